"""Reads of enciphered clusters, deciphered without the GIL."""

from libc.stdint cimport uint8_t, uint64_t

from cowslice.image.translation cimport Target

cdef bint read_deciphered(const Target *target, uint8_t *buffer, uint64_t length) noexcept nogil
cdef bint read_deciphered_at_once(const Target *target, uint8_t *buffer, uint64_t length) noexcept nogil
