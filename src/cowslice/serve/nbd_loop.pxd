"""The compiled transmission of one NBD connection."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from cowslice.cache.pthread cimport pthread_cond_t, pthread_mutex_t
from cowslice.image.translation cimport Target
from cowslice.serve.nbd_answering cimport Answering
from cowslice.serve.nbd_frames cimport Arena, Ask
from cowslice.serve.nbd_tally cimport Tally
from cowslice.serve.nbd_waiting cimport Vigil

cdef enum:
    BATCH = 64              # requests answered by one send

cdef struct Job:
    Ask ask
    Job *next

cdef class Loop(Answering):
    cdef object handover
    cdef readonly object fault  # what `handover` raised, or None
    cdef int fd
    cdef bint writable
    cdef uint64_t max_request
    cdef uint64_t most_bytes
    cdef uint32_t most_requests
    cdef int idle_ms
    cdef Vigil vigil
    cdef uint64_t piece         # bytes of data that are sent at once
    cdef uint64_t home          # the thread that runs the loop; 0 before and after
    cdef bint stopping
    cdef bint broken            # nothing can be sent any more
    cdef uint8_t *incoming
    cdef uint64_t start
    cdef uint64_t have
    cdef uint64_t room
    cdef Arena out
    cdef pthread_mutex_t sending
    cdef pthread_mutex_t lock   # of everything below
    cdef Tally tally
    cdef pthread_cond_t settled
    cdef pthread_cond_t work
    cdef uint32_t pending
    cdef uint64_t pending_bytes
    cdef Job *first
    cdef Job *last
    cdef uint32_t queued
    cdef uint32_t idle_workers
    cdef uint32_t workers
    cdef uint32_t most_workers
    cdef bint leaving
    cdef list threads
    cdef prepare(self, bytes leftover)
    cdef void wait_for_rest(self) noexcept nogil
    cdef int serve(self) noexcept nogil
    cdef bint make_space(self, uint64_t wanted) noexcept nogil
    cdef int receive(self) noexcept nogil
    cdef bint has_window(self) noexcept nogil
    cdef int parse(self) noexcept nogil
    cdef int take_one(self, Ask *ask, uint64_t *size) noexcept nogil
    cdef bint plain(self, const Ask *ask) noexcept nogil
    cdef bint answer_batch(self, Ask *asks, uint32_t count) noexcept nogil
    cdef uint32_t fitting(self, const Ask *asks, uint32_t count) noexcept nogil
    cdef void answer_inside(self, const Ask *asks, uint32_t count, Target *targets, bint *answered) noexcept nogil
    cdef bint answer_later(self, const Ask *ask, Target *target) noexcept nogil
    cdef bint write_here(self, const Ask *ask, const uint8_t *payload) noexcept nogil
    cdef bint send_all(self, const uint8_t *data, uint64_t size) noexcept nogil
    cdef bint flush(self) noexcept nogil
    cdef void admit(self, uint64_t length) noexcept nogil
    cdef void settle(self, uint64_t length) noexcept nogil
    cdef bint pass_on(self, const Ask *ask, const uint8_t *payload, uint64_t payload_size) noexcept nogil
    cdef bint tell(self, const Ask *ask, const uint8_t *payload, uint64_t payload_size) noexcept with gil
    cdef bint enqueue(self, const Ask *ask) noexcept nogil
    cdef bint hire(self) noexcept with gil
    cdef void toil(self) noexcept nogil
    cdef void do_job(self, Job *job) noexcept nogil
