# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""LRU stack distances of one slice size, in one pass: how many misses a cache of each size would have had.

It knows spans of guest bytes and weights, nothing of qcow2. What must hold: each access is counted once, as a first
touch or at the smallest cache that would have held its slice.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

import numpy as np

from cowslice.errors import BadOption

cdef extern from *:
    void prefetch "__builtin_prefetch"(const void *) noexcept nogil

cdef enum:
    BLOCK = 64              # slots whose marks are summed in a row, instead of by the tree
    FIRST_WINDOW = 4096
    DIRECT = 1 << 22        # slices that are found by their number; more go through a hash table
    FOREMOST = 8            # requests looked ahead, to fetch from memory what they will look at
    FINEST = 1 << 20        # distances kept apart

cdef uint64_t NOBODY = ~<uint64_t> 0


cdef inline uint64_t scatter(uint64_t number) noexcept nogil:
    """A 64-bit finaliser (the constants are those of SplitMix64)."""
    number = (number ^ (number >> 30)) * <uint64_t> 0xbf58476d1ce4e5b9
    number = (number ^ (number >> 27)) * <uint64_t> 0x94d049bb133111eb
    return number ^ (number >> 31)


cdef class Stack:
    """One LRU stack of slices of `1 << span_bits` guest bytes each, the first `slices` of which may be touched.

    A slice counts as one, or as what `weights` says of it (kept, not copied; 0: it costs nothing and never leaves).
    Up to `limit` distinct slices all is exact. Beyond, only slices whose hash falls into a share that is halved as often
    as need be are followed, and each stands for many (SHARDS, FAST 2015). Not thread safe.
    """

    def __cinit__(self, int span_bits, *, uint64_t slices, weights=None, uint64_t limit=1 << 20):
        cdef uint64_t total = min(slices, limit)
        if weights is not None:
            if <uint64_t> len(weights) < slices:
                raise BadOption(f"{len(weights)} weights are given, expected one for each of {slices} slices")
            self.weights = weights
            total = int(np.sum(weights, dtype=np.uint64))
            while total >> self.grain > FINEST:
                self.grain += 1
        self.weighted = weights is not None
        self.span_bits = <uint8_t> span_bits
        self.slices = slices
        self.limit = max(limit, 1)
        self.farthest = (total >> self.grain) + 2
        self.previous = NOBODY
        self.places = slices if slices <= DIRECT else FIRST_WINDOW
        self.last = <uint32_t *> calloc(self.places + 1, sizeof(uint32_t))
        if slices > DIRECT:
            self.keys = <uint64_t *> calloc(self.places, sizeof(uint64_t))
        if self.last == NULL or (slices > DIRECT and self.keys == NULL) or self.add_level() or self.make_time():
            raise MemoryError(f"no memory to follow {slices} slices")

    def __dealloc__(self):
        cdef int i
        for i in range(MOST_LEVELS):
            free(self.levels[i].found[0])
            free(self.levels[i].found[1])
        free(self.last)
        free(self.keys)
        free(self.owner)
        free(self.marks)
        free(self.tree)

    cdef int add_level(self) noexcept nogil:
        cdef Level *level = &self.levels[self.level]
        level.found[0] = <uint64_t *> calloc(self.farthest + 1, sizeof(uint64_t))
        level.found[1] = <uint64_t *> calloc(self.farthest + 1, sizeof(uint64_t))
        return 0 if level.found[0] != NULL and level.found[1] != NULL else -1

    # -- one access -------------------------------------------------------------------------------------------------

    cdef int touch(self, uint64_t number, uint8_t write) noexcept nogil:
        """Count an access and put its slice on top. -1 when memory is out."""
        cdef uint32_t weight = self.weights[number] if self.weighted else 1
        cdef uint64_t distance = weight
        cdef uint32_t place, slot
        self.accesses[write] += 1
        if number == self.previous:
            self.levels[0].found[write][self.rounded(distance)] += 1
            return 0
        self.previous = number
        if self.level and not self.sampled(number):
            return 0
        if self.now == self.window and self.make_time():
            return -1
        if self.keys != NULL and <uint64_t> (self.live + 1) * 2 > self.places and self.rehash(self.places * 2):
            return -1
        place = self.find(number)
        slot = self.last[place]
        if slot:
            distance += self.leave(slot - 1)
            # What costs nothing is never driven out.
            self.levels[self.level].found[write][self.rounded(distance) if weight else 0] += 1
        else:
            self.levels[self.level].cold[write] += 1
            self.live += 1
        self.enter(place, weight)
        return self.thin() if self.live > self.limit else 0

    cdef inline uint64_t rounded(self, uint64_t distance) noexcept nogil:
        return (distance + (<uint64_t> 1 << self.grain) - 1) >> self.grain

    cdef inline void enter(self, uint32_t place, uint32_t weight) noexcept nogil:
        """Give the slice the youngest slot. A block goes into the tree when it is full, with what is left in it."""
        self.owner[self.now] = place
        self.marks[self.now] = <uint16_t> weight
        self.now += 1
        self.last[place] = self.now
        self.head += weight
        if self.now % BLOCK == 0:
            self.grow_tree(self.now // BLOCK, self.head)
            self.settled += self.head
            self.head = 0

    cdef inline void grow_tree(self, uint32_t block, uint32_t by) noexcept nogil:
        """Add to the sum of a block, numbered from one; modulo 2^32, so that it may also take away."""
        while block <= self.window // BLOCK:
            self.tree[block] += by
            block += block & (0 - block)

    cdef inline uint64_t leave(self, uint32_t slot) noexcept nogil:
        """Vacate a slot; answers the weight of everything younger."""
        cdef uint32_t block = slot // BLOCK, weight = self.marks[slot], older = 0, i
        cdef uint32_t above = 0
        self.marks[slot] = 0
        for i in range(slot, (block + 1) * BLOCK):
            above += self.marks[i]
        if block == self.now // BLOCK:
            self.head -= weight
            return above
        i = block + 1
        while i:
            older += self.tree[i]
            i &= i - 1
        older = <uint32_t> self.settled - older
        self.settled -= weight
        self.grow_tree(block + 1, 0 - weight)
        return <uint64_t> above + older + self.head

    # -- slices -----------------------------------------------------------------------------------------------------

    cdef inline bint sampled(self, uint64_t number) noexcept nogil:
        return scatter(number) & ((<uint64_t> 1 << self.level) - 1) == 0

    cdef inline uint32_t find(self, uint64_t number) noexcept nogil:
        """The place of a slice; in the hash table it is given one."""
        cdef uint64_t place
        if self.keys == NULL:
            return <uint32_t> number
        place = scatter(number) >> 24 & (self.places - 1)
        while self.keys[place] and self.keys[place] != number + 1:
            place = (place + 1) & (self.places - 1)
        self.keys[place] = number + 1
        return <uint32_t> place

    cdef int rehash(self, uint64_t places) noexcept nogil:
        """Make a hash table of so many places, with those that are on the stack. -1 when memory is out."""
        cdef uint32_t *last = self.last
        cdef uint64_t *keys = self.keys
        cdef uint32_t slot
        self.compact()
        self.last = <uint32_t *> calloc(places, sizeof(uint32_t))
        self.keys = <uint64_t *> calloc(places, sizeof(uint64_t))
        self.places = places
        if self.last != NULL and self.keys != NULL:
            for slot in range(self.now):
                self.owner[slot] = self.find(keys[self.owner[slot]] - 1)
                self.last[self.owner[slot]] = slot + 1
        free(last)
        free(keys)
        return 0 if self.last != NULL and self.keys != NULL else -1

    cdef int thin(self) noexcept nogil:
        """Halve the share of slices that is followed until few enough are left."""
        cdef uint32_t slot, place
        cdef uint64_t number
        while self.live > self.limit and self.level + 1 < MOST_LEVELS:
            self.level += 1
            if self.add_level():
                return -1
            for slot in range(self.now):
                place = self.owner[slot]
                number = place if self.keys == NULL else self.keys[place] - 1
                if self.last[place] == slot + 1 and not self.sampled(number):
                    self.last[place] = 0
                    self.live -= 1
        self.compact()
        return self.rehash(self.places) if self.keys != NULL else 0

    # -- time -------------------------------------------------------------------------------------------------------

    cdef int make_time(self) noexcept nogil:
        """Close the gaps in time, and widen it where they are few. -1 when memory is out."""
        cdef uint32_t wanted = FIRST_WINDOW
        cdef uint32_t *owner
        cdef uint16_t *marks
        cdef uint32_t *tree
        self.compact()
        while wanted < 4 * <uint64_t> self.live:
            wanted *= 2
        if wanted <= self.window:
            return 0
        owner = <uint32_t *> realloc(self.owner, wanted * sizeof(uint32_t))
        self.owner = owner if owner != NULL else self.owner
        marks = <uint16_t *> realloc(self.marks, wanted * sizeof(uint16_t))
        self.marks = marks if marks != NULL else self.marks
        tree = <uint32_t *> realloc(self.tree, (wanted // BLOCK + 1) * sizeof(uint32_t))
        self.tree = tree if tree != NULL else self.tree
        if owner == NULL or marks == NULL or tree == NULL:
            return -1
        self.window = wanted
        self.compact()
        return 0

    cdef void compact(self) noexcept nogil:
        """Move the slots still owned together, in their order, and sum them anew."""
        cdef uint32_t slot, place, kept = 0
        for slot in range(self.now):
            place = self.owner[slot]
            if self.last[place] == slot + 1:
                self.owner[kept] = place
                self.marks[kept] = self.marks[slot]
                kept += 1
                self.last[place] = kept
        self.now = kept
        if self.window:
            memset(self.marks + kept, 0, (self.window - kept) * sizeof(uint16_t))
            self.plant()

    cdef void plant(self) noexcept nogil:
        """Build the tree from the marks."""
        cdef uint32_t blocks = self.window // BLOCK, full = self.now // BLOCK, block, i
        memset(self.tree, 0, (blocks + 1) * sizeof(uint32_t))
        self.settled = 0
        self.head = 0
        for block in range(full):
            for i in range(block * BLOCK, (block + 1) * BLOCK):
                self.tree[block + 1] += self.marks[i]
            self.settled += self.tree[block + 1]
        for i in range(full * BLOCK, self.now):
            self.head += self.marks[i]
        for block in range(1, blocks + 1):
            i = block + (block & (0 - block))
            if i <= blocks:
                self.tree[i] += self.tree[block]

    # -- for Python -------------------------------------------------------------------------------------------------

    def add(self, const uint64_t[::1] first not None, const uint64_t[::1] last not None,
            const uint8_t[::1] writes not None):
        """Touch every slice from byte `first` to byte `last` of each request, in order. `writes` holds 0 or 1.

        All three have one length, and no byte lies beyond the last slice. Runs without the GIL.
        """
        cdef uint64_t count = <uint64_t> first.shape[0]
        cdef int outcome = 0
        if last.shape[0] != first.shape[0] or writes.shape[0] != first.shape[0]:
            raise BadOption(f"columns have {count}, {last.shape[0]} and {writes.shape[0]} rows, expected as many")
        if count:
            with nogil:
                outcome = self.add_all(&first[0], &last[0], &writes[0], count)
        if outcome:
            raise MemoryError(f"no memory to follow {self.slices} slices")

    cdef int add_all(self, const uint64_t *first, const uint64_t *last, const uint8_t *writes,
                     uint64_t count) noexcept nogil:
        cdef uint64_t i, number, end
        for i in range(count):
            if self.keys == NULL and i + FOREMOST < count:
                prefetch(&self.last[min(first[i + FOREMOST] >> self.span_bits, self.slices)])
            number = first[i] >> self.span_bits
            end = min(last[i] >> self.span_bits, self.slices - 1)
            while number <= end:
                if self.touch(number, writes[i] != 0):
                    return -1
                number += 1
        return 0

    def distances(self, bint write):
        """Distances that occurred, ascending, and how many accesses had each: of reads, or of the rest, as int64 arrays.

        A distance is the smallest cache, in the unit of the weights, that would have held the slice.
        """
        distances, counts = [], []
        for level in range(self.level + 1):
            found = np.asarray(<uint64_t[:self.farthest + 1]> self.levels[level].found[write])
            at = np.flatnonzero(found)
            distances.append(at << (level + self.grain))
            counts.append(found[at].astype(np.int64) << level)
        every, place = np.unique(np.concatenate(distances), return_inverse=True)
        return every, np.bincount(place, np.concatenate(counts), len(every)).astype(np.int64)

    @property
    def reads_and_writes(self):
        """Accesses, exact."""
        return self.accesses[0], self.accesses[1]

    @property
    def cold(self):
        """First touches, of reads and of the rest."""
        return tuple(sum(self.levels[level].cold[write] << level for level in range(self.level + 1)) for write in (0, 1))

    @property
    def followed(self):
        """Distinct slices on the stack."""
        return self.live

    @property
    def rate(self):
        """The share of slices that is followed: 1.0 while all is exact."""
        return 0.5 ** self.level
