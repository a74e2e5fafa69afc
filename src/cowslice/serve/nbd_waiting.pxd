"""How a connection waits for its client."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef struct Vigil:
    uint64_t longest        # nanoseconds that it may stay awake; 0: it never does
    uint32_t trust          # short waits in a row
    int spare               # connections of the process that may be awake at once

cdef ssize_t await_bytes(Vigil *vigil, int fd, uint8_t *buffer, uint64_t room) noexcept nogil
