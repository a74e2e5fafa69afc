"""Host files as compiled code reads them."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len

# What a read of a descriptor may cost.
cdef enum Manner:
    IN_MEMORY = 0           # a memory file system: never waits for a device
    NOWAIT = 1              # the kernel can be asked whether it would wait
    BLOCKING = 2            # it may wait, and cannot be asked

cdef struct File:
    int fd                  # -1: none
    uint32_t alignment      # of offset, length and memory
    uint8_t manner

cdef uint8_t manner_of(int fd, uint32_t alignment) noexcept nogil
cdef bint read_exactly(int fd, uint8_t *buffer, uint64_t length, uint64_t offset) noexcept nogil
cdef bint read_host(const File *file, uint8_t *buffer, uint64_t length, uint64_t offset) noexcept nogil
cdef bint read_at_once(const File *file, uint8_t *buffer, uint64_t length, uint64_t offset) noexcept nogil
cdef bint write_host(const File *file, const uint8_t *buffer, uint64_t length, uint64_t offset) noexcept nogil
cdef bint write_parts(int fd, iovec *parts, int count, uint64_t offset) noexcept nogil
cdef bint reads_as_hole(int fd, uint64_t offset, uint64_t length) noexcept nogil
