"""Which guest clusters are being rewritten, told without the GIL."""

from libc.stdint cimport uint64_t

from cowslice.cache.pthread cimport pthread_cond_t, pthread_mutex_t

cimport cython

cdef struct Claimed:
    uint64_t first
    uint64_t end

@cython.final
cdef class Claims:
    cdef pthread_mutex_t lock       # of everything below
    cdef pthread_cond_t released
    cdef Claimed *held              # in no order: as many as writers are at work
    cdef uint64_t count
    cdef uint64_t room
    cdef bint is_held(self, uint64_t first, uint64_t end) noexcept nogil
    cdef bint add(self, uint64_t first, uint64_t end) noexcept nogil
    cdef bint seize(self, uint64_t first, uint64_t end) noexcept nogil
    cdef bint wait_for(self, uint64_t first, uint64_t end) noexcept nogil
    cdef void release(self, uint64_t first, uint64_t end) noexcept nogil
