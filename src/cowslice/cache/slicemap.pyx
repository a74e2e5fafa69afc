# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The metadata cache: where each guest cluster lives, kept packed, under a byte budget, with misses that run side by side.

It does not know what the bytes of a cluster are for, nor who asks. What must hold: the lock is never kept across I/O or
while waiting for the GIL; a slice is immutable once published; the budget is exceeded by loads in flight only; eviction
never writes.

A directory word is one of
  0                     absent
  1                     loading: somebody reads it, everybody else waits for that one read
  ...  | 2              inline: the slice is one run, and the word is all there is of it
                        bits 3-5 tag (zero, compressed, copied), 6-7 which bitmap, from 8 the first host cluster
  pointer | 3           packed: a Slice, 16-byte aligned
"""

cimport cython
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc

from libc.string cimport memcpy, memset

from cowslice.cache.packing cimport MAX_ENTRIES, TAGGED, Draft, Mapped, Shape, locate, one_run, pack, payload_size
from cowslice.cache.policy cimport AHEAD, DEMANDED, USED, WARMED, Arrival, Node, Policy, make_policy

from cowslice.cache.packing import FORMS
from cowslice.errors import BadOption, CorruptImage, InternalError, StorageError

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_cond_init(pthread_cond_t *, void *)
    int pthread_cond_destroy(pthread_cond_t *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_broadcast(pthread_cond_t *)

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buffer, size_t count, long offset)

cdef extern from "<malloc.h>" nogil:
    int malloc_trim(size_t)
    void *memalign(size_t alignment, size_t size)

cdef extern from *:
    uint64_t bswap64 "__builtin_bswap64"(uint64_t) noexcept nogil
    int trailing_zeros "__builtin_ctzll"(uint64_t) noexcept nogil

cdef enum:
    ABSENT = 0
    LOADING = 1
    INLINE = 2
    PACKED = 3
    STATE = 7
    NEVER_KEPT = 4          # digest's word for "no room for it"; never stands in the directory
    SLICE_BYTES = 4096      # the most that one slice spans on disk
    AHEAD_BYTES = 65536     # the most that a sequential reader brings at once
    FRUITLESS = 1024        # slices that a warm-up passes in vain before it gives up

cdef uint64_t COPIED = <uint64_t> 1 << 63
cdef uint64_t OFFSET = 0x00FFFFFFFFFFFE00
cdef uint64_t ALL_ALLOCATED = 0x00000000FFFFFFFF
cdef uint64_t ALL_ZERO = 0xFFFFFFFF00000000


cdef inline uint64_t charged(uint64_t size) noexcept nogil:
    """Bytes that the C library takes for a block of `size`: 8 of its own, rounded up to 16."""
    return (size + 8 + 15) & ~<uint64_t> 15


cdef inline uint8_t *payload_of(Slice *held) noexcept nogil:
    return <uint8_t *> held + sizeof(Slice)


cdef inline void stow(Slice *held, const Shape *shape) noexcept nogil:
    """Put a shape into 11 bytes: the base, and the cargo of the node."""
    held.base = shape.base
    held.node.cargo = shape.form | shape.view << 3 | shape.bitmaps << 5
    held.node.more_cargo = shape.runs | <uint16_t> (shape.width << 10)


cdef inline void unstow(const Slice *held, uint8_t cluster_bits, uint8_t entry_bits, Shape *shape) noexcept nogil:
    shape.base = held.base
    shape.form = held.node.cargo & 7
    shape.view = held.node.cargo >> 3 & 3
    shape.bitmaps = held.node.cargo >> 5
    shape.runs = held.node.more_cargo & 1023
    shape.width = held.node.more_cargo >> 10
    shape.cluster_bits = cluster_bits
    shape.entry_bits = entry_bits


@cython.no_gc_clear  # the policy must still be there in __dealloc__: the collector would take it away before
cdef class SliceCache:
    """The memory that the maps of one chain share: `budget` bytes, a replacement policy, one lock, counters.

    `budget` counts packed slices with their headers, directory leaves and the policy's own tables; loads in flight come on top.
    """

    def __cinit__(self, uint64_t budget, str policy="clock2q+"):
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.loaded, NULL)
        self.policy = make_policy(policy, budget)
        self.budget = budget
        self.fixed_bytes = self.policy.overhead()
        self.layers = 0

    def __dealloc__(self):
        cdef uint32_t layer, number
        for layer in range(self.layers):
            for number in range(self.directories[layer].length):
                self.discard_leaf(layer, number)
            free(self.directories[layer].leaves)
        free(self.directories)
        pthread_mutex_destroy(&self.lock)
        pthread_cond_destroy(&self.loaded)

    cdef uint64_t used_bytes(self) noexcept nogil:
        return self.fixed_bytes + self.slice_bytes + self.leaf_bytes

    cdef void make_room(self, uint64_t wanted) noexcept nogil:
        """Evict until `wanted` more bytes fit. Leaves yield only past three quarters of the budget, or when alone."""
        while self.used_bytes() + wanted > self.budget:
            if self.leaf_bytes * 4 > self.budget * 3:
                if self.drop_leaf() or self.evict_slice():
                    continue
                return
            if not self.evict_slice() and not self.drop_leaf():
                return

    cdef bint evict_slice(self) noexcept nogil:
        cdef Node *gone = self.policy.victim()
        if gone == NULL:
            return False
        self.directories[gone.layer].leaves[gone.key // LEAF_WORDS].words[gone.key % LEAF_WORDS] = ABSENT
        self.release(<Slice *> gone)
        self.counters.evictions += 1
        return True

    cdef void release(self, Slice *held) noexcept nogil:
        self.slice_bytes -= held.node.granules * 16
        self.counters.forms[held.node.cargo & 7] -= 1
        free(held)

    cdef bint drop_leaf(self) noexcept nogil:
        """A clock over all leaves: what was looked at since the last pass stays, and what loads."""
        cdef uint64_t steps = 0
        cdef uint32_t layer
        cdef Leaf *leaf
        for layer in range(self.layers):
            steps += 2 * self.directories[layer].length
        while steps:
            steps -= 1
            while self.hand_leaf >= self.directories[self.hand_layer].length:
                self.hand_leaf = 0
                self.hand_layer = (self.hand_layer + 1) % self.layers
            leaf = self.directories[self.hand_layer].leaves[self.hand_leaf]
            self.hand_leaf += 1
            if leaf == NULL or leaf.loading:
                continue
            if leaf.used:
                leaf.used = 0
                continue
            self.discard_leaf(self.hand_layer, self.hand_leaf - 1)
            self.counters.leaves_dropped += 1
            return True
        return False

    cdef void discard_leaf(self, uint32_t layer, uint32_t number) noexcept nogil:
        cdef Leaf *leaf = self.directories[layer].leaves[number]
        cdef uint64_t word
        cdef uint32_t i
        if leaf == NULL:
            return
        for i in range(LEAF_WORDS):
            word = leaf.words[i]
            if word & STATE == INLINE:
                self.counters.inlined -= 1
            elif word & STATE == PACKED:
                self.policy.remove(<Node *> (word & ~<uint64_t> STATE))
                self.release(<Slice *> (word & ~<uint64_t> STATE))
        free(leaf)
        self.directories[layer].leaves[number] = NULL
        self.leaf_bytes -= charged(sizeof(Leaf))

    cdef uint16_t adopt(self, uint64_t leaves) except 0xFFFF:
        """Give a new map its directory of `leaves` empty leaves; answers its layer number."""
        cdef Directory *grown = <Directory *> realloc(self.directories, (self.layers + 1) * sizeof(Directory))
        if grown == NULL:
            raise MemoryError("no memory for the directory of a metadata map")
        self.directories = grown
        grown[self.layers].leaves = <Leaf **> calloc(leaves, sizeof(Leaf *))
        grown[self.layers].length = <uint32_t> leaves
        if grown[self.layers].leaves == NULL:
            raise MemoryError(f"no memory for a directory of {leaves} leaves")
        self.fixed_bytes += charged(leaves * sizeof(Leaf *))
        self.layers += 1
        return <uint16_t> (self.layers - 1)

    def trim(self):
        """Give back what nobody looked at since the last trim; returns the bytes freed."""
        cdef uint64_t before, after
        cdef uint32_t layer, number
        with nogil:
            pthread_mutex_lock(&self.lock)
            before = self.used_bytes()
            for layer in range(self.layers):
                for number in range(self.directories[layer].length):
                    self.trim_leaf(layer, number)
            after = self.used_bytes()
            pthread_mutex_unlock(&self.lock)
            if after < before:
                malloc_trim(0)
        return before - after

    cdef void trim_leaf(self, uint32_t layer, uint32_t number) noexcept nogil:
        cdef Leaf *leaf = self.directories[layer].leaves[number]
        cdef Slice *held
        cdef uint32_t i
        if leaf == NULL or leaf.loading:
            return
        if leaf.idle:
            self.discard_leaf(layer, number)
            return
        leaf.idle = 1
        for i in range(LEAF_WORDS):
            if leaf.words[i] & STATE != PACKED:
                continue
            held = <Slice *> (leaf.words[i] & ~<uint64_t> STATE)
            if held.node.state & USED:
                held.node.state &= ~USED
                continue
            self.policy.remove(&held.node)
            self.release(held)
            leaf.words[i] = ABSENT

    def statistics(self):
        """Counters since the start and what is resident now, as a dict; sizes in bytes."""
        pthread_mutex_lock(&self.lock)
        cdef Counters c = self.counters
        cdef uint64_t used = self.used_bytes()
        pthread_mutex_unlock(&self.lock)
        return {
            "hits": c.hits, "misses": c.misses, "loads": c.loads, "joined_loads": c.joined, "failed_loads": c.failed,
            "bytes_read": c.bytes_read, "evictions": c.evictions, "leaves_dropped": c.leaves_dropped,
            "bytes_used": used, "budget": self.budget, "policy": self.policy.name,
            "slices": {"inline": c.inlined, **{form: c.forms[i] for i, form in enumerate(FORMS)}},
        }


cdef class SliceMap:
    """Guest cluster to L2 entry, for one layer: an L1 table in memory, and its L2 slices in the shared cache.

    `l1` is the big-endian L1 table; `clusters` is how many guest clusters may be asked for; `entry_bytes` is the unit of
    a metadata read (`l2-cache-entry-size`); `storage` is read through its descriptor where it has one (`fileno()` >= 0),
    else through its `read_into(offset, buffer)`. `l1_offset` is only named in errors. Bytes past the end of the file are zeros.
    """

    def __cinit__(self, SliceCache cache not None, *, int cluster_bits, bint extended_l2, bytes l1 not None,
                  uint64_t clusters, uint64_t entry_bytes, storage, uint64_t l1_offset=0, bint readahead=True):
        cdef uint64_t span = entry_bytes if entry_bytes < SLICE_BYTES else SLICE_BYTES
        cdef uint64_t slices
        self.cache = cache
        self.storage = storage
        # An unbuffered file wants aligned reads: the memory always is, the place when the unit of reading is.
        self.fd = storage.fileno() if entry_bytes % storage.alignment == 0 else -1
        self.clusters = clusters
        self.cluster_bits = cluster_bits
        self.extended = extended_l2
        self.entry_size = 16 if extended_l2 else 8
        self.table_bits = cluster_bits - (4 if extended_l2 else 3)
        self.slice_bits = trailing_zeros(span // self.entry_size)
        self.slice_clusters = <uint32_t> 1 << self.slice_bits
        self.group = <uint32_t> (entry_bytes // span)
        self.readahead = readahead
        self.l1_offset = l1_offset
        if entry_bytes & (entry_bytes - 1) or not 512 <= entry_bytes <= <uint64_t> 1 << cluster_bits:
            raise BadOption(f"l2-cache-entry-size is {entry_bytes}, expected a power of two from 512 to the cluster "
                            f"size {1 << cluster_bits}")
        slices = (clusters + self.slice_clusters - 1) >> self.slice_bits
        if slices >> 32:
            raise BadOption(f"l2-cache-entry-size {entry_bytes} cuts the map into {slices} slices, expected fewer than 4 "
                            f"billion: choose a larger one")
        self.take_l1(l1)
        self.layer = cache.adopt((slices + LEAF_WORDS - 1) // LEAF_WORDS or 1)

    cdef take_l1(self, bytes table):
        cdef const uint8_t *raw = table
        cdef uint64_t i, word
        self.l1_entries = <uint64_t> len(table) // 8
        self.l1 = <uint64_t *> malloc(self.l1_entries * 8 or 8)
        if self.l1 == NULL:
            raise MemoryError(f"no memory for an L1 table of {self.l1_entries} entries")
        for i in range(self.l1_entries):
            memcpy(&word, raw + 8 * i, 8)
            self.l1[i] = bswap64(word)

    def __dealloc__(self):
        free(self.l1)

    # -- lookup -----------------------------------------------------------------------------------------------------

    cdef bint unmapped(self, uint64_t cluster, uint32_t want, Mapped *out) noexcept nogil:
        """Without an L2 table there is nothing to load: answer from L1 alone, over as many tables as are missing."""
        cdef uint64_t table = cluster >> self.table_bits
        cdef uint64_t run
        if table < self.l1_entries and self.l1[table] & OFFSET:
            return False
        run = ((table + 1) << self.table_bits) - cluster
        while run < want and cluster + run < self.clusters and (
                table + 1 >= self.l1_entries or self.l1[table + 1] & OFFSET == 0):
            table += 1
            run += <uint64_t> 1 << self.table_bits
        out.word = 0
        out.bitmap = 0
        out.run = <uint32_t> (run if run < 0x7FFFFFFF else 0x7FFFFFFF)
        return True

    cdef Leaf *leaf_for(self, uint64_t number) noexcept nogil:
        return self.cache.directories[self.layer].leaves[number // LEAF_WORDS]

    cdef void read_word(self, uint64_t word, uint32_t index, uint32_t want, Mapped *out) noexcept nogil:
        """Answer from a word that is INLINE or PACKED."""
        cdef Slice *held
        cdef Shape shape
        cdef uint64_t host
        if word & STATE == INLINE:
            host = word >> 8
            if host:
                host += index
            out.word = (word >> 4 & 3) << 62 | (word >> 3 & 1) | host << self.cluster_bits
            out.bitmap = (ALL_ALLOCATED if word >> 6 & 1 else 0) | (ALL_ZERO if word >> 7 & 1 else 0)
            out.run = self.slice_clusters - index
            return
        held = <Slice *> (word & ~<uint64_t> STATE)
        unstow(held, self.cluster_bits, self.slice_bits, &shape)
        locate(&shape, payload_of(held), payload_size(&shape), index, want, out)
        held.node.state |= USED
        self.cache.policy.touch(&held.node)

    cdef int peek(self, uint64_t cluster, uint32_t want, Mapped *out) noexcept nogil:
        """Answer from memory, or NOT_RESIDENT. The caller holds the lock."""
        cdef uint64_t number = cluster >> self.slice_bits
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
        self.read_word(word, <uint32_t> cluster & (self.slice_clusters - 1), want, out)
        return FOUND

    cdef int resolve(self, uint64_t cluster, uint32_t want, Mapped *out) noexcept nogil:
        """Answer, loading the slice if need be. Takes the lock itself. On READ_FAILED and BAD_TABLE out.word says where."""
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

    # -- loading ----------------------------------------------------------------------------------------------------

    cdef void aim(self, Load *job, uint64_t first, uint32_t count) noexcept nogil:
        """Let the job bring up to `count` slices from `first`, none past the end of their L2 table."""
        cdef uint64_t per_table = <uint64_t> 1 << (self.table_bits - self.slice_bits)
        cdef uint64_t left = per_table - (first & (per_table - 1))
        cdef uint64_t slices = (self.clusters + self.slice_clusters - 1) >> self.slice_bits
        if slices - first < left:
            left = slices - first
        job.first = first
        job.count = <uint32_t> (count if count < left else left)
        job.table = self.l1[(first << self.slice_bits) >> self.table_bits]

    cdef void plan_demand(self, Load *job, uint64_t number) noexcept nogil:
        """One group, or more of them where the misses of late form a sequential stream."""
        cdef uint64_t first = number - number % self.group
        cdef uint32_t groups = self.stream_ahead(first) if self.readahead else 1
        self.cache.counters.misses += 1
        self.aim(job, first, self.group * groups)
        job.demanded = <uint32_t> (number - first)
        job.arrival = AHEAD
        job.may_evict = groups > 1

    cdef uint32_t stream_ahead(self, uint64_t first) noexcept nogil:
        """How many groups to read at `first`: twice as many as last time if a stream has just got here, else one."""
        cdef uint32_t i, groups = 1
        cdef uint32_t most = AHEAD_BYTES // (self.group * self.slice_clusters * self.entry_size)
        for i in range(4):
            if self.stream_next[i] == first and first:
                groups = self.stream_length[i] * 2
                break
        else:
            i = self.stream_hand
            self.stream_hand = (self.stream_hand + 1) & 3
        if groups > most:
            groups = most if most else 1
        self.stream_next[i] = first + groups * self.group
        self.stream_length[i] = groups
        return groups

    cdef int load(self, Load *job, Mapped *out) noexcept nogil:
        """Claim, read, pack, publish. Called with the lock held, returns without it; no lock is held while reading."""
        cdef uint64_t size = <uint64_t> job.count * self.slice_clusters * self.entry_size
        cdef uint8_t *buffer
        cdef int outcome
        cdef uint64_t table = job.table
        out.word = table
        if table & OFFSET & ((<uint64_t> 1 << self.cluster_bits) - 1):
            out.word = self.l1_offset + 8 * ((job.first << self.slice_bits) >> self.table_bits)
            pthread_mutex_unlock(&self.cache.lock)
            return BAD_TABLE
        if not self.claim(job):
            pthread_mutex_unlock(&self.cache.lock)
            return NO_MEMORY
        pthread_mutex_unlock(&self.cache.lock)
        buffer = <uint8_t *> memalign(SLICE_BYTES, size)
        if buffer == NULL:
            outcome = NO_MEMORY
        elif not self.read_table(job, buffer, size):
            outcome = READ_FAILED
        else:
            outcome = self.digest(job, buffer, out)
        free(buffer)
        pthread_mutex_lock(&self.cache.lock)
        if outcome == FOUND:
            self.cache.counters.loads += 1
            self.cache.counters.bytes_read += size
            self.publish(job)
        else:
            self.cache.counters.failed += 1
            self.unclaim(job)
        if self.cache.waiting:
            pthread_cond_broadcast(&self.cache.loaded)
        pthread_mutex_unlock(&self.cache.lock)
        return outcome

    cdef Leaf *grow_leaf(self, uint64_t number) noexcept nogil:
        cdef Leaf *leaf = self.leaf_for(number)
        if leaf != NULL:
            return leaf
        self.cache.make_room(charged(sizeof(Leaf)))
        leaf = <Leaf *> calloc(1, sizeof(Leaf))
        if leaf == NULL:
            return NULL
        leaf.used = 1
        self.cache.leaf_bytes += charged(sizeof(Leaf))
        self.cache.directories[self.layer].leaves[number // LEAF_WORDS] = leaf
        return leaf

    cdef bint claim(self, Load *job) noexcept nogil:
        """Mark what is absent in the job's range as loading by us. A leaf that loads cannot be dropped."""
        cdef uint32_t i
        cdef Leaf *leaf
        memset(job.claimed, 0, job.count)
        for i in range(job.count):
            leaf = self.grow_leaf(job.first + i)
            if leaf == NULL:
                self.unclaim(job)
                return False
            if leaf.words[(job.first + i) % LEAF_WORDS] == ABSENT:
                leaf.words[(job.first + i) % LEAF_WORDS] = LOADING
                leaf.loading += 1
                job.claimed[i] = 1
        return True

    cdef void unclaim(self, Load *job) noexcept nogil:
        cdef uint32_t i
        cdef Leaf *leaf
        for i in range(job.count):
            if job.claimed[i]:
                leaf = self.leaf_for(job.first + i)
                leaf.words[(job.first + i) % LEAF_WORDS] = ABSENT
                leaf.loading -= 1

    cdef bint read_table(self, Load *job, uint8_t *buffer, uint64_t size) noexcept nogil:
        cdef uint64_t offset = (job.table & OFFSET)
        cdef uint64_t done = 0
        cdef ssize_t got
        offset += ((job.first << self.slice_bits) & ((<uint64_t> 1 << self.table_bits) - 1)) * self.entry_size
        if self.fd < 0:
            with gil:
                return self.read_by_storage(offset, buffer, size)
        while done < size:
            got = pread(self.fd, buffer + done, size - done, <long> (offset + done))
            if got < 0 and errno == EINTR:
                continue
            if got < 0:
                return False
            if got == 0:
                memset(buffer + done, 0, size - done)
                return True
            done += got
        return True

    cdef bint read_by_storage(self, uint64_t offset, uint8_t *buffer, uint64_t size) noexcept:
        try:
            self.storage.read_into(offset, memoryview(<uint8_t[:size]> buffer))
            return True
        except Exception:
            # `lookup` reads once more and lets that error speak; here there is nobody to tell.
            return False

    cdef int digest(self, Load *job, const uint8_t *buffer, Mapped *out) noexcept nogil:
        """Turn raw entries into directory words, and answer the request that waits. Works on private memory only."""
        cdef uint64_t span = <uint64_t> self.slice_clusters * self.entry_size
        cdef bint room = job.may_evict or self.cache.used_bytes() + SLICE_BYTES // 2 < self.cache.budget
        cdef uint32_t i
        for i in range(job.count):
            if job.claimed[i]:
                job.words[i] = self.digest_one(buffer + i * span, room or i == job.demanded)
                if job.words[i] == ABSENT:
                    return self.spill(job, i)
        if job.demanded < job.count:
            self.read_private(job.words[job.demanded], job.index, job.want, out)
        return FOUND

    cdef int spill(self, Load *job, uint32_t end) noexcept nogil:
        cdef uint32_t i
        for i in range(end):
            if job.claimed[i] and job.words[i] & STATE == PACKED:
                free(<void *> (job.words[i] & ~<uint64_t> STATE))
        return NO_MEMORY

    cdef void read_private(self, uint64_t word, uint32_t index, uint32_t want, Mapped *out) noexcept nogil:
        """read_word for a slice that no policy knows yet."""
        cdef Slice *held = <Slice *> (word & ~<uint64_t> STATE)
        cdef Shape shape
        if word & STATE == INLINE:
            self.read_word(word, index, want, out)
            return
        unstow(held, self.cluster_bits, self.slice_bits, &shape)
        locate(&shape, payload_of(held), payload_size(&shape), index, want, out)
        held.node.state |= USED

    cdef uint64_t digest_one(self, const uint8_t *raw, bint keep) noexcept nogil:
        """The directory word of a slice: inline, a fresh packed Slice, NEVER_KEPT, or ABSENT when memory is out."""
        cdef Draft draft
        cdef Slice *held
        cdef uint64_t word
        if one_run(raw, self.slice_clusters, self.cluster_bits, self.extended):
            word = inline_word(raw, self.cluster_bits, self.extended)
            if word:
                return word
        if not keep:
            return NEVER_KEPT
        pack(raw, self.slice_clusters, self.cluster_bits, self.extended, &draft)
        held = <Slice *> malloc(sizeof(Slice) + draft.size)
        if held == NULL:
            return ABSENT
        memset(held, 0, sizeof(Slice))
        stow(held, &draft.shape)
        held.node.layer = self.layer
        held.node.granules = <uint16_t> (charged(sizeof(Slice) + draft.size) // 16)
        memcpy(payload_of(held), draft.payload, draft.size)
        return <uint64_t> held | PACKED

    cdef void publish(self, Load *job) noexcept nogil:
        """Put the words where everybody sees them. What found no room goes back to absent."""
        cdef uint32_t i
        cdef Leaf *leaf
        cdef uint64_t word
        job.published = 0
        for i in range(job.count):
            if not job.claimed[i]:
                continue
            leaf = self.leaf_for(job.first + i)
            word = job.words[i]
            if word & STATE == PACKED:
                word = self.settle(job, i, <Slice *> (word & ~<uint64_t> STATE))
            elif word & STATE == INLINE:
                self.cache.counters.inlined += 1
            leaf.words[(job.first + i) % LEAF_WORDS] = ABSENT if word == NEVER_KEPT else word
            job.published += word != NEVER_KEPT
        for i in range(job.count):
            if job.claimed[i]:
                self.leaf_for(job.first + i).loading -= 1

    cdef uint64_t settle(self, Load *job, uint32_t i, Slice *held) noexcept nogil:
        """Account for a packed slice and hand it to the policy, or free it where it may not push others out."""
        cdef uint64_t size = held.node.granules * 16
        cdef bint demanded = i == job.demanded
        cdef Counters *counters = &self.cache.counters
        if not demanded and not job.may_evict and self.cache.used_bytes() + size > self.cache.budget:
            free(held)
            return NEVER_KEPT
        self.cache.make_room(size)
        if self.cache.used_bytes() + size > self.cache.budget:
            free(held)
            return NEVER_KEPT
        held.node.key = <uint32_t> (job.first + i)
        self.cache.slice_bytes += size
        counters.forms[held.node.cargo & 7] += 1
        self.cache.policy.insert(&held.node, DEMANDED if demanded else job.arrival)
        return <uint64_t> held | PACKED

    # -- for Python -------------------------------------------------------------------------------------------------

    def lookup(self, uint64_t cluster, uint32_t want=0x7FFFFFFF):
        """(L2 entry word, subcluster bitmap, clusters from here that merely continue it) for a guest cluster.

        The run is exact up to `want` clusters, except that it never crosses a slice; the bitmap is 0 for standard entries.
        Raises CorruptImage for an L1 entry that cannot be followed, StorageError where reading fails. Thread safe.
        """
        cdef Mapped m
        cdef int outcome
        if cluster >= self.clusters:
            raise InternalError(f"guest cluster {cluster} was looked up in a map of {self.clusters}")
        for _ in range(3):
            with nogil:
                outcome = self.resolve(cluster, want, &m)
            if outcome == FOUND:
                return m.word, m.bitmap, m.run
            if outcome == READ_FAILED:
                # The compiled read has no way to say why: this one raises. If it succeeds the fault has passed.
                self.storage.read_into(m.word & OFFSET, memoryview(bytearray(1 << self.cluster_bits)))
                continue
            self.complain(cluster, outcome, m.word)
        raise StorageError(f"cannot read the L2 table at offset {m.word & OFFSET:#x}: it fails and succeeds by turns")

    cdef complain(self, uint64_t cluster, int outcome, uint64_t where):
        cdef uint64_t table = cluster >> self.table_bits
        if outcome == BAD_TABLE:
            raise CorruptImage(
                f"L1 entry {table} at offset {where:#x} is {self.l1[table]:#018x}, expected the offset of an L2 table "
                f"aligned to {1 << self.cluster_bits} bytes", structure="L1 table", offset=where)
        raise MemoryError("no memory to load a slice of an L2 table")

    def resident(self, uint64_t cluster):
        """Is the slice of this guest cluster in memory? For reports and tests."""
        cdef Mapped m
        pthread_mutex_lock(&self.cache.lock)
        cdef int outcome = self.peek(cluster, 1, &m)
        pthread_mutex_unlock(&self.cache.lock)
        return outcome == FOUND

    def warm(self):
        """Read all L2 tables in guest order while there is room, in the calling thread; `stop` ends it.

        Slices of one run are kept even when the budget is full, because they cost eight bytes. Returns the slices published.
        """
        cdef uint64_t published
        self.stopping = False
        with nogil:
            published = self.warm_tables()
        return published

    def stop(self):
        """Let a warm-up that runs in another thread end soon."""
        self.stopping = True

    cdef uint64_t warm_tables(self) noexcept nogil:
        cdef uint64_t slices = (self.clusters + self.slice_clusters - 1) >> self.slice_bits
        cdef uint64_t number = 0, published = 0, fruitless = 0
        cdef uint32_t chunk = AHEAD_BYTES // (self.slice_clusters * self.entry_size)
        cdef Mapped ignored
        cdef Load job
        while number < slices and fruitless < FRUITLESS and not self.stopping:
            if self.unmapped(number << self.slice_bits, 0x7FFFFFFF, &ignored):
                number += ignored.run >> self.slice_bits
                continue
            self.aim(&job, number, chunk)
            job.demanded = job.count
            job.arrival = WARMED
            job.may_evict = False
            pthread_mutex_lock(&self.cache.lock)
            if self.load(&job, &ignored) != FOUND:
                return published
            published += job.published
            fruitless = 0 if job.published else fruitless + job.count
            number += job.count
        return published


cdef inline uint64_t inline_word(const uint8_t *raw, uint8_t cluster_bits, bint extended) noexcept nogil:
    """The directory word of a slice that is one run, or 0 where its bitmap is none of the three that fit."""
    cdef const uint64_t *source = <const uint64_t *> raw
    cdef uint64_t word = bswap64(source[0])
    cdef uint64_t bitmap = bswap64(source[1]) if extended else 0
    cdef uint64_t code = 1 if bitmap == ALL_ALLOCATED else 2 if bitmap == ALL_ZERO else 0
    if bitmap and not code:
        return 0
    return INLINE | (word & 1) << 3 | (word >> 62) << 4 | code << 6 | (word & OFFSET) >> cluster_bits << 8
