# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The half of a map that reads: which slices a metadata read brings, the read itself, and what becomes of it.

It does not know what is asked of the map, nor what is stored to it. What must hold: the lock of the cache is never kept
across I/O or while waiting for the GIL; a slice that loads is read once, whoever waits; what was read while its table
was exchanged is not published.
"""

from cpython.exc cimport PyErr_SetInterrupt
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from cowslice.cache.directory cimport (
    ABSENT, DIRTY, INLINE, LEAF_WORDS, LOADING, PACKED, STATE, Leaf, Slice, inline_word, make_slice, read_inline, read_slice, slice_of)
from cowslice.cache.dirty cimport DirtySlice, dirty_of, entries_of, make_dirty, read_dirty
from cowslice.cache.forms cimport OFFSET, Mapped, bswap64, trailing_zeros
from cowslice.cache.policy cimport AHEAD, DEMANDED, USED, WARMED, Arrival
from cowslice.cache.pthread cimport pthread_cond_broadcast, pthread_cond_wait, pthread_mutex_lock, pthread_mutex_unlock
from cowslice.cache.slicecache cimport Counters, SliceCache
from cowslice.cache.streams cimport most_groups, room_beside, stream_at, within_table

from cowslice.errors import BadOption, CorruptImage, StorageError

cimport cython

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buffer, size_t count, long offset)

cdef extern from "<malloc.h>" nogil:
    void *memalign(size_t alignment, size_t size)


cdef inline void free_words(Load *job, uint32_t end) noexcept nogil:
    """Give back the slices that a job made but will not publish."""
    cdef uint32_t i
    for i in range(end):
        if job.words[i] & STATE == PACKED:
            free(slice_of(job.words[i]))
        elif job.words[i] & STATE == DIRTY:
            free(dirty_of(job.words[i]))


cdef uint64_t *decode_l1(bytes table) except NULL:
    """The entries of a big-endian L1 table as host offsets of L2 tables; free() ends them."""
    cdef const uint8_t *raw = table
    cdef uint64_t i, word, entries = <uint64_t> len(table) // 8
    cdef uint64_t *decoded = <uint64_t *> malloc(entries * 8 or 8)
    if decoded == NULL:
        raise MemoryError(f"no memory for an L1 table of {entries} entries")
    for i in range(entries):
        memcpy(&word, raw + 8 * i, 8)
        decoded[i] = bswap64(word) & OFFSET  # reserved bits do not change a meaning, as for QEMU
    return decoded


# Not cleared by the garbage collector: __dealloc__ still needs the cache.
@cython.no_gc_clear
cdef class Loads:
    """An L1 table in memory, and the reads that bring slices of its L2 tables into the shared cache."""

    def __cinit__(self, SliceCache cache not None, *, int cluster_bits, bint extended_l2, bytes l1 not None,
                  uint64_t clusters, uint64_t entry_bytes, storage, uint64_t l1_offset=0, bint readahead=True):
        self.cache = cache
        self.storage = storage
        self.fd = storage.fileno()
        self.alignment = storage.alignment
        self.clusters = clusters
        self.l1_offset = l1_offset
        self.dirty.head.prev = &self.dirty.head
        self.dirty.head.next = &self.dirty.head
        self.take_geometry(cluster_bits, extended_l2, entry_bytes)
        self.streams.most_groups = most_groups(cache.budget, entry_bytes, readahead)
        self.slices = self.slices_for(clusters)
        self.l1_entries = <uint64_t> len(l1) // 8
        self.l1 = decode_l1(l1)
        self.layer = cache.adopt((self.slices + LEAF_WORDS - 1) // LEAF_WORDS or 1)
        self.adopted = True

    def __dealloc__(self):
        if self.adopted:
            self.cache.retire(self.layer)
        free(self.l1)

    cdef take_geometry(self, int cluster_bits, bint extended, uint64_t entry_bytes):
        cdef uint64_t span = entry_bytes if entry_bytes < SLICE_BYTES else SLICE_BYTES
        if not 9 <= cluster_bits <= 21:
            raise BadOption(f"cluster_bits is {cluster_bits}, expected 9 to 21")
        if entry_bytes & (entry_bytes - 1) or not 512 <= entry_bytes <= <uint64_t> 1 << cluster_bits:
            raise BadOption(f"l2-cache-entry-size is {entry_bytes}, expected a power of two from 512 to the cluster "
                            f"size {1 << cluster_bits}")
        self.cluster_bits = cluster_bits
        self.extended = extended
        self.entry_size = 16 if extended else 8
        self.table_bits = cluster_bits - (4 if extended else 3)
        self.slice_bits = trailing_zeros(span // self.entry_size)
        self.slice_clusters = <uint32_t> 1 << self.slice_bits
        self.group = <uint32_t> (entry_bytes // span)

    cdef uint64_t slices_for(self, uint64_t clusters) except? 0:
        cdef uint64_t slices = (clusters >> self.slice_bits) + (clusters & (self.slice_clusters - 1) != 0)
        if slices >> 32:
            raise BadOption(f"l2-cache-entry-size cuts the map into {slices} slices of {self.slice_clusters} entries, "
                            f"expected fewer than 4 billion: choose a larger one")
        return slices

    cdef uint64_t word_at(self, uint64_t number) noexcept nogil:
        """The directory word of a slice. The lock is held."""
        cdef Leaf *leaf = self.leaf_for(number)
        return ABSENT if leaf == NULL else leaf.words[number % LEAF_WORDS]

    cdef complain(self, uint64_t number, int outcome, int attempts):
        """Raise what came of loading a slice. Returns where a read failed that succeeds by now, a few times."""
        cdef uint64_t table = (number << self.slice_bits) >> self.table_bits
        cdef uint64_t offset = self.l1[table] if table < self.l1_entries else 0
        cdef uint64_t where = self.l1_offset + 8 * table
        if outcome == BAD_TABLE:
            raise CorruptImage(
                f"L1 entry {table} at offset {where:#x} points at {offset:#x}, expected the offset of an L2 table aligned to "
                f"{1 << self.cluster_bits} bytes", structure="L1 table", offset=where)
        if outcome != READ_FAILED:
            raise MemoryError("no memory to load a slice of an L2 table")
        if attempts > 3:
            raise StorageError(f"cannot read the L2 table at offset {offset:#x}: it fails and succeeds by turns")
        # The compiled read has no way to say why: this one raises. If it succeeds the fault has passed.
        self.storage.read_into(offset, bytearray(1 << self.cluster_bits))

    # -- what to load -----------------------------------------------------------------------------------------------

    cdef void aim(self, Load *job, uint64_t first, uint32_t count) noexcept nogil:
        """Let the job bring up to `count` slices from `first`, none past the end of their L2 table."""
        job.first = first
        job.count = <uint32_t> within_table(first, count, <uint64_t> 1 << (self.table_bits - self.slice_bits), self.slices)
        job.table = self.l1[(first << self.slice_bits) >> self.table_bits]

    cdef void plan_demand(self, Load *job, uint64_t number) noexcept nogil:
        """One group, or more where the misses of late form a stream: twice as many as the stream got last time."""
        cdef uint64_t first = number - number % self.group
        cdef uint32_t stream = stream_at(&self.streams, first)
        cdef uint32_t groups = self.streams.length[stream]
        self.cache.counters.misses += 1
        self.aim(job, first, self.group * groups)
        self.streams.next[stream] = first + job.count
        job.demanded = <uint32_t> (number - first)
        job.arrival = AHEAD
        job.may_evict = groups > 1
        job.to_store = False
        job.copy = NULL

    # -- loading ----------------------------------------------------------------------------------------------------

    cdef int load(self, Load *job, Mapped *out) noexcept nogil:
        """Claim, read, pack, publish. Called with the lock held, returns without it."""
        cdef uint64_t size = <uint64_t> job.count * self.slice_clusters * self.entry_size
        cdef int outcome = BAD_TABLE
        out.word = job.table
        if self.replacing:
            self.wait()
            outcome = STALE
        elif not job.table & ((<uint64_t> 1 << self.cluster_bits) - 1):
            outcome = self.claim(job)
        if outcome != FOUND:
            pthread_mutex_unlock(&self.cache.lock)
            return outcome
        job.room = job.may_evict or room_beside(self.cache.used_bytes(), self.cache.budget)
        job.generation = self.generation
        self.in_flight += 1
        pthread_mutex_unlock(&self.cache.lock)
        outcome = self.fetch(job, size, out)
        pthread_mutex_lock(&self.cache.lock)
        outcome = self.conclude(job, size, outcome)
        self.in_flight -= 1
        self.cache.make_room(0)
        if self.cache.waiting:
            pthread_cond_broadcast(&self.cache.loaded)
        pthread_mutex_unlock(&self.cache.lock)
        return outcome

    cdef int conclude(self, Load *job, uint64_t size, int outcome) noexcept nogil:
        """Publish what was read, unless its table is not the same any more. The lock is held."""
        if outcome != FOUND:
            self.cache.counters.failed += 1
            self.unclaim(job)
            return outcome
        self.cache.counters.loads += 1
        self.cache.counters.bytes_read += size
        if job.generation == self.generation:
            self.publish(job)
            return FOUND
        free_words(job, job.count)
        self.unclaim(job)
        return STALE

    cdef void wait(self) noexcept nogil:
        """Until some load has ended. The lock is held, but not while waiting."""
        self.cache.waiting += 1
        pthread_cond_wait(&self.cache.loaded, &self.cache.lock)
        self.cache.waiting -= 1

    cdef int claim(self, Load *job) noexcept nogil:
        """Mark what is absent in the job's range as loading by us. A leaf that loads cannot be dropped."""
        cdef uint32_t i
        cdef uint64_t number
        cdef Leaf *leaf
        memset(job.claimed, 0, job.count)
        for i in range(job.count):
            number = job.first + i
            leaf = self.leaf_for(number)
            if leaf == NULL:
                if job.arrival == WARMED and not self.cache.may_keep_leaf():
                    self.unclaim(job)
                    return NO_ROOM
                leaf = self.cache.add_leaf(self.layer, <uint32_t> (number // LEAF_WORDS))
            if leaf == NULL:
                self.unclaim(job)
                return NO_MEMORY
            if leaf.words[number % LEAF_WORDS] == ABSENT:
                leaf.words[number % LEAF_WORDS] = LOADING
                leaf.pinned += 1
                job.claimed[i] = 1
        return FOUND

    cdef void unclaim(self, Load *job) noexcept nogil:
        cdef uint32_t i
        cdef Leaf *leaf
        for i in range(job.count):
            if job.claimed[i]:
                leaf = self.leaf_for(job.first + i)
                leaf.words[(job.first + i) % LEAF_WORDS] = ABSENT
                leaf.pinned -= 1

    cdef int fetch(self, Load *job, uint64_t size, Mapped *out) noexcept nogil:
        """Read and pack, without the lock."""
        cdef uint64_t skip = (job.first << self.slice_bits) & ((<uint64_t> 1 << self.table_bits) - 1)
        cdef uint8_t *buffer = <uint8_t *> (malloc(size) if self.alignment <= 16 else memalign(self.alignment, size))
        cdef int outcome = NO_MEMORY
        if buffer == NULL:
            return outcome
        outcome = READ_FAILED
        if self.read_table(job.table + skip * self.entry_size, buffer, size):
            outcome = self.digest(job, buffer, out)
        free(buffer)
        return outcome

    cdef bint read_table(self, uint64_t offset, uint8_t *buffer, uint64_t size) noexcept nogil:
        cdef uint64_t done = 0
        cdef ssize_t got
        if self.fd < 0 or (offset | size) % self.alignment:
            with gil:
                return self.read_by_storage(offset, buffer, size)
        while done < size:
            got = pread(self.fd, buffer + done, size - done, <long> (offset + done))
            if got < 0 and errno == EINTR:
                continue
            if got < 0:
                return False
            done += got
            if got == 0 or done % self.alignment:  # the file ends here
                memset(buffer + done, 0, size - done)
                return True
        return True

    cdef bint read_by_storage(self, uint64_t offset, uint8_t *buffer, uint64_t size) noexcept:
        """Through memory of Python's own, which a storage may hold on to for as long as it likes."""
        cdef bytearray own
        try:
            own = bytearray(size)
            self.storage.read_into(offset, own)
            memcpy(buffer, <char *> own, size)
            return True
        except KeyboardInterrupt:
            PyErr_SetInterrupt()  # there is no way up from here: let it be raised anew further up
            return False
        except Exception:
            # `lookup` reads once more and lets that error speak; here there is nobody to tell.
            return False

    cdef int digest(self, Load *job, const uint8_t *buffer, Mapped *out) noexcept nogil:
        """Turn raw entries into directory words, and answer the request that waits. Works on private memory only."""
        cdef uint64_t span = <uint64_t> self.slice_clusters * self.entry_size
        cdef uint32_t i
        for i in range(job.count):
            job.words[i] = ABSENT
            if not job.claimed[i]:
                continue
            if not self.make_word(job, i, buffer + i * span):
                free_words(job, i)
                return NO_MEMORY
        if job.demanded == job.count:
            return FOUND
        if job.copy != NULL:
            memcpy(job.copy, buffer + job.demanded * span, span)
        self.read_word(job.words[job.demanded], job.index, job.want, out)
        if job.words[job.demanded] & STATE == PACKED:
            slice_of(job.words[job.demanded]).node.state |= USED
        return FOUND

    cdef bint make_word(self, Load *job, uint32_t i, const uint8_t *raw) noexcept nogil:
        """The word for one slice of a job: ABSENT where there is no room for it. False: no memory."""
        cdef uint64_t made
        if job.to_store and i == job.demanded:
            made = <uint64_t> make_dirty(job.first + i, self.slice_clusters * self.entry_size)
            if made:
                memcpy(entries_of(<DirtySlice *> made), raw, self.slice_clusters * self.entry_size)
            job.words[i] = made | DIRTY
            return made != 0
        job.words[i] = inline_word(raw, self.slice_clusters, self.cluster_bits, self.extended)
        if job.words[i] != ABSENT or not (job.room or i == job.demanded):
            return True
        made = <uint64_t> make_slice(raw, self.slice_clusters, self.cluster_bits, self.extended)
        job.words[i] = made | PACKED
        return made != 0

    cdef void read_word(self, uint64_t word, uint32_t index, uint32_t want, Mapped *out) noexcept nogil:
        """What entry `index` of a resident slice says."""
        if word & STATE == INLINE:
            read_inline(word, self.cluster_bits, self.slice_bits, index, out)
        elif word & STATE == PACKED:
            read_slice(slice_of(word), self.cluster_bits, self.slice_bits, index, want, out)
        else:
            read_dirty(dirty_of(word), self.cluster_bits, self.slice_bits, self.extended, index, want, out)

    cdef void publish(self, Load *job) noexcept nogil:
        """Put the words where everybody sees them, the demanded one last, so that its neighbours do not push it out."""
        cdef uint32_t i
        job.published = 0
        for i in range(job.count):
            if job.claimed[i] and i != job.demanded:
                self.publish_one(job, i)
        if job.demanded < job.count:
            self.publish_one(job, job.demanded)
        for i in range(job.count):
            if job.claimed[i]:
                self.leaf_for(job.first + i).pinned -= 1

    cdef void publish_one(self, Load *job, uint32_t i) noexcept nogil:
        cdef bint demanded = i == job.demanded
        cdef uint64_t word = self.admit(
            job.first + i, job.words[i], DEMANDED if demanded else job.arrival, demanded or job.may_evict)
        cdef Leaf *leaf = self.leaf_for(job.first + i)
        leaf.words[(job.first + i) % LEAF_WORDS] = word
        leaf.pinned += word & STATE == DIRTY
        job.published += word != ABSENT

    cdef uint64_t admit(self, uint64_t number, uint64_t word, Arrival arrival, bint may_evict) noexcept nogil:
        """Account for a slice and hand it to the policy; ABSENT where it found no room, and is gone.

        The lock is held, and the leaf of the slice is pinned. A dirty one counts as stored to from now on.
        """
        if word & STATE == INLINE:
            self.cache.counters.inlined += 1
        elif word & STATE == PACKED and not self.settle(number, slice_of(word), arrival, may_evict):
            return ABSENT
        elif word & STATE == DIRTY:
            self.stores += 1
            dirty_of(word).version = self.stores
            self.cache.keep_dirty(dirty_of(word), &self.dirty)
        return word

    cdef bint settle(self, uint64_t number, Slice *held, Arrival arrival, bint may_evict) noexcept nogil:
        """The same for a packed slice, which is freed where it finds no room."""
        cdef uint64_t size = held.node.granules * 16
        cdef Counters *counters = &self.cache.counters
        if may_evict:
            self.cache.make_room(size)
        if self.cache.used_bytes() + size > self.cache.budget:
            free(held)
            return False
        held.node.layer = self.layer
        held.node.key = <uint32_t> number
        self.cache.slice_bytes += size
        counters.forms[held.node.cargo & 7] += 1
        self.cache.policy.insert(&held.node, arrival)
        return True
