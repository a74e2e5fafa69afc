# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Reading and writing a host file from compiled code: all of a span or nothing, aligned as the file wants it, waiting or not.

It does not know images. An error is only told as False: who needs to know why reads again through the storage.
"""

from libc.errno cimport EAGAIN, EINTR, ENXIO, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

cdef extern from "<sys/uio.h>" nogil:
    int RWF_NOWAIT
    ssize_t preadv2(int fd, const iovec *vector, int count, long offset, int flags)
    ssize_t pwritev(int fd, const iovec *vector, int count, long offset)

cdef extern from "<sys/vfs.h>" nogil:
    ctypedef struct statfs_t "struct statfs":
        long f_type
    int fstatfs(int fd, statfs_t *about)

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buffer, size_t count, long offset)
    ssize_t pwrite(int fd, const void *buffer, size_t count, long offset)
    long lseek(int fd, long offset, int whence)
    int SEEK_DATA

cdef extern from "<malloc.h>" nogil:
    void *memalign(size_t alignment, size_t size)

cdef enum:
    BOUNCE = 1 << 20        # most bytes of aligned memory for one unaligned read of an unbuffered file
    TMPFS_MAGIC = 0x01021994
    RAMFS_MAGIC = 0x858458f6


cdef bint read_exactly(int fd, uint8_t *buffer, uint64_t length, uint64_t offset) noexcept nogil:
    """All of it, zeros past the end of the file; False for an error, which the plain path meets again and names."""
    cdef uint64_t done = 0
    cdef ssize_t got
    while done < length:
        got = pread(fd, buffer + done, length - done, <long> (offset + done))
        if got < 0 and errno == EINTR:
            continue
        if got < 0:
            return False
        if got == 0:
            memset(buffer + done, 0, length - done)
            return True
        done += got
    return True


cdef bint read_bounced(const File *file, uint8_t *buffer, uint64_t length, uint64_t offset) noexcept nogil:
    """An unaligned read of an unbuffered file, by way of aligned memory."""
    cdef uint64_t skew, part
    cdef uint64_t mask = file.alignment - 1
    cdef uint64_t room = min(<uint64_t> BOUNCE, ((offset & mask) + length + mask) & ~mask)
    cdef uint8_t *aligned = <uint8_t *> memalign(4096, room)
    cdef bint fine = aligned != NULL
    while fine and length:
        skew = offset & mask
        part = room - skew if length > room - skew else length
        fine = read_exactly(file.fd, aligned, (skew + part + mask) & ~mask, offset - skew)
        if fine:
            memcpy(buffer, aligned + skew, part)
        buffer += part
        offset += part
        length -= part
    free(aligned)
    return fine


cdef bint read_host(const File *file, uint8_t *buffer, uint64_t length, uint64_t offset) noexcept nogil:
    if (<uint64_t> buffer | length | offset) & (file.alignment - 1):
        return read_bounced(file, buffer, length, offset)
    return read_exactly(file.fd, buffer, length, offset)


cdef bint write_host(const File *file, const uint8_t *buffer, uint64_t length, uint64_t offset) noexcept nogil:
    """All of it, or False: for an error, and for what an unbuffered file wants aligned. A part may be written then."""
    cdef uint64_t done = 0
    cdef ssize_t put
    if (<uint64_t> buffer | length | offset) & (file.alignment - 1):
        return False
    while done < length:
        put = pwrite(file.fd, buffer + done, length - done, <long> (offset + done))
        if put < 0 and errno == EINTR:
            continue
        if put <= 0:
            return False
        done += put
    return True


cdef bint write_parts(int fd, iovec *parts, int count, uint64_t offset) noexcept nogil:
    """All parts, one behind the other, or False; a piece may be written then. The parts are used up."""
    cdef ssize_t put
    while count:
        put = pwritev(fd, parts, count, <long> offset)
        if put < 0 and errno == EINTR:
            continue
        if put <= 0:
            return False
        offset += put
        while count and <size_t> put >= parts.iov_len:
            put -= parts.iov_len
            parts += 1
            count -= 1
        if count:
            parts.iov_base = <uint8_t *> parts.iov_base + put
            parts.iov_len -= put
    return True


cdef bint reads_as_hole(int fd, uint64_t offset, uint64_t length) noexcept nogil:
    """Does the file system know that there is no data? False where it knows no holes."""
    cdef long data = lseek(fd, <long> offset, SEEK_DATA)
    return <uint64_t> data >= offset + length if data >= 0 else errno == ENXIO


cdef bint read_at_once(const File *file, uint8_t *buffer, uint64_t length, uint64_t offset) noexcept nogil:
    """All of it if that needs no waiting for a device, else False."""
    cdef iovec vector
    if file.manner == IN_MEMORY:
        return read_host(file, buffer, length, offset)
    if file.manner == BLOCKING:
        return False
    vector.iov_base = buffer
    vector.iov_len = length
    return <uint64_t> preadv2(file.fd, &vector, 1, <long> offset, RWF_NOWAIT) == length


cdef uint8_t manner_of(int fd, uint32_t alignment) noexcept nogil:
    """Ask once: memory file systems always answer that they do not know RWF_NOWAIT."""
    cdef statfs_t about
    cdef iovec vector
    cdef uint8_t byte
    if fd < 0 or alignment > 1:
        return BLOCKING
    if fstatfs(fd, &about) == 0 and (about.f_type == TMPFS_MAGIC or about.f_type == RAMFS_MAGIC):
        return IN_MEMORY
    vector.iov_base = &byte
    vector.iov_len = 1
    if preadv2(fd, &vector, 1, 0, RWF_NOWAIT) < 0 and errno != EAGAIN:
        return BLOCKING
    return NOWAIT
