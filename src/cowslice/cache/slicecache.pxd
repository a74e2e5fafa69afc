"""The memory that the maps of one chain share."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from cowslice.cache.directory cimport Directory, Leaf, Slice
from cowslice.cache.dirty cimport DirtyRing, DirtySlice
from cowslice.cache.pthread cimport pthread_cond_t, pthread_mutex_t
from cowslice.cache.policy cimport Policy

cimport cython

cdef struct Counters:
    uint64_t hits
    uint64_t misses
    uint64_t loads
    uint64_t joined
    uint64_t failed
    uint64_t bytes_read
    uint64_t evictions
    uint64_t leaves_dropped
    uint64_t inlined        # resident slices that live in their directory word
    uint64_t forms[5]       # resident slices by packing form

# `lock` guards every field below it, every directory, leaf and slice. It is held for moments only: never across I/O,
# never while waiting for the GIL. All methods with "The lock is held" need it; the others take it.
@cython.final
cdef class SliceCache:
    cdef object __weakref__
    cdef readonly uint64_t budget
    cdef pthread_mutex_t lock
    cdef pthread_cond_t loaded
    cdef uint32_t waiting
    cdef Policy policy
    cdef uint64_t slice_bytes       # dirty ones included
    cdef uint64_t dirty_bytes
    cdef uint64_t leaf_bytes
    cdef uint64_t fixed_bytes
    cdef Counters counters
    cdef Directory *directories
    cdef uint32_t layers
    cdef Leaf ring              # sentinel: ring.prev is where the hand of the leaf clock stands
    cdef uint64_t leaf_count
    cdef uint64_t used_bytes(self) noexcept nogil
    cdef void make_room(self, uint64_t wanted) noexcept nogil
    cdef bint may_keep_leaf(self) noexcept nogil
    cdef Leaf *add_leaf(self, uint16_t layer, uint32_t number) noexcept nogil
    cdef void release(self, Slice *held) noexcept nogil
    cdef bint evict_slice(self) noexcept nogil
    cdef bint drop_leaf(self) noexcept nogil
    cdef void discard_leaf(self, Leaf *leaf) noexcept nogil
    cdef void discard_word(self, Leaf *leaf, uint32_t i) noexcept nogil
    cdef void keep_dirty(self, DirtySlice *held, DirtyRing *owner) noexcept nogil
    cdef void forget_dirty(self, DirtySlice *held) noexcept nogil
    cdef void trim_leaf(self, Leaf *leaf) noexcept nogil
    cdef uint64_t trim_all(self) noexcept nogil
    cdef uint16_t adopt(self, uint64_t leaves) except 0xFFFF
    cdef Leaf **exchange(self, uint16_t layer, Leaf **leaves, uint64_t length) noexcept nogil
    cdef void retire(self, uint16_t layer) noexcept
    cdef bytes residency(self, uint16_t layer, uint64_t slices, uint32_t cells)
    cdef void count_leaf(self, uint16_t layer, uint64_t first, uint64_t last, uint64_t slices, uint32_t cells, uint32_t *found) noexcept nogil
