"""Whole clusters of raw deflate through libdeflate, without the GIL."""

from libc.stdint cimport uint8_t

cdef bint inflate_whole(void **state, const uint8_t *stream, size_t length, uint8_t *out, size_t size) noexcept nogil
cdef void end_inflating(void **state) noexcept nogil
