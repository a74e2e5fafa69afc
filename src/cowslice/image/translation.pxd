"""From guest bytes to host bytes in compiled code, through a chain of plain layers."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from cowslice.cache.slicemap cimport SliceCache, SliceMap
from cowslice.codec.evp cimport EvpCipher
from cowslice.image.hostread cimport File
from cowslice.image.fences cimport Fences
from cowslice.image.inflated cimport InflatedClusters

# One layer as the compiled path sees it. `map` is NULL for a raw file; Translation keeps the maps alive.
cdef struct PlainLayer:
    void *map
    uint64_t size           # guest bytes
    File file               # where normal clusters are read from
    uint8_t cluster_bits
    bint extended
    bint version2
    bint data_file
    bint opaque             # its normal clusters are enciphered
    bint guest_sectors      # and their sectors are numbered in the guest, else in the host file
    void *cipher            # an EvpCipher that deciphers them, or NULL where only Python can; Translation keeps it alive
    void *inflated          # its compressed clusters, or NULL where only Python can read them; Translation keeps them alive
    uint32_t number         # of the layer, among those that share `inflated`
    bint zstd               # its compressed clusters are zstd frames, else deflate streams

# Where the bytes from one guest offset are, and for how long that holds.
cdef struct Target:
    uint64_t length
    uint64_t host
    PlainLayer *layer       # NULL: zeros
    uint64_t stored         # of a compressed cluster: the bytes from `host` in which its stream ends; else 0
    uint64_t skip           # and how far into the cluster the wanted bytes begin
    uint64_t sector         # of an opaque layer: the number, to its cipher, of the sector that the first byte lies in

cdef class Translation:
    cdef PlainLayer *layers
    cdef uint32_t depth
    cdef uint32_t maps_count
    cdef list maps
    cdef list inflating     # what `inflated` of the layers points to
    cdef list ciphers       # and what `cipher` does
    cdef SliceCache cache   # shared by all maps; None where every layer is raw
    cdef readonly uint64_t size
    cdef bint in_memory     # so are all layers and their maps
    cdef public bint writes_in_place    # Python may switch it off, to see each write
    cdef Fences fences
    cdef PlainLayer *grow(self) except NULL
    cdef attach(self, PlainLayer *layer, data)
    cdef bint locate(self, uint64_t offset, uint64_t want, bint held, Target *out) noexcept nogil
    cdef void foresee(self, uint64_t offset, bint deep) noexcept nogil
    cdef bint in_layer(self, PlainLayer *layer, uint64_t offset, uint64_t *want, bint held, Target *out, bint *below) noexcept nogil
    cdef bint in_subclusters(self, PlainLayer *layer, uint64_t word, uint64_t bitmap, uint64_t offset, uint64_t *want, Target *out, bint *below) noexcept nogil
    cdef bint to_host(self, PlainLayer *layer, uint64_t word, uint64_t offset, Target *out) noexcept nogil
    cdef bint to_stream(self, PlainLayer *layer, uint64_t word, uint64_t bitmap, uint64_t offset, uint64_t *want, Target *out) noexcept nogil
    cdef bint locate_own(self, uint64_t offset, uint64_t want, Target *out) noexcept nogil
