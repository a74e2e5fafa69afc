# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The map of one layer: where each guest cluster lives, answered from packed slices, with misses that run side by side.

It does not know what the bytes of a cluster are for, nor who asks. What must hold: the lock of the cache is never kept
across I/O or while waiting for the GIL; a slice that loads is read once, whoever waits; a slice is immutable once published.
"""

from cpython.exc cimport PyErr_SetInterrupt
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from cowslice.cache.directory cimport (
    ABSENT, INLINE, LEAF_WORDS, LOADING, PACKED, STATE, Leaf, Slice, foresee, inline_word, make_slice, read_inline, read_slice, slice_of)
from cowslice.cache.forms cimport OFFSET, Mapped, bswap64, trailing_zeros
from cowslice.cache.policy cimport AHEAD, DEMANDED, USED, WARMED
from cowslice.cache.pthread cimport pthread_cond_broadcast, pthread_cond_wait, pthread_mutex_lock, pthread_mutex_unlock
from cowslice.cache.slicecache cimport Counters, SliceCache

from cowslice.cache import slicecache
from cowslice.errors import BadOption, CorruptImage, InternalError, StorageError

cimport cython

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buffer, size_t count, long offset)

cdef extern from "<malloc.h>" nogil:
    void *memalign(size_t alignment, size_t size)

cdef enum:
    SLICE_BYTES = 4096      # the most that one slice spans on disk
    AHEAD_BYTES = 65536     # the most that a sequential reader brings at once
    FRUITLESS = 1024        # slices that a warm-up passes in vain before it gives up
    ANY_RUN = 0x7FFFFFFF

globals()["SliceCache"] = slicecache.SliceCache  # one door for both, in Python as in Cython


cdef inline void free_words(Load *job, uint32_t end) noexcept nogil:
    """Give back the slices that a job made before memory ran out."""
    cdef uint32_t i
    for i in range(end):
        if job.words[i] & STATE == PACKED:
            free(slice_of(job.words[i]))


# Not cleared by the garbage collector: __dealloc__ still needs the cache.
@cython.final
@cython.no_gc_clear
cdef class SliceMap:
    """Guest cluster to L2 entry, for one layer: an L1 table in memory, and its L2 slices in the shared cache.

    `l1` is the big-endian L1 table; `clusters` is how many guest clusters may be asked for; `entry_bytes` is the unit of
    a metadata read (`l2-cache-entry-size`); `storage` is read through its descriptor where it has one (`fileno()` >= 0),
    else through its `read_into(offset, buffer)`, and must stay open as long as anybody asks. `l1_offset` is only named in
    errors. Bytes past the end of the file are zeros.
    """

    def __cinit__(self, SliceCache cache not None, *, int cluster_bits, bint extended_l2, bytes l1 not None,
                  uint64_t clusters, uint64_t entry_bytes, storage, uint64_t l1_offset=0, bint readahead=True):
        self.cache = cache
        self.storage = storage
        self.fd = storage.fileno()
        self.alignment = storage.alignment
        self.clusters = clusters
        self.l1_offset = l1_offset
        self.take_geometry(cluster_bits, extended_l2, entry_bytes)
        self.most_groups = <uint32_t> (min(AHEAD_BYTES, cache.budget // 8) // entry_bytes or 1) if readahead else 1
        self.slices = (clusters >> self.slice_bits) + (clusters & (self.slice_clusters - 1) != 0)
        if self.slices >> 32:
            raise BadOption(f"l2-cache-entry-size {entry_bytes} cuts the map into {self.slices} slices, expected fewer "
                            f"than 4 billion: choose a larger one")
        self.take_l1(l1)
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

    cdef take_l1(self, bytes table):
        cdef const uint8_t *raw = table
        cdef uint64_t i, word
        self.l1_entries = <uint64_t> len(table) // 8
        self.l1 = <uint64_t *> malloc(self.l1_entries * 8 or 8)
        if self.l1 == NULL:
            raise MemoryError(f"no memory for an L1 table of {self.l1_entries} entries")
        for i in range(self.l1_entries):
            memcpy(&word, raw + 8 * i, 8)
            self.l1[i] = bswap64(word) & OFFSET  # reserved bits do not change a meaning, as for QEMU

    # -- lookup -----------------------------------------------------------------------------------------------------

    cdef bint unmapped(self, uint64_t cluster, uint32_t want, Mapped *out) noexcept nogil:
        """Without an L2 table there is nothing to load: answer from L1 alone, over as many tables as are missing."""
        cdef uint64_t table = cluster >> self.table_bits
        cdef uint64_t run
        if table < self.l1_entries and self.l1[table]:
            return False
        run = ((table + 1) << self.table_bits) - cluster
        while run < want and cluster + run < self.clusters and (table + 1 >= self.l1_entries or self.l1[table + 1] == 0):
            table += 1
            run += <uint64_t> 1 << self.table_bits
        out.word = 0
        out.bitmap = 0
        out.run = <uint32_t> (run if run < ANY_RUN else ANY_RUN)
        return True

    cdef Leaf *leaf_for(self, uint64_t number) noexcept nogil:
        return self.cache.directories[self.layer].leaves[number // LEAF_WORDS]

    cdef int peek(self, uint64_t cluster, uint32_t want, Mapped *out) noexcept nogil:
        """Answer from memory, or NOT_RESIDENT. The lock is held, and `cluster` is less than `clusters`."""
        cdef uint64_t number = cluster >> self.slice_bits
        cdef uint32_t index = <uint32_t> cluster & (self.slice_clusters - 1)
        cdef Leaf *leaf
        cdef Slice *held
        cdef uint64_t word
        if self.unmapped(cluster, want, out):
            self.cache.counters.hits += 1
            return FOUND
        leaf = self.leaf_for(number)
        if leaf == NULL:
            return NOT_RESIDENT
        word = leaf.words[number % LEAF_WORDS]
        if word <= LOADING:
            return NOT_RESIDENT
        leaf.used = 1
        leaf.idle = 0
        self.cache.counters.hits += 1
        if word & STATE == INLINE:
            read_inline(word, self.cluster_bits, self.slice_bits, index, out)
            return FOUND
        held = slice_of(word)
        read_slice(held, self.cluster_bits, self.slice_bits, index, want, out)
        held.node.state |= USED
        self.cache.policy.touch(&held.node)
        return FOUND

    cdef void foresee(self, uint64_t cluster, bint deep) noexcept nogil:
        """Begin to fetch from memory what `peek` will look at. The lock is held, and `cluster` is less than `clusters`."""
        cdef uint64_t number = cluster >> self.slice_bits
        cdef Leaf *leaf = self.leaf_for(number)
        if leaf != NULL:
            foresee(leaf.words[number % LEAF_WORDS], <uint32_t> cluster & (self.slice_clusters - 1), deep)

    cdef int resolve(self, uint64_t cluster, uint32_t want, Mapped *out) noexcept nogil:
        """Answer, loading the slice if need be. `cluster` is less than `clusters`. Takes the lock itself.

        On BAD_TABLE and READ_FAILED out.word is the offset of the L2 table.
        """
        cdef uint64_t number = cluster >> self.slice_bits
        cdef Leaf *leaf
        cdef Load job
        pthread_mutex_lock(&self.cache.lock)
        while self.peek(cluster, want, out) == NOT_RESIDENT:
            leaf = self.leaf_for(number)
            if leaf == NULL or leaf.words[number % LEAF_WORDS] == ABSENT:
                job.index = <uint32_t> cluster & (self.slice_clusters - 1)
                job.want = want
                self.plan_demand(&job, number)
                return self.load(&job, out)
            self.cache.counters.joined += 1
            self.cache.waiting += 1
            pthread_cond_wait(&self.cache.loaded, &self.cache.lock)
            self.cache.waiting -= 1
        pthread_mutex_unlock(&self.cache.lock)
        return FOUND

    # -- what to load -----------------------------------------------------------------------------------------------

    cdef void aim(self, Load *job, uint64_t first, uint32_t count) noexcept nogil:
        """Let the job bring up to `count` slices from `first`, none past the end of their L2 table."""
        cdef uint64_t per_table = <uint64_t> 1 << (self.table_bits - self.slice_bits)
        cdef uint64_t left = per_table - (first & (per_table - 1))
        if self.slices - first < left:
            left = self.slices - first
        job.first = first
        job.count = <uint32_t> (count if count < left else left)
        job.table = self.l1[(first << self.slice_bits) >> self.table_bits]

    cdef void plan_demand(self, Load *job, uint64_t number) noexcept nogil:
        """One group, or more where the misses of late form a stream: twice as many as the stream got last time."""
        cdef uint64_t first = number - number % self.group
        cdef uint32_t stream = self.find_stream(first)
        cdef uint32_t groups = self.stream_length[stream]
        self.cache.counters.misses += 1
        self.aim(job, first, self.group * groups)
        self.stream_next[stream] = first + job.count
        job.demanded = <uint32_t> (number - first)
        job.arrival = AHEAD
        job.may_evict = groups > 1

    cdef uint32_t find_stream(self, uint64_t first) noexcept nogil:
        """The stream that has just got to `first`, or the place of a new one."""
        cdef uint32_t i
        for i in range(STREAMS):
            if self.stream_next[i] == first and first:
                self.stream_length[i] = min(self.stream_length[i] * 2, self.most_groups)
                return i
        i = self.stream_hand
        self.stream_hand = (i + 1) % STREAMS
        self.stream_length[i] = 1
        return i

    # -- loading ----------------------------------------------------------------------------------------------------

    cdef int load(self, Load *job, Mapped *out) noexcept nogil:
        """Claim, read, pack, publish. Called with the lock held, returns without it."""
        cdef uint64_t size = <uint64_t> job.count * self.slice_clusters * self.entry_size
        cdef int outcome = BAD_TABLE
        out.word = job.table
        if not job.table & ((<uint64_t> 1 << self.cluster_bits) - 1):
            outcome = self.claim(job)
        if outcome != FOUND:
            pthread_mutex_unlock(&self.cache.lock)
            return outcome
        job.room = job.may_evict or self.cache.used_bytes() + SLICE_BYTES // 2 < self.cache.budget
        pthread_mutex_unlock(&self.cache.lock)
        outcome = self.fetch(job, size, out)
        pthread_mutex_lock(&self.cache.lock)
        if outcome == FOUND:
            self.cache.counters.loads += 1
            self.cache.counters.bytes_read += size
            self.publish(job)
        else:
            self.cache.counters.failed += 1
            self.unclaim(job)
        self.cache.make_room(0)
        if self.cache.waiting:
            pthread_cond_broadcast(&self.cache.loaded)
        pthread_mutex_unlock(&self.cache.lock)
        return outcome

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
                leaf.loading += 1
                job.claimed[i] = 1
        return FOUND

    cdef void unclaim(self, Load *job) noexcept nogil:
        cdef uint32_t i
        cdef Leaf *leaf
        for i in range(job.count):
            if job.claimed[i]:
                leaf = self.leaf_for(job.first + i)
                leaf.words[(job.first + i) % LEAF_WORDS] = ABSENT
                leaf.loading -= 1

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
        cdef Slice *held
        cdef uint32_t i
        for i in range(job.count):
            job.words[i] = ABSENT
            if not job.claimed[i]:
                continue
            job.words[i] = inline_word(buffer + i * span, self.slice_clusters, self.cluster_bits, self.extended)
            if job.words[i] == ABSENT and (job.room or i == job.demanded):
                held = make_slice(buffer + i * span, self.slice_clusters, self.cluster_bits, self.extended)
                if held == NULL:
                    free_words(job, i)
                    return NO_MEMORY
                job.words[i] = <uint64_t> held | PACKED
        if job.demanded == job.count:
            return FOUND
        if job.words[job.demanded] & STATE == INLINE:
            read_inline(job.words[job.demanded], self.cluster_bits, self.slice_bits, job.index, out)
            return FOUND
        held = slice_of(job.words[job.demanded])
        read_slice(held, self.cluster_bits, self.slice_bits, job.index, job.want, out)
        held.node.state |= USED
        return FOUND

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
                self.leaf_for(job.first + i).loading -= 1

    cdef void publish_one(self, Load *job, uint32_t i) noexcept nogil:
        cdef uint64_t word = job.words[i]
        if word & STATE == INLINE:
            self.cache.counters.inlined += 1
        elif word & STATE == PACKED and not self.settle(job, i, slice_of(word)):
            word = ABSENT
        self.leaf_for(job.first + i).words[(job.first + i) % LEAF_WORDS] = word
        job.published += word != ABSENT

    cdef bint settle(self, Load *job, uint32_t i, Slice *held) noexcept nogil:
        """Account for a packed slice and hand it to the policy, or free it where it finds no room."""
        cdef uint64_t size = held.node.granules * 16
        cdef bint demanded = i == job.demanded
        cdef Counters *counters = &self.cache.counters
        if demanded or job.may_evict:
            self.cache.make_room(size)
        if self.cache.used_bytes() + size > self.cache.budget:
            free(held)
            return False
        held.node.layer = self.layer
        held.node.key = <uint32_t> (job.first + i)
        self.cache.slice_bytes += size
        counters.forms[held.node.cargo & 7] += 1
        self.cache.policy.insert(&held.node, DEMANDED if demanded else job.arrival)
        return True

    cdef uint64_t warm_tables(self) noexcept nogil:
        cdef uint64_t number = 0, published = 0, fruitless = 0
        cdef uint32_t chunk = AHEAD_BYTES // (self.slice_clusters * self.entry_size)
        cdef Mapped ignored
        cdef Load job
        cdef int outcome
        while number < self.slices and fruitless < FRUITLESS and not self.stopping:
            if self.unmapped(number << self.slice_bits, ANY_RUN, &ignored):
                number += ignored.run >> self.slice_bits
                continue
            self.aim(&job, number, chunk)
            number += job.count
            job.demanded = job.count
            job.arrival = WARMED
            job.may_evict = False
            pthread_mutex_lock(&self.cache.lock)
            outcome = self.load(&job, &ignored)
            if outcome == FOUND:
                published += job.published
                fruitless = 0 if job.published else fruitless + job.count
            elif outcome != BAD_TABLE:
                break
        return published

    # -- for Python -------------------------------------------------------------------------------------------------

    def lookup(self, uint64_t cluster, uint32_t want=ANY_RUN):
        """(L2 entry word, subcluster bitmap, clusters from here that merely continue it) for a guest cluster.

        The run is exact up to `want` clusters, except that it never crosses a slice, and is one where a slice is kept raw;
        it may reach beyond the last cluster of the disk. The bitmap is 0 for standard entries.
        Raises CorruptImage for an L1 entry that cannot be followed, StorageError where reading fails. Thread safe.
        """
        cdef Mapped m
        cdef int outcome
        if cluster >= self.clusters:
            raise self.outside(cluster)
        pthread_mutex_lock(&self.cache.lock)
        outcome = self.peek(cluster, want, &m)
        pthread_mutex_unlock(&self.cache.lock)
        if outcome == FOUND:
            return m.word, m.bitmap, m.run
        for _ in range(3):
            with nogil:
                outcome = self.resolve(cluster, want, &m)
            if outcome == FOUND:
                return m.word, m.bitmap, m.run
            if outcome != READ_FAILED:
                raise self.complain(cluster, outcome)
            # The compiled read has no way to say why: this one raises. If it succeeds the fault has passed.
            self.storage.read_into(m.word, bytearray(1 << self.cluster_bits))
        raise StorageError(f"cannot read the L2 table at offset {m.word:#x}: it fails and succeeds by turns")

    cdef complain(self, uint64_t cluster, int outcome):
        """The exception for what a lookup came to."""
        cdef uint64_t table = cluster >> self.table_bits
        cdef uint64_t where = self.l1_offset + 8 * table
        if outcome == BAD_TABLE:
            return CorruptImage(
                f"L1 entry {table} at offset {where:#x} points at {self.l1[table]:#x}, expected the offset of an L2 table "
                f"aligned to {1 << self.cluster_bits} bytes", structure="L1 table", offset=where)
        return MemoryError("no memory to load a slice of an L2 table")

    cdef outside(self, uint64_t cluster):
        return InternalError(f"guest cluster {cluster} was looked up in a map of {self.clusters}")

    def resident(self, uint64_t cluster):
        """Is the slice of this guest cluster in memory? For reports and tests; counts as a hit."""
        cdef Mapped m
        cdef int outcome
        if cluster >= self.clusters:
            raise self.outside(cluster)
        pthread_mutex_lock(&self.cache.lock)
        outcome = self.peek(cluster, 1, &m)
        pthread_mutex_unlock(&self.cache.lock)
        return outcome == FOUND

    def residency(self, uint32_t cells):
        """For each of `cells` equal parts of the disk the share of its slices that is in memory, 0 to 255, as bytes."""
        return self.cache.residency(self.layer, self.slices, cells)

    def warm(self):
        """Read all L2 tables in guest order while there is room, in the calling thread; returns the slices published.

        Slices of one run are kept even when the budget is full, because they cost eight bytes. Nothing that a reader asked
        for is pushed out by more than the directory grows. Tables that cannot be read end it without a word: who asks for
        them hears of it.
        """
        cdef uint64_t published
        with nogil:
            published = self.warm_tables()
        return published

    def stop(self):
        """End a warm-up that runs in another thread soon, and let none begin any more."""
        self.stopping = True
