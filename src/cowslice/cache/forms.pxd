"""The forms of a packed slice, and the lookup of one entry in any of them."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from *:
    """
    #define COWSLICE_COPIED ((uint64_t) 1 << 63)
    #define COWSLICE_COMPRESSED ((uint64_t) 1 << 62)
    #define COWSLICE_OFFSET ((uint64_t) 0x00FFFFFFFFFFFE00)
    """
    uint64_t COPIED "COWSLICE_COPIED"           # L2 entry, bit 63
    uint64_t COMPRESSED "COWSLICE_COMPRESSED"   # bit 62
    uint64_t OFFSET "COWSLICE_OFFSET"           # bits 9-55 of a standard descriptor and of an L1 entry
    uint64_t bswap64 "__builtin_bswap64"(uint64_t) noexcept nogil
    int popcount64 "__builtin_popcountll"(uint64_t) noexcept nogil
    int leading_zeros "__builtin_clzll"(uint64_t) noexcept nogil
    int trailing_zeros "__builtin_ctzll"(uint64_t) noexcept nogil

cdef enum:
    MAX_ENTRIES = 512   # entries of one slice: 4 KiB of standard entries, 8 KiB of extended ones
    ZERO = 1            # L2 entry, bit 0 of a standard descriptor

# Tags: the three bits that say of what kind an entry is.
cdef enum:
    TAG_ZERO = 1
    TAG_COMPRESSED = 2
    TAG_COPIED = 4
    TAG_SHIFT = 61      # where Shape.base carries the shared tag
    MAX_WIDTH = 57      # a residual and up to seven bits before it fit one 64-bit load

# How the entry words are stored.
cdef enum Form:
    LINE = 0        # base + residuals of a fixed width
    SLOPED = 1      # the same after a line of slope one cluster was taken away
    EXTENTS = 2     # starts of runs, heads of runs
    RUNHEADS = 3    # one bit per entry says "a run starts here", ranks, heads of runs
    RAW = 4         # the words themselves

# What number stands for an entry word.
cdef enum View:
    CLUSTERS = 0    # the host cluster; all entries share one tag
    TAGGED = 1      # host cluster << 3 | tag
    BYTES = 2       # the same at byte granularity, with the sector count of compressed clusters

# How the subcluster bitmaps of extended entries are stored.
cdef enum Bitmaps:
    NO_BITMAPS = 0
    ONE_BITMAP = 1
    TWO_BITMAPS = 2      # 1 bit per entry into a dictionary
    FOUR_BITMAPS = 3     # 2 bits
    SIXTEEN_BITMAPS = 4  # 4 bits
    RAW_BITMAPS = 5

# The 16 bytes that describe a payload of packed bits.
cdef struct Shape:
    uint64_t base       # top three bits: the tag shared by all (view CLUSTERS)
    uint16_t runs
    uint8_t form
    uint8_t width       # bits of a residual or head
    uint8_t view
    uint8_t bitmaps
    uint8_t cluster_bits
    uint8_t entry_bits  # log2 of the number of entries

# What one L2 entry says, and for how many clusters from here the next ones merely continue it.
cdef struct Mapped:
    uint64_t word
    uint64_t bitmap
    uint32_t run

cdef uint32_t words_size(const Shape *shape) noexcept nogil
cdef uint32_t payload_size(const Shape *shape) noexcept nogil
cdef void locate(const Shape *shape, const uint8_t *payload, uint32_t size, uint32_t index, uint32_t want, Mapped *out) noexcept nogil
cdef void unpack(const Shape *shape, const uint8_t *payload, uint32_t size, uint64_t *words, uint64_t *bitmaps) noexcept nogil


cdef inline uint8_t sector_bits(uint8_t cluster_bits) noexcept nogil:
    """Bits of a compressed descriptor that count sectors (specification, "Compressed Clusters Descriptor")."""
    return cluster_bits - 8


cdef inline uint64_t continued(uint64_t value, uint64_t stride, uint8_t shift) noexcept nogil:
    """The value one cluster on, if the run goes on: without a host cluster the same again."""
    return value if value >> shift == 0 else value + stride


cdef inline uint8_t tag_shift(uint8_t view) noexcept nogil:
    return 0 if view == CLUSTERS else 3


cdef inline uint64_t stride_of(uint8_t view, uint8_t cluster_bits) noexcept nogil:
    if view == CLUSTERS:
        return 1
    if view == TAGGED:
        return 8
    return <uint64_t> 1 << (cluster_bits + sector_bits(cluster_bits) + 3)


cdef inline uint64_t word_of(uint64_t value, uint8_t view, uint8_t tag, uint8_t cluster_bits) noexcept nogil:
    """The entry word for which `value` stands."""
    cdef uint8_t sectors
    cdef uint64_t word
    if view != CLUSTERS:
        tag = value & 7
        value >>= 3
    word = (<uint64_t> (tag & 6) << 61) | (tag & TAG_ZERO)
    if view != BYTES:
        return word | (value << cluster_bits)
    sectors = sector_bits(cluster_bits)
    if tag & TAG_COMPRESSED:
        return word | (value >> sectors) | ((value & ((<uint64_t> 1 << sectors) - 1)) << (62 - sectors))
    return word | (value >> sectors)


cdef inline uint64_t true_base(const Shape *shape) noexcept nogil:
    """The base as a 64-bit number: in view CLUSTERS the tag's bits are filled with the sign of the rest."""
    if shape.view != CLUSTERS:
        return shape.base
    return <uint64_t> (<int64_t> (shape.base << 3) >> 3)


cdef inline uint64_t get_bits(const uint8_t *data, uint32_t size, uint64_t position, uint8_t width) noexcept nogil:
    """`width` bits at bit `position` of a payload of `size` >= 8 bytes, never reading past its end."""
    cdef uint64_t byte = position >> 3
    cdef uint64_t chunk
    if width == 0:
        return 0
    if byte + 8 > size:
        byte = size - 8
    memcpy(&chunk, data + byte, 8)
    return (chunk >> (position - (byte << 3))) & (~<uint64_t> 0 >> (64 - width))


cdef inline uint32_t bytes_for(uint64_t bits) noexcept nogil:
    return <uint32_t> ((bits + 7) >> 3)


cdef inline uint32_t heads_at(uint32_t entries) noexcept nogil:
    """Where the heads stand in RUNHEADS: behind one bit per entry and one 16-bit rank per 64 entries."""
    return (entries + 63) // 64 * 10


cdef inline uint8_t code_width(uint8_t bitmaps) noexcept nogil:
    """0, 1, 2 or 4 bits per entry into a dictionary of 1, 2, 4 or 16 bitmaps."""
    return 0 if bitmaps < TWO_BITMAPS else 1 << (bitmaps - TWO_BITMAPS)


cdef inline uint32_t dictionary_length(uint8_t bitmaps) noexcept nogil:
    return 0 if bitmaps == NO_BITMAPS or bitmaps == RAW_BITMAPS else <uint32_t> 1 << code_width(bitmaps)
