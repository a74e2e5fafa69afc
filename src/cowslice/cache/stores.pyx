# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The half of a map that is written to: dirty slices, from the first store until whoever wrote them says they are clean.

It does not know what entries mean, nor when they go to disk. What must hold: a dirty slice is never evicted and never
read from disk; a slice that was stored to after `take_dirty` stays dirty; once an L2 table is exchanged for another,
nothing of the old one is answered any more.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

from cowslice.cache.directory cimport (
    ABSENT, DIRTY, INLINE, LEAF_WORDS, LOADING, PACKED, STATE, Leaf, inline_word, make_slice, slice_of, spell_out)
from cowslice.cache.dirty cimport DirtySlice, dirty_of, entries_of, make_dirty
from cowslice.cache.forms cimport Mapped
from cowslice.cache.loads cimport (
    BAD_TABLE, FOUND, NO_MEMORY, NO_TABLE, READ_FAILED, SLICE_BYTES, STALE, Load, Loads, decode_l1)
from cowslice.cache.policy cimport DEMANDED
from cowslice.cache.pthread cimport pthread_cond_broadcast, pthread_mutex_lock, pthread_mutex_unlock

from cowslice.errors import InternalError

cimport cython

cdef extern from "<malloc.h>" nogil:
    void *memalign(size_t alignment, size_t size)


cdef void *renewed(void *memory, uint64_t size) except NULL:
    """Memory of that size instead of the old, which is kept where there is none."""
    cdef void *other = realloc(memory, size)
    if other == NULL:
        raise MemoryError(f"no memory for {size} bytes of L2 entries")
    return other


# Not cleared by the garbage collector: __dealloc__ of the loads still needs the cache.
@cython.no_gc_clear
cdef class Stores(Loads):
    """What was stored to a map: kept as on disk, looked up like the rest, counted against the cache's budget.

    A writer stores entries; a commit takes copies of the dirty slices, writes them, makes them stable and calls them
    clean. Thread safe; who stores to one cluster while another does decides nothing.
    """

    # -- storing ----------------------------------------------------------------------------------------------------

    cdef DirtySlice *hold(self, uint64_t number, int *outcome) noexcept nogil:
        """The dirty slice of that number, made if need be; NULL, and why, where that fails.

        The lock is held before and after, but not while it loads.
        """
        cdef Mapped ignored
        cdef Load job
        cdef uint64_t word
        outcome[0] = FOUND
        while outcome[0] == FOUND or outcome[0] == STALE:
            word = self.word_at(number)
            if not self.has_table(number):
                outcome[0] = NO_TABLE
            elif word & STATE == DIRTY:
                return dirty_of(word)
            elif word & STATE >= INLINE:
                outcome[0] = self.inflate(number, word)
            elif word == LOADING:
                self.wait()
            else:
                self.plan_demand(&job, number)
                job.index = 0
                job.want = 1
                job.to_store = True
                outcome[0] = self.load(&job, &ignored)
                pthread_mutex_lock(&self.cache.lock)
        return NULL

    cdef int inflate(self, uint64_t number, uint64_t word) noexcept nogil:
        """Put a dirty slice in the place of an inline or packed one. The lock is held."""
        cdef DirtySlice *made = make_dirty(number, self.slice_clusters * self.entry_size)
        cdef Leaf *leaf = self.leaf_for(number)
        if made == NULL:
            return NO_MEMORY
        spell_out(word, self.cluster_bits, self.slice_bits, self.extended, entries_of(made))
        self.cache.discard_word(leaf, number % LEAF_WORDS)
        leaf.pinned += 1
        leaf.words[number % LEAF_WORDS] = self.admit(number, <uint64_t> made | DIRTY, DEMANDED, True)
        self.cache.make_room(0)
        return FOUND

    cdef int store_entries(self, uint64_t cluster, const uint8_t *entries, uint64_t count, uint64_t *number) noexcept nogil:
        """Hold every slice before the first is changed: all entries are stored, or none where slice `number` failed."""
        cdef DirtySlice *held
        cdef int outcome
        pthread_mutex_lock(&self.cache.lock)
        outcome = self.hold_all(cluster, count, number)
        while outcome == FOUND and count:
            number[0] = cluster >> self.slice_bits
            held = self.hold(number[0], &outcome)
            if held != NULL:
                self.change(held, &cluster, &entries, &count)
        pthread_mutex_unlock(&self.cache.lock)
        return outcome

    cdef int hold_all(self, uint64_t cluster, uint64_t count, uint64_t *number) noexcept nogil:
        """Make every slice of these clusters dirty, up to slice `number`, which fails. The lock is held."""
        cdef DirtySlice *held
        cdef int outcome = FOUND
        number[0] = cluster >> self.slice_bits
        while outcome == FOUND and number[0] <= (cluster + count - 1) >> self.slice_bits:
            held = self.hold(number[0], &outcome)
            if held != NULL:
                self.renew(held)  # so that it stays, should somebody call it clean while the next one loads
                number[0] += 1
        return outcome

    cdef int keep_slice(self, uint64_t cluster, uint64_t *number) noexcept nogil:
        cdef int outcome
        pthread_mutex_lock(&self.cache.lock)
        outcome = self.hold_all(cluster, 1, number)
        pthread_mutex_unlock(&self.cache.lock)
        return outcome

    cdef bint is_dirty(self, uint64_t cluster) noexcept nogil:
        """Was the slice of a guest cluster stored to, or kept for that, and is it not on disk yet?"""
        cdef bint dirty
        pthread_mutex_lock(&self.cache.lock)
        dirty = self.word_at(cluster >> self.slice_bits) & STATE == DIRTY
        pthread_mutex_unlock(&self.cache.lock)
        return dirty

    cdef uint64_t end_of_slice(self, uint64_t cluster) noexcept nogil:
        """One past the last cluster that has its entry in the same slice."""
        return (cluster >> self.slice_bits) + 1 << self.slice_bits

    cdef void renew(self, DirtySlice *held) noexcept nogil:
        self.stores += 1
        held.version = self.stores

    cdef void change(self, DirtySlice *held, uint64_t *cluster, const uint8_t **entries, uint64_t *count) noexcept nogil:
        """Put those entries into a slice that belong there, and step over them."""
        cdef uint32_t index = <uint32_t> cluster[0] & (self.slice_clusters - 1)
        cdef uint64_t part = min(count[0], <uint64_t> self.slice_clusters - index)
        memcpy(entries_of(held) + index * self.entry_size, entries[0], part * self.entry_size)
        self.renew(held)
        cluster[0] += part
        entries[0] += part * self.entry_size
        count[0] -= part

    cdef int copy_slice(self, uint64_t number, uint8_t *raw) noexcept nogil:
        """The raw entries of a slice inside the directory."""
        cdef Mapped ignored
        cdef Load job
        cdef uint64_t word
        cdef int outcome = STALE
        while outcome == STALE:
            pthread_mutex_lock(&self.cache.lock)
            word = self.word_at(number)
            if not self.has_table(number):
                memset(raw, 0, self.slice_clusters * self.entry_size)
                outcome = FOUND
            elif word & STATE == DIRTY:
                memcpy(raw, entries_of(dirty_of(word)), self.slice_clusters * self.entry_size)
                outcome = FOUND
            elif word & STATE >= INLINE:
                spell_out(word, self.cluster_bits, self.slice_bits, self.extended, raw)
                outcome = FOUND
            elif word == LOADING:
                self.wait()
            else:
                self.plan_demand(&job, number)
                job.index = 0
                job.want = 1
                job.copy = raw
                outcome = self.load(&job, &ignored)
                continue
            pthread_mutex_unlock(&self.cache.lock)
        return outcome

    cdef int copy_beyond(self, uint64_t number, uint8_t *raw) noexcept nogil:
        """The same for one that is not in the directory, because the disk ends before it but its table does not."""
        cdef uint64_t first = number << self.slice_bits
        cdef uint32_t span = self.slice_clusters * self.entry_size
        cdef uint8_t *aligned
        cdef uint64_t table = 0
        cdef int outcome
        memset(raw, 0, span)
        pthread_mutex_lock(&self.cache.lock)
        if self.has_table(number):
            table = self.l1[first >> self.table_bits]
        pthread_mutex_unlock(&self.cache.lock)
        if table & (((<uint64_t> 1 << self.cluster_bits) - 1)):
            return BAD_TABLE
        aligned = <uint8_t *> memalign(4096, span)
        if table == 0 or aligned == NULL:
            free(aligned)
            return FOUND if table == 0 else NO_MEMORY
        outcome = FOUND if self.read_table(table + self.skip(number), aligned, span) else READ_FAILED
        memcpy(raw, aligned, span)
        free(aligned)
        return outcome

    cdef bint has_table(self, uint64_t number) noexcept nogil:
        """The lock is held."""
        cdef uint64_t table = (number << self.slice_bits) >> self.table_bits
        return table < self.l1_entries and self.l1[table] != 0

    cdef void drop_table(self, uint64_t table) noexcept nogil:
        """Forget all slices of an L2 table; what loads will not be published. The lock is held."""
        cdef uint64_t number = table << (self.table_bits - self.slice_bits)
        cdef uint64_t end = min((table + 1) << (self.table_bits - self.slice_bits), self.slices)
        cdef Leaf *leaf
        while number < end:
            leaf = self.leaf_for(number)
            if leaf == NULL:
                number += LEAF_WORDS - number % LEAF_WORDS
                continue
            if leaf.words[number % LEAF_WORDS] != LOADING:
                self.cache.discard_word(leaf, number % LEAF_WORDS)
            number += 1
        self.generation += self.l1[table] != 0

    cdef uint64_t skip(self, uint64_t number) noexcept nogil:
        """Bytes of an L2 table before that slice of it."""
        return ((number << self.slice_bits) & ((<uint64_t> 1 << self.table_bits) - 1)) * self.entry_size

    # -- to the disk ------------------------------------------------------------------------------------------------

    cdef uint64_t copy_dirty(self, Taken *taken, uint8_t *content, uint64_t room) noexcept nogil:
        """Copy every dirty slice, if there is `room` for so many; returns how many there are."""
        cdef DirtySlice *held
        cdef uint64_t i = 0, count, first
        cdef uint32_t span = self.slice_clusters * self.entry_size
        pthread_mutex_lock(&self.cache.lock)
        count = self.dirty.count
        held = self.dirty.head.next
        while held != &self.dirty.head and count <= room:
            first = held.number << self.slice_bits
            taken[i].number = held.number
            taken[i].version = held.version
            taken[i].host = self.l1[first >> self.table_bits] + self.skip(held.number)
            memcpy(content + i * span, entries_of(held), span)
            held = held.next
            i += 1
        pthread_mutex_unlock(&self.cache.lock)
        return count

    cdef void clean_one(self, uint64_t number, uint64_t version) noexcept nogil:
        """Pack a dirty slice without the lock, and put that in its place if it was not stored to meanwhile."""
        cdef uint8_t raw[SLICE_BYTES]
        cdef uint64_t word
        cdef Leaf *leaf
        if not self.copy_version(number, version, raw):
            return
        word = inline_word(raw, self.slice_clusters, self.cluster_bits, self.extended)
        if word == ABSENT:
            word = <uint64_t> make_slice(raw, self.slice_clusters, self.cluster_bits, self.extended)
            word = word | PACKED if word else ABSENT  # out of memory: the disk has it
        pthread_mutex_lock(&self.cache.lock)
        if self.is_version(number, version):
            leaf = self.leaf_for(number)
            leaf.pinned += 1
            self.cache.discard_word(leaf, number % LEAF_WORDS)
            leaf.words[number % LEAF_WORDS] = self.admit(number, word, DEMANDED, True)
            leaf.pinned -= 1
        elif word & STATE == PACKED:
            free(slice_of(word))
        pthread_mutex_unlock(&self.cache.lock)

    cdef bint copy_version(self, uint64_t number, uint64_t version, uint8_t *raw) noexcept nogil:
        cdef bint same
        pthread_mutex_lock(&self.cache.lock)
        same = self.is_version(number, version)
        if same:
            memcpy(raw, entries_of(dirty_of(self.word_at(number))), self.slice_clusters * self.entry_size)
        pthread_mutex_unlock(&self.cache.lock)
        return same

    cdef bint is_version(self, uint64_t number, uint64_t version) noexcept nogil:
        """Whether the slice is dirty in just that version. The lock is held."""
        cdef uint64_t word = self.word_at(number) if number < self.slices else ABSENT
        return word & STATE == DIRTY and dirty_of(word).version == version

    cdef bint exchange(self, uint64_t **l1, uint64_t entries, uint64_t clusters, Leaf ***leaves, uint64_t length) noexcept nogil:
        """Take L1 table and directory in exchange for ours, once nothing loads. False: something is dirty, nothing was done."""
        cdef uint64_t *old = self.l1
        cdef bint fine
        pthread_mutex_lock(&self.cache.lock)
        self.replacing = True
        while self.in_flight:
            self.wait()
        self.replacing = False
        fine = self.dirty.count == 0
        if fine:
            leaves[0] = self.cache.exchange(self.layer, leaves[0], length)
            self.l1 = l1[0]
            self.l1_entries = entries
            self.clusters = clusters
            self.slices = (clusters + self.slice_clusters - 1) >> self.slice_bits
            l1[0] = old
        if self.cache.waiting:
            pthread_cond_broadcast(&self.cache.loaded)
        pthread_mutex_unlock(&self.cache.lock)
        return fine

    # -- for Python -------------------------------------------------------------------------------------------------

    @property
    def dirty_bytes(self):
        """Memory that dirty slices take."""
        return self.dirty.bytes

    def entries(self, uint64_t cluster, uint64_t count):
        """The raw big-endian L2 entries of `count` guest clusters, 8 or 16 bytes each.

        Zeros where there is no L2 table; a table is read to its end, even where the disk ends before. Raises as `lookup`.
        """
        cdef uint32_t span = self.slice_clusters * self.entry_size
        cdef uint64_t first = cluster >> self.slice_bits, number
        cdef uint64_t end = (cluster + count + self.slice_clusters - 1) >> self.slice_bits
        cdef uint64_t skip = (cluster & (self.slice_clusters - 1)) * self.entry_size
        cdef uint8_t raw[SLICE_BYTES]
        found = bytearray()
        for number in range(first, end):
            self.load_slice(number, raw)
            found += raw[:span]
        return bytes(found[skip : skip + count * self.entry_size])

    cdef load_slice(self, uint64_t number, uint8_t *raw):
        cdef int outcome = STALE, attempts = 0
        while outcome != FOUND:
            with nogil:
                outcome = self.copy_slice(number, raw) if number < self.slices else self.copy_beyond(number, raw)
            if outcome != FOUND:
                attempts += 1
                self.complain(number, outcome, attempts)

    def store(self, uint64_t cluster, const uint8_t[::1] entries not None):
        """Replace the raw L2 entries from `cluster` on, whole ones of 8 or 16 bytes; what is absent is loaded first.

        All of them are stored or none. Raises as `lookup`, and InternalError where there is no L2 table or no such cluster.
        """
        cdef uint64_t size = entries.shape[0], count = size // self.entry_size, number
        cdef int outcome, attempts = 0
        if size == 0 or size % self.entry_size or count > self.clusters or cluster > self.clusters - count:
            raise InternalError(f"{size} bytes of L2 entries were stored at guest cluster {cluster}, expected whole ones of "
                                f"{self.entry_size} bytes inside a map of {self.clusters} clusters")
        while True:
            with nogil:
                outcome = self.store_entries(cluster, &entries[0], count, &number)
            if outcome == FOUND:
                return
            if outcome == NO_TABLE:
                raise InternalError(f"L2 entries were stored at guest cluster {cluster}, which has no L2 table")
            attempts += 1
            self.complain(number, outcome, attempts)

    def keep(self, uint64_t cluster):
        """Make the slice of a guest cluster dirty as it is, so that compiled writers store to it.

        Raises as `lookup`, and InternalError where there is no L2 table or no such cluster.
        """
        cdef uint64_t number
        cdef int outcome, attempts = 0
        while True:
            outcome = NO_TABLE
            if cluster < self.clusters:
                with nogil:
                    outcome = self.keep_slice(cluster, &number)
            if outcome == FOUND:
                return
            if outcome == NO_TABLE:
                raise InternalError(f"the slice of guest cluster {cluster} was to be kept, which has no L2 table")
            attempts += 1
            self.complain(number, outcome, attempts)

    def l1_offset_of(self, uint64_t table):
        """Host offset of an L2 table, 0 where there is none."""
        cdef uint64_t offset
        pthread_mutex_lock(&self.cache.lock)
        offset = self.l1[table] if table < self.l1_entries else 0
        pthread_mutex_unlock(&self.cache.lock)
        return offset

    def set_l1(self, uint64_t table, uint64_t offset):
        """Let an L1 entry name the L2 table at host `offset`, 0 for none. All that is known of the old one is forgotten.

        That includes entries which were stored to it. Raises InternalError for an entry that the L1 table does not have.
        """
        cdef bint there
        pthread_mutex_lock(&self.cache.lock)
        there = table < self.l1_entries
        if there:
            self.drop_table(table)
            self.l1[table] = offset
        pthread_mutex_unlock(&self.cache.lock)
        if not there:
            raise InternalError(f"L1 entry {table} was set in an L1 table of {self.l1_entries} entries")

    def replace_l1(self, bytes l1 not None, uint64_t clusters, *, l1_offset=None):
        """Take another big-endian L1 table, for a disk of so many clusters; all that is known of the old one is forgotten.

        Nobody may be asking meanwhile, but a warm-up. Raises BadOption, and InternalError while anything is dirty.
        """
        cdef uint64_t entries = <uint64_t> len(l1) // 8
        cdef uint64_t length = (self.slices_for(clusters) + LEAF_WORDS - 1) // LEAF_WORDS or 1
        cdef uint64_t *table = decode_l1(l1)
        cdef Leaf **leaves = <Leaf **> calloc(length, sizeof(Leaf *))
        cdef bint done
        if leaves == NULL:
            free(table)
            raise MemoryError(f"no memory for a directory of {length} leaves")
        with nogil:
            done = self.exchange(&table, entries, clusters, &leaves, length)
        free(table)
        free(leaves)
        if not done:
            raise InternalError("an L1 table was replaced while slices of its L2 tables were dirty")
        if l1_offset is not None:
            self.l1_offset = l1_offset

    def take_dirty(self):
        """Copies of all dirty slices, ascending by host offset: (host offset, content, token) each. They stay dirty."""
        cdef uint32_t span = self.slice_clusters * self.entry_size
        cdef Taken *taken = NULL
        cdef uint8_t *content = NULL
        cdef uint64_t i, room = 0, count = self.dirty.count
        try:
            while count > room:
                room = count
                taken = <Taken *> renewed(taken, room * sizeof(Taken))
                content = <uint8_t *> renewed(content, room * span)
                with nogil:
                    count = self.copy_dirty(taken, content, room)
            found = [(taken[i].host, content[i * span : (i + 1) * span], (taken[i].number, taken[i].version))
                     for i in range(count)]
        finally:
            free(taken)
            free(content)
        found.sort()
        return found

    def clean(self, tokens):
        """Slices of `take_dirty` are on disk and stable: those not stored to since are as good as loaded from there."""
        cdef uint64_t number, version
        for number, version in tokens:
            with nogil:
                self.clean_one(number, version)
