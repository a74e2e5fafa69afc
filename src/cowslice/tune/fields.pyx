# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Fields of many text lines at once: where they stand, and the numbers and words that they say.

It does not know formats. It is called once per block of lines and column, without the GIL; what does not say what is
asked is marked, never guessed, and nothing outside the text is touched whatever it holds.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcmp, memset

import numpy as np

cdef enum:
    NANO_DIGITS = 9
    MOST_WORDS = 32

ABSENT = 255                # the code of a field that is none of the words

cdef uint64_t U64 = 0xFFFFFFFFFFFFFFFF
cdef uint64_t I63 = 0x7FFFFFFFFFFFFFFF


cdef inline bint blank(uint8_t c) noexcept nogil:
    return c == 32 or c == 9 or c == 13


cdef int64_t count_lines(const uint8_t *text, int64_t size) noexcept nogil:
    cdef int64_t lines = 0
    cdef const uint8_t *at = text
    cdef const uint8_t *end = text + size
    while at < end:
        lines += 1
        at = <const uint8_t *> memchr(at, 10, end - at)
        if at == NULL:
            break
        at += 1
    return lines


cdef void split(const uint8_t *text, int64_t size, uint8_t separator, uint32_t most, uint32_t *starts, uint32_t *lengths,
                uint8_t *counts) noexcept nogil:
    """Blanks around a field do not belong to it. Without a separator any run of blanks is one."""
    cdef int64_t at = 0, end, field, field_end
    cdef uint32_t found
    cdef const uint8_t *newline
    while at < size:
        newline = <const uint8_t *> memchr(text + at, 10, size - at)
        end = size if newline == NULL else newline - text
        found = 0
        while at < end and blank(text[at]):
            at += 1
        while at < end:
            field = at
            if separator:
                while at < end and text[at] != separator:
                    at += 1
                field_end = at
                while field_end > field and blank(text[field_end - 1]):
                    field_end -= 1
            else:
                while at < end and not blank(text[at]):
                    at += 1
                field_end = at
            if found < most:
                starts[found] = <uint32_t> field
                lengths[found] = <uint32_t> (field_end - field)
            found += 1
            if at == end:
                break
            at += 1
            while at < end and blank(text[at]):
                at += 1
            if separator and at == end:  # an empty field behind the last separator
                if found < most:
                    starts[found] = <uint32_t> end
                    lengths[found] = 0
                found += 1
        counts[0] = <uint8_t> min(found, most + 1)
        for found in range(found, most):
            starts[found] = <uint32_t> end
            lengths[found] = 0
        starts += most
        lengths += most
        counts += 1
        at = end + 1


def split_lines(const uint8_t[::1] text, str separator not None, uint32_t most):
    """Return (starts, lengths, counts): where the first `most` fields of each line stand in `text`, and how many it has.

    `starts` and `lengths` are uint32 of shape (lines, most), absent fields empty; `counts` is uint8, at most `most` + 1, 0
    for a blank line. `separator` is one character, or '' for runs of blanks. `text` is shorter than 4 GiB.
    """
    cdef int64_t size = text.shape[0], lines
    cdef uint8_t code = <uint8_t> ord(separator) if separator else 0
    if size == 0:
        return np.empty((0, most), np.uint32), np.empty((0, most), np.uint32), np.empty(0, np.uint8)
    if size > <int64_t> 0xFFFFFFF0 or not 0 < most < 250:
        raise ValueError(f"{size} bytes and {most} fields, expected less than 4 GiB and fewer than 250")
    with nogil:
        lines = count_lines(&text[0], size)
    starts = np.empty((lines, most), np.uint32)
    lengths = np.empty((lines, most), np.uint32)
    counts = np.empty(lines, np.uint8)
    cdef uint32_t[:, ::1] s = starts
    cdef uint32_t[:, ::1] n = lengths
    cdef uint8_t[::1] c = counts
    with nogil:
        split(&text[0], size, code, most, &s[0, 0], &n[0, 0], &c[0])
    return starts, lengths, counts


cdef inline bint inside(int64_t size, uint32_t start, uint32_t length) noexcept nogil:
    return <int64_t> start + length <= size


cdef bint number(const uint8_t *at, uint32_t length, uint64_t *value) noexcept nogil:
    """Decimal digits and nothing else, below 2**64."""
    cdef uint64_t total = 0
    cdef uint32_t i
    cdef uint8_t digit
    if length == 0:
        return False
    for i in range(length):
        digit = at[i] - 48
        if digit > 9:
            return False
        if i >= 19 and (total > U64 // 10 or (total == U64 // 10 and digit > U64 % 10)):
            return False
        total = total * 10 + digit
    value[0] = total
    return True


cdef bint hexadecimal(const uint8_t *at, uint32_t length, uint64_t *value) noexcept nogil:
    """0x and one to sixteen digits."""
    cdef uint64_t total = 0
    cdef uint32_t i
    cdef uint8_t c
    if length < 3 or length > 18 or at[0] != 48 or at[1] | 32 != 120:
        return False
    for i in range(2, length):
        c = at[i]
        if 48 <= c <= 57:
            c -= 48
        elif 97 <= c | 32 <= 102:
            c = (c | 32) - 87
        else:
            return False
        total = total << 4 | c
    value[0] = total
    return True


def numbers(const uint8_t[::1] text, const uint32_t[:] starts, const uint32_t[:] lengths, bint hexadecimals=False):
    """Return (values, sound): uint64, 0 where a field is not `sound`, which means digits only and less than 2**64.

    With `hexadecimals` fields are 0x and digits.
    """
    cdef int64_t i, count = starts.shape[0], size = text.shape[0]
    values = np.zeros(count, np.uint64)
    sound = np.zeros(count, np.uint8)
    cdef uint64_t[::1] v = values
    cdef uint8_t[::1] s = sound
    with nogil:
        for i in range(count):
            if not lengths[i] or not inside(size, starts[i], lengths[i]):
                continue
            if hexadecimals:
                s[i] = hexadecimal(&text[starts[i]], lengths[i], &v[i])
            else:
                s[i] = number(&text[starts[i]], lengths[i], &v[i])
    return values, sound.view(np.bool_)


cdef bint nanoseconds(const uint8_t *at, uint32_t length, int64_t *value) noexcept nogil:
    """Digits, and perhaps a point and more digits, of which those beyond the ninth do not count."""
    cdef uint64_t whole = 0, fraction = 0
    cdef uint32_t i = 0, digits = 0
    while i < length and at[i] != 46:
        i += 1
    if not number(at, i, &whole) or whole >= I63 // 1_000_000_000:
        return False
    if i < length:
        i += 1
        if i == length:
            return False
        while i < length:
            if at[i] < 48 or at[i] > 57:
                return False
            if digits < NANO_DIGITS:
                fraction = fraction * 10 + (at[i] - 48)
                digits += 1
            i += 1
        while digits < NANO_DIGITS:
            fraction *= 10
            digits += 1
    value[0] = <int64_t> (whole * 1_000_000_000 + fraction)
    return True


def seconds(const uint8_t[::1] text, const uint32_t[:] starts, const uint32_t[:] lengths):
    """Return (values, sound): int64 nanoseconds of fields such as 12 or 12.000345, 0 where a field is not `sound`."""
    cdef int64_t i, count = starts.shape[0], size = text.shape[0]
    values = np.zeros(count, np.int64)
    sound = np.zeros(count, np.uint8)
    cdef int64_t[::1] v = values
    cdef uint8_t[::1] s = sound
    with nogil:
        for i in range(count):
            if lengths[i] and inside(size, starts[i], lengths[i]):
                s[i] = nanoseconds(&text[starts[i]], lengths[i], &v[i])
    return values, sound.view(np.bool_)


def words(const uint8_t[::1] text, const uint32_t[:] starts, const uint32_t[:] lengths, tuple known not None):
    """Return for each field the place of the word of `known` that it is, as uint8; ABSENT for none."""
    cdef int64_t i, count = starts.shape[0], size = text.shape[0]
    cdef uint8_t w, most = <uint8_t> len(known)
    cdef const uint8_t *spelled[MOST_WORDS]
    cdef uint32_t letters[MOST_WORDS]
    if len(known) > MOST_WORDS:
        raise ValueError(f"{len(known)} words, expected at most {MOST_WORDS}")
    for w in range(most):
        spelled[w] = <const uint8_t *> <bytes> known[w]
        letters[w] = <uint32_t> len(<bytes> known[w])
    codes = np.full(count, ABSENT, np.uint8)
    cdef uint8_t[::1] c = codes
    with nogil:
        for i in range(count):
            if not lengths[i] or not inside(size, starts[i], lengths[i]):
                continue
            for w in range(most):
                if letters[w] == lengths[i] and memcmp(&text[starts[i]], spelled[w], letters[w]) == 0:
                    c[i] = w
                    break
    return codes


def cut(const uint8_t[::1] text, const uint32_t[:] starts, const uint32_t[:] lengths, str mark not None):
    """Return how many bytes of each field stand before the first `mark`, one character, as uint32; all where it has none."""
    cdef int64_t i, count = starts.shape[0], size = text.shape[0]
    cdef uint8_t code = <uint8_t> ord(mark)
    cdef const uint8_t *found
    before = np.array(lengths, np.uint32)
    cdef uint32_t[::1] b = before
    with nogil:
        for i in range(count):
            if not lengths[i] or not inside(size, starts[i], lengths[i]):
                continue
            found = <const uint8_t *> memchr(&text[starts[i]], code, lengths[i])
            if found != NULL:
                b[i] = <uint32_t> (found - &text[starts[i]])
    return before


cdef inline uint32_t hash_of(const uint8_t *at, uint32_t length) noexcept nogil:
    """FNV-1a: short, and good enough for names that nobody chose to collide in one block."""
    cdef uint32_t h = 2166136261, i
    for i in range(length):
        h = (h ^ at[i]) * 16777619
    return h ^ h >> 15


cdef int32_t intern(const uint8_t *text, int64_t size, const uint32_t[:] starts, const uint32_t[:] lengths,
                    const uint8_t[:] chosen, int32_t[::1] codes, uint32_t *table, uint32_t mask, uint32_t *firsts) noexcept nogil:
    """`table` has places of `firsts` plus one, which has the row where each spelling first stood. Returns how many."""
    cdef int64_t i
    cdef int32_t found = 0, last = -1
    cdef uint32_t at, row, length
    for i in range(starts.shape[0]):
        codes[i] = -1
        if not chosen[i] or not inside(size, starts[i], lengths[i]):
            continue
        length = lengths[i]
        if last >= 0:  # neighbours are often alike
            row = firsts[last]
            if lengths[row] == length and memcmp(text + starts[row], text + starts[i], length) == 0:
                codes[i] = last
                continue
        at = hash_of(text + starts[i], length) & mask
        while table[at]:
            row = firsts[table[at] - 1]
            if lengths[row] == length and memcmp(text + starts[row], text + starts[i], length) == 0:
                break
            at = (at + 1) & mask
        if not table[at]:
            firsts[found] = <uint32_t> i
            found += 1
            table[at] = found
        last = table[at] - 1
        codes[i] = last
    return found


def spellings(const uint8_t[::1] text, const uint32_t[:] starts, const uint32_t[:] lengths, chosen):
    """Return (codes, spelled): for each chosen field the place in `spelled`, a list of distinct bytes, of what it says.

    `chosen` is a mask; codes are int32, -1 for the others. Spellings stand in the order in which they first came.
    """
    cdef int64_t count = starts.shape[0], size = text.shape[0]
    cdef uint32_t room = 16
    cdef int32_t found, i
    cdef const uint8_t[:] mask = chosen.view(np.uint8)
    while room < 2 * count:
        room *= 2
    codes = np.empty(count, np.int32)
    if count == 0 or size == 0:
        return np.full(count, -1, np.int32), []
    cdef int32_t[::1] c = codes
    cdef uint32_t *table = <uint32_t *> malloc(room * sizeof(uint32_t))
    cdef uint32_t *firsts = <uint32_t *> malloc(count * sizeof(uint32_t))
    try:
        if table == NULL or firsts == NULL:
            raise MemoryError(f"no memory for the names in {count} lines")
        with nogil:
            memset(table, 0, room * sizeof(uint32_t))
            found = intern(&text[0], size, starts, lengths, mask, c, table, room - 1, firsts)
        return codes, [bytes(text[starts[firsts[i]] : starts[firsts[i]] + lengths[firsts[i]]]) for i in range(found)]
    finally:
        free(table)
        free(firsts)
