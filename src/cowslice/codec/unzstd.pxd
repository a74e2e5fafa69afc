"""Whole clusters of one zstd frame through libzstd, without the GIL."""

from libc.stdint cimport uint8_t

cdef bint unzstd_whole(void **state, const uint8_t *stream, size_t length, uint8_t *out, size_t size) noexcept nogil
cdef void end_unzstd(void **state) noexcept nogil
