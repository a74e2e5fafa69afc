"""Writing to clusters that are not there yet, without the GIL."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from cowslice.cache.forms cimport Mapped
from cowslice.image.claims cimport Claims
from cowslice.image.dirtybits cimport Marks
from cowslice.image.hostread cimport iovec
from cowslice.image.supply cimport Supply
from cowslice.image.translation cimport PlainLayer, Target, Translation

# What becomes of neighbouring guest clusters whose entries say the same. Offsets are bytes.
cdef struct Place:
    uint64_t start          # guest bytes that are written
    uint64_t end
    uint64_t host           # of the first cluster
    uint64_t count          # clusters
    uint32_t allocated      # subclusters that are there before the write, and that read as zeros; none without them
    uint32_t zero
    bint ours               # the cluster is there and is the image's alone
    bint fresh              # it reads as zeros where nothing is written

cdef class Placing(Translation):
    cdef Claims claims
    cdef Supply supply
    cdef object provider            # makes ready what is missing: see `supply_writes`
    cdef readonly Marks marks       # the bitmaps that every write is noted in
    cdef bint read_target(self, const Target *target, uint8_t *buffer, uint64_t length) noexcept nogil
    cdef uint64_t read_span(self, uint64_t offset, uint8_t *buffer, uint64_t length) noexcept nogil
    cdef uint64_t place(self, uint64_t offset, const uint8_t *buffer, uint64_t length) noexcept nogil
    cdef bint can_place(self, PlainLayer *layer, uint64_t offset, uint64_t length) noexcept nogil
    cdef bint can_encipher(self, PlainLayer *layer, uint64_t offset, uint64_t length) noexcept nogil
    cdef bint plan(self, PlainLayer *layer, uint64_t cluster, uint64_t most, Place *place) noexcept nogil
    cdef bint is_plain(self, PlainLayer *layer, const Mapped *m) noexcept nogil
    cdef bint is_ours(self, PlainLayer *layer, const Mapped *m) noexcept nogil
    cdef bint make_ready(self, PlainLayer *layer, uint64_t cluster) noexcept nogil
    cdef bint is_ready(self, PlainLayer *layer, uint64_t cluster) noexcept nogil
    cdef bint provide(self, uint64_t cluster) noexcept with gil
    cdef bint place_claimed(self, PlainLayer *layer, Place *place, const uint8_t *buffer) noexcept nogil
    cdef bint put(self, PlainLayer *layer, Place *place, const uint8_t *buffer) noexcept nogil
    cdef bint put_parts(self, PlainLayer *layer, iovec *parts, uint64_t guest, uint64_t host) noexcept nogil
    cdef uint64_t kept_from(self, PlainLayer *layer, Place *place) noexcept nogil
    cdef uint64_t kept_to(self, PlainLayer *layer, Place *place) noexcept nogil
    cdef bint keep(self, uint64_t start, uint64_t end, bint fresh, iovec *part) noexcept nogil
    cdef bint reads_as_zeros(self, uint64_t start, uint64_t length) noexcept nogil
    cdef bint show(self, PlainLayer *layer, Place *place) noexcept nogil
