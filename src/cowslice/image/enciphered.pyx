# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Enciphered clusters without the GIL: whole sectors are deciphered where they are to go, ragged ends beside it.

The compiled twin of what image.qcow2 and image.writing do: it raises nothing, and False leaves a request to them. What must
hold: no byte is written that was not enciphered, and a caller's buffer of bytes to write never changes.
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy

from cowslice.codec.evp cimport EvpCipher
from cowslice.image.hostread cimport read_at_once, read_host, write_host
from cowslice.image.translation cimport PlainLayer, Target

cdef extern from "<malloc.h>" nogil:
    void *memalign(size_t alignment, size_t size)

cdef enum:
    SECTOR = 512
    BOUNCE = 64 << 10       # bytes that are enciphered, then written, while they are in a core's own cache


cdef bint read_enciphered(const Target *target, uint8_t *buffer, uint64_t length) noexcept nogil:
    """Read `length` bytes of a target in an opaque layer; False, and anything in the buffer, where the plain path must."""
    cdef uint64_t host = target.host, sector = target.sector, skew = host % SECTOR, part
    if skew:
        part = min(SECTOR - skew, length)
        if not read_inside(target, buffer, part, skew, sector):
            return False
        buffer, length, host, sector = buffer + part, length - part, host + part, sector + 1
    part = length - length % SECTOR
    if part and not (read_host(&target.layer.file, buffer, part, host) and decipher(target, buffer, part, sector)):
        return False
    return part == length or read_inside(target, buffer + part, length - part, 0, sector + part // SECTOR)


cdef bint read_enciphered_at_once(const Target *target, uint8_t *buffer, uint64_t length) noexcept nogil:
    """The same of whole sectors if that needs no waiting for a device; False for any others."""
    return ((target.host | length) % SECTOR == 0 and read_at_once(&target.layer.file, buffer, length, target.host)
            and decipher(target, buffer, length, target.sector))


cdef bint read_inside(const Target *target, uint8_t *buffer, uint64_t length, uint64_t skew, uint64_t sector) noexcept nogil:
    """`length` bytes from byte `skew` of one sector."""
    cdef uint8_t whole[SECTOR]
    cdef uint64_t host = target.host - target.host % SECTOR + (sector - target.sector) * SECTOR
    if not read_host(&target.layer.file, whole, SECTOR, host) or not decipher(target, whole, SECTOR, sector):
        return False
    memcpy(buffer, whole + skew, length)
    return True


cdef inline bint decipher(const Target *target, uint8_t *buffer, uint64_t length, uint64_t sector) noexcept nogil:
    cdef uint64_t count = length // SECTOR
    return (<EvpCipher> target.layer.cipher).transform(False, sector, buffer, buffer, count) == count


cdef bint write_enciphered(const PlainLayer *layer, const uint8_t *buffer, uint64_t length, uint64_t host,
                           uint64_t guest) noexcept nogil:
    """Write the whole sectors that lie at `host` and are the guest's from `guest` on. If False, a part may be written."""
    cdef uint64_t done = 0, part, sector = (guest if layer.guest_sectors else host) // SECTOR
    cdef uint8_t *secret
    if layer.cipher == NULL or (length | host | guest) % SECTOR:
        return False
    secret = <uint8_t *> memalign(4096, min(length, <uint64_t> BOUNCE))
    while secret != NULL and done < length:
        part = min(length - done, <uint64_t> BOUNCE)
        if (<EvpCipher> layer.cipher).transform(True, sector + done // SECTOR, buffer + done, secret, part // SECTOR) * SECTOR < part:
            break
        if not write_host(&layer.file, secret, part, host + done):
            break
        done += part
    free(secret)
    return done == length
