# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Counts of the reads and writes that compiled code answers: how many, how large, how long they took, where on the disk.

It takes no lock and reads no clock: the caller does both.
"""

from libc.stdint cimport uint32_t, uint64_t

from cowslice.serve.nbd_frames cimport Ask

cdef extern from *:
    int leading_zeros "__builtin_clzll"(uint64_t) noexcept nogil


cdef void count_reads(Tally *tally, uint64_t size, const Ask *asks, uint32_t count, uint64_t now) noexcept nogil:
    """Add reads of a disk of `size` bytes that were answered at `now` (nanoseconds)."""
    cdef uint64_t part = max((size + HEAT - 1) // HEAT, <uint64_t> 1), took
    cdef uint32_t i
    for i in range(count):
        took = now - asks[i].arrived
        tally.bytes += asks[i].length
        tally.latency_sum += took
        tally.latencies[min(64 - leading_zeros(took // 1000 | 1), LATENCIES - 1)] += 1
        tally.heat[asks[i].offset // part] += 1
    tally.reads += count


cdef void count_write(Tally *tally, uint64_t size, const Ask *ask, uint64_t now) noexcept nogil:
    """Add a write, as count_reads adds reads."""
    count_reads(tally, size, ask, 1, now)
    tally.reads -= 1
    tally.bytes -= ask.length
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
