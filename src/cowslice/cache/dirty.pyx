# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Slices that were stored to and wait for their way to the disk, and the lookup of one entry in them.

It does not know who stores or writes, and takes no lock. A dirty slice is in exactly one ring until it is unlinked.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport malloc

from cowslice.cache.directory cimport charged
from cowslice.cache.forms cimport COPIED, OFFSET, ZERO, bswap64


cdef DirtySlice *make_dirty(uint64_t number, uint32_t span) noexcept nogil:
    """A slice with room for `span` bytes of entries, in no ring; free() ends it. NULL when memory is out."""
    cdef DirtySlice *held = <DirtySlice *> malloc(sizeof(DirtySlice) + span)
    if held != NULL:
        held.number = number
        held.version = 0
        held.granules = <uint32_t> (charged(sizeof(DirtySlice) + span) // 16)
    return held


cdef void link_dirty(DirtyRing *owner, DirtySlice *held) noexcept nogil:
    held.owner = owner
    held.prev = &owner.head
    held.next = owner.head.next
    held.next.prev = held
    owner.head.next = held
    owner.count += 1
    owner.bytes += held.granules * 16


cdef void unlink_dirty(DirtySlice *held) noexcept nogil:
    held.prev.next = held.next
    held.next.prev = held.prev
    held.owner.count -= 1
    held.owner.bytes -= held.granules * 16


cdef void read_dirty(const DirtySlice *held, uint8_t cluster_bits, uint8_t slice_bits, bint extended, uint32_t index, uint32_t want,
                     Mapped *out) noexcept nogil:
    """Fill `out` for entry `index`. The run is exact up to `want` clusters, and one where an entry is compressed or odd."""
    cdef const uint64_t *raw = <const uint64_t *> entries_of(held)
    cdef uint32_t step = 2 if extended else 1
    cdef uint32_t limit = (<uint32_t> 1 << slice_bits) - index
    cdef uint64_t known = COPIED | ZERO | (OFFSET & ~((<uint64_t> 1 << cluster_bits) - 1))
    cdef uint64_t word = bswap64(raw[index * step]), stride
    out.word = word
    out.bitmap = bswap64(raw[2 * index + 1]) if extended else 0
    out.run = 1
    stride = (<uint64_t> 1 << cluster_bits) if word & OFFSET else 0
    if want < limit:
        limit = want
    while out.run < limit and not word & ~known:
        word += stride
        if word & ~known or bswap64(raw[(index + out.run) * step]) != word:
            return
        if extended and raw[2 * (index + out.run) + 1] != raw[2 * index + 1]:
            return
        out.run += 1
