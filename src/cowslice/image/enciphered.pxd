"""Enciphered clusters of host files, read and written without the GIL."""

from libc.stdint cimport uint8_t, uint64_t

from cowslice.image.translation cimport PlainLayer, Target

cdef bint read_enciphered(const Target *target, uint8_t *buffer, uint64_t length) noexcept nogil
cdef bint read_enciphered_at_once(const Target *target, uint8_t *buffer, uint64_t length) noexcept nogil
cdef bint write_enciphered(const PlainLayer *layer, const uint8_t *buffer, uint64_t length, uint64_t host, uint64_t guest) noexcept nogil
