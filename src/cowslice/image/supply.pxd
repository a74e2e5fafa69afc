"""Host clusters that wait to be written to, taken without the GIL."""

from libc.stdint cimport uint64_t

from cowslice.cache.pthread cimport pthread_mutex_t

cimport cython

cdef struct ClusterRun:
    uint64_t start
    uint64_t count

@cython.final
cdef class Supply:
    cdef pthread_mutex_t lock       # of everything below
    cdef uint64_t first             # the run that is left: clusters [first, end)
    cdef uint64_t end
    cdef bint fresh                 # it reads as zeros
    cdef ClusterRun *returned       # what was taken and then not used; it may hold any bytes
    cdef uint64_t returned_count
    cdef uint64_t room
    cdef bint has_some(self) noexcept nogil
    cdef uint64_t take(self, uint64_t most, uint64_t *got, bint *fresh) noexcept nogil
    cdef bint give_back(self, uint64_t start, uint64_t count) noexcept nogil
