"""Packed slices: a run of L2 entries, immutable, in a fraction of their bytes, read at random without unpacking."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    MAX_ENTRIES = 512   # entries of one slice: 4 KiB of standard entries, 8 KiB of extended ones

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

cdef struct Draft:
    Shape shape
    uint32_t size                           # bytes of payload
    uint8_t payload[MAX_ENTRIES * 16 + 256]

cdef void pack(const uint8_t *raw, uint32_t entries, uint8_t cluster_bits, bint extended, Draft *draft) noexcept nogil
cdef void locate(const Shape *shape, const uint8_t *payload, uint32_t size, uint32_t index, uint32_t want, Mapped *out) noexcept nogil
cdef bint one_run(const uint8_t *raw, uint32_t entries, uint8_t cluster_bits, bint extended) noexcept nogil
cdef uint32_t payload_size(const Shape *shape) noexcept nogil
