# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What a directory word says: from raw L2 entries to a word or a packed slice, and from there back to one entry.

It does not know who keeps the words, nor which slice leaves. A word is one of
  0                     absent
  1                     loading: somebody reads it, everybody else waits for that one read
  ...  | 2              inline: the slice is one run, and the word is all there is of it
                        bits 3-5 tag (zero, compressed, copied), 6-7 which bitmap, from 8 the first host cluster
  pointer | 3           packed: a Slice, 16-byte aligned
  pointer | 4           dirty: a DirtySlice, see dirty.pxd
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy, memset

from cowslice.cache.forms cimport MAX_ENTRIES, NO_BITMAPS, OFFSET, SLOPED, Mapped, Shape, bswap64, locate, payload_size, unpack
from cowslice.cache.packing cimport Draft, one_run, pack

cdef extern from *:
    void prefetch "__builtin_prefetch"(const void *) noexcept nogil

cdef enum:
    ALLOCATED_CODE = 1      # the bitmaps that an inline word can stand for, besides an empty one
    ZERO_CODE = 2

cdef uint64_t ALL_ALLOCATED = 0x00000000FFFFFFFF
cdef uint64_t ALL_ZERO = 0xFFFFFFFF00000000


cdef inline uint8_t *payload_of(const Slice *held) noexcept nogil:
    return <uint8_t *> held + sizeof(Slice)


cdef inline void stow(Slice *held, const Shape *shape) noexcept nogil:
    """Put a shape into 11 bytes: the base, and the cargo of the node."""
    held.base = shape.base
    held.node.cargo = shape.form | shape.view << 3 | shape.bitmaps << 5
    held.node.more_cargo = shape.runs | <uint16_t> (shape.width << 10)


cdef inline void unstow(const Slice *held, uint8_t cluster_bits, uint8_t entry_bits, Shape *shape) noexcept nogil:
    shape.base = held.base
    shape.form = held.node.cargo & 7
    shape.view = held.node.cargo >> 3 & 3
    shape.bitmaps = held.node.cargo >> 5
    shape.runs = held.node.more_cargo & 1023
    shape.width = held.node.more_cargo >> 10
    shape.cluster_bits = cluster_bits
    shape.entry_bits = entry_bits


cdef uint64_t inline_word(const uint8_t *raw, uint32_t entries, uint8_t cluster_bits, bint extended) noexcept nogil:
    """The word of a slice that is one run, or 0 where it is not, or its bitmap is none of the three that fit."""
    cdef const uint64_t *source = <const uint64_t *> raw
    cdef uint64_t word = bswap64(source[0])
    cdef uint64_t bitmap = bswap64(source[1]) if extended else 0
    cdef uint64_t code = ALLOCATED_CODE if bitmap == ALL_ALLOCATED else ZERO_CODE if bitmap == ALL_ZERO else 0
    if (bitmap and not code) or not one_run(raw, entries, cluster_bits, extended):
        return 0
    return INLINE | (word & 1) << 3 | (word >> 62) << 4 | code << 6 | (word & OFFSET) >> cluster_bits << 8


cdef void read_inline(uint64_t word, uint8_t cluster_bits, uint8_t slice_bits, uint32_t index, Mapped *out) noexcept nogil:
    cdef uint64_t host = word >> 8
    if host:
        host += index
    out.word = (word >> 4 & 3) << 62 | (word >> 3 & 1) | host << cluster_bits
    out.bitmap = (ALL_ALLOCATED if word >> 6 & ALLOCATED_CODE else 0) | (ALL_ZERO if word >> 6 & ZERO_CODE else 0)
    out.run = (<uint32_t> 1 << slice_bits) - index


cdef Slice *make_slice(const uint8_t *raw, uint32_t entries, uint8_t cluster_bits, bint extended) noexcept nogil:
    """A fresh packed slice that no policy knows yet, weighed; free() ends it. NULL when memory is out."""
    cdef Draft draft
    cdef Slice *held
    pack(raw, entries, cluster_bits, extended, &draft)
    held = <Slice *> malloc(sizeof(Slice) + draft.size)
    if held == NULL:
        return NULL
    memset(held, 0, sizeof(Slice))
    stow(held, &draft.shape)
    held.node.granules = <uint16_t> (charged(sizeof(Slice) + draft.size) // 16)
    memcpy(payload_of(held), draft.payload, draft.size)
    return held


cdef void foresee(uint64_t word, uint32_t index, bint deep) noexcept nogil:
    """Bring the head of a packed slice into the processor's cache, or, once that is there, the line that holds an entry."""
    cdef const Slice *held = slice_of(word)
    cdef uint32_t width
    if word & STATE != PACKED:
        return
    if not deep:
        prefetch(held)
        return
    # Entries on a line lie in order; of the other forms the front is always looked at.
    width = held.node.more_cargo >> 10 if held.node.cargo & 7 <= SLOPED else 0
    prefetch(<const uint8_t *> held + sizeof(Slice) + (index * width >> 3))


cdef void read_slice(const Slice *held, uint8_t cluster_bits, uint8_t slice_bits, uint32_t index, uint32_t want,
                     Mapped *out) noexcept nogil:
    cdef Shape shape
    unstow(held, cluster_bits, slice_bits, &shape)
    locate(&shape, payload_of(held), payload_size(&shape), index, want, out)


cdef void spell_out(uint64_t word, uint8_t cluster_bits, uint8_t slice_bits, bint extended, uint8_t *raw) noexcept nogil:
    """Write the big-endian entries that an inline or packed word stands for: exactly those that it was made from."""
    cdef uint64_t words[MAX_ENTRIES]
    cdef uint64_t bitmaps[MAX_ENTRIES]
    cdef uint64_t *out = <uint64_t *> raw
    cdef uint32_t i, step = 2 if extended else 1
    if word & STATE == INLINE:
        unfold_inline(word, cluster_bits, slice_bits, words, bitmaps)
    else:
        unfold_slice(slice_of(word), cluster_bits, slice_bits, words, bitmaps)
    for i in range(<uint32_t> 1 << slice_bits):
        out[i * step] = bswap64(words[i])
        if extended:
            out[2 * i + 1] = bswap64(bitmaps[i])


cdef void unfold_inline(uint64_t word, uint8_t cluster_bits, uint8_t slice_bits, uint64_t *words, uint64_t *bitmaps) noexcept nogil:
    cdef Mapped m
    cdef uint32_t i
    for i in range(<uint32_t> 1 << slice_bits):
        read_inline(word, cluster_bits, slice_bits, i, &m)
        words[i] = m.word
        bitmaps[i] = m.bitmap


cdef void unfold_slice(const Slice *held, uint8_t cluster_bits, uint8_t slice_bits, uint64_t *words, uint64_t *bitmaps) noexcept nogil:
    cdef Shape shape
    unstow(held, cluster_bits, slice_bits, &shape)
    if shape.bitmaps == NO_BITMAPS:
        memset(bitmaps, 0, <uint64_t> 8 << slice_bits)
    unpack(&shape, payload_of(held), payload_size(&shape), words, bitmaps)
