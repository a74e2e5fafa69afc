"""The load of one NBD connection."""

from cpython.buffer cimport Py_buffer
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef enum:
    BUCKETS = 1920          # of latency: 32 buckets for each doubling, of 64 bits of nanoseconds
    DEPTHS = 4096           # the most requests under way

# How a run ends.
cdef enum End:
    GOES_ON = 0
    DONE = 1
    LOST = 2                # the server closed the connection, or the system did
    SILENT = 3              # no answer for too long
    BROKEN = 4              # the server broke the protocol: `fault` says how
    DIFFERENT = 5           # it answered other bytes than were expected, at `blamed`

# A request under way.
cdef struct Slot:
    uint64_t turn           # how often the slot was used: part of the cookie
    uint64_t sent           # nanoseconds
    uint64_t offset
    uint32_t got            # bytes that its answer brought
    bint busy
    bint writes
    bint failed

cdef class Load:
    cdef int fd
    cdef uint64_t start
    cdef uint64_t span          # bytes of whole requests from `start`
    cdef uint32_t length        # of a request
    cdef uint32_t depth
    cdef uint64_t position      # of the walk; random where `step` is 0
    cdef uint64_t step
    cdef uint64_t dice
    cdef uint32_t write_percent
    cdef uint64_t count
    cdef uint64_t deadline      # nanoseconds
    cdef double seconds
    cdef bint structured
    cdef volatile bint stopping
    cdef Py_buffer content
    cdef bint has_content
    cdef uint8_t *noise         # what is written where no content is known
    cdef Slot *slots
    cdef uint16_t *idle         # a stack of the slots that are not busy
    cdef uint32_t idle_count
    cdef uint8_t *headers
    cdef iovec *out
    cdef uint32_t out_count
    cdef uint32_t out_next      # first one not wholly sent
    cdef uint8_t *incoming
    cdef uint64_t have
    cdef uint64_t body          # bytes that still belong to the reply in hand
    cdef uint64_t body_offset   # what they should be: guest bytes from here, if `body_counts`
    cdef bint body_counts
    cdef int64_t closing        # the slot that is answered when they have come, or -1
    cdef uint64_t now
    cdef const char *fault
    cdef uint64_t blamed
    cdef uint64_t issued
    cdef uint64_t answered
    cdef uint64_t writes
    cdef uint64_t errors
    cdef uint32_t first_error
    cdef uint64_t elapsed       # nanoseconds
    cdef uint64_t busy          # of processor time
    cdef uint64_t latencies[BUCKETS]
    cdef int drive(self) noexcept nogil
    cdef void issue(self) noexcept nogil
    cdef uint64_t next_offset(self, uint64_t number) noexcept nogil
    cdef void add_out(self, const uint8_t *bytes, uint64_t size) noexcept nogil
    cdef int push(self) noexcept nogil
    cdef int pull(self) noexcept nogil
    cdef int wait_both(self) noexcept nogil
    cdef int parse(self) noexcept nogil
    cdef int64_t header(self, const uint8_t *p, uint64_t left) noexcept nogil
    cdef int64_t simple(self, const uint8_t *p, uint64_t left) noexcept nogil
    cdef int64_t chunk(self, const uint8_t *p, uint64_t left) noexcept nogil
    cdef int64_t chunk_body(self, const uint8_t *p, Slot *slot, uint32_t kind, uint32_t size) noexcept nogil
    cdef int64_t find(self, uint64_t cookie) noexcept nogil
    cdef bint expect(self, Slot *slot, uint64_t offset, uint64_t size) noexcept nogil
    cdef bint same(self, const uint8_t *p, uint64_t offset, uint64_t size) noexcept nogil
    cdef bint zero(self, uint64_t offset, uint64_t size) noexcept nogil
    cdef void note_error(self, Slot *slot, uint32_t error) noexcept nogil
    cdef int settle(self) noexcept nogil
    cdef int64_t broken(self, const char *fault, uint64_t value) noexcept nogil
