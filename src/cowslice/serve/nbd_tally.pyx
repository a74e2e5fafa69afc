# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Counts of the reads and writes that compiled code answers: how many, how large, how long they took, where on the disk.

It takes no lock and reads no clock: the caller does both.
"""

from libc.stdint cimport uint32_t, uint64_t

from cowslice.serve.nbd_frames cimport Ask

cdef extern from *:
    int leading_zeros "__builtin_clzll"(uint64_t) noexcept nogil


cdef inline void count(Tally *tally, uint64_t size, const Ask *ask, uint64_t now) noexcept nogil:
    """Add what reads and writes have in common."""
    cdef uint64_t part = max((size + HEAT - 1) // HEAT, <uint64_t> 1), took = now - ask.arrived
    tally.latency_sum += took
    tally.latencies[min(63 - leading_zeros(took // 1000 * 2 + 1), LATENCIES - 1)] += 1
    tally.heat[ask.offset // part] += 1


cdef void count_reads(
        Tally *tally, uint64_t size, const Ask *asks, const bint *answered, uint32_t asked, uint64_t now) noexcept nogil:
    """Add those reads of a disk of `size` bytes that are `answered` at `now` (nanoseconds)."""
    cdef uint32_t i
    for i in range(asked):
        if answered[i]:
            count_read(tally, size, &asks[i], now)


cdef void count_read(Tally *tally, uint64_t size, const Ask *ask, uint64_t now) noexcept nogil:
    """Add one read that is answered at `now`."""
    count(tally, size, ask, now)
    tally.reads += 1
    tally.bytes += ask.length


cdef void count_write(Tally *tally, uint64_t size, const Ask *ask, uint64_t now) noexcept nogil:
    """Add one write that is answered at `now`."""
    count(tally, size, ask, now)
    tally.writes += 1
    tally.written += ask.length


cdef dict describe(const Tally *tally):
    """For Python: reads, bytes, writes, written, handed_over, sends, latency_seconds, latencies (bucket n: below 2**n us), heat."""
    return {
        "reads": tally.reads, "bytes": tally.bytes, "writes": tally.writes, "written": tally.written, "handed_over": tally.handed_over, "sends": tally.sends,
        "latency_seconds": tally.latency_sum / 1e9,
        "latencies": [tally.latencies[i] for i in range(LATENCIES)],
        "heat": [tally.heat[i] for i in range(HEAT)],
    }
