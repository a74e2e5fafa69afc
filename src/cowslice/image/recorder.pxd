"""Requests on their way to a capture file."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from cowslice.cache.pthread cimport pthread_cond_t, pthread_mutex_t

cdef struct Record:         # as it stands in the file; see image.capture
    uint64_t place
    uint32_t length
    uint32_t time

cdef enum Asked:            # the kinds of requests, as tune.requests.Operation numbers them
    ASKED_READ = 0
    ASKED_WRITE = 1
    ASKED_FLUSH = 2
    ASKED_DISCARD = 3
    ASKED_ZERO = 4

cdef class Recorder:
    cdef pthread_mutex_t lock   # of everything below
    cdef pthread_cond_t wake    # the writing thread
    cdef Record *ring
    cdef uint64_t capacity
    cdef uint64_t head          # records put in since the start
    cdef uint64_t tail          # records written
    cdef readonly uint64_t recorded
    cdef readonly uint64_t lost
    cdef uint64_t untold        # of the lost, those that the file does not tell of yet
    cdef uint64_t begun         # nanoseconds of the clock
    cdef uint64_t latest        # microseconds of the last record
    cdef readonly bint running
    cdef bint ending
    cdef int fault              # errno of a write that failed, 0
    cdef int fd
    cdef object thread
    cdef uint64_t enter(self) noexcept nogil
    cdef void put(self, uint64_t now, uint64_t kind, uint64_t offset, uint64_t length) noexcept nogil
    cdef void leave(self) noexcept nogil
    cdef void tell(self, uint64_t kind, uint64_t offset, uint64_t length) noexcept nogil
    cdef void push(self, uint64_t value, uint64_t kind, uint32_t length, uint64_t now) noexcept nogil
    cdef void drain(self) noexcept nogil
    cdef uint64_t wait_for_records(self) noexcept nogil
    cdef void forget(self, uint64_t first, uint64_t count) noexcept nogil


cdef inline void record(Recorder recorder, uint64_t kind, uint64_t offset, uint64_t length) noexcept nogil:
    """Tell a recorder if it runs: next to nothing where it does not."""
    if recorder.running:
        recorder.tell(kind, offset, length)
