"""The packed map of one image layer, and the memory that the layers of a chain share."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from cowslice.cache.packing cimport Mapped
from cowslice.cache.policy cimport Arrival, Node, Policy

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass

cdef enum:
    LEAF_WORDS = 64         # slices under one directory leaf
    MOST_AT_ONCE = 512      # slices that one metadata read brings at most: 2 MiB

# A resident slice of more than one run. The payload follows; the node's cargo holds what else a Shape needs.
cdef struct Slice:
    Node node
    uint64_t base

# One leaf of the directory: a word per slice. slicemap.pyx says what a word means.
cdef struct Leaf:
    uint64_t words[LEAF_WORDS]
    uint32_t loading        # words in state LOADING: such a leaf stays
    uint8_t used            # looked at since the hand of the leaf clock passed
    uint8_t idle            # not looked at since the last trim

cdef struct Directory:
    Leaf **leaves
    uint32_t length

# What a lookup came to.
cdef enum Outcome:
    FOUND = 0
    BAD_TABLE = 1           # the L1 entry cannot be followed
    READ_FAILED = 2
    NO_MEMORY = 3
    NOT_RESIDENT = 4        # only from `peek`

cdef struct Counters:
    uint64_t hits
    uint64_t misses
    uint64_t loads
    uint64_t joined
    uint64_t failed
    uint64_t bytes_read
    uint64_t evictions
    uint64_t leaves_dropped
    uint64_t inlined        # resident slices that live in their directory word
    uint64_t forms[5]       # resident slices by packing form

# One metadata read: which slices it brings, and what became of each.
cdef struct Load:
    uint64_t first
    uint32_t count
    uint32_t demanded       # index of the slice a request waits for, or `count`
    uint32_t index          # entry in it that was asked for
    uint32_t want
    Arrival arrival         # of the slices nobody waits for
    bint may_evict          # may those push others out?
    uint64_t table          # host offset of the L2 table
    uint8_t claimed[MOST_AT_ONCE]
    uint64_t words[MOST_AT_ONCE]
    uint32_t published

cdef class SliceCache:
    cdef pthread_mutex_t lock
    cdef pthread_cond_t loaded
    cdef uint32_t waiting
    cdef Policy policy
    cdef readonly uint64_t budget
    cdef uint64_t slice_bytes
    cdef uint64_t leaf_bytes
    cdef uint64_t fixed_bytes
    cdef Counters counters
    cdef Directory *directories
    cdef uint32_t layers
    cdef uint32_t hand_layer
    cdef uint32_t hand_leaf
    cdef uint64_t used_bytes(self) noexcept nogil
    cdef void make_room(self, uint64_t wanted) noexcept nogil
    cdef bint evict_slice(self) noexcept nogil
    cdef bint drop_leaf(self) noexcept nogil
    cdef void discard_leaf(self, uint32_t layer, uint32_t number) noexcept nogil
    cdef void release(self, Slice *held) noexcept nogil
    cdef uint16_t adopt(self, uint64_t leaves) except 0xFFFF
    cdef void trim_leaf(self, uint32_t layer, uint32_t number) noexcept nogil

cdef class SliceMap:
    cdef readonly SliceCache cache
    cdef readonly uint64_t clusters
    cdef readonly uint32_t slice_clusters
    cdef object storage
    cdef uint64_t l1_offset
    cdef int fd
    cdef uint16_t layer
    cdef uint64_t *l1
    cdef uint64_t l1_entries
    cdef uint8_t cluster_bits
    cdef uint8_t table_bits         # log2 of the entries of an L2 table
    cdef uint8_t slice_bits         # log2 of the entries of a slice
    cdef uint8_t entry_size         # 8 or 16 bytes
    cdef bint extended
    cdef bint readahead
    cdef bint stopping
    cdef uint32_t group             # slices that one metadata read brings
    cdef uint64_t stream_next[4]
    cdef uint32_t stream_length[4]
    cdef uint32_t stream_hand
    cdef int resolve(self, uint64_t cluster, uint32_t want, Mapped *out) noexcept nogil
    cdef int peek(self, uint64_t cluster, uint32_t want, Mapped *out) noexcept nogil
    cdef bint unmapped(self, uint64_t cluster, uint32_t want, Mapped *out) noexcept nogil
    cdef Leaf *leaf_for(self, uint64_t number) noexcept nogil
    cdef Leaf *grow_leaf(self, uint64_t number) noexcept nogil
    cdef void read_word(self, uint64_t word, uint32_t index, uint32_t want, Mapped *out) noexcept nogil
    cdef int load(self, Load *job, Mapped *out) noexcept nogil
    cdef bint claim(self, Load *job) noexcept nogil
    cdef void unclaim(self, Load *job) noexcept nogil
    cdef bint read_table(self, Load *job, uint8_t *buffer, uint64_t size) noexcept nogil
    cdef int digest(self, Load *job, const uint8_t *buffer, Mapped *out) noexcept nogil
    cdef uint64_t digest_one(self, const uint8_t *raw, bint keep) noexcept nogil
    cdef int spill(self, Load *job, uint32_t end) noexcept nogil
    cdef void read_private(self, uint64_t word, uint32_t index, uint32_t want, Mapped *out) noexcept nogil
    cdef void publish(self, Load *job) noexcept nogil
    cdef uint64_t settle(self, Load *job, uint32_t i, Slice *held) noexcept nogil
    cdef take_l1(self, bytes table)
    cdef bint read_by_storage(self, uint64_t offset, uint8_t *buffer, uint64_t size) noexcept
    cdef complain(self, uint64_t cluster, int outcome, uint64_t where)
    cdef uint64_t warm_tables(self) noexcept nogil
    cdef void plan_demand(self, Load *job, uint64_t number) noexcept nogil
    cdef void aim(self, Load *job, uint64_t first, uint32_t count) noexcept nogil
    cdef uint32_t stream_ahead(self, uint64_t first) noexcept nogil
