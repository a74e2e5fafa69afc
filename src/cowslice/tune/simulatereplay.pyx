# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Two caches without content under a stream of accesses: QEMU's array of slices, and our map with its own policy.

It knows spans of guest bytes and sizes of slices, nothing of traces. What must hold: who leaves is decided by
cache.policy itself, with the sizes that the cache charges, and what a read brings by cache.streams itself.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from cowslice.cache.directory cimport LEAF_WORDS, Leaf, Slice, charged, inline_word, make_slice
from cowslice.cache.policy cimport AHEAD, DEMANDED, Clock2QPlus, Lru, Node, Policy
from cowslice.cache.streams cimport Streams, most_groups, room_beside, stream_at, within_table

from cowslice.errors import BadOption

cdef enum:
    MOST = 65535            # misses of one request that are counted


cdef class Replay:
    """A cache that is asked for slices of `1 << span_bits` guest bytes, of which there are `slices`."""

    cdef uint8_t span_bits
    cdef uint64_t slices
    cdef uint64_t accesses[2]
    cdef uint64_t misses[2]

    cdef bint access(self, uint64_t number) noexcept nogil:
        """Ask for a slice; True when it is read for it."""
        return True

    def add(self, const uint64_t[::1] first not None, const uint64_t[::1] last not None,
            const uint8_t[::1] writes not None, uint16_t[::1] missed not None):
        """Ask for every slice from byte `first` to byte `last` of each request, in order.

        `missed` is filled with the misses of each request. All four have one length. Runs without the GIL.
        """
        cdef uint64_t count = <uint64_t> first.shape[0], i
        if not last.shape[0] == writes.shape[0] == missed.shape[0] == first.shape[0]:
            raise BadOption("columns of different lengths, expected one row for each request")
        with nogil:
            for i in range(count):
                missed[i] = self.request(first[i] >> self.span_bits, last[i] >> self.span_bits, writes[i] != 0)

    cdef uint16_t request(self, uint64_t number, uint64_t last, bint write) noexcept nogil:
        cdef uint64_t found = 0
        self.accesses[write] += last - number + 1
        while number <= last and number < self.slices:
            found += self.access(number)
            number += 1
        self.misses[write] += found
        return <uint16_t> min(found, <uint64_t> MOST)

    @property
    def counts(self):
        """Accesses and misses of reads, accesses and misses of the rest."""
        return self.accesses[0], self.misses[0], self.accesses[1], self.misses[1]


cdef class QemuReplay(Replay):
    """QEMU's cache of `entries` slices: the one used longest ago leaves."""

    cdef uint64_t *newer        # by slice number + 1; place 0 is the ring's sentinel, 0 in `older` says absent
    cdef uint64_t *older
    cdef uint8_t *held
    cdef uint64_t free_entries

    def __cinit__(self, int span_bits, *, uint64_t slices, uint64_t entries):
        self.span_bits = <uint8_t> span_bits
        self.slices = slices
        self.free_entries = entries
        self.newer = <uint64_t *> calloc(slices + 1, sizeof(uint64_t))
        self.older = <uint64_t *> calloc(slices + 1, sizeof(uint64_t))
        self.held = <uint8_t *> calloc(slices + 1, 1)
        if self.newer == NULL or self.older == NULL or self.held == NULL:
            raise MemoryError(f"no memory to follow {slices} slices")

    def __dealloc__(self):
        free(self.newer)
        free(self.older)
        free(self.held)

    cdef inline void unlink(self, uint64_t place) noexcept nogil:
        self.newer[self.older[place]] = self.newer[place]
        self.older[self.newer[place]] = self.older[place]

    cdef bint access(self, uint64_t number) noexcept nogil:
        cdef uint64_t place = number + 1, gone
        cdef bint missing = not self.held[place]
        if not missing:
            self.unlink(place)
        elif self.free_entries:
            self.free_entries -= 1
        else:
            gone = self.newer[0]
            self.unlink(gone)
            self.held[gone] = 0
        # The ring goes from the oldest, newer[0], to the youngest, older[0].
        self.older[place] = self.older[0]
        self.newer[place] = 0
        self.newer[self.older[0]] = place
        self.older[0] = place
        self.held[place] = 1
        return missing


cdef class MapReplay(Replay):
    """Our map under a budget: `sizes` are the bytes of each packed slice, 0 for one that lives in its directory word.

    `mapped` is 0 where there is no L2 table; `group` slices are read at once, `per_table` make a table.
    """

    cdef Policy policy
    cdef const uint16_t[::1] sizes
    cdef const uint8_t[::1] mapped
    cdef Node *nodes
    cdef uint8_t *present
    cdef uint8_t *leaves
    cdef uint64_t budget
    cdef uint64_t used
    cdef uint64_t group
    cdef uint64_t per_table
    cdef Streams streams

    def __cinit__(self, int span_bits, *, uint64_t budget, str policy, const uint16_t[::1] sizes not None,
                  const uint8_t[::1] mapped not None, uint64_t entry_bytes, uint64_t group, uint64_t per_table,
                  bint readahead):
        self.span_bits = <uint8_t> span_bits
        self.slices = <uint64_t> sizes.shape[0]
        self.sizes = sizes
        self.mapped = mapped
        self.budget = budget
        self.group = group
        self.per_table = per_table
        self.streams.most_groups = most_groups(budget, entry_bytes, readahead)
        if policy not in ("clock2q+", "lru"):
            raise BadOption(f"policy is '{policy}', expected 'clock2q+' or 'lru'")
        # A replay runs faster than its trace: the policy's sense of time stays out of it.
        self.policy = Lru(budget) if policy == "lru" else Clock2QPlus(budget, 0.0)
        self.nodes = <Node *> calloc(self.slices + 1, sizeof(Node))
        self.present = <uint8_t *> calloc(self.slices + 1, 1)
        self.leaves = <uint8_t *> calloc(self.slices // LEAF_WORDS + 1, 1)
        if self.nodes == NULL or self.present == NULL or self.leaves == NULL:
            raise MemoryError(f"no memory to follow {self.slices} slices")
        self.used = charged(((self.slices + LEAF_WORDS - 1) // LEAF_WORDS or 1) * sizeof(Leaf *))

    def __dealloc__(self):
        free(self.nodes)
        free(self.present)
        free(self.leaves)

    cdef bint access(self, uint64_t number) noexcept nogil:
        if not self.mapped[number]:
            return False
        if not self.present[number]:
            self.load(number)
            return True
        if self.sizes[number]:
            self.policy.touch(&self.nodes[number])
        return False

    cdef void load(self, uint64_t number) noexcept nogil:
        """Bring a slice with its group, more where the misses form a stream; the demanded one last."""
        cdef uint64_t first = number - number % self.group, end, i
        cdef uint32_t stream = stream_at(&self.streams, first)
        cdef uint32_t groups = self.streams.length[stream]
        cdef bint evict, room
        end = first + within_table(first, self.group * groups, self.per_table, self.slices)
        self.streams.next[stream] = end
        for i in range(first // LEAF_WORDS, (end - 1) // LEAF_WORDS + 1):
            self.add_leaf(i)
        evict = groups > 1
        room = evict or room_beside(self.used_bytes(), self.budget)
        for i in range(first, end):
            if i != number and not self.present[i] and (room or self.sizes[i] == 0):
                self.settle(i, evict, False)
        self.settle(number, True, True)
        self.make_room(0)

    cdef void add_leaf(self, uint64_t leaf) noexcept nogil:
        """Leaves are never dropped here: a budget that cannot keep the directory is none to choose."""
        if self.leaves[leaf]:
            return
        self.make_room(charged(sizeof(Leaf)))
        self.leaves[leaf] = 1
        self.used += charged(sizeof(Leaf))

    cdef void settle(self, uint64_t number, bint evict, bint demanded) noexcept nogil:
        cdef Node *node = &self.nodes[number]
        cdef uint64_t size = self.sizes[number]
        if size == 0:
            self.present[number] = 1
            return
        if evict:
            self.make_room(size)
        if self.used_bytes() + size > self.budget:
            return
        node.key = <uint32_t> number
        node.granules = <uint16_t> (size // 16)
        node.state = 0
        self.present[number] = 1
        self.used += size
        self.policy.insert(node, DEMANDED if demanded else AHEAD)

    cdef inline uint64_t used_bytes(self) noexcept nogil:
        return self.used + self.policy.overhead()

    cdef void make_room(self, uint64_t wanted) noexcept nogil:
        cdef Node *gone
        while self.used_bytes() + wanted > self.budget:
            gone = self.policy.victim()
            if gone == NULL:
                return
            self.used -= gone.granules * 16
            self.present[gone.key] = 0


def weigh(const uint8_t[::1] table not None, uint32_t slice_bytes, int cluster_bits, bint extended,
          uint16_t[::1] sizes not None):
    """Write the bytes that the cache charges for each slice of a raw L2 table: 0 for one that its word says all of."""
    cdef uint64_t number, count = <uint64_t> sizes.shape[0]
    cdef uint32_t entries = slice_bytes // (16 if extended else 8)
    cdef const uint8_t *raw
    cdef Slice *held
    if <uint64_t> table.shape[0] < count * slice_bytes:
        raise BadOption(f"a table of {table.shape[0]} bytes has no {count} slices of {slice_bytes}")
    for number in range(count):
        raw = &table[number * slice_bytes]
        sizes[number] = 0
        if inline_word(raw, entries, <uint8_t> cluster_bits, extended):
            continue
        held = make_slice(raw, entries, <uint8_t> cluster_bits, extended)
        if held == NULL:
            raise MemoryError("no memory to pack a slice")
        sizes[number] = held.node.granules * 16
        free(held)


def directory_bytes(uint64_t slices):
    """What the directory of a map takes when all of its leaves are there."""
    cdef uint64_t leaves = (slices + LEAF_WORDS - 1) // LEAF_WORDS or 1
    return charged(leaves * sizeof(Leaf *)) + leaves * charged(sizeof(Leaf))
