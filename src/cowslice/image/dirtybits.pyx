# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Which granules of a disk were changed: bits that many threads set at once without the GIL, and without a lock.

It does not know what a bitmap is for, nor files. What must hold: a bit that was set stays set until `clear` or `resize`,
which are called while nobody marks; a mark that found no memory is never forgotten silently (`lost`).
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

from cowslice.errors import InternalError

cimport cython

cdef extern from *:
    """
    #include <endian.h>
    static inline uint64_t *cowslice_chunk(uint64_t **at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
    static inline int cowslice_adopt(uint64_t **at, uint64_t *fresh) {
        uint64_t *none = NULL;
        return __atomic_compare_exchange_n(at, &none, fresh, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    }
    static inline void cowslice_or(uint64_t *word, uint64_t mask) {
        mask = htole64(mask);
        if ((__atomic_load_n(word, __ATOMIC_RELAXED) & mask) != mask) __atomic_fetch_or(word, mask, __ATOMIC_RELAXED);
    }
    """
    uint64_t *load_chunk "cowslice_chunk"(uint64_t **at) noexcept nogil
    bint adopt "cowslice_adopt"(uint64_t **at, uint64_t *fresh) noexcept nogil
    void or_word "cowslice_or"(uint64_t *word, uint64_t mask) noexcept nogil

cdef enum:
    CHUNK = 4096            # bytes that are allocated together
    CHUNK_BITS = 32768
    WORDS = 512


@cython.final
cdef class DirtyBits:
    """One bit for each granule of a disk of `size` bytes, none set; a bit covers 2^`granularity_bits` bytes."""

    def __init__(self, uint64_t size, int granularity_bits):
        if not 0 <= granularity_bits < 63:
            raise InternalError(f"granularity_bits is {granularity_bits}, expected 0 to 62")
        self.granularity_bits = granularity_bits
        self.resize(size)

    def __dealloc__(self):
        self.drop_chunks(0)
        free(self.chunks)

    cdef void drop_chunks(self, uint64_t first) noexcept nogil:
        cdef uint64_t i
        for i in range(first, self.chunk_count):
            free(self.chunks[i])
            self.chunks[i] = NULL

    cdef uint64_t *chunk_at(self, uint64_t index) noexcept nogil:
        """The chunk, a new one where there is none yet; NULL without memory."""
        cdef uint64_t *found = load_chunk(&self.chunks[index])
        if found != NULL:
            return found
        found = <uint64_t *> calloc(1, CHUNK)
        if found == NULL or adopt(&self.chunks[index], found):
            return found
        free(found)
        return load_chunk(&self.chunks[index])

    cdef void mark(self, uint64_t offset, uint64_t length) noexcept nogil:
        """Set the bits of all granules that the span touches; what lies behind the end is ignored."""
        cdef uint64_t first = offset >> self.granularity_bits, last
        if length == 0 or first >= self.bits:
            return
        last = (offset + length - 1) >> self.granularity_bits
        self.mark_bits(first, last if last < self.bits else self.bits - 1)

    cdef void mark_bits(self, uint64_t first, uint64_t last) noexcept nogil:
        cdef uint64_t word = first >> 6, end = last >> 6, mask
        cdef uint64_t *chunk
        while word <= end:
            mask = <uint64_t> 0 - 1
            if word == first >> 6:
                mask <<= first & 63
            if word == end:
                mask &= (<uint64_t> 0 - 1) >> (63 - (last & 63))
            chunk = self.chunk_at(word // WORDS)
            if chunk == NULL:
                self.failed = 1
                return
            or_word(&chunk[word % WORDS], mask)
            word += 1

    # -- for Python -------------------------------------------------------------------------------------------------

    @property
    def lost(self):
        """Whether a mark found no memory: then the bits say too little."""
        return bool(self.failed)

    @property
    def memory(self):
        """Bytes that are allocated for bits."""
        cdef uint64_t i, total = 0
        for i in range(self.chunk_count):
            total += CHUNK if load_chunk(&self.chunks[i]) != NULL else 0
        return total

    def mark_span(self, uint64_t offset, uint64_t length):
        """Set the bits of all granules that the span of the disk touches."""
        with nogil:
            self.mark(offset, length)

    def read(self, uint64_t start, uint64_t length):
        """`length` bytes of the bits from byte `start` on: the lowest bit of a byte is the first. Zeros behind the end."""
        result = PyBytes_FromStringAndSize(NULL, length)
        cdef uint8_t *out = <uint8_t *> PyBytes_AS_STRING(result)
        cdef uint64_t done = 0, at, piece
        cdef uint64_t *chunk
        with nogil:
            while done < length:
                at = start + done
                piece = min(length - done, CHUNK - at % CHUNK)
                chunk = load_chunk(&self.chunks[at // CHUNK]) if at // CHUNK < self.chunk_count else NULL
                if chunk == NULL:
                    memset(out + done, 0, piece)
                else:
                    memcpy(out + done, <uint8_t *> chunk + at % CHUNK, piece)
                done += piece
        return result

    def touched(self, uint64_t start, uint64_t length):
        """May any of these bytes of the bits be other than zero?"""
        cdef uint64_t i, end = min((start + length + CHUNK - 1) // CHUNK, self.chunk_count)
        for i in range(start // CHUNK, end):
            if load_chunk(&self.chunks[i]) != NULL:
                return True
        return False

    def clear(self):
        """Let no bit be set."""
        self.drop_chunks(0)
        self.failed = 0

    def resize(self, uint64_t size):
        """Describe a disk of `size` bytes from now on; bits behind a nearer end are forgotten."""
        cdef uint64_t bits = (size >> self.granularity_bits) + bool(size & (((<uint64_t> 1) << self.granularity_bits) - 1))
        cdef uint64_t count = (bits + CHUNK_BITS - 1) // CHUNK_BITS, i
        cdef uint64_t **grown
        if count < self.chunk_count:
            self.drop_chunks(count)
        grown = <uint64_t **> realloc(self.chunks, max(count, <uint64_t> 1) * sizeof(uint64_t *))
        if grown == NULL:
            raise MemoryError(f"no memory for a bitmap of {bits} bits")
        self.chunks = grown
        for i in range(self.chunk_count, count):
            grown[i] = NULL
        self.chunk_count = count
        if bits < self.bits and bits % CHUNK_BITS and grown[count - 1] != NULL:
            self.cut_tail(grown[count - 1], bits % CHUNK_BITS)
        self.bits = bits

    cdef cut_tail(self, uint64_t *chunk, uint64_t bits):
        """Forget the bits of a chunk from that one on."""
        cdef uint8_t *raw = <uint8_t *> chunk
        raw[bits // 8] &= (1 << bits % 8) - 1
        memset(raw + bits // 8 + 1, 0, CHUNK - bits // 8 - 1)


@cython.final
cdef class Marks:
    """The bit sets that every change of a disk is noted in."""

    def __cinit__(self):
        self.held = []

    def __dealloc__(self):
        free(self.sets)

    cdef void mark(self, uint64_t offset, uint64_t length) noexcept nogil:
        cdef int64_t i
        for i in range(self.count):
            (<DirtyBits> self.sets[i]).mark(offset, length)

    def mark_span(self, uint64_t offset, uint64_t length):
        """Note a change of this span in all of them."""
        with nogil:
            self.mark(offset, length)

    def assign(self, sets):
        """Note changes in these from now on. Only while nobody is inside the disk."""
        cdef list held = list(sets)
        cdef void **grown = <void **> realloc(self.sets, (len(held) + 1) * sizeof(void *))
        cdef DirtyBits one
        if grown == NULL:
            raise MemoryError(f"no memory for {len(held)} bitmaps")
        self.sets = grown
        for i, one in enumerate(held):
            grown[i] = <void *> one
        self.held = held
        self.count = len(held)
