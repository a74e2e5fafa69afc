# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""NBD requests and replies as compiled code reads and writes them (NBD specification, "Transmission").

It does not know sockets or disks; `cowslice.nbd` is the same in Python, for every message there is.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport realloc

cdef extern from *:
    uint16_t bswap16 "__builtin_bswap16"(uint16_t) noexcept nogil
    uint32_t bswap32 "__builtin_bswap32"(uint32_t) noexcept nogil
    uint64_t bswap64 "__builtin_bswap64"(uint64_t) noexcept nogil

# Magic numbers, commands and flags of the NBD specification.
cdef uint32_t REQUEST = 0x25609513
cdef uint32_t EXTENDED_REQUEST = 0x21e41c71
cdef uint32_t SIMPLE_REPLY = 0x67446698
cdef uint32_t STRUCTURED_REPLY = 0x668e33ef
cdef uint32_t EXTENDED_REPLY = 0x6e8a278c

cdef enum:
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    LEAST_ROOM = 1 << 20        # of an arena


def numbers():
    """The numbers above and in the declarations, by the names of `cowslice.nbd.wire`: what is written twice can be compared."""
    return {
        "REQUEST_MAGIC": REQUEST, "EXTENDED_REQUEST_MAGIC": EXTENDED_REQUEST, "SIMPLE_REPLY_MAGIC": SIMPLE_REPLY,
        "STRUCTURED_REPLY_MAGIC": STRUCTURED_REPLY, "EXTENDED_REPLY_MAGIC": EXTENDED_REPLY,
        "Mode.SIMPLE": SIMPLE, "Mode.STRUCTURED": STRUCTURED, "Mode.EXTENDED": EXTENDED,
        "Command.READ": READ, "Command.WRITE": WRITE, "Command.DISC": DISC,
        "Command.CACHE": CACHE, "Command.BLOCK_STATUS": BLOCK_STATUS,
        "CommandFlag.FUA": FUA, "CommandFlag.DF": DONT_FRAGMENT, "CommandFlag.PAYLOAD_LEN": PAYLOAD_LEN,
        "REPLY_DONE": REPLY_DONE, "Chunk.NONE": NONE, "Chunk.OFFSET_DATA": OFFSET_DATA, "Chunk.OFFSET_HOLE": OFFSET_HOLE,
    }


cdef inline uint16_t get16(const uint8_t *p) noexcept nogil:
    return bswap16((<const uint16_t *> p)[0])


cdef inline uint32_t get32(const uint8_t *p) noexcept nogil:
    return bswap32((<const uint32_t *> p)[0])


cdef inline uint64_t get64(const uint8_t *p) noexcept nogil:
    return bswap64((<const uint64_t *> p)[0])


cdef inline void put16(uint8_t *p, uint16_t value) noexcept nogil:
    (<uint16_t *> p)[0] = bswap16(value)


cdef inline void put32(uint8_t *p, uint32_t value) noexcept nogil:
    (<uint32_t *> p)[0] = bswap32(value)


cdef inline void put64(uint8_t *p, uint64_t value) noexcept nogil:
    (<uint64_t *> p)[0] = bswap64(value)


cdef bint reserve(Arena *arena, uint64_t wanted) noexcept nogil:
    """Room for `wanted` more bytes behind what is there."""
    cdef uint64_t room = arena.room if arena.room else LEAST_ROOM
    cdef uint8_t *grown
    if arena.used + wanted <= arena.room:
        return True
    while room < arena.used + wanted:
        room *= 2
    grown = <uint8_t *> realloc(arena.bytes, room)
    if grown == NULL:
        return False
    arena.bytes = grown
    arena.room = room
    return True


cdef bint decode_request(int mode, const uint8_t *p, Ask *ask) noexcept nogil:
    """Fill `ask` from the 28 bytes, or 32 in EXTENDED mode, at `p`; False where they do not begin a request."""
    if get32(p) != (EXTENDED_REQUEST if mode == EXTENDED else REQUEST):
        return False
    ask.flags = get16(p + 4)
    ask.command = get16(p + 6)
    ask.cookie = get64(p + 8)
    ask.offset = get64(p + 16)
    ask.length = get64(p + 24) if mode == EXTENDED else get32(p + 24)
    return True


cdef uint8_t *put_data(int mode, Arena *out, const Ask *ask, uint64_t offset, uint64_t length, uint16_t flags) noexcept nogil:
    """Write the head of a reply or chunk of data; returns where the data goes. The arena has the room."""
    cdef uint8_t *p = out.bytes + out.used
    cdef uint8_t *data
    if mode == SIMPLE:
        put32(p, SIMPLE_REPLY)
        put32(p + 4, 0)
        put64(p + 8, ask.cookie)
        data = p + 16
    else:
        data = put_chunk(mode, p, ask, OFFSET_DATA, flags, 8 + length)
        put64(data, offset)
        data += 8
    out.used += (data - p) + length
    return data


cdef bint put_hole(int mode, Arena *out, const Ask *ask, uint64_t offset, uint64_t length, uint16_t flags) noexcept nogil:
    cdef uint8_t *p
    cdef uint8_t *body
    if not reserve(out, 64):
        return False
    p = out.bytes + out.used
    body = put_chunk(mode, p, ask, OFFSET_HOLE, flags, 12)
    put64(body, offset)
    put32(body + 8, <uint32_t> length)
    out.used += (body - p) + 12
    return True


cdef void put_done(int mode, Arena *out, const Ask *ask) noexcept nogil:
    """Say that a request without data is done. The arena has room for 64 bytes."""
    cdef uint8_t *p = out.bytes + out.used
    if mode == SIMPLE:
        put32(p, SIMPLE_REPLY)
        put32(p + 4, 0)
        put64(p + 8, ask.cookie)
        out.used += 16
    else:
        out.used += put_chunk(mode, p, ask, NONE, REPLY_DONE, 0) - p


cdef uint8_t *put_chunk(int mode, uint8_t *p, const Ask *ask, uint16_t kind, uint16_t flags, uint64_t length) noexcept nogil:
    """The head of a chunk with `length` bytes of payload; returns where those go."""
    put32(p, EXTENDED_REPLY if mode == EXTENDED else STRUCTURED_REPLY)
    put16(p + 4, flags)
    put16(p + 6, kind)
    put64(p + 8, ask.cookie)
    if mode == EXTENDED:
        put64(p + 16, ask.offset)
        put64(p + 24, length)
        return p + 32
    put32(p + 16, <uint32_t> length)
    return p + 20
