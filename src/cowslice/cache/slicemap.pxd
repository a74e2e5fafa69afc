"""The map of one image layer: lookups."""

from libc.stdint cimport uint32_t, uint64_t

from cowslice.cache.forms cimport Mapped
from cowslice.cache.loads cimport Load
from cowslice.cache.slicecache cimport SliceCache
from cowslice.cache.stores cimport Stores

cimport cython

@cython.final
cdef class SliceMap(Stores):
    cdef bint stopping
    cdef int resolve(self, uint64_t cluster, uint32_t want, Mapped *out) noexcept nogil
    cdef int peek(self, uint64_t cluster, uint32_t want, Mapped *out) noexcept nogil
    cdef void foresee(self, uint64_t cluster, bint deep) noexcept nogil
    cdef bint unmapped(self, uint64_t cluster, uint32_t want, Mapped *out) noexcept nogil
    cdef uint64_t next_mapped(self, uint64_t number) noexcept nogil
    cdef int warm_some(self, Load *job, uint64_t number) noexcept nogil
    cdef uint64_t warm_tables(self) noexcept nogil
    cdef outside(self, uint64_t cluster)
