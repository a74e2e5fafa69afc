"""Which host bytes hold metadata."""

from libc.stdint cimport uint32_t, uint64_t

from cowslice.cache.pthread cimport pthread_mutex_t

cimport cython

cdef struct Fence:
    uint64_t start
    uint64_t end
    uint32_t kind

@cython.final
cdef class Fences:
    cdef pthread_mutex_t lock       # of everything below
    cdef Fence *fences              # ascending, disjoint
    cdef uint64_t count
    cdef uint64_t room
    cdef bint touches(self, uint64_t start, uint64_t length) noexcept nogil
    cdef uint64_t first_beyond(self, uint64_t offset) noexcept nogil
    cdef bint reserve(self) noexcept nogil
    cdef void insert(self, uint64_t at, uint64_t start, uint64_t end, uint32_t kind) noexcept nogil
    cdef void carve(self, uint64_t start, uint64_t end) noexcept nogil
    cdef set_kind(self, uint64_t start, uint64_t length, bint fenced, uint32_t kind)
