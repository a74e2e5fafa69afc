"""The reads of one image layer's L2 tables."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from cowslice.cache.directory cimport LEAF_WORDS, Leaf, Slice
from cowslice.cache.dirty cimport DirtyRing
from cowslice.cache.forms cimport Mapped
from cowslice.cache.policy cimport Arrival
from cowslice.cache.slicecache cimport SliceCache
from cowslice.cache.streams cimport Streams

cdef enum:
    SLICE_BYTES = 4096      # the most that one slice spans on disk
    MOST_AT_ONCE = 512      # slices that one metadata read brings at most: 2 MiB

# What a lookup came to.
cdef enum Outcome:
    FOUND = 0
    BAD_TABLE = 1           # the L1 entry cannot be followed
    READ_FAILED = 2
    NO_MEMORY = 3
    NOT_RESIDENT = 4        # only from `peek`
    STALE = 5               # its table was exchanged meanwhile: ask again
    NO_ROOM = 6             # only for a warm-up: what comes now would drive out what it read before
    NO_TABLE = 7            # only for a store: there is no L2 table

# One metadata read: which slices it brings, and what became of each.
cdef struct Load:
    uint64_t first
    uint32_t count
    uint32_t demanded       # index of the slice a request waits for, or `count`
    uint32_t index          # entry in it that was asked for
    uint32_t want
    uint32_t published
    Arrival arrival         # of the slices nobody waits for
    bint may_evict          # may those push others out?
    bint room               # was there room for those when the read began?
    bint to_store           # the demanded slice is to become a dirty one
    uint8_t *copy           # where the raw entries of the demanded slice go, or NULL
    uint64_t table          # the L1 entry
    uint64_t generation     # of the map when the read began
    uint8_t claimed[MOST_AT_ONCE]
    uint64_t words[MOST_AT_ONCE]    # as in a directory; ABSENT: not kept

cdef uint64_t *decode_l1(bytes table) except NULL

cdef class Loads:
    cdef readonly SliceCache cache
    cdef readonly uint64_t clusters
    cdef readonly uint32_t slice_clusters
    cdef object storage
    cdef int fd
    cdef uint32_t alignment         # of offset, length and memory, for that descriptor
    cdef uint64_t l1_offset
    cdef uint64_t *l1
    cdef uint64_t l1_entries
    cdef uint64_t slices
    cdef uint16_t layer
    cdef bint adopted
    cdef uint8_t cluster_bits
    cdef uint8_t table_bits         # log2 of the entries of an L2 table
    cdef uint8_t slice_bits         # log2 of the entries of a slice
    cdef uint8_t entry_size         # 8 or 16 bytes
    cdef bint extended
    cdef uint32_t group             # slices that one metadata read brings
    cdef DirtyRing dirty
    cdef uint64_t stores            # the latest version given to a dirty slice
    cdef uint64_t generation        # counts tables exchanged for others
    cdef uint32_t in_flight         # reads under way
    cdef bint replacing             # the whole L1 table is about to change: begin no read
    cdef Streams streams
    cdef void aim(self, Load *job, uint64_t first, uint32_t count) noexcept nogil
    cdef void plan_demand(self, Load *job, uint64_t number) noexcept nogil
    cdef int load(self, Load *job, Mapped *out) noexcept nogil
    cdef int conclude(self, Load *job, uint64_t size, int outcome) noexcept nogil
    cdef void wait(self) noexcept nogil
    cdef int claim(self, Load *job) noexcept nogil
    cdef void unclaim(self, Load *job) noexcept nogil
    cdef int fetch(self, Load *job, uint64_t size, Mapped *out) noexcept nogil
    cdef bint read_table(self, uint64_t offset, uint8_t *buffer, uint64_t size) noexcept nogil
    cdef bint read_by_storage(self, uint64_t offset, uint8_t *buffer, uint64_t size) noexcept
    cdef int digest(self, Load *job, const uint8_t *buffer, Mapped *out) noexcept nogil
    cdef bint make_word(self, Load *job, uint32_t i, const uint8_t *raw) noexcept nogil
    cdef void read_word(self, uint64_t word, uint32_t index, uint32_t want, Mapped *out) noexcept nogil
    cdef void publish(self, Load *job) noexcept nogil
    cdef void publish_one(self, Load *job, uint32_t i) noexcept nogil
    cdef uint64_t admit(self, uint64_t number, uint64_t word, Arrival arrival, bint may_evict) noexcept nogil
    cdef bint settle(self, uint64_t number, Slice *held, Arrival arrival, bint may_evict) noexcept nogil
    cdef uint64_t slices_for(self, uint64_t clusters) except? 0
    cdef uint64_t word_at(self, uint64_t number) noexcept nogil
    cdef complain(self, uint64_t number, int outcome, int attempts)
    cdef take_geometry(self, int cluster_bits, bint extended, uint64_t entry_bytes)

    cdef inline Leaf *leaf_for(self, uint64_t number) noexcept nogil:
        return self.cache.directories[self.layer].leaves[number // LEAF_WORDS]
