# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Sequential readers told apart by their misses, and how much of the map the next read brings for one.

It knows numbers of slices, and neither memory nor I/O. A map and its simulation both plan with it: they cannot disagree.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    STREAMS = 4             # sequential readers that are told apart
    AHEAD_BYTES = 65536     # the most that is read for one of them at once
    ROOM_BESIDE = 2048      # bytes that must be free before neighbours nobody asked for are taken along

cdef struct Streams:
    uint64_t next[STREAMS]      # the slice with which each goes on
    uint32_t length[STREAMS]    # groups of slices that it got last
    uint32_t hand               # whose place the next new one takes
    uint32_t most_groups        # that one read joins


cdef inline uint32_t most_groups(uint64_t budget, uint64_t entry_bytes, bint readahead) noexcept nogil:
    """Groups that fit into AHEAD_BYTES and an eighth of the budget, one at least."""
    cdef uint64_t most = budget // 8
    if not readahead:
        return 1
    most = (most if most < AHEAD_BYTES else <uint64_t> AHEAD_BYTES) // entry_bytes
    return <uint32_t> (most if most else 1)


cdef inline uint32_t stream_at(Streams *streams, uint64_t first) noexcept nogil:
    """The stream that has just got to slice `first`, and may have twice as many groups as last time, or a new one."""
    cdef uint32_t i, twice
    for i in range(STREAMS):
        if streams.next[i] == first and first:
            twice = streams.length[i] * 2
            streams.length[i] = twice if twice < streams.most_groups else streams.most_groups
            return i
    i = streams.hand
    streams.hand = (i + 1) % STREAMS
    streams.length[i] = 1
    return i


cdef inline uint64_t within_table(uint64_t first, uint64_t count, uint64_t per_table, uint64_t slices) noexcept nogil:
    """How many of `count` slices from `first` one read brings: none past the end of their L2 table or of the map."""
    cdef uint64_t left = per_table - first % per_table
    if slices - first < left:
        left = slices - first
    return count if count < left else left


cdef inline bint room_beside(uint64_t used, uint64_t budget) noexcept nogil:
    """Whether neighbours that nobody asked for may be taken along."""
    return used + ROOM_BESIDE < budget
