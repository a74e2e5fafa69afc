# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Where each thing stands in a packed slice, and the lookup of one entry.

It does not know how a slice was packed, nor who keeps it. A shape and the payload that belongs to it go in; nothing
outside the payload is ever read, and nothing is written.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

FORMS = ("line", "sloped", "extents", "runheads", "raw")


cdef uint32_t words_size(const Shape *shape) noexcept nogil:
    """Bytes that the entry words take, without the bitmaps."""
    cdef uint32_t entries = <uint32_t> 1 << shape.entry_bits
    if shape.form == EXTENTS:
        return 2 * shape.runs + bytes_for(<uint64_t> shape.runs * shape.width)
    if shape.form == RUNHEADS:
        return heads_at(entries) + bytes_for(<uint64_t> shape.runs * shape.width)
    if shape.form == RAW:
        return 8 * entries
    return bytes_for(<uint64_t> entries * shape.width)


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


# -- all entries at once --------------------------------------------------------------------------------------------

cdef void unpack(const Shape *shape, const uint8_t *payload, uint32_t size, uint64_t *words, uint64_t *bitmaps) noexcept nogil:
    """Every entry word, and every bitmap where the shape has some: what `locate` would say of each."""
    cdef uint32_t i
    if shape.form == RAW:
        memcpy(words, payload, <uint64_t> 8 << shape.entry_bits)
    elif shape.form == EXTENTS or shape.form == RUNHEADS:
        unpack_runs(shape, payload, size, words)
    else:
        unpack_line(shape, payload, size, words)
    if shape.bitmaps != NO_BITMAPS:
        for i in range(<uint32_t> 1 << shape.entry_bits):
            bitmaps[i] = bitmap_at(shape, payload, size, i)


cdef void unpack_line(const Shape *shape, const uint8_t *payload, uint32_t size, uint64_t *words) noexcept nogil:
    cdef uint64_t base = true_base(shape)
    cdef uint64_t slope = stride_of(shape.view, shape.cluster_bits) if shape.form == SLOPED else 0
    cdef uint8_t tag = <uint8_t> (shape.base >> TAG_SHIFT)
    cdef uint8_t width = shape.width, view = shape.view, cluster_bits = shape.cluster_bits
    cdef uint64_t position = 0
    cdef uint32_t i
    for i in range(<uint32_t> 1 << shape.entry_bits):
        words[i] = word_of(base + get_bits(payload, size, position, width), view, tag, cluster_bits)
        base += slope
        position += width


cdef void unpack_runs(const Shape *shape, const uint8_t *payload, uint32_t size, uint64_t *words) noexcept nogil:
    cdef uint32_t index = 0, start = 0, end = 0, run
    cdef uint32_t entries = <uint32_t> 1 << shape.entry_bits
    cdef uint64_t at = 8 * <uint64_t> (2 * shape.runs if shape.form == EXTENTS else heads_at(entries))
    cdef uint64_t stride, value
    cdef uint8_t tag = <uint8_t> (shape.base >> TAG_SHIFT)
    while index < entries:
        run = run_of(shape, payload, index, &start, &end)
        value = true_base(shape) + get_bits(payload, size, at + <uint64_t> run * shape.width, shape.width)
        stride = stride_of(shape.view, shape.cluster_bits) if value >> tag_shift(shape.view) else 0
        for index in range(start, end):
            words[index] = word_of(value, shape.view, tag, shape.cluster_bits)
            value += stride
        index = end
