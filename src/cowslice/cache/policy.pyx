# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Replacement policies: byte-weighted Clock2Q+ and, to compare with, LRU.

A policy orders nodes and names a victim; it does not know what a node holds, owns no memory of it and takes no lock:
the caller holds one around every call. A node is in exactly one queue from `insert` until `victim` or `remove`.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.time cimport CLOCK_MONOTONIC_COARSE, clock_gettime, timespec

from cowslice.errors import BadOption

# Queue numbers in Node.state; 0 is nowhere.
cdef enum:
    SMALL = 1
    MAIN = 2

cdef enum:
    GRANULE = 16
    # A slice of 512 random 64 KiB clusters packs into about 1320 bytes: the yardstick of what is cheap.
    TYPICAL = 1320
    MAX_LAPS = 3


cdef inline void empty(Queue *queue) noexcept nogil:
    queue.ring.prev = &queue.ring
    queue.ring.next = &queue.ring
    queue.granules = 0
    queue.length = 0


cdef inline void push(Queue *queue, Node *node) noexcept nogil:
    node.next = queue.ring.next
    node.prev = &queue.ring
    queue.ring.next.prev = node
    queue.ring.next = node
    queue.granules += node.granules
    queue.length += 1


cdef inline void unlink(Queue *queue, Node *node) noexcept nogil:
    node.prev.next = node.next
    node.next.prev = node.prev
    queue.granules -= node.granules
    queue.length -= 1


cdef inline Node *oldest(Queue *queue) noexcept nogil:
    return queue.ring.prev if queue.length else NULL


cdef inline uint8_t laps_of(Node *node) noexcept nogil:
    """Cheap slices earn extra passes: a hit is worth the same, whatever the bytes that bought it."""
    cdef uint32_t size = node.granules * GRANULE
    cdef uint8_t laps = 0
    while laps < MAX_LAPS and size * 2 <= TYPICAL:
        size *= 2
        laps += 1
    return laps * LAP


cdef inline int64_t now_ns() noexcept nogil:
    """The coarse clock: a few milliseconds are near enough for a time floor, and it is asked on many hits."""
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t)
    return t.tv_sec * 1_000_000_000 + t.tv_nsec


cdef class Policy:
    """The contract. `insert` links a node, `touch` notes a hit, `victim` unlinks the one to go (NULL: none is left)."""

    cdef void insert(self, Node *node, Arrival arrival) noexcept nogil:
        pass

    cdef void touch(self, Node *node) noexcept nogil:
        pass

    cdef Node *victim(self) noexcept nogil:
        return NULL

    cdef void remove(self, Node *node) noexcept nogil:
        pass

    cdef uint64_t overhead(self) noexcept nogil:
        """Bytes of memory the policy itself holds."""
        return 0


cdef class Lru(Policy):
    """Least recently used: what QEMU does. No scan resistance."""

    def __cinit__(self, uint64_t budget):
        self.name = "lru"
        self.budget = budget
        empty(&self.queue)

    cdef void insert(self, Node *node, Arrival arrival) noexcept nogil:
        node.state = (node.state & ~QUEUE) | MAIN
        push(&self.queue, node)

    cdef void touch(self, Node *node) noexcept nogil:
        if self.queue.ring.next == node:
            return
        unlink(&self.queue, node)
        push(&self.queue, node)

    cdef Node *victim(self) noexcept nogil:
        cdef Node *node = oldest(&self.queue)
        if node != NULL:
            self.remove(node)
        return node

    cdef void remove(self, Node *node) noexcept nogil:
        unlink(&self.queue, node)
        node.state &= ~QUEUE


cdef class Clock2QPlus(Policy):
    """Clock2Q+ (arXiv 2511.21958), with queue limits in bytes.

    New slices enter a small queue, a tenth of the budget. A hit sets the reference bit only once the slice has left the
    correlation window, the younger half of the small queue, because one guest stream touches a slice hundreds of times
    in a row without that making it hot. A slice that leaves the small queue unreferenced is forgotten but for a
    fingerprint; if it comes back while that lasts, it enters the main queue, a clock, directly. So does what comes
    once the small queue is full and nothing had to leave yet.
    """

    def __cinit__(self, uint64_t budget, double floor_seconds=0.05):
        cdef uint64_t entries = budget // TYPICAL * 9 // 10
        cdef uint64_t slots = 16
        self.name = "clock2q+"
        self.budget = budget
        self.floor_ns = <int64_t> (floor_seconds * 1e9)
        empty(&self.small)
        empty(&self.main)
        while slots * 2 <= entries:
            slots *= 2
        self.ghost_mask = <uint32_t> (slots - 1)
        self.departures = 1
        self.mark_time = now_ns()

    def __dealloc__(self):
        free(self.ghosts)

    cdef uint64_t overhead(self) noexcept nogil:
        return (<uint64_t> self.ghost_mask + 1) * sizeof(uint32_t) if self.ghosts != NULL else 0

    cdef void insert(self, Node *node, Arrival arrival) noexcept nogil:
        node.state = (node.state & USED) | laps_of(node)
        if arrival == WARMED or self.was_here(node) or self.has_room(node):
            node.state |= MAIN
            push(&self.main, node)
            return
        node.state |= SMALL
        self.entered += node.granules
        node.stamp = self.entered
        push(&self.small, node)

    cdef bint has_room(self, Node *node) noexcept nogil:
        """Before anything had to leave there is nothing to protect from a newcomer: what overflows the small queue stays.

        So a loop over more than fits keeps what it began with, though its slices come back too late to be remembered.
        """
        return not self.evicted and self.small.granules + node.granules > self.small_target()

    cdef void touch(self, Node *node) noexcept nogil:
        if node.state & REFERENCED:
            return
        if node.state & QUEUE == SMALL and self.in_window(node):
            return
        node.state |= REFERENCED

    cdef bint in_window(self, Node *node) noexcept nogil:
        """Is it among the youngest half of the small queue, and younger than the time floor?"""
        cdef uint32_t age = self.entered - node.stamp
        cdef int64_t now
        if age >= self.small_target() // 2:
            return False
        if self.floor_ns == 0:
            return True
        # A slow guest may load nothing for minutes: whatever was there one floor ago has left the window as well.
        now = now_ns()
        if now - self.mark_time >= self.floor_ns:
            self.aged = self.marked
            self.marked = self.entered
            self.mark_time = now
        return self.entered - node.stamp < self.entered - self.aged

    cdef uint64_t small_target(self) noexcept nogil:
        return self.budget // (10 * GRANULE)

    cdef Node *victim(self) noexcept nogil:
        cdef Node *node = NULL
        self.evicted |= self.small.length + self.main.length > 0
        while node == NULL and self.small.length + self.main.length:
            if self.small.granules > self.small_target() or self.main.length == 0:
                node = self.leave_small()
            else:
                node = self.leave_main()
        return node

    cdef Node *leave_small(self) noexcept nogil:
        """The oldest of the small queue, or NULL when it earned its place in the main one."""
        cdef Node *node = oldest(&self.small)
        unlink(&self.small, node)
        if node.state & REFERENCED:
            node.state = (node.state & ~(QUEUE | REFERENCED)) | MAIN
            push(&self.main, node)
            return NULL
        self.remember(node)
        node.state &= ~QUEUE
        return node

    cdef Node *leave_main(self) noexcept nogil:
        """The oldest of the main queue, or NULL when it goes round once more."""
        cdef Node *node = oldest(&self.main)
        unlink(&self.main, node)
        if node.state & REFERENCED:
            node.state = (node.state & ~(REFERENCED | LAPS)) | laps_of(node)
        elif node.state & LAPS:
            node.state -= LAP
        else:
            node.state &= ~(QUEUE | REFERENCED)
            return node
        push(&self.main, node)
        return NULL

    cdef void remove(self, Node *node) noexcept nogil:
        if node.state & QUEUE == SMALL:
            unlink(&self.small, node)
        else:
            unlink(&self.main, node)
        node.state &= ~(QUEUE | REFERENCED)

    cdef void remember(self, Node *node) noexcept nogil:
        """Leave a fingerprint: the high half names the slice, the low half says when it left."""
        cdef uint64_t h = scatter(node)
        self.departures += 1
        if self.ghosts == NULL:  # a map that fits never gets here; without the memory there are no ghosts
            self.ghosts = <uint32_t *> calloc(<size_t> self.ghost_mask + 1, sizeof(uint32_t))
            if self.ghosts == NULL:
                return
        self.ghosts[h & self.ghost_mask] = (<uint32_t> (h >> 48) << 16) | (self.departures & 0xFFFF)

    cdef bint was_here(self, Node *node) noexcept nogil:
        cdef uint64_t h = scatter(node)
        cdef uint32_t ghost = self.ghosts[h & self.ghost_mask] if self.ghosts != NULL else 0
        if ghost == 0 or ghost >> 16 != <uint32_t> (h >> 48):
            return False
        self.ghosts[h & self.ghost_mask] = 0
        return (self.departures - ghost) & 0xFFFF <= self.ghost_mask


cdef inline uint64_t scatter(Node *node) noexcept nogil:
    """A 64-bit finaliser (the constants are those of MurmurHash3) over the slice's name."""
    cdef uint64_t h = (<uint64_t> node.layer << 32) | node.key
    h = (h ^ (h >> 33)) * <uint64_t> 0xff51afd7ed558ccd
    h = (h ^ (h >> 33)) * <uint64_t> 0xc4ceb9fe1a85ec53
    return h ^ (h >> 33)


cdef Policy make_policy(str name, uint64_t budget):
    if name == "clock2q+":
        return Clock2QPlus(budget)
    if name == "lru":
        return Lru(budget)
    raise BadOption(f"policy is '{name}', expected 'clock2q+' or 'lru'")


POLICIES = ("clock2q+", "lru")


cdef class Rehearsal:
    """A policy on its own: keys of given weights under a byte budget, and who stays.

    The replay of traces and the tests drive the very policy that the slice map uses, without slices.
    """

    cdef Policy policy
    cdef dict nodes
    cdef uint64_t used
    cdef uint64_t limit

    def __init__(self, str name, uint64_t budget, *, double floor_seconds=0.0):
        self.policy = Clock2QPlus(budget, floor_seconds) if name == "clock2q+" else make_policy(name, budget)
        self.nodes = {}
        self.used = 0
        self.limit = budget

    def access(self, uint32_t key, uint32_t weight=TYPICAL):
        """Touch `key`; True for a hit. A miss loads it with `weight` bytes (a multiple of 16 is charged) and evicts."""
        cdef Rehearsed held = self.nodes.get(key)
        if held is not None:
            self.policy.touch(&held.node)
            return True
        held = Rehearsed()
        held.node.key = key
        held.node.granules = (weight + GRANULE - 1) // GRANULE
        self.make_room(held.node.granules * GRANULE)
        self.nodes[key] = held
        self.used += held.node.granules * GRANULE
        self.policy.insert(&held.node, DEMANDED)
        return False

    cdef make_room(self, uint64_t wanted):
        cdef Node *gone
        while self.used + wanted > self.limit:
            gone = self.policy.victim()
            if gone == NULL:
                return
            self.used -= gone.granules * GRANULE
            del self.nodes[gone.key]

    def resident(self):
        """The keys held now."""
        return set(self.nodes)

    def remove(self, uint32_t key):
        """Drop `key` without a word to the ghosts."""
        cdef Rehearsed held = self.nodes.pop(key)
        self.policy.remove(&held.node)
        self.used -= held.node.granules * GRANULE

    @property
    def used_bytes(self):
        return self.used


cdef class Rehearsed:
    cdef Node node
