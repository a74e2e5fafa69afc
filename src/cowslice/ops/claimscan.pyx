# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Which entries of a whole L2 table refer to given host clusters, found without the GIL: one call per table.

It judges nothing: an entry refers to whatever its bits say.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint64_t

cdef extern from "<endian.h>" nogil:
    uint64_t be64toh(uint64_t word)

# Format section "Cluster descriptors": bit 63 copied, 62 compressed, 9-55 offset.
cdef uint64_t COPIED = <uint64_t>1 << 63
cdef uint64_t COMPRESSED = <uint64_t>1 << 62
cdef uint64_t OFFSET = <uint64_t>0x00FFFFFFFFFFFE00


def claims(table, wanted, *, int cluster_bits, bint extended):
    """(index, cluster) of each entry that refers to a `wanted` cluster: a sorted array of unsigned 64-bit numbers."""
    cdef Py_buffer view, sought
    cdef Py_ssize_t i, n, low, high, middle, step = 2 if extended else 1
    cdef uint64_t word, k, last
    cdef int place = 70 - cluster_bits
    cdef const uint64_t *words
    cdef const uint64_t *keys
    cdef list found = []
    PyObject_GetBuffer(table, &view, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(wanted, &sought, PyBUF_SIMPLE)
    except BaseException:
        PyBuffer_Release(&view)
        raise
    words = <const uint64_t *>view.buf
    keys = <const uint64_t *>sought.buf
    n = view.len // (8 * step)
    with nogil:
        for i in range(n):
            word = be64toh(words[i * step])
            if word & COMPRESSED:
                k = word & ((<uint64_t>1 << place) - 1)
                last = ((k | 511) + 512 * ((word & ~(COPIED | COMPRESSED)) >> place)) >> cluster_bits
                k >>= cluster_bits
            else:
                k = word & OFFSET
                if k == 0:
                    continue
                last = (k + (<uint64_t>1 << cluster_bits) - 1) >> cluster_bits
                k >>= cluster_bits
            low = 0
            high = sought.len // 8
            while low < high:
                middle = (low + high) >> 1
                if keys[middle] < k:
                    low = middle + 1
                else:
                    high = middle
            while low < sought.len // 8 and keys[low] <= last:
                with gil:
                    found.append((i, keys[low]))
                low += 1
    PyBuffer_Release(&view)
    PyBuffer_Release(&sought)
    return found
