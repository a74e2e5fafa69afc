"""Which granules of a disk were changed, marked without the GIL."""

from libc.stdint cimport int64_t, uint8_t, uint64_t

cimport cython

@cython.final
cdef class DirtyBits:
    cdef uint64_t **chunks      # of CHUNK bytes each, NULL where nothing is marked
    cdef uint64_t chunk_count
    cdef uint64_t bits
    cdef readonly int granularity_bits
    cdef int failed             # a mark was lost for want of memory
    cdef void mark(self, uint64_t offset, uint64_t length) noexcept nogil
    cdef void mark_bits(self, uint64_t first, uint64_t last) noexcept nogil
    cdef uint64_t *chunk_at(self, uint64_t index) noexcept nogil
    cdef void drop_chunks(self, uint64_t first) noexcept nogil
    cdef cut_tail(self, uint64_t *chunk, uint64_t bits)

# `sets` are kept alive by `held`; both change only while nobody is inside the disk.
@cython.final
cdef class Marks:
    cdef void **sets
    cdef int64_t count
    cdef list held
    cdef void mark(self, uint64_t offset, uint64_t length) noexcept nogil
