# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The memory of the maps of one chain: a byte budget, one lock, directories of leaves, packed slices, counters.

It does not know how slices are loaded or what they say. What must hold: with no load in flight and nothing dirty
`bytes_used` is at most `budget`, unless the fixed tables alone are larger (then nothing else is kept); eviction never writes.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc

from cowslice.cache.directory cimport ABSENT, DIRTY, INLINE, LEAF_WORDS, PACKED, STATE, Directory, Leaf, Slice, charged, slice_of
from cowslice.cache.dirty cimport DirtyRing, DirtySlice, dirty_of, link_dirty, unlink_dirty
from cowslice.cache.pthread cimport (
    pthread_cond_destroy, pthread_cond_init, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock)
from cowslice.cache.policy cimport USED, Node, Policy, make_policy

from cowslice.cache.forms import FORMS
from cowslice.errors import BadOption

cimport cython

cdef extern from "<malloc.h>" nogil:
    int malloc_trim(size_t)

cdef enum:
    MOST_LAYERS = 0xFFFF    # Node.layer has 16 bits
    TRIM_STEPS = 256        # leaves that a trim looks at before it lets others have the lock


cdef inline void link_newest(Leaf *ring, Leaf *leaf) noexcept nogil:
    leaf.next = ring.next
    leaf.prev = ring
    ring.next.prev = leaf
    ring.next = leaf


cdef inline void unlink(Leaf *leaf) noexcept nogil:
    leaf.prev.next = leaf.next
    leaf.next.prev = leaf.prev


# Not cleared by the garbage collector: __dealloc__ still needs the policy.
@cython.final
@cython.no_gc_clear
cdef class SliceCache:
    """The memory that the maps of one chain share: `budget` bytes, a replacement policy, one lock, counters.

    `budget` counts packed slices with their headers, directories and their leaves, and the policy's own tables, each with
    what the C library adds; loads in flight come on top. Dirty slices are counted too, but stay whatever the budget.
    """

    def __cinit__(self, uint64_t budget, str policy="clock2q+"):
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.loaded, NULL)
        self.ring.prev = &self.ring
        self.ring.next = &self.ring
        self.budget = budget
        self.policy = make_policy(policy, budget)

    def __dealloc__(self):
        cdef uint32_t layer
        while self.ring.next != NULL and self.ring.next != &self.ring:
            self.discard_leaf(self.ring.next)
        for layer in range(self.layers):
            free(self.directories[layer].leaves)
        free(self.directories)
        pthread_mutex_destroy(&self.lock)
        pthread_cond_destroy(&self.loaded)

    cdef uint64_t used_bytes(self) noexcept nogil:
        return self.policy.overhead() + self.fixed_bytes + self.slice_bytes + self.leaf_bytes

    cdef void make_room(self, uint64_t wanted) noexcept nogil:
        """Evict until `wanted` more bytes fit, as far as possible. The lock is held.

        Leaves yield only past three quarters of the budget, or when there is nothing else.
        """
        while self.used_bytes() + wanted > self.budget:
            if self.leaf_bytes * 4 > self.budget * 3:
                if self.drop_leaf() or self.evict_slice():
                    continue
                return
            if not self.evict_slice() and not self.drop_leaf():
                return

    cdef bint may_keep_leaf(self) noexcept nogil:
        """Would another leaf stay without driving out other leaves? The lock is held."""
        return (self.fixed_bytes + self.leaf_bytes + charged(sizeof(Leaf))) * 4 <= self.budget * 3

    cdef Leaf *add_leaf(self, uint16_t layer, uint32_t number) noexcept nogil:
        """A new leaf where there is none; NULL when memory is out. The lock is held."""
        cdef Leaf *leaf
        self.make_room(charged(sizeof(Leaf)))
        leaf = <Leaf *> calloc(1, sizeof(Leaf))
        if leaf == NULL:
            return NULL
        leaf.layer = layer
        leaf.number = number
        leaf.used = 1
        link_newest(&self.ring, leaf)
        self.leaf_count += 1
        self.leaf_bytes += charged(sizeof(Leaf))
        self.directories[layer].leaves[number] = leaf
        return leaf

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
        """A clock over all leaves: what was looked at since the hand passed stays, and what loads or is dirty. The lock is held."""
        cdef uint64_t steps = 2 * self.leaf_count
        cdef Leaf *leaf
        while steps:
            steps -= 1
            leaf = self.ring.prev
            if not leaf.used and not leaf.pinned:
                self.discard_leaf(leaf)
                self.counters.leaves_dropped += 1
                return True
            leaf.used = 0
            unlink(leaf)
            link_newest(&self.ring, leaf)
        return False

    cdef void discard_leaf(self, Leaf *leaf) noexcept nogil:
        """Forget a leaf with all its slices, dirty ones too. The lock is held, and none of them loads."""
        cdef uint32_t i
        for i in range(LEAF_WORDS):
            self.discard_word(leaf, i)
        self.directories[leaf.layer].leaves[leaf.number] = NULL
        unlink(leaf)
        free(leaf)
        self.leaf_count -= 1
        self.leaf_bytes -= charged(sizeof(Leaf))

    cdef void discard_word(self, Leaf *leaf, uint32_t i) noexcept nogil:
        """Forget a slice that does not load, even a dirty one. The lock is held."""
        cdef uint64_t word = leaf.words[i]
        if word & STATE == INLINE:
            self.counters.inlined -= 1
        elif word & STATE == PACKED:
            self.policy.remove(&slice_of(word).node)
            self.release(slice_of(word))
        elif word & STATE == DIRTY:
            self.forget_dirty(dirty_of(word))
            leaf.pinned -= 1
        leaf.words[i] = ABSENT

    cdef void keep_dirty(self, DirtySlice *held, DirtyRing *owner) noexcept nogil:
        """Account for a dirty slice, whatever the budget. The lock is held."""
        link_dirty(owner, held)
        self.dirty_bytes += held.granules * 16
        self.slice_bytes += held.granules * 16

    cdef void forget_dirty(self, DirtySlice *held) noexcept nogil:
        self.dirty_bytes -= held.granules * 16
        self.slice_bytes -= held.granules * 16
        unlink_dirty(held)
        free(held)

    # -- layers -----------------------------------------------------------------------------------------------------

    cdef uint16_t adopt(self, uint64_t leaves) except 0xFFFF:
        """Give a new map a directory of `leaves` empty places; answers its layer number."""
        cdef Directory made
        cdef Directory *grown
        cdef uint32_t layer = 0
        made.length = <uint32_t> leaves
        made.leaves = <Leaf **> calloc(leaves, sizeof(Leaf *))
        if made.leaves == NULL:
            raise MemoryError(f"no memory for a directory of {leaves} leaves")
        pthread_mutex_lock(&self.lock)
        while layer < self.layers and self.directories[layer].leaves != NULL:
            layer += 1
        if layer == self.layers:
            grown = <Directory *> realloc(self.directories, (layer + 1) * sizeof(Directory)) if layer < MOST_LAYERS else NULL
            if grown == NULL:
                pthread_mutex_unlock(&self.lock)
                free(made.leaves)
                raise BadOption(f"{layer} maps share one metadata cache already, expected memory for one more and fewer "
                                f"than {MOST_LAYERS}")
            self.directories = grown
            self.layers += 1
        self.directories[layer] = made
        self.fixed_bytes += charged(leaves * sizeof(Leaf *))
        self.make_room(0)
        pthread_mutex_unlock(&self.lock)
        return <uint16_t> layer

    cdef Leaf **exchange(self, uint16_t layer, Leaf **leaves, uint64_t length) noexcept nogil:
        """Give a map a fresh directory of `length` places, or none; all it had is forgotten. The caller frees what is returned.

        The lock is held, and nothing of that map loads.
        """
        cdef Directory *own = &self.directories[layer]
        cdef Leaf **gone = own.leaves
        cdef uint32_t number
        for number in range(own.length):
            if gone[number] != NULL:
                self.discard_leaf(gone[number])
        self.fixed_bytes -= charged(<uint64_t> own.length * sizeof(Leaf *))
        own.leaves = leaves
        own.length = <uint32_t> length
        if leaves != NULL:
            self.fixed_bytes += charged(length * sizeof(Leaf *))
            self.make_room(0)
        return gone

    cdef void retire(self, uint16_t layer) noexcept:
        """Forget a map that nobody can ask any more; its number is free for another."""
        cdef Leaf **gone
        pthread_mutex_lock(&self.lock)
        gone = self.exchange(layer, NULL, 0)
        pthread_mutex_unlock(&self.lock)
        free(gone)

    # -- what is here -----------------------------------------------------------------------------------------------

    cdef bytes residency(self, uint16_t layer, uint64_t slices, uint32_t cells):
        """The share of slices in memory, 0 to 255, of each of `cells` equal parts of a map. The lock is held per leaf."""
        cdef uint32_t *found
        cdef uint64_t first = 0, cell, begin, end
        if not 1 <= cells <= 1 << 20:
            raise BadOption(f"cells is {cells}, expected 1 to {1 << 20}")
        found = <uint32_t *> calloc(cells, sizeof(uint32_t))
        if found == NULL:
            raise MemoryError(f"no memory for {cells} cells")
        with nogil:
            while first < slices:
                self.count_leaf(layer, first, min(first + LEAF_WORDS, slices), slices, cells, found)
                first += LEAF_WORDS
        shares = bytearray(cells)
        for cell in range(cells):
            # A part narrower than a slice shows the slice that it lies in.
            begin = cell * slices // cells
            end = max((cell + 1) * slices // cells, begin + 1)
            shares[cell] = min(found[cell] * 255 // (end - begin), 255)
        free(found)
        return bytes(shares)

    cdef void count_leaf(self, uint16_t layer, uint64_t first, uint64_t last, uint64_t slices, uint32_t cells,
                         uint32_t *found) noexcept nogil:
        """Count what is in memory of slices `first` to `last`, which stand under one leaf, into the cells they touch."""
        cdef Leaf *leaf
        cdef uint64_t number, cell, final
        pthread_mutex_lock(&self.lock)
        leaf = self.directories[layer].leaves[first // LEAF_WORDS]
        if leaf != NULL:
            for number in range(first, last):
                if leaf.words[number % LEAF_WORDS] & STATE < INLINE:
                    continue
                final = ((number + 1) * cells - 1) // slices
                for cell in range(min((number * cells + slices - 1) // slices, final), final + 1):
                    found[cell] += 1
        pthread_mutex_unlock(&self.lock)

    # -- for Python -------------------------------------------------------------------------------------------------

    def trim(self):
        """Give back what nobody looked at since the last trim; returns the bytes freed."""
        cdef uint64_t freed
        with nogil:
            freed = self.trim_all()
            if freed:
                malloc_trim(0)
        return freed

    cdef uint64_t trim_all(self) noexcept nogil:
        """One round of the leaf clock. Others get the lock now and then; what they add meanwhile is not looked at."""
        cdef uint64_t freed = 0, before, steps = 0, all_leaves
        cdef Leaf *leaf
        pthread_mutex_lock(&self.lock)
        all_leaves = self.leaf_count
        while steps < all_leaves and self.leaf_count:
            leaf = self.ring.prev
            unlink(leaf)
            link_newest(&self.ring, leaf)
            before = self.used_bytes()
            self.trim_leaf(leaf)
            freed += before - self.used_bytes()
            steps += 1
            if steps % TRIM_STEPS == 0:
                pthread_mutex_unlock(&self.lock)
                pthread_mutex_lock(&self.lock)
        pthread_mutex_unlock(&self.lock)
        return freed

    cdef void trim_leaf(self, Leaf *leaf) noexcept nogil:
        """Slices of one run stay as long as anybody looks at their leaf: alone they free nothing."""
        cdef Slice *held
        cdef uint32_t i
        if leaf.pinned:
            return
        if leaf.idle:
            self.discard_leaf(leaf)
            return
        leaf.idle = 1
        for i in range(LEAF_WORDS):
            if leaf.words[i] & STATE != PACKED:
                continue
            held = slice_of(leaf.words[i])
            if held.node.state & USED:
                held.node.state &= ~USED
                continue
            self.policy.remove(&held.node)
            self.release(held)
            leaf.words[i] = ABSENT

    def statistics(self):
        """Counters since the start and what is resident now, as a dict; sizes in bytes.

        `loads` counts metadata reads that came, `failed_loads` those that did not, `joined_loads` the waits of lookups for
        a read of somebody else; `slices` counts resident slices by form, `inline` being those of one run; dirty ones are
        not among them, their memory is `dirty_bytes`.
        """
        pthread_mutex_lock(&self.lock)
        cdef Counters c = self.counters
        cdef uint64_t used = self.used_bytes()
        cdef uint64_t ghosts = self.policy.overhead()
        cdef uint64_t dirty = self.dirty_bytes
        pthread_mutex_unlock(&self.lock)
        return {
            "hits": c.hits, "misses": c.misses, "loads": c.loads, "joined_loads": c.joined, "failed_loads": c.failed,
            "bytes_read": c.bytes_read, "evictions": c.evictions, "leaves_dropped": c.leaves_dropped,
            "bytes_used": used, "policy_bytes": ghosts, "dirty_bytes": dirty, "budget": self.budget, "policy": self.policy.name,
            "slices": {"inline": c.inlined, **{form: c.forms[i] for i, form in enumerate(FORMS)}},
        }
