# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What many L2 entries refer to, and the counts of many host clusters, without the GIL: one call per batch of tables.

It does no I/O and knows neither files nor budgets: blocks of counts come as native arrays that the caller holds. What
must hold: `change` changes all counts as it was asked to or none, as plain Python in tests says it.
"""

from cpython cimport array
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcpy

cdef extern from "<endian.h>" nogil:
    uint64_t be64toh(uint64_t word)
    uint64_t htobe64(uint64_t word)

# Format section "Cluster descriptors": bit 63 copied, 62 compressed, 9-55 offset.
cdef uint64_t COPIED = <uint64_t>1 << 63
cdef uint64_t COMPRESSED = <uint64_t>1 << 62
cdef uint64_t OFFSET = <uint64_t>0x00FFFFFFFFFFFE00

cdef array.array _NUMBERS = array.array("q")


cdef inline uint64_t _last(uint64_t word, int place, int bits) noexcept nogil:
    """The last host cluster that a compressed stream touches."""
    cdef uint64_t at = word & ((<uint64_t>1 << place) - 1)
    return ((at | 511) + 512 * ((word & ~(COPIED | COMPRESSED)) >> place)) >> bits


def referred(tables, *, int step, int cluster_bits):
    """(clusters, plain, crooked): the host clusters that the entries of L2 tables name, as often as they do.

    The first `plain` stand in the order of their entries, the rest are those of compressed streams. `crooked` is the
    first offset that lies inside a cluster, 0 for none. An entry is `step` words wide.
    """
    cdef Py_buffer view
    cdef const uint64_t *words
    cdef Py_ssize_t i, n, plain = 0, packed = 0
    cdef uint64_t word, cluster, crooked = 0, within = (<uint64_t>1 << cluster_bits) - 1
    cdef int place = 70 - cluster_bits
    cdef int64_t *out
    cdef array.array found
    PyObject_GetBuffer(tables, &view, PyBUF_SIMPLE)
    words = <const uint64_t *>view.buf
    n = view.len // (8 * step)
    with nogil:
        for i in range(n):
            word = be64toh(words[i * step])
            if word & COMPRESSED:
                packed += _last(word, place, cluster_bits) - ((word & ((<uint64_t>1 << place) - 1)) >> cluster_bits) + 1
            elif word & OFFSET:
                plain += 1
                if word & OFFSET & within and crooked == 0:
                    crooked = word & OFFSET
    try:
        found = array.clone(_NUMBERS, plain + packed, False)
    except BaseException:
        PyBuffer_Release(&view)
        raise
    out = <int64_t *>found.data.as_voidptr
    packed = plain
    plain = 0
    with nogil:
        for i in range(n):
            word = be64toh(words[i * step])
            if word & COMPRESSED:
                cluster = (word & ((<uint64_t>1 << place) - 1)) >> cluster_bits
                while cluster <= _last(word, place, cluster_bits):
                    out[packed] = cluster
                    packed += 1
                    cluster += 1
            elif word & OFFSET:
                out[plain] = (word & OFFSET) >> cluster_bits
                plain += 1
    PyBuffer_Release(&view)
    return found, plain, crooked


def marked(tables, counts, *, int step, Py_ssize_t table_bytes):
    """[(table number, content)] of the tables that change when COPIED is set exactly where a count is 1.

    `counts` are those of the plain clusters that `referred` found, in that order; None stands for no count of 1.
    Compressed entries stay as they are.
    """
    cdef Py_buffer view, known
    cdef const uint64_t *words
    cdef const uint64_t *have = NULL
    cdef uint64_t *into
    cdef uint64_t word, wanted
    cdef Py_ssize_t i, row, n = table_bytes // (8 * step), at = 0
    cdef bint differs
    cdef list changed = []
    PyObject_GetBuffer(tables, &view, PyBUF_SIMPLE)
    into = <uint64_t *>malloc(table_bytes)
    try:
        if into == NULL:
            raise MemoryError
        if counts is not None:
            PyObject_GetBuffer(counts, &known, PyBUF_SIMPLE)
            have = <const uint64_t *>known.buf
        for row in range(view.len // table_bytes):
            words = <const uint64_t *>(<const char *>view.buf + row * table_bytes)
            with nogil:
                memcpy(into, words, table_bytes)
                differs = False
                for i in range(n):
                    word = be64toh(words[i * step])
                    if word & COMPRESSED:
                        continue
                    wanted = word & ~COPIED
                    if word & OFFSET:
                        if have != NULL and have[at] == 1:
                            wanted |= COPIED
                        at += 1
                    if wanted != word:
                        into[i * step] = htobe64(wanted)
                        differs = True
            if differs:
                changed.append((row, (<char *>into)[:table_bytes]))
        return changed
    finally:
        if have != NULL:
            PyBuffer_Release(&known)
        free(into)
        PyBuffer_Release(&view)


def spread(clusters, *, int shift, Py_ssize_t blocks):
    """([(block, first entry, end entry)], stranger): which of the blocks 0 to `blocks` count these clusters, and where.

    Ascending; `stranger` is the first cluster behind all of them, -1 for none.
    """
    cdef Py_buffer view
    cdef const uint64_t *numbers
    cdef uint64_t *bounds
    cdef uint64_t index, entry, last = <uint64_t>-1
    cdef int64_t stranger = -1
    cdef Py_ssize_t i
    cdef list found = []
    bounds = <uint64_t *>calloc(max(blocks, 1) * 2, 8)  # first entry and end entry; an end of 0 says untouched
    if bounds == NULL:
        raise MemoryError
    try:
        PyObject_GetBuffer(clusters, &view, PyBUF_SIMPLE)
        numbers = <const uint64_t *>view.buf
        with nogil:
            for i in range(view.len // 8):
                index = numbers[i] >> shift
                if index >= <uint64_t>blocks:
                    if stranger < 0:
                        stranger = numbers[i]
                    continue
                entry = numbers[i] & ((<uint64_t>1 << shift) - 1)
                if index != last:
                    if bounds[2 * index + 1] == 0:
                        bounds[2 * index] = entry
                    last = index
                if entry >= bounds[2 * index + 1]:
                    bounds[2 * index + 1] = entry + 1
                elif entry < bounds[2 * index]:
                    bounds[2 * index] = entry
        PyBuffer_Release(&view)
        for i in range(blocks):
            if bounds[2 * i + 1]:
                found.append((i, bounds[2 * i], bounds[2 * i + 1]))
        return found, stranger
    finally:
        free(bounds)


def first_zero(counts):
    """The index of the first 0 in an array of unsigned 64-bit counts, -1 for none."""
    cdef Py_buffer view
    cdef Py_ssize_t i = 0, n
    PyObject_GetBuffer(counts, &view, PyBUF_SIMPLE)
    n = view.len // 8
    with nogil:
        while i < n and (<const uint64_t *>view.buf)[i]:
            i += 1
    PyBuffer_Release(&view)
    return i if i < n else -1


cdef inline uint64_t _get(const void *counts, uint64_t at, int width) noexcept nogil:
    if width == 2:
        return (<const uint16_t *>counts)[at]
    if width == 1:
        return (<const uint8_t *>counts)[at]
    if width == 4:
        return (<const uint32_t *>counts)[at]
    return (<const uint64_t *>counts)[at]


cdef inline void _put(void *counts, uint64_t at, int width, uint64_t count) noexcept nogil:
    if width == 2:
        (<uint16_t *>counts)[at] = <uint16_t>count
    elif width == 1:
        (<uint8_t *>counts)[at] = <uint8_t>count
    elif width == 4:
        (<uint32_t *>counts)[at] = <uint32_t>count
    else:
        (<uint64_t *>counts)[at] = count


cdef int _ascending(const void *one, const void *other) noexcept nogil:
    cdef uint64_t a = (<const uint64_t *>one)[0], b = (<const uint64_t *>other)[0]
    return (a > b) - (a < b)


cdef class Blocks:
    """Some blocks of counts, native arrays of one type: `held` has (index, array), ascending by index."""

    cdef Py_buffer *views
    cdef void **places  # of the blocks `first` to `first + span`; NULL for one that is not held
    cdef Py_ssize_t taken
    cdef uint64_t first, span
    cdef int shift, width

    def __cinit__(self, list held, *, int shift, int width):
        cdef Py_ssize_t i
        self.shift = shift
        self.width = width
        self.first = held[0][0] if held else 0
        self.span = <uint64_t>(held[len(held) - 1][0]) - self.first + 1 if held else 0
        self.places = <void **>calloc(max(self.span, 1), sizeof(void *))
        self.views = <Py_buffer *>malloc(max(len(held), 1) * sizeof(Py_buffer))
        if self.places == NULL or self.views == NULL:
            raise MemoryError
        for index, counts in held:
            PyObject_GetBuffer(counts, &self.views[self.taken], PyBUF_WRITABLE)
            self.taken += 1
            if self.views[self.taken - 1].len != <Py_ssize_t>width << shift:
                raise ValueError(f"block {index} has {self.views[self.taken - 1].len} bytes, expected {width << shift}")
            self.places[<uint64_t>index - self.first] = self.views[self.taken - 1].buf

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.taken):
            PyBuffer_Release(&self.views[i])
        free(self.views)
        free(self.places)

    cdef inline void *place(self, uint64_t cluster) noexcept nogil:
        cdef uint64_t index = (cluster >> self.shift) - self.first
        return self.places[index] if index < self.span else NULL

    def read(self, clusters, counts):
        """Put the count of each cluster that a held block counts into `counts`, unsigned 64-bit; leave the others."""
        cdef Py_buffer asked, into
        cdef const uint64_t *numbers
        cdef uint64_t *out
        cdef void *block
        cdef Py_ssize_t i
        cdef uint64_t mask = (<uint64_t>1 << self.shift) - 1
        PyObject_GetBuffer(clusters, &asked, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(counts, &into, PyBUF_WRITABLE)
        except BaseException:
            PyBuffer_Release(&asked)
            raise
        numbers = <const uint64_t *>asked.buf
        out = <uint64_t *>into.buf
        with nogil:
            for i in range(min(asked.len, into.len) // 8):
                block = self.place(numbers[i])
                if block != NULL:
                    out[i] = _get(block, numbers[i] & mask, self.width)
        PyBuffer_Release(&asked)
        PyBuffer_Release(&into)

    def change(self, clusters, *, bint up, uint64_t limit):
        """One more or one less for each cluster, as often as it occurs: (runs, failed).

        `runs` (first cluster, clusters) ascend: those that count 0 now. `failed` is -1, or the first cluster whose
        count was 0 (it must not be) or was `limit` on the way up; then nothing has changed.
        """
        cdef Py_buffer view
        cdef const uint64_t *numbers
        cdef Py_ssize_t i, n, fell = 0, done = 0
        cdef uint64_t mask = (<uint64_t>1 << self.shift) - 1, count, step = 1 if up else <uint64_t>-1
        cdef void *block
        cdef uint64_t *zeros
        PyObject_GetBuffer(clusters, &view, PyBUF_SIMPLE)
        numbers = <const uint64_t *>view.buf
        n = view.len // 8
        zeros = <uint64_t *>malloc((1 if up else max(n, 1)) * 8)
        try:
            if zeros == NULL:
                raise MemoryError
            with nogil:
                while done < n:
                    block = self.place(numbers[done])
                    count = 0 if block == NULL else _get(block, numbers[done] & mask, self.width)
                    if count == 0 or (up and count == limit):
                        break
                    _put(block, numbers[done] & mask, self.width, count + step)
                    if count + step == 0:
                        zeros[fell] = numbers[done]
                        fell += 1
                    done += 1
                if done < n:
                    for i in range(done):
                        block = self.place(numbers[i])
                        _put(block, numbers[i] & mask, self.width, _get(block, numbers[i] & mask, self.width) - step)
                else:
                    qsort(zeros, fell, 8, _ascending)
            return ([], numbers[done]) if done < n else (_runs(zeros, fell), -1)
        finally:
            free(zeros)
            PyBuffer_Release(&view)


cdef list _runs(const uint64_t *numbers, Py_ssize_t n):
    """Ascending numbers as (first, how many)."""
    cdef Py_ssize_t i = 0, start
    cdef list runs = []
    while i < n:
        start = i
        i += 1
        while i < n and numbers[i] == numbers[i - 1] + 1:
            i += 1
        runs.append((numbers[start], i - start))
    return runs
