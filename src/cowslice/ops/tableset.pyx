# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The distinct L2 tables that L1 tables name, each with how many entries name it: sorted records of 40 bytes.

It does not know where L1 tables lie or who owns them. Memory is bounded: beyond `most` distinct tables the highest are
forgotten, `high` says from where on, and another set that begins there holds them.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, qsort, realloc

cdef extern from "<endian.h>" nogil:
    uint64_t be64toh(uint64_t word)

# Format section "Cluster mapping": bit 63 copied, 9-55 offset of the L2 table, the rest reserved.
cdef uint64_t OFFSET = <uint64_t>0x00FFFFFFFFFFFE00
cdef uint64_t RESERVED = <uint64_t>0x7F000000000001FF


cdef struct Named:
    uint64_t offset
    uint64_t place   # of one entry that names it: bit 63 is clear if that is the active disk's
    uint64_t active  # entries of the active disk
    uint64_t copied  # entries of the active disk with the copied flag
    uint64_t times   # entries of all


cdef int _order(const void *a, const void *b) noexcept nogil:
    cdef const Named *one = <const Named *>a
    cdef const Named *other = <const Named *>b
    if one.offset != other.offset:
        return -1 if one.offset < other.offset else 1
    return -1 if one.place < other.place else one.place > other.place


cdef class TableSet:
    """Tables at host offsets from `low` on and below `high`. Complete, sorted and to be read after `finish`."""

    cdef Named *named
    cdef size_t filled, room, most, told
    cdef readonly uint64_t low
    cdef readonly uint64_t high
    cdef readonly uint64_t faults

    def __cinit__(self, low, most, told):
        self.low = low
        self.told = told
        self.high = <uint64_t>1 << 56
        self.most = max(1, most)

    def __dealloc__(self):
        free(self.named)

    def __len__(self):
        return self.filled

    def __getitem__(self, size_t index):
        """(offset, place, active, copied, times) of a table: `place` as in `add`, `times` counts the active ones too."""
        if index >= self.filled:
            raise IndexError(index)
        cdef Named *one = self.named + index
        return one.offset, one.place, one.active, one.copied, one.times

    def add(self, words, *, uint64_t place, uint64_t times, uint64_t active, int cluster_bits):
        """Take the entries of a piece of an L1 table that `times` disks share, `active` of which is the active one.

        `place` is the number of its first entry, by whatever count. Returns the indexes of entries with reserved bits or
        of unaligned tables, up to `told` of them in all; the faults of the rest are counted in `faults`.
        """
        cdef Py_buffer view
        cdef size_t i, n
        cdef uint64_t word, offset, bad = RESERVED | (OFFSET & ((<uint64_t>1 << cluster_bits) - 1))
        cdef list odd = []
        PyObject_GetBuffer(words, &view, PyBUF_SIMPLE)
        try:
            n = view.len // 8
            for i in range(n):
                word = be64toh((<const uint64_t *>view.buf)[i])
                if word == 0:
                    continue
                offset = word & OFFSET
                if word & bad and self.told:
                    self.told -= 1
                    odd.append(i)
                elif word & bad:
                    self.faults += times * ((word & RESERVED != 0) + (offset & bad != 0))
                if offset < self.low or offset >= self.high:
                    continue
                self._append(Named(offset, (place + i) | (0 if active else <uint64_t>1 << 63), active,
                                   active if word >> 63 else 0, times))
        finally:
            PyBuffer_Release(&view)
        return odd

    cdef int _append(self, Named one) except -1:
        cdef Named *grown
        cdef size_t room
        if self.filled == self.room:
            self._merge()
            if self.filled > self.most:
                self.high = self.named[self.most].offset
                self.filled = self.most
                if one.offset >= self.high:
                    return 0
            if self.filled * 2 >= self.room:
                room = max(<size_t>1024, self.room * 2)
                grown = <Named *>realloc(self.named, room * sizeof(Named))
                if grown == NULL:
                    raise MemoryError
                self.named, self.room = grown, room
        self.named[self.filled] = one
        self.filled += 1
        return 0

    cdef void _merge(self) noexcept nogil:
        """Sort, and make one record of all that name the same table."""
        cdef size_t i, last = 0
        if self.filled == 0:
            return
        qsort(self.named, self.filled, sizeof(Named), _order)
        for i in range(1, self.filled):
            if self.named[i].offset == self.named[last].offset:
                self.named[last].active += self.named[i].active
                self.named[last].copied += self.named[i].copied
                self.named[last].times += self.named[i].times
            else:
                last += 1
                self.named[last] = self.named[i]
        self.filled = last + 1

    def finish(self):
        """Sort what was added. Nothing may be added after it."""
        self._merge()
        if self.filled > self.most:
            self.high = self.named[self.most].offset
            self.filled = self.most

    def find(self, uint64_t offset):
        """How many tables lie below the host offset."""
        cdef size_t low = 0, high = self.filled, middle
        while low < high:
            middle = (low + high) >> 1
            if self.named[middle].offset < offset:
                low = middle + 1
            else:
                high = middle
        return low

    def chain(self, size_t index, uint64_t cluster_size):
        """Where the tables end that overlap each other from `index` on: for sound ones the next index."""
        while index + 1 < self.filled and self.named[index + 1].offset - self.named[index].offset < cluster_size:
            index += 1
        return index + 1
