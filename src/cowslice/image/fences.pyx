# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The host bytes of one image file that hold metadata, so that no data is ever written over them.

It does not know what the kinds mean. What must hold: fences are ascending and disjoint; a byte has the kind that was
given to it last.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memmove

from cowslice.cache.pthread cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock

from cowslice.errors import InternalError

cimport cython

cdef uint64_t END = <uint64_t> 1 << 63  # of all offsets: off_t is signed


@cython.final
cdef class Fences:
    """Spans of host bytes, each with a kind, a small number; thread safe. A lookup costs O(log n), as does adding behind all."""

    def __cinit__(self):
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self):
        free(self.fences)
        pthread_mutex_destroy(&self.lock)

    cdef bint touches(self, uint64_t start, uint64_t length) noexcept nogil:
        """Does any of these bytes hold metadata?"""
        cdef uint64_t at
        cdef bint found
        pthread_mutex_lock(&self.lock)
        at = self.first_beyond(start)
        found = at < self.count and self.fences[at].start < start + length
        pthread_mutex_unlock(&self.lock)
        return found

    cdef uint64_t first_beyond(self, uint64_t offset) noexcept nogil:
        """The first fence that ends beyond an offset: it holds the byte there, or the next one that is held."""
        cdef uint64_t low = 0, high = self.count, middle
        if high and self.fences[high - 1].end <= offset:
            return high
        while low < high:
            middle = (low + high) // 2
            if self.fences[middle].end <= offset:
                low = middle + 1
            else:
                high = middle
        return low

    cdef bint reserve(self) noexcept nogil:
        """Have room for two more: the most that one change adds."""
        cdef uint64_t room = self.room * 2 or 64
        cdef Fence *grown
        if self.count + 2 <= self.room:
            return True
        grown = <Fence *> realloc(self.fences, room * sizeof(Fence))
        if grown == NULL:
            return False
        self.fences = grown
        self.room = room
        return True

    cdef void insert(self, uint64_t at, uint64_t start, uint64_t end, uint32_t kind) noexcept nogil:
        memmove(self.fences + at + 1, self.fences + at, (self.count - at) * sizeof(Fence))
        self.fences[at] = Fence(start, end, kind)
        self.count += 1

    cdef void carve(self, uint64_t start, uint64_t end) noexcept nogil:
        """Take a span out; of fences that only reach into it the rest stays."""
        cdef uint64_t first = self.first_beyond(start), last
        if first < self.count and self.fences[first].start < start:
            if self.fences[first].end > end:
                self.insert(first + 1, end, self.fences[first].end, self.fences[first].kind)
            self.fences[first].end = start
            first += 1
        last = first
        while last < self.count and self.fences[last].end <= end:
            last += 1
        if last < self.count and self.fences[last].start < end:
            self.fences[last].start = end
        memmove(self.fences + first, self.fences + last, (self.count - last) * sizeof(Fence))
        self.count -= last - first

    # -- for Python -------------------------------------------------------------------------------------------------

    def __len__(self):
        return self.count

    def add(self, uint64_t start, uint64_t length, uint32_t kind):
        """Fence bytes off as of that kind, also those that were of another."""
        self.set_kind(start, length, True, kind)

    def remove(self, uint64_t start, uint64_t length):
        """Let the bytes hold no metadata any more."""
        self.set_kind(start, length, False, 0)

    cdef set_kind(self, uint64_t start, uint64_t length, bint fenced, uint32_t kind):
        cdef bint fine
        if start > END or length > END - start:
            raise InternalError(f"{length} bytes at host offset {start} were fenced, expected a span below {END}")
        if length == 0:
            return
        pthread_mutex_lock(&self.lock)
        fine = self.reserve()
        if fine:
            self.carve(start, start + length)
            if fenced:
                self.insert(self.first_beyond(start), start, start + length, kind)
        pthread_mutex_unlock(&self.lock)
        if not fine:
            raise MemoryError(f"no memory for more than {self.count} fences")

    def hit(self, uint64_t start, uint64_t length):
        """(start, length, kind) of the first fence that the span touches, or None."""
        cdef Fence found
        cdef uint64_t at
        cdef bint there
        pthread_mutex_lock(&self.lock)
        at = self.first_beyond(start)
        there = at < self.count and length and self.fences[at].start < start + length
        if there:
            found = self.fences[at]
        pthread_mutex_unlock(&self.lock)
        return (found.start, found.end - found.start, found.kind) if there else None
