# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The map of one layer: where each guest cluster lives, answered from what is in memory, with misses that run side by side.

It does not know what the bytes of a cluster are for, nor who asks. What must hold: the lock of the cache is never kept
across I/O or while waiting for the GIL; a slice that loads is read once, whoever waits; a packed slice is immutable once
published.
"""

from libc.stdint cimport uint32_t, uint64_t

from cowslice.cache.directory cimport LEAF_WORDS, LOADING, PACKED, STATE, Leaf, foresee, slice_of
from cowslice.cache.forms cimport Mapped
from cowslice.cache.loads cimport BAD_TABLE, FOUND, NOT_RESIDENT, STALE, Load
from cowslice.cache.policy cimport USED, WARMED
from cowslice.cache.pthread cimport pthread_mutex_lock, pthread_mutex_unlock
from cowslice.cache.stores cimport Stores

from cowslice.cache import slicecache
from cowslice.errors import InternalError

cimport cython

cdef enum:
    WARM_BYTES = 65536      # of a table that a warm-up reads at once
    FRUITLESS = 1024        # slices that a warm-up passes in vain before it gives up
    ANY_RUN = 0x7FFFFFFF

globals()["SliceCache"] = slicecache.SliceCache  # one door for both, in Python as in Cython


# Not cleared by the garbage collector: __dealloc__ still needs the cache.
@cython.final
@cython.no_gc_clear
cdef class SliceMap(Stores):
    """Guest cluster to L2 entry, for one layer: an L1 table in memory, and its L2 slices in the shared cache.

    `l1` is the big-endian L1 table; `clusters` is how many guest clusters may be asked for; `entry_bytes` is the unit of
    a metadata read (`l2-cache-entry-size`); `storage` is read through its descriptor where it has one (`fileno()` >= 0),
    else through its `read_into(offset, buffer)`, and must stay open as long as anybody asks. `l1_offset` is only named in
    errors. Bytes past the end of the file are zeros. What can be stored, and how it gets to disk, is told at Stores.
    """

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

    cdef int peek(self, uint64_t cluster, uint32_t want, Mapped *out) noexcept nogil:
        """Answer from memory, or NOT_RESIDENT. The lock is held, and `cluster` is less than `clusters`."""
        cdef uint64_t number = cluster >> self.slice_bits
        cdef uint32_t index = <uint32_t> cluster & (self.slice_clusters - 1)
        cdef Leaf *leaf
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
        self.read_word(word, index, want, out)
        if word & STATE == PACKED:
            slice_of(word).node.state |= USED
            self.cache.policy.touch(&slice_of(word).node)
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
        cdef int outcome
        cdef Load job
        pthread_mutex_lock(&self.cache.lock)
        while self.peek(cluster, want, out) == NOT_RESIDENT:
            if self.word_at(number) == LOADING:
                self.cache.counters.joined += 1
                self.wait()
                continue
            self.plan_demand(&job, number)
            job.index = <uint32_t> cluster & (self.slice_clusters - 1)
            job.want = want
            outcome = self.load(&job, out)
            if outcome != STALE:
                return outcome
            pthread_mutex_lock(&self.cache.lock)
        pthread_mutex_unlock(&self.cache.lock)
        return FOUND

    # -- warming ----------------------------------------------------------------------------------------------------

    cdef uint64_t warm_tables(self) noexcept nogil:
        cdef uint64_t number = 0, published = 0, fruitless = 0
        cdef Load job
        cdef int outcome = FOUND
        while fruitless < FRUITLESS and not self.stopping:
            pthread_mutex_lock(&self.cache.lock)
            number = self.next_mapped(number)
            if number >= self.slices:
                pthread_mutex_unlock(&self.cache.lock)
                break
            outcome = self.warm_some(&job, number)
            if outcome == FOUND:
                published += job.published
                fruitless = 0 if job.published else fruitless + job.count
            elif outcome != BAD_TABLE and outcome != STALE:
                break
            if outcome != STALE:
                number += job.count
        return published

    cdef uint64_t next_mapped(self, uint64_t number) noexcept nogil:
        """The first slice from `number` on that has an L2 table, or one past the end. The lock is held."""
        cdef Mapped hole
        while number < self.slices and self.unmapped(number << self.slice_bits, ANY_RUN, &hole):
            number += hole.run >> self.slice_bits
        return number

    cdef int warm_some(self, Load *job, uint64_t number) noexcept nogil:
        """Read a stretch of slices for nobody in particular. Called with the lock held, returns without it."""
        cdef Mapped ignored
        self.aim(job, number, WARM_BYTES // (self.slice_clusters * self.entry_size))
        job.demanded = job.count
        job.arrival = WARMED
        job.may_evict = False
        job.to_store = False
        job.copy = NULL
        return self.load(job, &ignored)

    # -- for Python -------------------------------------------------------------------------------------------------

    def lookup(self, uint64_t cluster, uint32_t want=ANY_RUN):
        """(L2 entry word, subcluster bitmap, clusters from here that merely continue it) for a guest cluster.

        The run is exact up to `want` clusters, except that it never crosses a slice, and is one where a slice is kept raw;
        it may reach beyond the last cluster of the disk. The bitmap is 0 for standard entries.
        Raises CorruptImage for an L1 entry that cannot be followed, StorageError where reading fails. Thread safe.
        """
        cdef Mapped m
        cdef int outcome, attempts = 0
        if cluster >= self.clusters:
            raise self.outside(cluster)
        pthread_mutex_lock(&self.cache.lock)
        outcome = self.peek(cluster, want, &m)
        pthread_mutex_unlock(&self.cache.lock)
        while outcome != FOUND:
            with nogil:
                outcome = self.resolve(cluster, want, &m)
            if outcome != FOUND:
                attempts += 1
                self.complain(cluster >> self.slice_bits, outcome, attempts)
        return m.word, m.bitmap, m.run

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
