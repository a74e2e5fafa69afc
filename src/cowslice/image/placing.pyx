# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Writing to clusters that are not there yet, as far as that is plain: nothing is dropped, enciphered or inflated by Python.

It does faster what image.writing does and leaves the rest to it, so it raises nothing about an image. Inside the passage
only. What must hold: guest clusters are claimed from plan to end; an entry is shown in an L2 table that is the image's
alone, and after its bytes were written (with the first barrier this is I2).
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from cowslice.cache.forms cimport COPIED, MAX_ENTRIES, OFFSET, ZERO, Mapped, bswap64
from cowslice.cache.loads cimport FOUND
from cowslice.cache.slicemap cimport SliceMap
from cowslice.image.claims cimport Claims
from cowslice.image.dirtybits cimport Marks
from cowslice.image.enciphered cimport read_enciphered, write_enciphered
from cowslice.image.hostread cimport iovec, read_host, reads_as_hole, write_parts
from cowslice.image.inflated cimport InflatedClusters, Stream
from cowslice.image.supply cimport Supply
from cowslice.image.translation cimport PlainLayer, Target, Translation

import _thread

cdef enum:
    MOST_CLUSTERS = MAX_ENTRIES # that are placed at once: those of one slice at most
    MOST_ZEROS = 64 * 1024      # more of them are left to the file system, by image.writing
    ALL_SUBCLUSTERS = 0xFFFFFFFF
    SECTOR = 512                # what is enciphered at once


cdef class Placing(Translation):
    """Reads what stands beside a write, and puts both into new clusters or into subclusters that are not there yet."""

    def __cinit__(self):
        self.marks = Marks()

    def supply_writes(self, Claims claims not None, Supply supply not None, provider not None):
        """Let new clusters be written here, taken from `supply`, guest clusters being claimed in `claims`.

        `provider(cluster)` sees to it that the L2 table of a guest cluster is the image's alone and its slice dirty, and
        stocks the supply; whether that worked. What it raises is met again, and raised, by image.writing.
        """
        self.claims = claims
        self.supply = supply
        self.provider = provider

    # -- reading ----------------------------------------------------------------------------------------------------

    cdef bint read_target(self, const Target *target, uint8_t *buffer, uint64_t length) noexcept nogil:
        """Read `length` bytes, no more than the target has; False where the plain path must."""
        cdef Stream stream
        if target.layer == NULL:
            memset(buffer, 0, length)
            return True
        if not target.stored and target.layer.opaque:
            return read_enciphered(target, buffer, length)
        if not target.stored:
            return read_host(&target.layer.file, buffer, length, target.host)
        stream.layer = target.layer.number
        stream.host = target.host
        stream.stored = target.stored
        stream.size = <uint64_t> 1 << target.layer.cluster_bits
        stream.zstd = target.layer.zstd
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

    # -- planning ---------------------------------------------------------------------------------------------------

    cdef uint64_t place(self, uint64_t offset, const uint8_t *buffer, uint64_t length) noexcept nogil:
        """Write as many bytes from `offset` on as are placed alike; 0 where the plain path must."""
        cdef PlainLayer *layer = self.layers
        cdef uint64_t first, end
        cdef Place place
        cdef bint fine = False
        place.start = offset
        place.end = offset + length
        if not self.can_place(layer, offset, length):
            return 0
        first = offset >> layer.cluster_bits
        end = min((place.end - 1 >> layer.cluster_bits) + 1, (<SliceMap> layer.map).end_of_slice(first))
        if not self.plan(layer, first, end - first, &place) or not self.make_ready(layer, first):
            return 0
        if not self.claims.seize(first, end):
            return 0
        place.end = offset + length
        if self.plan(layer, first, end - first, &place):  # again: only now nobody else changes it
            fine = self.place_claimed(layer, &place, buffer)
        self.claims.release(first, end)
        return place.end - offset if fine else 0

    cdef bint can_place(self, PlainLayer *layer, uint64_t offset, uint64_t length) noexcept nogil:
        return (layer.map != NULL and self.supply is not None and self.writes_in_place and not layer.data_file
                and (not layer.opaque or self.can_encipher(layer, offset, length))
                and layer.file.fd >= 0 and layer.file.alignment == 1)

    cdef bint can_encipher(self, PlainLayer *layer, uint64_t offset, uint64_t length) noexcept nogil:
        """Whether these are whole sectors of an opaque layer whose cipher is compiled."""
        return layer.cipher != NULL and self.claims is not None and (offset | length) % SECTOR == 0

    cdef bint plan(self, PlainLayer *layer, uint64_t cluster, uint64_t most, Place *place) noexcept nogil:
        """How up to `most` clusters from the first take their bytes; `place.end` shrinks to what is alike."""
        cdef Mapped m
        if (<SliceMap> layer.map).resolve(cluster, <uint32_t> most, &m) != FOUND:
            return False
        place.ours = self.is_ours(layer, &m)
        if not place.ours and not self.is_plain(layer, &m):
            return False
        place.count = 1 if place.ours else min(most, <uint64_t> m.run)
        place.end = min(place.end, cluster + place.count << layer.cluster_bits)
        place.count = (place.end - 1 >> layer.cluster_bits) + 1 - cluster
        place.host = m.word & OFFSET
        place.allocated = <uint32_t> m.bitmap
        place.zero = <uint32_t> (m.bitmap >> 32) if layer.extended else 0
        return not place.allocated & place.zero

    cdef bint is_plain(self, PlainLayer *layer, const Mapped *m) noexcept nogil:
        """Is nothing stored there, so that a new cluster takes nobody's place?"""
        if layer.extended:
            return m.word == 0 and <uint32_t> m.bitmap == 0
        return m.word == 0 or (m.word == ZERO and not layer.version2)

    cdef bint is_ours(self, PlainLayer *layer, const Mapped *m) noexcept nogil:
        """Is there a cluster of the image's alone, with subclusters that nothing was written to?"""
        cdef uint64_t size = <uint64_t> 1 << layer.cluster_bits
        return (layer.extended and m.word & COPIED != 0 and m.word & OFFSET != 0 and not m.word & ~(COPIED | OFFSET)
                and not m.word & OFFSET & (size - 1) and not self.fences.touches(m.word & OFFSET, size))

    # -- what must be there before ----------------------------------------------------------------------------------

    cdef bint make_ready(self, PlainLayer *layer, uint64_t cluster) noexcept nogil:
        return self.is_ready(layer, cluster) or (self.provide(cluster) and self.is_ready(layer, cluster))

    cdef bint is_ready(self, PlainLayer *layer, uint64_t cluster) noexcept nogil:
        """Who made a slice dirty made its table the image's alone, which it is until all who are inside have left."""
        return self.supply.has_some() and (<SliceMap> layer.map).is_dirty(cluster)

    cdef bint provide(self, uint64_t cluster) noexcept with gil:
        try:
            self.provider(cluster)
            return True
        except KeyboardInterrupt:
            _thread.interrupt_main()  # it is not lost: raised again where Python goes on
        except BaseException:
            pass
        return False

    # -- doing it ---------------------------------------------------------------------------------------------------

    cdef bint place_claimed(self, PlainLayer *layer, Place *place, const uint8_t *buffer) noexcept nogil:
        """Take clusters, as many as follow each other, write and show them; `place.end` may shrink."""
        cdef uint64_t first = place.start >> layer.cluster_bits, taken = 0, start = 0
        place.fresh = False
        if not place.ours:
            start = self.supply.take(place.count, &taken, &place.fresh)
            if taken == 0:
                return False
            place.count = taken
            place.end = min(place.end, first + taken << layer.cluster_bits)
            place.host = start << layer.cluster_bits
        if self.marks.count:
            self.marks.mark(place.start, place.end - place.start)
        if self.put(layer, place, buffer) and self.show(layer, place):
            return True
        if taken:
            self.supply.give_back(start, taken)
        return False

    cdef bint put(self, PlainLayer *layer, Place *place, const uint8_t *buffer) noexcept nogil:
        """The new bytes and what must stand beside them, in one write unless they are enciphered."""
        cdef iovec parts[3]
        cdef void *head
        cdef void *tail
        cdef uint64_t begin, cluster = place.start >> layer.cluster_bits << layer.cluster_bits
        cdef bint fine, blank = place.fresh and not layer.opaque  # what was never written deciphers to noise
        parts[0].iov_base = parts[2].iov_base = NULL
        fine = (self.keep(self.kept_from(layer, place), place.start, blank, &parts[0])
                and self.keep(place.end, self.kept_to(layer, place), blank, &parts[2]))
        head, tail = parts[0].iov_base, parts[2].iov_base
        if fine:
            parts[1].iov_base = <void *> buffer
            parts[1].iov_len = place.end - place.start
            begin = place.start - parts[0].iov_len
            fine = self.put_parts(layer, parts, begin, place.host + begin - cluster)
        free(head)
        free(tail)
        return fine

    cdef bint put_parts(self, PlainLayer *layer, iovec *parts, uint64_t guest, uint64_t host) noexcept nogil:
        """Write three parts, one behind the other, where a cluster of the layer lies."""
        cdef uint64_t done = 0
        cdef int i
        if not layer.opaque:
            return write_parts(layer.file.fd, parts, 3, host)
        for i in range(3):
            if not write_enciphered(layer, <const uint8_t *> parts[i].iov_base, parts[i].iov_len, host + done, guest + done):
                return False
            done += parts[i].iov_len
        return True

    cdef uint64_t kept_from(self, PlainLayer *layer, Place *place) noexcept nogil:
        """Where the (sub)cluster of the first byte begins, unless it is there already."""
        cdef uint32_t bits = layer.cluster_bits - 5 if layer.extended else layer.cluster_bits
        cdef uint32_t number = <uint32_t> (place.start >> bits) & 31
        return place.start if layer.extended and place.allocated >> number & 1 else place.start >> bits << bits

    cdef uint64_t kept_to(self, PlainLayer *layer, Place *place) noexcept nogil:
        """Where that of the last byte ends."""
        cdef uint32_t bits = layer.cluster_bits - 5 if layer.extended else layer.cluster_bits
        cdef uint32_t number = <uint32_t> (place.end - 1 >> bits) & 31
        return place.end if layer.extended and place.allocated >> number & 1 else (place.end - 1 >> bits) + 1 << bits

    cdef bint keep(self, uint64_t start, uint64_t end, bint fresh, iovec *part) noexcept nogil:
        """The old bytes of a span, none where a fresh cluster says zeros by itself. Behind the end of the disk are zeros."""
        cdef uint64_t size = self.layers[0].size
        cdef uint64_t inside = min(end, size) - start if start < size else 0
        cdef bint zeros = start < end and self.reads_as_zeros(start, inside)
        cdef uint8_t *old
        part.iov_base = NULL
        part.iov_len = 0
        if start >= end or (zeros and fresh):
            return True
        if zeros and end - start > MOST_ZEROS:
            return False
        old = <uint8_t *> malloc(end - start)
        if old == NULL:
            return False
        part.iov_base = old
        part.iov_len = end - start
        memset(old if zeros else old + inside, 0, end - start if zeros else end - start - inside)
        return zeros or self.read_span(start, old, inside) == inside

    cdef bint reads_as_zeros(self, uint64_t start, uint64_t length) noexcept nogil:
        """Whether that is known of all bytes without reading them."""
        cdef Target target
        if length == 0:
            return True
        if not self.locate(start, length, False, &target) or target.length < length or target.stored:
            return False
        if target.layer == NULL:
            return True
        return not target.layer.opaque and reads_as_hole(target.layer.file.fd, target.host, length)

    cdef bint show(self, PlainLayer *layer, Place *place) noexcept nogil:
        """Store the entries that the clusters have now."""
        cdef uint64_t entries[2 * MOST_CLUSTERS]
        cdef uint64_t first = place.start >> layer.cluster_bits, size = <uint64_t> 1 << layer.cluster_bits, i, ignored
        cdef uint32_t touched, bits = layer.cluster_bits - 5
        for i in range(place.count):
            if not layer.extended:
                entries[i] = bswap64(place.host + i * size | COPIED)
                continue
            touched = ALL_SUBCLUSTERS
            if i == 0:
                touched &= <uint32_t> ALL_SUBCLUSTERS << ((place.start >> bits) & 31)
            if i == place.count - 1:
                touched &= <uint32_t> ALL_SUBCLUSTERS >> (31 - ((place.end - 1 >> bits) & 31))
            entries[2 * i] = bswap64(place.host + i * size | COPIED)
            entries[2 * i + 1] = bswap64(<uint64_t> (place.zero & ~touched) << 32 | place.allocated | touched)
        return (<SliceMap> layer.map).store_entries(first, <const uint8_t *> entries, place.count, &ignored) == FOUND
