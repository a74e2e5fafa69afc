# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Lossless packing of L2 slices: the choice of a form, and the writing of it.

It does not know files, tables or caches: big-endian entry bytes go in, a shape and a payload come out.
What is packed is unpacked and compared at once; whatever does not come back bit by bit is kept raw.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from cowslice.cache.forms cimport (
    BYTES, CLUSTERS, COMPRESSED, COPIED, EXTENTS, LINE, MAX_ENTRIES, MAX_WIDTH, NO_BITMAPS, OFFSET, ONE_BITMAP, RAW,
    RAW_BITMAPS, RUNHEADS, SLOPED, TAG_COMPRESSED, TAG_SHIFT, TAGGED, ZERO, Mapped, Shape, bswap64, code_width, continued,
    dictionary_length, heads_at, leading_zeros, locate, payload_size, sector_bits, stride_of, tag_shift, trailing_zeros,
    true_base, words_size)

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


cdef inline uint8_t bits_for(uint64_t span) noexcept nogil:
    return 64 - leading_zeros(span) if span else 0


cdef inline uint8_t tag_of(uint64_t word) noexcept nogil:
    cdef uint8_t tag = (word >> 61) & 6
    return tag if tag & TAG_COMPRESSED else tag | (word & ZERO)


# -- words to values and back ---------------------------------------------------------------------------------------

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
    cdef uint64_t loose = 0, any_word = 0
    cdef uint64_t unaligned = OFFSET & ((<uint64_t> 1 << s.cluster_bits) - 1)
    cdef uint8_t tag = tag_of(s.words[0])
    cdef bint same = True
    cdef uint32_t i
    for i in range(s.entries):
        any_word |= s.words[i]
        same &= tag_of(s.words[i]) == tag
        if not s.words[i] & COMPRESSED:
            loose |= s.words[i] & (unaligned | ~(OFFSET | COPIED | ZERO))
    s.sound = loose == 0
    s.tag = tag
    s.view = BYTES if any_word & COMPRESSED else CLUSTERS if same else TAGGED


cdef void assign_values(Survey *s) noexcept nogil:
    cdef uint32_t i
    if s.view == CLUSTERS:
        for i in range(s.entries):
            s.values[i] = (s.words[i] & OFFSET) >> s.cluster_bits
    elif s.view == TAGGED:
        for i in range(s.entries):
            s.values[i] = ((s.words[i] & OFFSET) >> s.cluster_bits << 3) | tag_of(s.words[i])
    else:
        for i in range(s.entries):
            s.sound &= byte_value(s.words[i], tag_of(s.words[i]), s.cluster_bits, &s.values[i])
    s.stride = stride_of(s.view, s.cluster_bits)


cdef void count_runs(Survey *s) noexcept nogil:
    cdef uint8_t shift = tag_shift(s.view)
    cdef uint32_t i
    s.runs = 1
    for i in range(1, s.entries):
        s.runs += s.values[i] != continued(s.values[i - 1], s.stride, shift)


# -- bits -----------------------------------------------------------------------------------------------------------

cdef inline void put_bits(uint8_t *into, uint64_t position, uint64_t value) noexcept nogil:
    """Or `value` in at bit `position`. Eight bytes are touched: drafts have room behind their end."""
    cdef uint64_t chunk
    memcpy(&chunk, into + (position >> 3), 8)
    chunk |= value << (position & 7)
    memcpy(into + (position >> 3), &chunk, 8)


# -- choosing and writing a form -----------------------------------------------------------------------------------

cdef struct Fit:
    uint64_t base
    uint8_t width


cdef Fit fit_line(Survey *s, uint64_t slope) noexcept nogil:
    """Least base and width that hold value[i] - i * slope, compared as signed numbers."""
    cdef int64_t low = <int64_t> s.values[0], high = low, value
    cdef uint32_t i
    cdef Fit fit
    for i in range(s.entries):
        value = <int64_t> (s.values[i] - i * slope)
        if value < low:
            low = value
        if value > high:
            high = value
    fit.base = <uint64_t> low
    fit.width = bits_for(<uint64_t> high - <uint64_t> low)
    return fit


cdef Fit fit_heads(Survey *s) noexcept nogil:
    cdef uint64_t low = s.values[0], high = low
    cdef uint8_t shift = tag_shift(s.view)
    cdef uint32_t i
    cdef Fit fit
    for i in range(1, s.entries):
        if s.values[i] == continued(s.values[i - 1], s.stride, shift):
            continue
        if s.values[i] < low:
            low = s.values[i]
        if s.values[i] > high:
            high = s.values[i]
    fit.base = low
    fit.width = bits_for(high - low)
    return fit


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
    heads = fit_heads(s)
    consider(shape, &size, EXTENTS, heads, s.runs)
    consider(shape, &size, RUNHEADS, heads, s.runs)
    consider(shape, &size, LINE, fit_line(s, 0), 0)
    if s.view != BYTES:
        consider(shape, &size, SLOPED, fit_line(s, s.stride), 0)
    # A base that would collide with the tag bits cannot come from 47-bit cluster numbers, but SLOPED may go below zero.
    if shape.view == CLUSTERS and shape.form != RAW:
        shape.base = (shape.base & BASE) | (<uint64_t> s.tag << TAG_SHIFT)


cdef void write_words(Survey *s, Draft *d) noexcept nogil:
    cdef uint8_t form = d.shape.form
    cdef uint64_t base, slope
    cdef uint32_t i
    if form == RAW:
        memcpy(d.payload, s.words, 8 * s.entries)
        return
    if form == EXTENTS or form == RUNHEADS:
        write_heads(s, d)
        return
    base = true_base(&d.shape)
    slope = s.stride if form == SLOPED else 0
    for i in range(s.entries):
        put_bits(d.payload, <uint64_t> i * d.shape.width, s.values[i] - i * slope - base)


cdef void write_heads(Survey *s, Draft *d) noexcept nogil:
    cdef uint8_t shift = tag_shift(s.view)
    cdef uint64_t base = true_base(&d.shape)
    cdef bint extents = d.shape.form == EXTENTS
    cdef uint16_t *starts = <uint16_t *> d.payload
    cdef uint16_t *ranks = <uint16_t *> (d.payload + (s.entries + 63) // 64 * 8)
    cdef uint8_t *heads = d.payload + (2 * s.runs if extents else heads_at(s.entries))
    cdef uint32_t i, run = 0
    for i in range(s.entries):
        if not extents and i & 63 == 0:
            ranks[i >> 6] = <uint16_t> run
        if i and s.values[i] == continued(s.values[i - 1], s.stride, shift):
            continue
        if extents:
            starts[run] = <uint16_t> i
        else:
            put_bits(d.payload, i, 1)
        put_bits(heads, <uint64_t> run * d.shape.width, s.values[i] - base)
        run += 1


cdef void write_bitmaps(Survey *s, Draft *d) noexcept nogil:
    """Up to 16 distinct bitmaps become a dictionary and codes; more are kept as they are."""
    cdef uint64_t known[16]
    cdef uint8_t codes[MAX_ENTRIES]
    cdef uint32_t distinct = 0, i, j
    cdef uint8_t *into = d.payload + words_size(&d.shape)
    memset(known, 0, sizeof(known))
    for i in range(s.entries):
        j = 0
        while j < distinct and known[j] != s.bitmaps[i]:
            j += 1
        if j == distinct:
            if distinct == 16:
                d.shape.bitmaps = RAW_BITMAPS
                memcpy(into, s.bitmaps, 8 * s.entries)
                return
            known[distinct] = s.bitmaps[i]
            distinct += 1
        codes[i] = <uint8_t> j
    d.shape.bitmaps = ONE_BITMAP
    while dictionary_length(d.shape.bitmaps) < distinct:
        d.shape.bitmaps += 1
    memcpy(into, known, 8 * dictionary_length(d.shape.bitmaps))
    into += 8 * dictionary_length(d.shape.bitmaps)
    for i in range(s.entries):
        put_bits(into, <uint64_t> i * code_width(d.shape.bitmaps), codes[i])


cdef void write(Survey *s, bint extended, Draft *d) noexcept nogil:
    memset(d.payload, 0, words_size(&d.shape) + 8)
    write_words(s, d)
    d.shape.bitmaps = NO_BITMAPS
    if extended:
        memset(d.payload + words_size(&d.shape), 0, 8 * s.entries + 8 * 16)
        write_bitmaps(s, d)
    d.size = payload_size(&d.shape)


cdef bint comes_back(Survey *s, bint extended, Draft *d) noexcept nogil:
    cdef uint32_t i
    cdef Mapped m
    for i in range(s.entries):
        locate(&d.shape, d.payload, d.size, i, 1, &m)
        if m.word != s.words[i] or (extended and m.bitmap != s.bitmaps[i]):
            return False
    return True


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
    if word & (~(OFFSET | COPIED | ZERO) | (OFFSET & ((<uint64_t> 1 << cluster_bits) - 1))):
        return False
    for i in range(1, entries):
        if bswap64(source[i * step]) != word + i * stride:
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
        cdef uint32_t entries = <uint32_t> (raw.shape[0] // (16 if extended else 8))
        if entries == 0 or entries > MAX_ENTRIES or entries & (entries - 1) or raw.shape[0] % (16 if extended else 8):
            raise ValueError(f"{raw.shape[0]} bytes are not 1 to {MAX_ENTRIES} whole L2 entries, a power of two")
        pack(&raw[0], entries, cluster_bits, extended, &draft)
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

    @property
    def form(self):
        return FORMS[self.shape.form]

    @property
    def payload_bytes(self):
        return len(self.payload)
