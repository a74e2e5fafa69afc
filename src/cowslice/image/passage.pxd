"""Who is inside a disk, counted without the GIL."""

from libc.stdint cimport int64_t

from cowslice.cache.pthread cimport pthread_cond_t, pthread_mutex_t

cimport cython

# `lock` guards the steps of `epoch` and the waits; the counters and flags themselves change atomically.
@cython.final
cdef class Passage:
    cdef int64_t inside[2]          # requests that entered in an even epoch, in an odd one
    cdef int64_t epoch
    cdef int64_t barred             # somebody waits to be alone, or is
    cdef pthread_mutex_t lock
    cdef pthread_cond_t left
    cdef pthread_cond_t resumed
    cdef int64_t enter(self) noexcept nogil
    cdef void leave(self, int64_t ticket) noexcept nogil
    cdef void bar(self) noexcept nogil
    cdef void unbar(self) noexcept nogil
    cdef bint advance(self, int64_t wanted) noexcept nogil
