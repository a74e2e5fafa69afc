# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""From guest bytes to host bytes through a chain of layers, without the GIL.

It reads and writes nothing but maps. What is not plain (faulty, without descriptor or cipher) it does not find: image.reading
deals with that, and raises what there is to raise. What it finds in an opaque layer must be deciphered by who reads it.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from cowslice.cache.loads cimport FOUND
from cowslice.cache.packing cimport Mapped
from cowslice.cache.slicemap cimport SliceMap
from cowslice.codec.evp cimport EvpCipher
from cowslice.image.hostread cimport IN_MEMORY, manner_of
from cowslice.image.inflated cimport InflatedClusters, Stream

cdef extern from *:
    int trailing_zeros "__builtin_ctzll"(uint64_t) noexcept nogil

cdef uint64_t COPIED = <uint64_t> 1 << 63
cdef uint64_t COMPRESSED = <uint64_t> 1 << 62
cdef uint64_t ZERO = 1
cdef uint64_t OFFSET = 0x00FFFFFFFFFFFE00
cdef uint32_t SECTOR_BITS = 9  # enciphered are sectors of 512 bytes
cdef uint64_t MAX_HOST_OFFSET = (<uint64_t> 1 << 56) - 1  # format.entries has its reason


cdef inline bint astray(uint64_t word, uint64_t offset) noexcept nogil:
    """Whether an entry of an image with a data file owns another cluster than the one at its own guest offset."""
    return (word & OFFSET or word & COPIED) and (word & OFFSET) != offset


cdef class Translation:
    """The layers of a chain as compiled code sees them: those that were added, top first.

    The storages behind the descriptors must stay open until `close` has returned.
    """

    def __cinit__(self):
        self.maps = []
        self.inflating = []
        self.ciphers = []
        self.in_memory = True

    def __dealloc__(self):
        free(self.layers)

    cdef PlainLayer *grow(self) except NULL:
        cdef PlainLayer *grown = <PlainLayer *> realloc(self.layers, (self.depth + 1) * sizeof(PlainLayer))
        if grown == NULL:
            raise MemoryError("no memory for another layer")
        self.layers = grown
        memset(&grown[self.depth], 0, sizeof(PlainLayer))
        self.depth += 1
        return &grown[self.depth - 1]

    cdef attach(self, PlainLayer *layer, data):
        layer.file.fd = -1 if data is None else data.fileno()
        layer.file.alignment = 1 if data is None else data.alignment
        layer.file.manner = manner_of(layer.file.fd, layer.file.alignment)
        self.in_memory &= layer.file.manner == IN_MEMORY

    def add_qcow2(self, SliceMap slices not None, *, uint64_t size, data, int cluster_bits, bint extended_l2, int version,
                  bint data_file, bint opaque, EvpCipher cipher=None, bint guest_sectors=False,
                  InflatedClusters inflated=None, uint32_t number=0, bint zstd=False):
        """Add a qcow2 layer of `size` guest bytes whose normal clusters lie in the storage `data`, or None.

        An `opaque` layer is read here if its `cipher` is given, which numbers sectors in the host file unless `guest_sectors`.
        Compressed clusters, of the layer `number` of `inflated`, are read here if that is given and there is no data file;
        they are deflate streams, or `zstd`.
        """
        cdef PlainLayer *layer = self.grow()
        layer.map = <void *> slices
        layer.size = size
        self.attach(layer, data)
        layer.cluster_bits = cluster_bits
        layer.extended = extended_l2
        layer.version2 = version < 3
        layer.data_file = data_file
        layer.opaque = opaque
        layer.guest_sectors = guest_sectors
        if opaque and cipher is not None:
            self.ciphers.append(cipher)
            layer.cipher = <void *> cipher
        layer.number = number
        layer.zstd = zstd
        if inflated is not None and not data_file and layer.file.fd >= 0:
            self.inflating.append(inflated)
            layer.inflated = <void *> inflated
        self.in_memory &= manner_of(slices.fd, 1) == IN_MEMORY
        self.maps.append(slices)
        self.cache = slices.cache
        self.maps_count += 1
        self.size = self.layers[0].size

    def add_raw(self, *, uint64_t size, data):
        """Add a raw layer: guest bytes are the bytes of the storage `data`."""
        cdef PlainLayer *layer = self.grow()
        layer.size = size
        self.attach(layer, data)
        self.size = self.layers[0].size

    # -- translation ------------------------------------------------------------------------------------------------

    cdef bint locate(self, uint64_t offset, uint64_t want, bint held, Target *out) noexcept nogil:
        """Find the layer that answers for `offset`, and for how much of `want`. False: not for this path.

        With the cache's lock `held` nothing is loaded: False then also means that a slice is not resident.
        """
        cdef uint32_t i
        cdef bint below
        out.layer = NULL
        out.stored = 0
        for i in range(self.depth):
            if offset >= self.layers[i].size:
                break
            if want > self.layers[i].size - offset:
                want = self.layers[i].size - offset
            if not self.in_layer(&self.layers[i], offset, &want, held, out, &below):
                return False
            if not below:
                return True
        out.length = want
        return True

    cdef void foresee(self, uint64_t offset, bint deep) noexcept nogil:
        """Begin to fetch from memory what `locate` will look at first: shallow for all of a batch, then deep for all."""
        cdef PlainLayer *top = self.layers
        if top.map != NULL and offset < top.size:
            (<SliceMap> top.map).foresee(offset >> top.cluster_bits, deep)

    cdef bint in_layer(self, PlainLayer *layer, uint64_t offset, uint64_t *want, bint held, Target *out, bint *below) noexcept nogil:
        """What one layer says of the bytes at `offset`; `want` shrinks to how far that holds."""
        cdef Mapped m
        cdef uint64_t within, cluster, clusters, reach
        cdef uint32_t run
        below[0] = False
        if layer.map == NULL:
            out.layer = layer
            out.host = offset
            out.length = want[0]
            return layer.file.fd >= 0
        within = offset & ((<uint64_t> 1 << layer.cluster_bits) - 1)
        clusters = (within + want[0] - 1 >> layer.cluster_bits) + 1
        run = <uint32_t> (clusters if clusters < 0x7FFFFFFF else 0x7FFFFFFF)
        cluster = offset >> layer.cluster_bits
        if held:
            if (<SliceMap> layer.map).peek(cluster, run, &m) != FOUND:
                return False
        elif (<SliceMap> layer.map).resolve(cluster, run, &m) != FOUND:
            return False
        if m.word & COMPRESSED:
            return self.to_stream(layer, m.word, m.bitmap, offset, want, out)
        reach = (<uint64_t> m.run << layer.cluster_bits) - within
        if reach < want[0]:
            want[0] = reach
        out.length = want[0]
        if layer.data_file and astray(m.word, offset - within):
            return False
        if layer.extended:
            return self.in_subclusters(layer, m.word, m.bitmap, offset, want, out, below)
        if m.word & ZERO:
            return not layer.version2 and m.word & OFFSET & ((<uint64_t> 1 << layer.cluster_bits) - 1) == 0
        if m.word & OFFSET or (layer.data_file and m.word & COPIED):
            return self.to_host(layer, m.word, offset, out)
        below[0] = True
        return True

    cdef bint in_subclusters(self, PlainLayer *layer, uint64_t word, uint64_t bitmap, uint64_t offset, uint64_t *want, Target *out,
                             bint *below) noexcept nogil:
        """The same for an extended entry: neighbouring subclusters of one state count as one."""
        cdef uint32_t allocated = <uint32_t> bitmap, zero = <uint32_t> (bitmap >> 32), differs
        cdef bint owned = word & OFFSET != 0 or (layer.data_file and word & COPIED != 0)
        cdef uint64_t within = offset & ((<uint64_t> 1 << layer.cluster_bits) - 1)
        cdef uint32_t first = <uint32_t> (within >> (layer.cluster_bits - 5)), count
        if allocated & zero or (allocated and not owned) or word & OFFSET & ((<uint64_t> 1 << layer.cluster_bits) - 1):
            return False
        if (allocated != 0 and ~allocated != 0) or (zero != 0 and ~zero != 0):
            differs = (allocated ^ (0 - (allocated >> first & 1))) | (zero ^ (0 - (zero >> first & 1)))
            differs >>= first
            count = trailing_zeros(differs) if differs else 32 - first
            count = (first + count << (layer.cluster_bits - 5)) - <uint32_t> within
            if count < want[0]:
                want[0] = count
            out.length = want[0]
        if allocated >> first & 1:
            return self.to_host(layer, word, offset, out)
        below[0] = not zero >> first & 1
        return True

    cdef bint to_host(self, PlainLayer *layer, uint64_t word, uint64_t offset, Target *out) noexcept nogil:
        cdef uint64_t mask = (<uint64_t> 1 << layer.cluster_bits) - 1
        if (layer.opaque and layer.cipher == NULL) or layer.file.fd < 0 or word & OFFSET & mask:
            return False
        out.layer = layer
        out.host = (word & OFFSET) + (offset & mask)
        out.sector = (offset if layer.guest_sectors else out.host) >> SECTOR_BITS
        return not layer.data_file or out.host == offset

    cdef bint to_stream(self, PlainLayer *layer, uint64_t word, uint64_t bitmap, uint64_t offset, uint64_t *want,
                        Target *out) noexcept nogil:
        """Where a compressed cluster is stored (spec: compressed clusters); it answers up to its own end."""
        cdef uint64_t size = <uint64_t> 1 << layer.cluster_bits
        cdef uint32_t shift = 70 - layer.cluster_bits
        out.host = word & ((<uint64_t> 1 << shift) - 1)
        if layer.inflated == NULL or (layer.extended and bitmap) or out.host > MAX_HOST_OFFSET:
            return False
        out.layer = layer
        out.stored = (((word & (COMPRESSED - 1)) >> shift) + 1) * 512 - (out.host & 511)
        out.skip = offset & (size - 1)
        want[0] = min(want[0], size - out.skip)
        out.length = want[0]
        return True

    cdef bint locate_own(self, uint64_t offset, uint64_t want, Target *out) noexcept nogil:
        """Find bytes that may be overwritten where they are: those of clusters that are the top layer's alone.

        In an opaque layer they must be enciphered first.
        """
        cdef PlainLayer *layer = self.layers
        cdef Mapped m
        cdef uint64_t within, reach
        cdef bint below = False
        out.layer = NULL
        if offset >= layer.size or not self.writes_in_place or layer.file.fd < 0:
            return False
        if layer.map == NULL:
            out.layer = layer
            out.host = offset
            out.length = want
            return True
        within = offset & ((<uint64_t> 1 << layer.cluster_bits) - 1)
        reach = (within + want - 1 >> layer.cluster_bits) + 1
        if (<SliceMap> layer.map).resolve(offset >> layer.cluster_bits, <uint32_t> min(reach, <uint64_t> 0x7FFFFFFF), &m) != FOUND:
            return False
        if m.word & COMPRESSED or not (m.word & COPIED or layer.data_file) or (layer.data_file and astray(m.word, offset - within)):
            return False
        reach = (<uint64_t> m.run << layer.cluster_bits) - within
        want = min(want, reach)
        out.length = want
        if layer.extended:
            if not self.in_subclusters(layer, m.word, m.bitmap, offset, &want, out, &below) or below:
                return False
        elif m.word & ZERO or not (m.word & OFFSET or m.word & COPIED) or not self.to_host(layer, m.word, offset, out):
            return False
        if out.layer == NULL:
            return False
        return layer.data_file or not self.fences.touches(out.host, out.length)
