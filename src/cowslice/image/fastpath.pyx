# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The compiled read path: translate and `pread` in one call, without the GIL, through a chain of plain layers.

It only does faster what image.reading does; whatever is not plain (encrypted, faulty, no descriptor, a stream that
InflatedClusters refuses, a read that fails) it leaves to that path by returning early, so it raises nothing of its own about an image. No lock is held
while reading.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

from cowslice.cache.packing cimport Mapped
from cowslice.cache.pthread cimport pthread_mutex_lock, pthread_mutex_unlock
from cowslice.cache.loads cimport FOUND
from cowslice.cache.slicemap cimport SliceMap
from cowslice.image.hostread cimport IN_MEMORY, File, manner_of, read_host
from cowslice.image.inflated cimport InflatedClusters, Stream

import threading

from cowslice.errors import Closed, OutOfRange, RequestError
from cowslice.image.compressed import cores

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int)

cdef extern from *:
    int trailing_zeros "__builtin_ctzll"(uint64_t) noexcept nogil
    int64_t fetch_add "__sync_fetch_and_add"(int64_t *, int64_t) noexcept nogil

cdef enum:
    CLAIM = 64              # requests that a thread of a batch takes at once

cdef uint64_t COPIED = <uint64_t> 1 << 63
cdef uint64_t COMPRESSED = <uint64_t> 1 << 62
cdef uint64_t ZERO = 1
cdef uint64_t OFFSET = 0x00FFFFFFFFFFFE00
cdef uint64_t MAX_HOST_OFFSET = (<uint64_t> 1 << 56) - 1  # format.entries has its reason


cdef inline bint astray(uint64_t word, uint64_t offset) noexcept nogil:
    """Whether an entry of an image with a data file owns another cluster than the one at its own guest offset."""
    return (word & OFFSET or word & COPIED) and (word & OFFSET) != offset


cdef class FastPath:
    """The compiled twin of image.reading over the layers that were added, top first.

    The storages behind the descriptors must stay open until `close` has returned.
    """

    def __cinit__(self):
        self.maps = []
        self.inflating = []
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
                  bint data_file, bint opaque, InflatedClusters inflated=None, uint32_t number=0):
        """Add a qcow2 layer of `size` guest bytes whose normal clusters lie in the storage `data`, or None.

        Compressed clusters, of the layer `number` of `inflated`, are read here if that is given and there is no data file.
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
        layer.number = number
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
        if layer.opaque or layer.file.fd < 0 or word & OFFSET & mask:
            return False
        out.layer = layer
        out.host = (word & OFFSET) + (offset & mask)
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

    # -- reading ----------------------------------------------------------------------------------------------------

    cdef bint read_target(self, const Target *target, uint8_t *buffer, uint64_t length) noexcept nogil:
        """Read `length` bytes, no more than the target has; False where the plain path must."""
        cdef Stream stream
        if target.layer == NULL:
            memset(buffer, 0, length)
            return True
        if not target.stored:
            return read_host(&target.layer.file, buffer, length, target.host)
        stream.layer = target.layer.number
        stream.host = target.host
        stream.stored = target.stored
        stream.size = <uint64_t> 1 << target.layer.cluster_bits
        return (<InflatedClusters> target.layer.inflated).read(&target.layer.file, &stream, target.skip, buffer, length)

    cdef uint64_t read_span(self, uint64_t offset, uint8_t *buffer, uint64_t length) noexcept nogil:
        """Read as far as this path can; returns the bytes done."""
        cdef uint64_t done = 0
        cdef Target target
        while done < length:
            if not self.locate(offset + done, length - done, False, &target):
                break
            if not self.read_target(&target, buffer + done, target.length):
                break
            done += target.length
        return done

    cdef uint64_t read_lone(self, uint64_t offset, uint8_t *buffer, uint64_t length) noexcept nogil:
        """As read_span, but several compressed clusters are left to image.reading, which inflates them on all cores."""
        cdef uint64_t done = 0
        cdef Target target
        while done < length:
            if not self.locate(offset + done, length - done, False, &target):
                break
            if target.stored and done + target.length < length:
                break
            if not self.read_target(&target, buffer + done, target.length):
                break
            done += target.length
        return done

    def read_into(self, uint64_t offset, buffer, uint64_t start=0):
        """Fill `buffer` with the guest bytes from `offset`, beginning at its byte `start`; returns where it stopped.

        That is the length of the buffer, or the first byte that image.reading has to provide. Raises OutOfRange, Closed.
        """
        cdef Py_buffer view
        cdef uint64_t done
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            if self.closed:
                raise Closed("the image is closed")
            if offset > self.size or <uint64_t> view.len > self.size - offset:
                raise OutOfRange(f"{view.len} bytes at offset {offset} reach beyond the end of the disk at {self.size}")
            if start >= <uint64_t> view.len:
                return view.len
            self.active += 1
            with nogil:
                done = start + self.read_lone(offset + start, <uint8_t *> view.buf + start, view.len - start)
            self.active -= 1
            return done
        finally:
            PyBuffer_Release(&view)

    def read_many(self, offsets, uint64_t length, out, int depth=1):
        """Read `length` bytes at each offset (a buffer of int64) into `out`, one behind the other.

        `depth` requests are under way at once, one thread each. Returns the indexes of the requests that this path could not
        finish; their bytes in `out` are unknown. Raises OutOfRange, Closed, RequestError for buffers that do not fit.
        """
        cdef Py_buffer where, into
        cdef Batch batch = Batch()
        PyObject_GetBuffer(offsets, &where, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(out, &into, PyBUF_SIMPLE | PyBUF_WRITABLE)
            try:
                self.fill_batch(batch, &where, &into, length)
                self.run_batch(batch, depth)
                return [i for i in range(batch.count) if batch.undone[i]]
            finally:
                PyBuffer_Release(&into)
        finally:
            PyBuffer_Release(&where)

    cdef fill_batch(self, Batch batch, Py_buffer *where, Py_buffer *into, uint64_t length):
        cdef int64_t i
        cdef const int64_t *offsets = <const int64_t *> where.buf
        if self.closed:
            raise Closed("the image is closed")
        if where.len % 8 or length > self.size:
            raise RequestError(f"offsets must be 64-bit integers and length at most {self.size}, not {length}")
        batch.count = where.len // 8
        if <uint64_t> into.len < batch.count * length:
            raise RequestError(f"out has {into.len} bytes, expected at least {batch.count} * {length}")
        for i in range(batch.count):
            if offsets[i] < 0 or <uint64_t> offsets[i] > self.size - length:
                raise OutOfRange(f"{length} bytes at offset {offsets[i]} reach beyond the end of the disk at {self.size}")
        batch.offsets = offsets
        batch.out = <uint8_t *> into.buf
        batch.length = length
        batch.undone = <uint8_t *> calloc(batch.count + 1, 1)
        if batch.undone == NULL:
            raise MemoryError(f"no memory for a batch of {batch.count} reads")

    def _work(self, Batch batch not None):
        with nogil:
            self.read_batch(batch)

    cdef run_batch(self, Batch batch, int depth):
        """The calling thread works too. What lies in memory never waits, so there a thread per processor does it all."""
        cdef int64_t useful = (batch.count + CLAIM - 1) // CLAIM
        if depth > 1 and self.in_memory:
            useful = min(useful, <int64_t> cores())
        threads = [threading.Thread(target=self._work, args=(batch,), daemon=True) for _ in range(1, min(depth, useful))]
        self.active += 1
        try:
            for thread in threads:
                thread.start()
            self._work(batch)
            for thread in threads:
                thread.join()
        finally:
            self.active -= 1

    cdef void read_batch(self, Batch batch) noexcept nogil:
        cdef int64_t first = fetch_add(&batch.next, CLAIM)
        while first < batch.count:
            self.read_some(batch, first, min(first + CLAIM, batch.count))
            first = fetch_add(&batch.next, CLAIM)

    cdef void read_some(self, Batch batch, int64_t first, int64_t end) noexcept nogil:
        """Translate what is resident under one lock, then read; the rest goes one by one."""
        cdef Target targets[CLAIM]
        cdef Target *target
        cdef uint8_t *out
        cdef int64_t i
        self.locate_some(batch, first, end, targets)
        for i in range(first, end):
            target = &targets[i - first]
            out = batch.out + i * batch.length
            if target.length < batch.length:
                batch.undone[i] = self.read_lone(batch.offsets[i], out, batch.length) < batch.length
            else:
                batch.undone[i] = not self.read_target(target, out, batch.length)

    cdef void locate_some(self, Batch batch, int64_t first, int64_t end, Target *targets) noexcept nogil:
        """A target's length is 0 where it could not be told at once."""
        cdef int64_t i
        cdef uint32_t deep
        if self.maps_count:
            pthread_mutex_lock(&self.cache.lock)
        for deep in range(2):
            for i in range(first, end):
                self.foresee(batch.offsets[i], deep)
        for i in range(first, end):
            if not self.locate(batch.offsets[i], batch.length, True, &targets[i - first]):
                targets[i - first].length = 0
        if self.maps_count:
            pthread_mutex_unlock(&self.cache.lock)

    def close(self):
        """Refuse new reads and wait for those under way."""
        self.closed = True
        while self.active:
            with nogil:
                usleep(200)


cdef class Batch:
    def __dealloc__(self):
        free(self.undone)
