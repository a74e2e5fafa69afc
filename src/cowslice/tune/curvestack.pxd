"""One LRU stack of slices: where each stands, and how far down each access found its slice."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    MOST_LEVELS = 40        # times that the share of slices followed may be halved

# Accesses by distance while one share was followed, and first touches: of reads, of the rest.
cdef struct Level:
    uint64_t *found[2]
    uint64_t cold[2]

cdef class Stack:
    cdef readonly uint64_t slices
    cdef uint8_t span_bits
    cdef uint64_t limit         # most slices that are followed
    cdef uint64_t accesses[2]
    # A slice has a place: its number, or where there are too many the place of its key in a hash table.
    cdef uint32_t *last         # slot + 1, 0 for one that is not on the stack
    cdef uint64_t *keys         # number + 1, 0 for a free place; NULL when places are numbers
    cdef uint64_t places
    cdef uint64_t previous      # the slice looked up last
    # Time is a row of slots, one for each access that moves a slice to the top.
    cdef uint32_t *owner        # place of the slice that took the slot
    cdef uint16_t *marks        # its weight, 0 once it moved on
    cdef uint32_t *tree         # Fenwick tree over the sums of full blocks of marks
    cdef uint32_t window        # slots
    cdef uint32_t now           # the first slot that is free
    cdef uint32_t live          # slices on the stack
    cdef uint64_t settled       # sum of the marks in full blocks
    cdef uint32_t head          # and in the block that fills
    # What slices weigh, and the unit, a power of two, in which distances are kept.
    cdef const uint16_t[::1] weights
    cdef bint weighted
    cdef uint8_t grain
    cdef uint64_t farthest
    cdef Level levels[MOST_LEVELS]
    cdef uint8_t level
    cdef int add_level(self) noexcept nogil
    cdef int touch(self, uint64_t number, uint8_t write) noexcept nogil
    cdef uint64_t rounded(self, uint64_t distance) noexcept nogil
    cdef void enter(self, uint32_t place, uint32_t weight) noexcept nogil
    cdef void grow_tree(self, uint32_t block, uint32_t by) noexcept nogil
    cdef uint64_t leave(self, uint32_t slot) noexcept nogil
    cdef bint sampled(self, uint64_t number) noexcept nogil
    cdef uint32_t find(self, uint64_t number) noexcept nogil
    cdef int rehash(self, uint64_t places) noexcept nogil
    cdef int thin(self) noexcept nogil
    cdef int make_time(self) noexcept nogil
    cdef void compact(self) noexcept nogil
    cdef void plant(self) noexcept nogil
    cdef int add_all(self, const uint64_t *first, const uint64_t *last, const uint8_t *writes, uint64_t count) noexcept nogil
