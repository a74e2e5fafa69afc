"""What is stored to the map of one image layer."""

from libc.stdint cimport uint8_t, uint64_t

from cowslice.cache.directory cimport Leaf
from cowslice.cache.dirty cimport DirtySlice
from cowslice.cache.loads cimport Loads

# A dirty slice that was copied, and where it goes.
cdef struct Taken:
    uint64_t number
    uint64_t version
    uint64_t host

cdef class Stores(Loads):
    cdef DirtySlice *hold(self, uint64_t number, int *outcome) noexcept nogil
    cdef int inflate(self, uint64_t number, uint64_t word) noexcept nogil
    cdef int store_entries(self, uint64_t cluster, const uint8_t *entries, uint64_t count, uint64_t *number) noexcept nogil
    cdef int hold_all(self, uint64_t cluster, uint64_t count, uint64_t *number) noexcept nogil
    cdef int keep_slice(self, uint64_t cluster, uint64_t *number) noexcept nogil
    cdef bint is_dirty(self, uint64_t cluster) noexcept nogil
    cdef uint64_t end_of_slice(self, uint64_t cluster) noexcept nogil
    cdef void renew(self, DirtySlice *held) noexcept nogil
    cdef void change(self, DirtySlice *held, uint64_t *cluster, const uint8_t **entries, uint64_t *count) noexcept nogil
    cdef int copy_slice(self, uint64_t number, uint8_t *raw) noexcept nogil
    cdef int copy_beyond(self, uint64_t number, uint8_t *raw) noexcept nogil
    cdef bint has_table(self, uint64_t number) noexcept nogil
    cdef void drop_table(self, uint64_t table) noexcept nogil
    cdef uint64_t skip(self, uint64_t number) noexcept nogil
    cdef uint64_t copy_dirty(self, Taken *taken, uint8_t *content, uint64_t room) noexcept nogil
    cdef void clean_one(self, uint64_t number, uint64_t version) noexcept nogil
    cdef bint copy_version(self, uint64_t number, uint64_t version, uint8_t *raw) noexcept nogil
    cdef bint is_version(self, uint64_t number, uint64_t version) noexcept nogil
    cdef bint exchange(self, uint64_t **l1, uint64_t entries, uint64_t clusters, Leaf ***leaves, uint64_t length) noexcept nogil
    cdef load_slice(self, uint64_t number, uint8_t *raw)
