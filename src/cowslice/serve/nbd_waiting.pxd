"""How a connection waits for its client."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef struct Vigil:
    uint64_t longest        # nanoseconds that it may stay awake; 0: it never does
    uint32_t trust          # short waits in a row
    uint32_t caution        # short waits that it takes beyond the usual before it stays awake: the processor is wanted
    uint32_t passing        # times that it will not gather
    uint32_t reluctance     # how often gathering is passed over after it brought nothing
    uint32_t owed           # bytes that were looked at and still lie in the socket
    bint lone               # one request came last time, and no more
    int spare               # connections of the process that may be awake at once

cdef ssize_t await_bytes(Vigil *vigil, int fd, uint8_t *buffer, uint64_t room) noexcept nogil
cdef void take_owed(Vigil *vigil, int fd) noexcept nogil
cdef uint64_t gather(Vigil *vigil, int fd, uint8_t *buffer, uint64_t room) noexcept nogil
