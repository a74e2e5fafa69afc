"""What one NBD connection has answered so far."""

from libc.stdint cimport uint32_t, uint64_t

from cowslice.serve.nbd_frames cimport Ask

cdef enum:
    HEAT = 512              # parts of the disk whose reads are counted apart
    LATENCIES = 32          # buckets of latency: the n-th counts below 2**n microseconds

cdef struct Tally:
    uint64_t reads
    uint64_t bytes
    uint64_t writes
    uint64_t written
    uint64_t handed_over
    uint64_t sends
    uint64_t latency_sum    # nanoseconds
    uint64_t latencies[LATENCIES]
    uint32_t heat[HEAT]

cdef void count_reads(Tally *tally, uint64_t size, const Ask *asks, const bint *answered, uint32_t asked,
                      uint64_t now) noexcept nogil
cdef void count_read(Tally *tally, uint64_t size, const Ask *ask, uint64_t now) noexcept nogil
cdef void count_write(Tally *tally, uint64_t size, const Ask *ask, uint64_t now) noexcept nogil
cdef dict describe(const Tally *tally)
