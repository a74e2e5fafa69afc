# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Lossless packing of L2 slices, and the lookup of one entry inside a packed slice.

It does not know files, tables or caches: big-endian entry bytes go in, a shape and a payload come out, and an entry's exact
word comes back. What is packed is unpacked and compared at once; whatever does not come back bit by bit is kept raw.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

cdef extern from *:
    uint64_t bswap64 "__builtin_bswap64"(uint64_t) noexcept nogil
    int popcount64 "__builtin_popcountll"(uint64_t) noexcept nogil
    int leading_zeros "__builtin_clzll"(uint64_t) noexcept nogil
    int trailing_zeros "__builtin_ctzll"(uint64_t) noexcept nogil

cdef uint64_t COPIED = <uint64_t> 1 << 63           # L2 entry, bit 63
cdef uint64_t COMPRESSED = <uint64_t> 1 << 62       # bit 62
cdef uint64_t ZERO = 1                              # bit 0 of a standard descriptor
cdef uint64_t OFFSET = 0x00FFFFFFFFFFFE00           # bits 9-55
cdef uint64_t PAYLOAD = (<uint64_t> 1 << 62) - 1    # bits 0-61 of a compressed descriptor

# Tags: the three bits that say of what kind an entry is.
cdef enum:
    TAG_ZERO = 1
    TAG_COMPRESSED = 2
    TAG_COPIED = 4
    TAG_SHIFT = 61      # where Shape.base carries the shared tag
    MAX_WIDTH = 57      # a residual and up to seven bits before it fit one 64-bit load

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


cdef inline uint8_t sector_bits(uint8_t cluster_bits) noexcept nogil:
    """Bits of a compressed descriptor that count sectors (specification, "Compressed Clusters Descriptor")."""
    return cluster_bits - 8


cdef inline uint8_t tag_of(uint64_t word) noexcept nogil:
    cdef uint8_t tag = (word >> 61) & 6
    return tag if tag & TAG_COMPRESSED else tag | (word & ZERO)


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


cdef inline uint64_t word_of(uint64_t value, uint8_t view, uint8_t tag, uint8_t cluster_bits) noexcept nogil:
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


cdef inline uint32_t words_size(const Shape *shape) noexcept nogil:
    """Bytes that the entry words take, without the bitmaps."""
    cdef uint32_t entries = <uint32_t> 1 << shape.entry_bits
    if shape.form == EXTENTS:
        return 2 * shape.runs + bytes_for(<uint64_t> shape.runs * shape.width)
    if shape.form == RUNHEADS:
        return heads_at(entries) + bytes_for(<uint64_t> shape.runs * shape.width)
    if shape.form == RAW:
        return 8 * entries
    return bytes_for(<uint64_t> entries * shape.width)


cdef inline uint32_t heads_at(uint32_t entries) noexcept nogil:
    """Where the heads stand in RUNHEADS: behind one bit per entry and one 16-bit rank per 64 entries."""
    return (entries + 63) // 64 * 10


cdef inline uint32_t dictionary_length(uint8_t bitmaps) noexcept nogil:
    return 0 if bitmaps == NO_BITMAPS or bitmaps == RAW_BITMAPS else <uint32_t> 1 << code_width(bitmaps)


cdef inline uint8_t code_width(uint8_t bitmaps) noexcept nogil:
    """0, 1, 2 or 4 bits per entry into a dictionary of 1, 2, 4 or 16 bitmaps."""
    return 0 if bitmaps < TWO_BITMAPS else 1 << (bitmaps - TWO_BITMAPS)


cdef inline uint32_t bitmaps_size(const Shape *shape) noexcept nogil:
    cdef uint32_t entries = <uint32_t> 1 << shape.entry_bits
    if shape.bitmaps == NO_BITMAPS:
        return 0
    if shape.bitmaps == RAW_BITMAPS:
        return 8 * entries
    return 8 * dictionary_length(shape.bitmaps) + bytes_for(<uint64_t> entries * code_width(shape.bitmaps))


cdef uint32_t payload_size(const Shape *shape) noexcept nogil:
    cdef uint32_t size = words_size(shape) + bitmaps_size(shape)
    return size if size >= 8 else 8


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


# -- lookup ---------------------------------------------------------------------------------------------------------

cdef inline uint64_t true_base(const Shape *shape) noexcept nogil:
    """The base as a 64-bit number: in view CLUSTERS the tag's bits are filled with the sign of the rest."""
    if shape.view != CLUSTERS:
        return shape.base
    return <uint64_t> (<int64_t> (shape.base << 3) >> 3)


cdef inline uint32_t run_of(const Shape *shape, const uint8_t *payload, uint32_t index, uint32_t *start, uint32_t *end) noexcept nogil:
    """Which run holds `index`; from and up to which entry it goes."""
    if shape.form == EXTENTS:
        return run_by_starts(shape, payload, index, start, end)
    return run_by_bits(shape, payload, index, start, end)


cdef inline uint32_t run_by_starts(const Shape *shape, const uint8_t *payload, uint32_t index, uint32_t *start, uint32_t *end) noexcept nogil:
    cdef const uint16_t *starts = <const uint16_t *> payload
    cdef uint32_t low = 0, count = shape.runs, half
    while count > 1:
        half = count // 2
        low += half if starts[low + half] <= index else 0
        count -= half
    start[0] = starts[low]
    end[0] = starts[low + 1] if low + 1 < shape.runs else <uint32_t> 1 << shape.entry_bits
    return low


cdef inline uint32_t run_by_bits(const Shape *shape, const uint8_t *payload, uint32_t index, uint32_t *start, uint32_t *end) noexcept nogil:
    cdef uint32_t entries = <uint32_t> 1 << shape.entry_bits
    cdef uint32_t words = (entries + 63) // 64
    cdef const uint64_t *bits = <const uint64_t *> payload
    cdef const uint16_t *ranks = <const uint16_t *> (payload + words * 8)
    cdef uint32_t word = index >> 6
    cdef uint64_t upto = bits[word] & (~<uint64_t> 0 >> (63 - (index & 63)))
    cdef uint32_t run = ranks[word] + popcount64(upto) - 1
    cdef uint64_t after = bits[word] & ~(~<uint64_t> 0 >> (63 - (index & 63)))
    cdef uint32_t back = word
    while upto == 0:
        back -= 1
        upto = bits[back]
    start[0] = back * 64 + 63 - leading_zeros(upto)
    while after == 0 and word + 1 < words:
        word += 1
        after = bits[word]
    end[0] = word * 64 + trailing_zeros(after) if after else entries
    return run


cdef inline uint64_t line_value(const Shape *shape, const uint8_t *payload, uint32_t size, uint32_t index) noexcept nogil:
    cdef uint64_t value = true_base(shape) + get_bits(payload, size, <uint64_t> index * shape.width, shape.width)
    if shape.form == SLOPED:
        value += index * stride_of(shape.view, shape.cluster_bits)
    return value


cdef inline void locate_in_run(const Shape *shape, const uint8_t *payload, uint32_t size, uint32_t index, Mapped *out) noexcept nogil:
    cdef uint32_t start = 0, end = 0
    cdef uint32_t run = run_of(shape, payload, index, &start, &end)
    cdef uint32_t at = 2 * shape.runs if shape.form == EXTENTS else heads_at(<uint32_t> 1 << shape.entry_bits)
    cdef uint64_t value = true_base(shape) + get_bits(payload, size, at * 8 + <uint64_t> run * shape.width, shape.width)
    if value >> tag_shift(shape.view):
        value += (index - start) * stride_of(shape.view, shape.cluster_bits)
    out.word = word_of(value, shape.view, <uint8_t> (shape.base >> TAG_SHIFT), shape.cluster_bits)
    out.run = end - index


cdef inline void locate_on_line(const Shape *shape, const uint8_t *payload, uint32_t size, uint32_t index, uint32_t want, Mapped *out) noexcept nogil:
    """Neighbours are compared one by one, no further than `want`."""
    cdef uint64_t stride = stride_of(shape.view, shape.cluster_bits)
    cdef uint8_t shift = tag_shift(shape.view)
    cdef uint64_t value = line_value(shape, payload, size, index), following = value
    cdef uint32_t limit = (<uint32_t> 1 << shape.entry_bits) - index
    out.word = word_of(value, shape.view, <uint8_t> (shape.base >> TAG_SHIFT), shape.cluster_bits)
    out.run = 1
    if want < limit:
        limit = want
    while out.run < limit:
        following = continued(following, stride, shift)
        if line_value(shape, payload, size, index + out.run) != following:
            return
        out.run += 1


cdef inline uint64_t bitmap_at(const Shape *shape, const uint8_t *payload, uint32_t size, uint32_t index) noexcept nogil:
    cdef uint32_t at = words_size(shape)
    cdef uint64_t bitmap
    cdef uint8_t width
    if shape.bitmaps != RAW_BITMAPS:
        width = code_width(shape.bitmaps)
        index = <uint32_t> get_bits(payload, size, (at + 8 * dictionary_length(shape.bitmaps)) * 8 + <uint64_t> index * width, width)
    memcpy(&bitmap, payload + at + 8 * index, 8)
    return bitmap


cdef inline void locate_bitmap(const Shape *shape, const uint8_t *payload, uint32_t size, uint32_t index, uint32_t want, Mapped *out) noexcept nogil:
    cdef uint32_t limit = out.run if out.run < want else want
    out.bitmap = bitmap_at(shape, payload, size, index)
    if shape.bitmaps == ONE_BITMAP:
        return
    out.run = 1
    while out.run < limit and bitmap_at(shape, payload, size, index + out.run) == out.bitmap:
        out.run += 1


cdef void locate(const Shape *shape, const uint8_t *payload, uint32_t size, uint32_t index, uint32_t want, Mapped *out) noexcept nogil:
    """Fill `out` for entry `index`. The run is exact up to `want` clusters and may be shorter than the true one beyond."""
    out.bitmap = 0
    if shape.form == EXTENTS or shape.form == RUNHEADS:
        locate_in_run(shape, payload, size, index, out)
    elif shape.form == RAW:
        memcpy(&out.word, payload + 8 * index, 8)
        out.run = 1
    else:
        locate_on_line(shape, payload, size, index, want, out)
    if shape.bitmaps != NO_BITMAPS:
        locate_bitmap(shape, payload, size, index, want, out)


# -- for Python: reports and tests ---------------------------------------------------------------------------------

FORMS = ("line", "sloped", "extents", "runheads", "raw")


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
