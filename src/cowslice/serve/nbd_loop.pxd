"""The compiled transmission of one NBD connection."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from cowslice.image.translation cimport Target
from cowslice.serve.nbd_frames cimport Ask
from cowslice.serve.nbd_inflight cimport InFlight
from cowslice.serve.nbd_waiting cimport Vigil

cdef enum:
    BATCH = 64              # requests answered by one send

cdef class Loop(InFlight):
    cdef bint writable          # the client may write
    cdef bint writethrough      # what it writes must be stable before it is answered
    cdef readonly bint refusing          # whatever comes from now on
    cdef bint direct            # each write waits for the device
    cdef Vigil vigil
    cdef uint64_t piece         # bytes of data that are sent at once
    cdef uint64_t head          # bytes of a request without its payload
    cdef uint8_t *incoming
    cdef uint64_t start
    cdef uint64_t have
    cdef readonly uint64_t room # bytes of memory for what comes in
    cdef bint needed            # all of it, since it was last looked at
    cdef uint64_t dropped       # bytes of the payload of the first request that were let go
    cdef prepare(self, bytes leftover)
    cdef int serve(self) noexcept nogil
    cdef bint make_space(self, uint64_t wanted) noexcept nogil
    cdef void give_back(self) noexcept nogil
    cdef int receive(self) noexcept nogil
    cdef bint has_window(self) noexcept nogil
    cdef int parse(self) noexcept nogil
    cdef int take_one(self, Ask *ask, uint64_t *size) noexcept nogil
    cdef bint takes(self, const Ask *ask) noexcept nogil
    cdef bint drop(self, uint64_t payload) noexcept nogil
    cdef bint lies_inside(self, const Ask *ask) noexcept nogil
    cdef bint plain(self, const Ask *ask) noexcept nogil
    cdef bint answer_batch(self, Ask *asks, uint32_t count) noexcept nogil
    cdef uint32_t fitting(self, const Ask *asks, uint32_t count) noexcept nogil
    cdef void answer_inside(self, const Ask *asks, uint32_t count, Target *targets, bint *answered) noexcept nogil
    cdef bint answer_later(self, Ask *ask, Target *target) noexcept nogil
    cdef bint write_here(self, Ask *ask, const uint8_t *payload) noexcept nogil
    cdef bint is_slow(self, const Ask *ask) noexcept nogil
