"""A slice that was stored to: its entries exactly as they will be on disk."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from cowslice.cache.directory cimport STATE
from cowslice.cache.forms cimport Mapped

# The big-endian entries follow. Whoever changes them gives the slice a new version.
cdef struct DirtySlice:
    DirtySlice *prev
    DirtySlice *next
    DirtyRing *owner
    uint64_t number         # which slice of its map
    uint64_t version
    uint32_t granules       # of 16 bytes, with what the C library adds

# The dirty slices of one map; `head` is no slice.
cdef struct DirtyRing:
    DirtySlice head
    uint64_t count
    uint64_t bytes

cdef DirtySlice *make_dirty(uint64_t number, uint32_t span) noexcept nogil
cdef void link_dirty(DirtyRing *owner, DirtySlice *held) noexcept nogil
cdef void unlink_dirty(DirtySlice *held) noexcept nogil
cdef void read_dirty(const DirtySlice *held, uint8_t cluster_bits, uint8_t slice_bits, bint extended, uint32_t index, uint32_t want, Mapped *out) noexcept nogil


cdef inline DirtySlice *dirty_of(uint64_t word) noexcept nogil:
    """The slice that a word in state DIRTY points to."""
    return <DirtySlice *> (word & ~<uint64_t> STATE)


cdef inline uint8_t *entries_of(const DirtySlice *held) noexcept nogil:
    return <uint8_t *> held + sizeof(DirtySlice)
