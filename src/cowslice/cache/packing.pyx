# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Lossless packing of L2 slices: the choice of a form, and the writing of it.

It does not know files, tables or caches: big-endian entry bytes go in, a shape and a payload come out.
What is packed is unpacked and compared at once; whatever does not come back bit by bit is kept raw.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from cowslice.cache.forms cimport (
    BYTES, CLUSTERS, COMPRESSED, COPIED, EXTENTS, LINE, MAX_ENTRIES, MAX_WIDTH, NO_BITMAPS, OFFSET, ONE_BITMAP, RAW,
    RAW_BITMAPS, RUNHEADS, SLOPED, TAG_COMPRESSED, TAG_SHIFT, TAGGED, ZERO, Mapped, Shape, bswap64, code_width, continued,
    dictionary_length, heads_at, leading_zeros, locate, payload_size, sector_bits, stride_of, tag_shift, trailing_zeros,
    true_base, unpack, words_size)

from cowslice.cache.forms import FORMS

cdef uint64_t PAYLOAD = (<uint64_t> 1 << 62) - 1    # bits 0-61 of a compressed descriptor
cdef uint64_t BASE = (<uint64_t> 1 << TAG_SHIFT) - 1


# What the encoder knows of a slice before it chooses a form.
cdef struct Survey:
    uint64_t values[MAX_ENTRIES]
    uint64_t bitmaps[MAX_ENTRIES]
    uint64_t words[MAX_ENTRIES]
    uint32_t entries
    uint32_t runs
    uint8_t cluster_bits
    uint8_t view
    uint8_t tag
    bint sound          # every word is expressible
    uint64_t stride     # what the next cluster of a run adds to a value

# Least base and width that hold some numbers.
cdef struct Fit:
    uint64_t base
    uint8_t width


cdef inline uint8_t tag_of(uint64_t word) noexcept nogil:
    cdef uint8_t tag = (word >> 61) & 6
    return tag if tag & TAG_COMPRESSED else tag | (word & ZERO)


cdef inline uint64_t misplaced(uint8_t cluster_bits) noexcept nogil:
    """Bits that are zero in every sound standard descriptor: the reserved ones, and the offset's within a cluster."""
    return ~(OFFSET | COPIED | ZERO) | (OFFSET & ((<uint64_t> 1 << cluster_bits) - 1))


# -- words to values ------------------------------------------------------------------------------------------------

cdef inline bint byte_value(uint64_t word, uint8_t tag, uint8_t cluster_bits, uint64_t *value) noexcept nogil:
    """View BYTES: offset << sector bits | sectors, then the tag. False where that leaves 64 bits."""
    cdef uint8_t sectors = sector_bits(cluster_bits)
    cdef uint8_t place = 62 - sectors
    cdef uint64_t offset, count = 0
    if tag & TAG_COMPRESSED:
        offset = word & ((<uint64_t> 1 << place) - 1)
        count = (word & PAYLOAD) >> place
    else:
        offset = word & OFFSET
    value[0] = (((offset << sectors) | count) << 3) | tag
    return offset >> (61 - sectors) == 0


cdef void read_words(Survey *s, const uint8_t *raw, bint extended) noexcept nogil:
    cdef uint32_t i
    cdef const uint64_t *source = <const uint64_t *> raw
    if extended:
        for i in range(s.entries):
            s.words[i] = bswap64(source[2 * i])
            s.bitmaps[i] = bswap64(source[2 * i + 1])
    else:
        for i in range(s.entries):
            s.words[i] = bswap64(source[i])


cdef void choose_view(Survey *s) noexcept nogil:
    """One tag for all: CLUSTERS. Several: TAGGED. Any compressed cluster: BYTES. Reserved or unaligned bits: not sound."""
    cdef uint64_t some = 0, every = ~<uint64_t> 0
    cdef uint32_t i
    for i in range(s.entries):
        some |= s.words[i]
        every &= s.words[i]
    s.tag = tag_of(every)
    if some & COMPRESSED:
        s.view = BYTES
        s.sound = True
        return
    s.view = CLUSTERS if (some ^ every) & (COPIED | ZERO) == 0 else TAGGED
    s.sound = some & misplaced(s.cluster_bits) == 0


cdef void assign_values(Survey *s) noexcept nogil:
    cdef uint8_t bits = s.cluster_bits
    cdef uint64_t word, loose = 0
    cdef uint32_t i
    s.stride = stride_of(s.view, bits)
    if s.view == CLUSTERS:
        for i in range(s.entries):
            s.values[i] = (s.words[i] & OFFSET) >> bits
        return
    if s.view == TAGGED:
        for i in range(s.entries):
            s.values[i] = ((s.words[i] & OFFSET) >> bits << 3) | tag_of(s.words[i])
        return
    for i in range(s.entries):
        word = s.words[i]
        if not word & COMPRESSED:
            loose |= word
        s.sound &= byte_value(word, tag_of(word), bits, &s.values[i])
    s.sound &= loose & misplaced(bits) == 0


# -- choosing a form ------------------------------------------------------------------------------------------------

cdef inline Fit fit_between(uint64_t low, uint64_t high) noexcept nogil:
    cdef Fit fit
    fit.base = low
    fit.width = 64 - leading_zeros(high - low) if high != low else 0
    return fit


cdef Fit fit_line(const Survey *s, uint64_t slope) noexcept nogil:
    """What holds value[i] - i * slope, compared as signed numbers."""
    cdef int64_t low = <int64_t> s.values[0], high = low, value
    cdef uint64_t fallen = 0
    cdef uint32_t i
    for i in range(s.entries):
        value = <int64_t> (s.values[i] - fallen)
        low = value if value < low else low
        high = value if value > high else high
        fallen += slope
    return fit_between(<uint64_t> low, <uint64_t> high)


cdef void count_runs(Survey *s) noexcept nogil:
    cdef uint8_t shift = tag_shift(s.view)
    cdef uint32_t i, runs = 1
    for i in range(1, s.entries):
        runs += s.values[i] != continued(s.values[i - 1], s.stride, shift)
    s.runs = runs


cdef Fit fit_heads(const Survey *s) noexcept nogil:
    """What holds the first value of every run."""
    cdef uint64_t low = s.values[0], high = low
    cdef uint8_t shift = tag_shift(s.view)
    cdef uint32_t i
    for i in range(1, s.entries):
        if s.values[i] == continued(s.values[i - 1], s.stride, shift):
            continue
        if s.values[i] < low:
            low = s.values[i]
        if s.values[i] > high:
            high = s.values[i]
    return fit_between(low, high)


cdef inline void consider(Shape *best, uint32_t *best_size, uint8_t form, Fit fit, uint32_t runs) noexcept nogil:
    cdef Shape shape = best[0]
    cdef uint32_t size
    if fit.width > MAX_WIDTH:
        return
    shape.form = form
    shape.base = fit.base
    shape.width = fit.width
    shape.runs = <uint16_t> runs
    size = words_size(&shape)
    if size < best_size[0]:
        best[0] = shape
        best_size[0] = size


cdef void choose_form(Survey *s, Shape *shape) noexcept nogil:
    cdef uint32_t size
    cdef Fit heads
    shape.form = RAW
    shape.base = 0
    shape.width = 0
    shape.runs = 0
    if not s.sound:
        return
    count_runs(s)
    size = words_size(shape)
    if s.runs < s.entries:  # else every value is a head, and a line of them is smaller
        heads = fit_heads(s)
        consider(shape, &size, EXTENTS, heads, s.runs)
        consider(shape, &size, RUNHEADS, heads, s.runs)
    consider(shape, &size, LINE, fit_line(s, 0), 0)
    if s.view != BYTES:
        consider(shape, &size, SLOPED, fit_line(s, s.stride), 0)
    # A base that would collide with the tag bits cannot come from 47-bit cluster numbers, but SLOPED may go below zero.
    if shape.view == CLUSTERS and shape.form != RAW:
        shape.base = (shape.base & BASE) | (<uint64_t> s.tag << TAG_SHIFT)


# -- writing a form -------------------------------------------------------------------------------------------------

# Numbers of one width go out bit behind bit. Eight bytes are written each time: drafts have room behind their end.
cdef struct Pen:
    uint8_t *at
    uint64_t carry      # bits of *at that are written already
    uint8_t fill        # how many, 0 to 7


cdef inline void put(Pen *pen, uint64_t value, uint8_t width) noexcept nogil:
    cdef uint64_t chunk = pen.carry | value << pen.fill
    cdef uint8_t fill = pen.fill + width
    memcpy(pen.at, &chunk, 8)
    pen.at += fill >> 3
    pen.carry = chunk >> (fill & 0x38) if fill < 64 else 0
    pen.fill = fill & 7


cdef void write_line(const Survey *s, Draft *d) noexcept nogil:
    cdef uint64_t base = true_base(&d.shape)
    cdef uint64_t slope = s.stride if d.shape.form == SLOPED else 0
    cdef uint8_t width = d.shape.width
    cdef uint32_t i
    cdef Pen pen = [d.payload, 0, 0]
    for i in range(s.entries):
        put(&pen, s.values[i] - base, width)
        base += slope


cdef void write_heads(const Survey *s, Draft *d) noexcept nogil:
    cdef uint8_t shift = tag_shift(s.view)
    cdef uint64_t base = true_base(&d.shape)
    cdef bint extents = d.shape.form == EXTENTS
    cdef uint16_t *starts = <uint16_t *> d.payload
    cdef uint64_t *bits = <uint64_t *> d.payload
    cdef uint16_t *ranks = <uint16_t *> (d.payload + (s.entries + 63) // 64 * 8)
    cdef uint32_t i, run = 0
    cdef Pen pen = [d.payload + (2 * s.runs if extents else heads_at(s.entries)), 0, 0]
    for i in range(s.entries):
        if not extents and i & 63 == 0:
            bits[i >> 6] = 0
            ranks[i >> 6] = <uint16_t> run
        if i and s.values[i] == continued(s.values[i - 1], s.stride, shift):
            continue
        if extents:
            starts[run] = <uint16_t> i
        else:
            bits[i >> 6] |= <uint64_t> 1 << (i & 63)
        put(&pen, s.values[i] - base, d.shape.width)
        run += 1


cdef void write_bitmaps(const Survey *s, Draft *d) noexcept nogil:
    """Up to 16 distinct bitmaps become a dictionary and codes; more are kept as they are."""
    cdef uint64_t known[16]
    cdef uint8_t codes[MAX_ENTRIES]
    cdef uint32_t distinct = 0, i, j = 0
    cdef uint8_t *into = d.payload + words_size(&d.shape)
    cdef Pen pen
    memset(known, 0, sizeof(known))
    for i in range(s.entries):
        if not distinct or known[j] != s.bitmaps[i]:
            j = 0
            while j < distinct and known[j] != s.bitmaps[i]:
                j += 1
        if j == 16:
            d.shape.bitmaps = RAW_BITMAPS
            memcpy(into, s.bitmaps, 8 * s.entries)
            return
        if j == distinct:
            known[distinct] = s.bitmaps[i]
            distinct += 1
        codes[i] = <uint8_t> j
    d.shape.bitmaps = ONE_BITMAP
    while dictionary_length(d.shape.bitmaps) < distinct:
        d.shape.bitmaps += 1
    memcpy(into, known, 8 * dictionary_length(d.shape.bitmaps))
    pen = [into + 8 * dictionary_length(d.shape.bitmaps), 0, 0]
    for i in range(s.entries):
        put(&pen, codes[i], code_width(d.shape.bitmaps))


cdef void write(const Survey *s, bint extended, Draft *d) noexcept nogil:
    memset(d.payload, 0, 8)  # no payload is smaller
    if d.shape.form == RAW:
        memcpy(d.payload, s.words, 8 * s.entries)
    elif d.shape.form == EXTENTS or d.shape.form == RUNHEADS:
        write_heads(s, d)
    else:
        write_line(s, d)
    d.shape.bitmaps = NO_BITMAPS
    if extended:
        write_bitmaps(s, d)
    d.size = payload_size(&d.shape)


cdef bint comes_back(const Survey *s, bint extended, const Draft *d) noexcept nogil:
    cdef uint64_t words[MAX_ENTRIES]
    cdef uint64_t bitmaps[MAX_ENTRIES]
    unpack(&d.shape, d.payload, d.size, words, bitmaps)
    if memcmp(words, s.words, 8 * s.entries):
        return False
    return not extended or memcmp(bitmaps, s.bitmaps, 8 * s.entries) == 0


cdef void pack(const uint8_t *raw, uint32_t entries, uint8_t cluster_bits, bint extended, Draft *draft) noexcept nogil:
    """Pack `entries` (a power of two, at most MAX_ENTRIES) big-endian L2 entries in the smallest form."""
    cdef Survey s
    s.entries = entries
    s.runs = 0
    s.cluster_bits = cluster_bits
    read_words(&s, raw, extended)
    choose_view(&s)
    if s.sound:
        assign_values(&s)
    draft.shape.view = s.view
    draft.shape.bitmaps = NO_BITMAPS
    draft.shape.cluster_bits = cluster_bits
    draft.shape.entry_bits = trailing_zeros(entries)
    choose_form(&s, &draft.shape)
    write(&s, extended, draft)
    if not comes_back(&s, extended, draft):
        draft.shape.form = RAW
        write(&s, extended, draft)


cdef bint one_run(const uint8_t *raw, uint32_t entries, uint8_t cluster_bits, bint extended) noexcept nogil:
    """Is the whole slice one run of sound entries, with the same bitmap throughout? Ends at the first that is not."""
    cdef const uint64_t *source = <const uint64_t *> raw
    cdef uint32_t step = 2 if extended else 1, i
    cdef uint64_t word = bswap64(source[0])
    cdef uint64_t stride = (<uint64_t> 1 << cluster_bits) if word & OFFSET else 0
    if word & misplaced(cluster_bits):
        return False
    for i in range(1, entries):
        word += stride
        if bswap64(source[i * step]) != word:
            return False
        if extended and source[2 * i + 1] != source[1]:
            return False
    return True


# -- for Python: reports and tests ---------------------------------------------------------------------------------

cdef class PackedSlice:
    """One slice packed on its own: how small it gets, and what is in it. Immutable.

    `raw` is a whole number of big-endian L2 entries (8 bytes, or 16 when `extended`), a power of two, at most 512.
    """

    cdef Shape shape
    cdef bytes payload

    def __init__(self, const uint8_t[::1] raw not None, int cluster_bits, bint extended=False):
        cdef Draft draft
        cdef uint32_t entry_size = 16 if extended else 8
        cdef uint64_t entries = <uint64_t> raw.shape[0] // entry_size
        if entries == 0 or entries > MAX_ENTRIES or entries & (entries - 1) or raw.shape[0] % entry_size:
            raise ValueError(f"{raw.shape[0]} bytes are not 1 to {MAX_ENTRIES} whole L2 entries, a power of two")
        if not 9 <= cluster_bits <= 21:
            raise ValueError(f"cluster_bits is {cluster_bits}, expected 9 to 21")
        pack(&raw[0], <uint32_t> entries, cluster_bits, extended, &draft)
        self.shape = draft.shape
        self.payload = draft.payload[:draft.size]

    def __len__(self):
        return 1 << self.shape.entry_bits

    def locate(self, uint32_t index, uint32_t want=MAX_ENTRIES):
        """(entry word, subcluster bitmap, clusters from here that continue it), exact up to `want` clusters."""
        cdef Mapped m
        if index >= len(self):
            raise IndexError(index)
        locate(&self.shape, self.payload, <uint32_t> len(self.payload), index, want, &m)
        return m.word, m.bitmap, m.run

    def unpacked(self):
        """All (entry word, subcluster bitmap) pairs in order."""
        cdef uint64_t words[MAX_ENTRIES]
        cdef uint64_t bitmaps[MAX_ENTRIES]
        memset(bitmaps, 0, sizeof(bitmaps))
        unpack(&self.shape, self.payload, <uint32_t> len(self.payload), words, bitmaps)
        return [(words[i], bitmaps[i]) for i in range(len(self))]

    @property
    def form(self):
        return FORMS[self.shape.form]

    @property
    def payload_bytes(self):
        return len(self.payload)
