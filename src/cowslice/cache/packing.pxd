"""The encoder of packed slices. What it makes is described in forms.pxd."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from cowslice.cache.forms cimport MAX_ENTRIES, Mapped, Shape, locate, payload_size

cdef struct Draft:
    Shape shape
    uint64_t size                           # bytes of payload; as wide as it is so that the payload is aligned
    uint8_t payload[MAX_ENTRIES * 16 + 256]

cdef void pack(const uint8_t *raw, uint32_t entries, uint8_t cluster_bits, bint extended, Draft *draft) noexcept nogil
cdef bint one_run(const uint8_t *raw, uint32_t entries, uint8_t cluster_bits, bint extended) noexcept nogil
