"""Which resident slice leaves first: the contract between the slice map and a replacement policy."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

# Bits of Node.state. The low two name the queue; a policy never touches USED, which belongs to the slice map.
cdef enum:
    QUEUE = 3
    REFERENCED = 4
    USED = 8
    LAP = 16            # the two bits from here: extra clock passes still to come
    LAPS = 48

# How a node came in.
cdef enum Arrival:
    DEMANDED = 0    # a request waits for it
    AHEAD = 1       # read because a neighbour was asked for
    WARMED = 2      # read while there was room

# 32 bytes at the head of every resident slice. `key` and `layer` name it; the cargo belongs to whoever owns the node.
cdef struct Node:
    Node *prev
    Node *next
    uint32_t key
    uint32_t stamp      # Clock2Q+: granules that had entered the small queue when this one did
    uint16_t layer
    uint16_t granules   # weight in units of 16 bytes
    uint8_t state
    uint8_t cargo
    uint16_t more_cargo

cdef struct Queue:
    Node ring           # sentinel: ring.next is the newest, ring.prev the oldest
    uint64_t granules
    uint64_t length

cdef class Policy:
    cdef readonly str name
    cdef readonly uint64_t budget
    cdef void insert(self, Node *node, Arrival arrival) noexcept nogil
    cdef void touch(self, Node *node) noexcept nogil
    cdef Node *victim(self) noexcept nogil
    cdef void remove(self, Node *node) noexcept nogil
    cdef uint64_t overhead(self) noexcept nogil

cdef class Lru(Policy):
    cdef Queue queue

cdef class Clock2QPlus(Policy):
    cdef Queue small
    cdef Queue main
    cdef uint32_t *ghosts
    cdef uint32_t ghost_mask
    cdef uint32_t departures
    cdef uint32_t entered
    cdef uint32_t aged
    cdef uint32_t marked
    cdef int64_t mark_time
    cdef int64_t floor_ns
    cdef bint evicted
    cdef uint64_t small_target(self) noexcept nogil
    cdef bint in_window(self, Node *node) noexcept nogil
    cdef bint has_room(self, Node *node) noexcept nogil
    cdef bint was_here(self, Node *node) noexcept nogil
    cdef void remember(self, Node *node) noexcept nogil
    cdef Node *leave_small(self) noexcept nogil
    cdef Node *leave_main(self) noexcept nogil

cdef Policy make_policy(str name, uint64_t budget)
