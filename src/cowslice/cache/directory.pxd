"""Words, leaves and slices: what the directory of a map is made of."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from cowslice.cache.forms cimport Mapped
from cowslice.cache.policy cimport Node

cdef enum:
    LEAF_WORDS = 64     # slices under one leaf

# The low three bits of a directory word; directory.pyx says what the rest means.
cdef enum:
    ABSENT = 0
    LOADING = 1
    INLINE = 2
    PACKED = 3
    DIRTY = 4           # a DirtySlice, which no policy knows and nothing evicts
    STATE = 7

# A resident slice of more than one run. The payload follows; the node's cargo holds what else a Shape needs.
cdef struct Slice:
    Node node
    uint64_t base

# A word for each of LEAF_WORDS slices. All leaves of a cache stand in one ring, the hand of a clock goes round it.
cdef struct Leaf:
    Leaf *prev
    Leaf *next
    uint64_t words[LEAF_WORDS]
    uint32_t number         # its place in its directory
    uint32_t pinned         # words in state LOADING or DIRTY: such a leaf stays
    uint16_t layer
    uint8_t used            # looked at since the hand passed
    uint8_t idle            # not looked at since the last trim

# The leaves of one map by number, NULL where there is none.
cdef struct Directory:
    Leaf **leaves
    uint32_t length

cdef uint64_t inline_word(const uint8_t *raw, uint32_t entries, uint8_t cluster_bits, bint extended) noexcept nogil
cdef Slice *make_slice(const uint8_t *raw, uint32_t entries, uint8_t cluster_bits, bint extended) noexcept nogil
cdef void spell_out(uint64_t word, uint8_t cluster_bits, uint8_t slice_bits, bint extended, uint8_t *raw) noexcept nogil
cdef void foresee(uint64_t word, uint32_t index, bint deep) noexcept nogil
cdef void read_inline(uint64_t word, uint8_t cluster_bits, uint8_t slice_bits, uint32_t index, Mapped *out) noexcept nogil
cdef void read_slice(const Slice *held, uint8_t cluster_bits, uint8_t slice_bits, uint32_t index, uint32_t want, Mapped *out) noexcept nogil


cdef inline uint64_t charged(uint64_t size) noexcept nogil:
    """Bytes that the C library takes for a block of `size`: 8 of its own, rounded up to 16, 32 at least."""
    return (size + 8 + 15) & ~<uint64_t> 15 if size > 24 else 32


cdef inline Slice *slice_of(uint64_t word) noexcept nogil:
    """The slice that a word in state PACKED points to."""
    return <Slice *> (word & ~<uint64_t> STATE)
