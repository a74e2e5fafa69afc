"""NBD requests and replies of compiled code."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

# Shape of requests and replies (NBD specification, "Transmission").
cdef enum Mode:
    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2

# One request as it came.
cdef struct Ask:
    uint64_t cookie
    uint64_t offset
    uint64_t length
    uint64_t arrived        # nanoseconds of the monotonic clock
    uint64_t cost           # bytes that it holds until it is answered; set when it does not go at once
    uint16_t flags
    uint16_t command

cdef enum:
    READ = 0
    WRITE = 1
    DISC = 2
    CACHE = 5
    BLOCK_STATUS = 7
    FUA = 1
    DONT_FRAGMENT = 4
    PAYLOAD_LEN = 32
    REPLY_DONE = 1

# Memory that replies are put together in before they are sent.
cdef struct Arena:
    uint8_t *bytes
    uint64_t used
    uint64_t room

cdef bint reserve(Arena *arena, uint64_t wanted) noexcept nogil
cdef bint decode_request(int mode, const uint8_t *p, Ask *ask) noexcept nogil
cdef uint8_t *put_data(int mode, Arena *out, const Ask *ask, uint64_t offset, uint64_t length, uint16_t flags) noexcept nogil
cdef bint put_hole(int mode, Arena *out, const Ask *ask, uint64_t offset, uint64_t length, uint16_t flags) noexcept nogil
cdef void put_done(int mode, Arena *out, const Ask *ask) noexcept nogil
cdef uint8_t *put_chunk(int mode, uint8_t *p, const Ask *ask, uint16_t kind, uint16_t flags, uint64_t length) noexcept nogil
