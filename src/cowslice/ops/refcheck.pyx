# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Reference counting over whole L2 tables, without the GIL: one call per table or refcount block, never per entry.

It does not know what a finding is: whatever breaks a rule is handed back by index and judged in plain Python.
Counts live in one window of host clusters at a time, so memory stays the same for any image.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

cdef extern from "<endian.h>" nogil:
    uint64_t be64toh(uint64_t word)
    uint32_t be32toh(uint32_t word)
    uint16_t be16toh(uint16_t word)
    uint64_t htobe64(uint64_t word)
    uint32_t htobe32(uint32_t word)
    uint16_t htobe16(uint16_t word)

cdef extern from * nogil:
    uint32_t __atomic_load_n(uint32_t *slot, int order)
    bint __sync_bool_compare_and_swap(uint32_t *slot, uint32_t old, uint32_t new)

# Format section "Cluster descriptors": bit 63 copied, 62 compressed, 9-55 offset, 0 zero, the rest reserved.
cdef uint64_t COPIED = <uint64_t>1 << 63
cdef uint64_t COMPRESSED = <uint64_t>1 << 62
cdef uint64_t OFFSET = <uint64_t>0x00FFFFFFFFFFFE00
cdef uint64_t RESERVED = <uint64_t>0x3F000000000001FE
cdef uint64_t ZERO = 1
cdef uint64_t LOW = 0xFFFFFFFF

cdef uint32_t UNREADABLE_COUNT = 0xFFFFFFFE
UNREADABLE = UNREADABLE_COUNT
SATURATED = 0xFFFFFFFF


cdef struct Rules:
    int cluster_bits
    bint extended
    bint data_file
    bint active
    bint shared
    uint64_t eof  # host clusters of the file
    uint64_t bad  # bits that no standard entry may have

    uint64_t file_length
    uint64_t times
    uint64_t visits  # of the active disk
    uint64_t copied  # of those, the visits whose copied flags are held against refcounts
    uint64_t described  # host clusters that refcount blocks could describe; 0: judge nothing here

cdef struct Seen:
    uint64_t allocated
    uint64_t compressed
    uint64_t fragmented
    uint64_t faults


cdef class Trail:
    """How far the clusters of overlapping tables follow each other, from one piece to the next.

    `follows`: where the next cluster lies if it is not a fragment; `fresh`: visits that began behind the last cluster.
    """

    cdef public uint64_t follows
    cdef public uint64_t fresh


cdef inline uint64_t _count(uint32_t *slot, uint64_t limit, uint64_t times, bint shared) noexcept nogil:
    """Add references as far as the refcount width goes. Returns how many are beyond it."""
    cdef uint32_t old
    cdef uint64_t new
    if not shared:
        new = min(slot[0] + times, limit)
        times -= new - slot[0]
        slot[0] = <uint32_t>new
        return times
    while True:
        old = __atomic_load_n(slot, 0)
        new = min(old + times, limit)
        if new == old or __sync_bool_compare_and_swap(slot, old, <uint32_t>new):
            return times - (new - old)


cdef inline uint32_t _stored_at(const uint8_t *block, uint64_t i, int order) noexcept nogil:
    cdef uint64_t wide
    if order == 4:
        return be16toh((<const uint16_t *>block)[i])
    if order == 3:
        return block[i]
    if order == 5:
        wide = be32toh((<const uint32_t *>block)[i])
    elif order == 6:
        wide = be64toh((<const uint64_t *>block)[i])
    else:
        return (block[(i << order) >> 3] >> ((i << order) & 7)) & ((1 << (1 << order)) - 1)
    return <uint32_t>wide if wide < UNREADABLE_COUNT else 0xFFFFFFFF


cdef inline void _store_at(uint8_t *block, uint64_t i, int order, uint32_t count) noexcept nogil:
    cdef int shift = (i << order) & 7, mask = (1 << (1 << order)) - 1 if order < 3 else 0
    if order == 4:
        (<uint16_t *>block)[i] = htobe16(<uint16_t>count)
    elif order == 3:
        block[i] = <uint8_t>count
    elif order == 5:
        (<uint32_t *>block)[i] = htobe32(count)
    elif order == 6:
        (<uint64_t *>block)[i] = htobe64(count)
    else:
        block += (i << order) >> 3
        block[0] = <uint8_t>((block[0] & ~(mask << shift)) | (count << shift))


cdef class Tally:
    """Two counts for each host cluster of a window: references found, and the refcount stored on disk."""

    cdef uint32_t *counted
    cdef uint32_t *stored
    cdef uint32_t limit
    cdef uint64_t clusters_passed[2]
    cdef uint64_t runs_passed[2]
    cdef readonly uint64_t first
    cdef readonly uint64_t clusters

    def __cinit__(self, first, clusters, limit):
        self.first = first
        self.clusters = clusters
        self.limit = min(limit, 0x7FFFFFFF)
        self.counted = <uint32_t *>calloc(max(1, clusters), 4)
        self.stored = <uint32_t *>calloc(max(1, clusters), 4)
        if self.counted == NULL or self.stored == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.counted)
        free(self.stored)

    def load(self, uint64_t cluster, block, int order):
        """Take the stored refcounts of a block whose first entry describes `cluster`; `order` is log2 of their bits."""
        cdef Py_buffer view
        cdef uint64_t i, entries, start, end
        PyObject_GetBuffer(block, &view, PyBUF_SIMPLE)
        try:
            entries = (<uint64_t>view.len << 3) >> order
            start = max(cluster, self.first)
            end = min(cluster + entries, self.first + self.clusters)
            with nogil:
                i = start
                while i < end:
                    self.stored[i - self.first] = _stored_at(<const uint8_t *>view.buf, i - cluster, order)
                    i += 1
        finally:
            PyBuffer_Release(&view)

    def unreadable(self, uint64_t cluster, uint64_t clusters):
        """Mark clusters whose stored refcount cannot be known. Returns how many of them lie in the window."""
        cdef uint64_t i = max(cluster, self.first)
        cdef uint64_t end = min(cluster + clusters, self.first + self.clusters)
        cdef uint64_t marked = max(i, end) - i
        while i < end:
            self.stored[i - self.first] = UNREADABLE_COUNT
            i += 1
        return marked

    def add(self, uint64_t cluster, uint64_t clusters=1, uint64_t times=1):
        """Count references to each cluster of a run that lies in the window.

        Returns how many are beyond the refcount width, and the first cluster that has such.
        """
        cdef uint64_t i = max(cluster, self.first)
        cdef uint64_t end = min(cluster + clusters, self.first + self.clusters)
        cdef uint64_t beyond, excess = 0, overflowed = 0
        with nogil:
            while i < end:
                beyond = _count(self.counted + (i - self.first), self.limit, times, True)
                if beyond:
                    if not excess:
                        overflowed = i
                    excess += beyond
                i += 1
        return excess, overflowed

    def get(self, uint64_t cluster):
        """(stored, counted) of a cluster in the window."""
        if cluster - self.first >= self.clusters:
            raise IndexError(cluster)
        return self.stored[cluster - self.first], self.counted[cluster - self.first]

    def mismatch(self, uint64_t cluster, *, bint leaks=True, bint corruptions=True):
        """The next run whose two counts differ in the same way: (cluster, clusters, stored, counted), or None.

        Runs of a kind that is not wanted are passed over and only counted: `passed` has their clusters and their number
        since the tally was made, first of the leaks (stored counts too high), then of the corruptions.
        """
        cdef uint64_t i = max(cluster, self.first) - self.first
        cdef uint64_t start
        cdef bint leak
        with nogil:
            while True:
                while i < self.clusters and (self.stored[i] == self.counted[i] or self.stored[i] == UNREADABLE_COUNT):
                    i += 1
                start = i
                while i < self.clusters and self.stored[i] == self.stored[start] and self.counted[i] == self.counted[start]:
                    i += 1
                if start >= self.clusters:
                    break
                leak = self.stored[start] > self.counted[start]
                if leaks if leak else corruptions:
                    break
                self.clusters_passed[not leak] += i - start
                self.runs_passed[not leak] += 1
        if start >= self.clusters:
            return None
        return start + self.first, i - start, self.stored[start], self.counted[start]

    def put(self, uint64_t cluster, block, int order, *, bint up=False, bint down=False, bint fresh=False):
        """Write counted references into a block whose first entry describes `cluster`: (entries changed, from zero).

        `up`: where the stored count is too low; `down`: too high; `fresh`: all that are not zero, whatever is stored.
        """
        cdef Py_buffer view
        cdef uint64_t i = max(cluster, self.first), end, changed = 0, risen = 0, stored, counted
        PyObject_GetBuffer(block, &view, PyBUF_WRITABLE)
        end = min(cluster + ((<uint64_t>view.len << 3) >> order), self.first + self.clusters)
        with nogil:
            while i < end:
                stored, counted = self.stored[i - self.first], self.counted[i - self.first]
                if (counted != 0 if fresh else stored != UNREADABLE_COUNT
                        and ((up and counted > stored) or (down and counted < stored))):
                    _store_at(<uint8_t *>view.buf, i - cluster, order, <uint32_t>counted)
                    changed += 1
                    risen += stored == 0
                i += 1
        PyBuffer_Release(&view)
        return changed, risen

    @property
    def passed(self):
        """((clusters, runs) of leaks, (clusters, runs) of corruptions) that `mismatch` passed over."""
        return tuple((self.clusters_passed[kind], self.runs_passed[kind]) for kind in range(2))

    def highest(self):
        """The highest cluster that is counted or referenced, or -1."""
        cdef uint64_t i = self.clusters
        with nogil:
            while i > 0 and ((self.stored[i - 1] == 0 and self.counted[i - 1] == 0)
                             or self.stored[i - 1] == UNREADABLE_COUNT):
                i -= 1
        return <object>(i + self.first) - 1 if i else -1

    cdef bint _compressed(self, const Rules *rules, Seen *seen, uint64_t word, uint64_t bitmap, Py_ssize_t i,
                          list overflowed) noexcept nogil:
        """Count a compressed entry; False when it breaks a rule."""
        cdef int place = 70 - rules.cluster_bits
        cdef uint64_t offset = word & ((<uint64_t>1 << place) - 1)
        cdef uint64_t k = offset >> rules.cluster_bits
        cdef uint64_t last = ((offset | 511) + 512 * ((word & ~(COPIED | COMPRESSED)) >> place)) >> rules.cluster_bits
        if rules.data_file or bitmap:
            return False
        seen.allocated += rules.visits
        seen.compressed += rules.visits
        seen.fragmented += rules.visits
        if last >= rules.eof or word & COPIED:
            return False
        while k <= last:
            self._reference(rules, seen, k, i, overflowed)
            k += 1
        return True

    cdef bint _standard(self, const Rules *rules, Seen *seen, Trail trail, uint64_t word, uint64_t bitmap,
                        Py_ssize_t i, list overflowed) noexcept nogil:
        """Count a standard or extended entry; False when it breaks a rule."""
        cdef uint64_t offset = word & OFFSET
        cdef uint64_t k = offset >> rules.cluster_bits
        cdef uint32_t stored
        if offset == 0 and not (rules.data_file and word & COPIED and (rules.extended or not word & ZERO)):
            return not (word & RESERVED or bitmap & LOW)
        seen.allocated += rules.visits
        if trail.follows and trail.follows != offset and rules.visits > trail.fresh:
            seen.fragmented += rules.visits - trail.fresh
        trail.follows = offset + (<uint64_t>1 << rules.cluster_bits)
        trail.fresh = 0
        if word & rules.bad or (bitmap >> 32) & bitmap:
            return False
        if rules.data_file:
            return not rules.active or word & COPIED
        if k >= rules.eof:
            return False
        if k - self.first >= self.clusters:
            return True
        stored = self.stored[k - self.first]
        if rules.active and (stored == 1) != (word >= COPIED) and stored != UNREADABLE_COUNT:
            return False
        self._reference(rules, seen, k, i, overflowed)
        return True

    cdef inline void _reference(self, const Rules *rules, Seen *seen, uint64_t k, Py_ssize_t i,
                                list overflowed) noexcept nogil:
        cdef uint64_t beyond
        if k - self.first < self.clusters:
            beyond = _count(self.counted + (k - self.first), self.limit, rules.times, rules.shared)
            if beyond and rules.described:
                seen.faults += beyond
            elif beyond:
                with gil:
                    overflowed.append((i, k, beyond))

    cdef bint _is_judged_here(self, const Rules *rules, uint64_t word) noexcept nogil:
        """Whether an entry concerns this window: all or some of its span lies in it, or behind the file."""
        cdef int place = 70 - rules.cluster_bits
        cdef uint64_t k = word & OFFSET
        cdef uint64_t last = (k + (<uint64_t>1 << rules.cluster_bits) - 1) >> rules.cluster_bits
        if word & COMPRESSED:
            k = word & ((<uint64_t>1 << place) - 1)
            last = ((k | 511) + 512 * ((word & ~(COPIED | COMPRESSED)) >> place)) >> rules.cluster_bits
        k >>= rules.cluster_bits
        return (last >= self.first and k < self.first + self.clusters) or (self.first == 0 and k > rules.eof)

    cdef bint _judge(self, const Rules *rules, Seen *seen, uint64_t word, uint64_t bitmap, Py_ssize_t i,
                     list overflowed) noexcept nogil:
        """Count an entry that breaks a rule, and its faults, as l2rules.judge_entry has them; False if it cannot."""
        cdef uint64_t cluster = <uint64_t>1 << rules.cluster_bits
        cdef int place = 70 - rules.cluster_bits
        cdef uint64_t offset = word & OFFSET, end = offset + cluster, faults = 0, flawed = 0
        cdef uint64_t k, last
        cdef uint32_t stored = 1
        cdef bint counts = not rules.data_file
        if word & COMPRESSED:
            offset = word & ((<uint64_t>1 << place) - 1)
            end = (offset | 511) + 1 + 512 * ((word & ~(COPIED | COMPRESSED)) >> place)
            faults = word >> 63
            counts = counts and not bitmap
            faults += not counts
        elif offset == 0 and not (rules.data_file and word & COPIED and (rules.extended or not word & ZERO)):
            faults = (word & RESERVED != 0) + (bitmap & LOW != 0)
            counts = False
        else:
            k = offset >> rules.cluster_bits
            if not rules.data_file and rules.copied:
                if k - self.first < self.clusters:
                    stored = self.stored[k - self.first]
                elif k < rules.described:
                    return False
                else:
                    stored = 0
            faults = (word & RESERVED != 0) + ((bitmap >> 32) & bitmap != 0) + (offset & (cluster - 1) != 0)
            if stored != UNREADABLE_COUNT and (stored == 1) != (word >= COPIED):
                flawed = rules.copied
        k, last = offset >> rules.cluster_bits, (end - 1) >> rules.cluster_bits
        if counts and end >= rules.file_length + cluster:
            faults += 1
            counts = False
        if k - self.first < self.clusters or (self.first == 0 and k > rules.eof):
            seen.faults += faults * rules.times + flawed
        while counts and k <= last:
            self._reference(rules, seen, k, i, overflowed)
            k += 1
        return True

    def scan(self, table, *, int cluster_bits, bint extended, bint data_file, uint64_t file_length, bint active,
             bint shared, uint64_t times=1, uint64_t visits=1, uint64_t copied=0, uint64_t described=0,
             Trail trail=None):
        """Count what an L2 table, or a piece of one, refers to in this window, `times` times.

        Returns (odd, overflowed, allocated, compressed, fragmented, faults): the indexes of entries that break a rule and
        concern this window, which were *not* counted and are for the caller to judge; (index, cluster, references)
        beyond the refcount width; and three totals over all entries, `visits` times. `active`: hold the copied flag
        against the stored refcount. `shared`: other threads count into this object now.

        With `described`, the number of host clusters that the refcount table could describe, odd entries are judged and
        counted here as well, as far as possible, and nobody learns which they were: `faults` is how many rules they
        break, `copied` times where it is the copied flag, else `times` times, and how many references overflow.
        """
        cdef Py_buffer view
        cdef Py_ssize_t i, n, step = 2 if extended else 1
        cdef uint64_t word, bitmap = 0, cluster = <uint64_t>1 << cluster_bits
        cdef const uint64_t *words
        cdef list odd = [], overflowed = []
        cdef bint right
        cdef Trail path = Trail() if trail is None else trail
        cdef Seen seen = Seen(0, 0, 0, 0)
        cdef Rules rules = Rules(cluster_bits, extended, data_file, active, shared,
                                 (file_length + cluster - 1) >> cluster_bits, RESERVED | (OFFSET & (cluster - 1)),
                                 file_length, times, visits, copied, described)
        PyObject_GetBuffer(table, &view, PyBUF_SIMPLE)
        words = <const uint64_t *>view.buf
        n = view.len // (8 * step)
        with nogil:
            for i in range(n):
                word = be64toh(words[i * step])
                if extended:
                    bitmap = be64toh(words[i * step + 1])
                if word == 0 and bitmap == 0:
                    continue
                if word & COMPRESSED:
                    right = self._compressed(&rules, &seen, word, bitmap, i, overflowed)
                else:
                    right = self._standard(&rules, &seen, path, word, bitmap, i, overflowed)
                if right or not self._is_judged_here(&rules, word):
                    continue
                if described and self._judge(&rules, &seen, word, bitmap, i, overflowed):
                    continue
                with gil:
                    odd.append(i)
        PyBuffer_Release(&view)
        return odd, overflowed, seen.allocated, seen.compressed, seen.fragmented, seen.faults


cdef class Owners:
    """One bit for each host cluster: it has one owner. For images in which none has two, which is most of them."""

    cdef uint64_t *bits
    cdef readonly uint64_t clusters

    def __cinit__(self, clusters):
        self.clusters = clusters
        self.bits = <uint64_t *>calloc(clusters // 64 + 1, 8)
        if self.bits == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.bits)

    cdef bint _own(self, uint64_t cluster) noexcept nogil:
        cdef uint64_t bit = <uint64_t>1 << (cluster & 63)
        if cluster >= self.clusters or self.bits[cluster >> 6] & bit:
            return False
        self.bits[cluster >> 6] |= bit
        return True

    def own(self, uint64_t cluster, uint64_t clusters=1):
        """Give a run of clusters an owner; False when one of them has an owner already or lies outside."""
        cdef uint64_t k
        for k in range(cluster, cluster + clusters):
            if not self._own(k):
                return False
        return True

    def scan(self, table, *, int cluster_bits):
        """Own what a whole standard L2 table refers to: (allocated, fragmented).

        None when an entry is anything but unallocated, zero, or sole owner of an aligned cluster that says so.
        """
        cdef Py_buffer view
        cdef Py_ssize_t i, n
        cdef uint64_t word, offset, follows = 0, allocated = 0, fragmented = 0
        cdef uint64_t bad = RESERVED | COMPRESSED | (OFFSET & ((<uint64_t>1 << cluster_bits) - 1))
        cdef const uint64_t *words
        cdef bint sound = True
        PyObject_GetBuffer(table, &view, PyBUF_SIMPLE)
        words = <const uint64_t *>view.buf
        n = view.len // 8
        with nogil:
            for i in range(n):
                word = be64toh(words[i])
                if word == 0 or word == ZERO:
                    continue
                offset = word & OFFSET
                if word & bad or offset == 0 or not word & COPIED or not self._own(offset >> cluster_bits):
                    sound = False
                    break
                allocated += 1
                if follows and follows != offset:
                    fragmented += 1
                follows = offset + (<uint64_t>1 << cluster_bits)
        PyBuffer_Release(&view)
        return (allocated, fragmented) if sound else None

    def agree(self, uint64_t cluster, uint64_t clusters, block, int order):
        """Whether the refcounts of this many clusters from `cluster` on are 1 for what has an owner and else 0.

        `block` None stands for zeros. Clusters outside are passed over.
        """
        cdef Py_buffer view
        cdef uint64_t k, last = min(cluster + clusters, self.clusters)
        cdef uint32_t stored = 0
        cdef const uint8_t *counts = NULL
        if block is not None:
            PyObject_GetBuffer(block, &view, PyBUF_SIMPLE)
            counts = <const uint8_t *>view.buf
            last = min(last, cluster + (<uint64_t>view.len << 3 >> order))
        with nogil:
            k = cluster
            while k < last:
                if counts != NULL:
                    stored = _stored_at(counts, k - cluster, order)
                if stored != (self.bits[k >> 6] >> (k & 63) & 1):
                    break
                k += 1
        if block is not None:
            PyBuffer_Release(&view)
        return k >= last

    def highest(self):
        """The highest cluster that has an owner, or -1."""
        cdef uint64_t k = self.clusters
        while k > 0 and not self.bits[(k - 1) >> 6] >> ((k - 1) & 63) & 1:
            k -= 1
        return <object>k - 1
