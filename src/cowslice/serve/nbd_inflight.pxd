"""What one NBD connection has under way."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from cowslice.cache.pthread cimport pthread_cond_t, pthread_mutex_t
from cowslice.image.translation cimport Target
from cowslice.serve.nbd_answering cimport Answering
from cowslice.serve.nbd_frames cimport Arena, Ask
from cowslice.serve.nbd_tally cimport Tally

cdef enum:
    ARENA = 1 << 20             # bytes of replies put together before they are sent

cdef struct Job:
    Ask ask
    uint8_t *payload            # of a write, right behind the job; of a read NULL
    Job *next

cdef class InFlight(Answering):
    cdef object handover
    cdef readonly object fault  # why Python gave the connection up, or None
    cdef int fd
    cdef uint64_t max_request
    cdef uint64_t most_bytes
    cdef uint32_t most_requests
    cdef uint64_t home          # the thread that runs the loop; 0 before and after
    cdef bint broken            # nothing can be sent any more
    cdef Arena out              # replies of the loop's thread that wait for the next send
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
    cdef bint send_all(self, const uint8_t *data, uint64_t size) noexcept nogil
    cdef bint flush(self) noexcept nogil
    cdef void give_up(self) noexcept nogil
    cdef void admit(self, uint64_t cost) noexcept nogil
    cdef void settle(self, uint64_t cost) noexcept nogil
    cdef void wait_for_rest(self) noexcept nogil
    cdef bint pass_on(self, Ask *ask, const uint8_t *payload, uint64_t payload_size) noexcept nogil
    cdef bint tell(self, const Ask *ask, const uint8_t *payload, uint64_t payload_size) noexcept with gil
    cdef bint enqueue(self, Ask *ask, const uint8_t *payload) noexcept nogil
    cdef void put_last(self, Job *job) noexcept nogil
    cdef bint is_short_handed(self) noexcept nogil
    cdef void hire(self) noexcept with gil
    cdef Job *next_job(self) noexcept nogil
    cdef void toil(self) noexcept nogil
    cdef void do_job(self, const Ask *ask, const uint8_t *payload) noexcept nogil
    cdef bint write(self, const Ask *ask, const uint8_t *payload, Arena *out) noexcept nogil
    cdef bint is_mapped(self, const Ask *ask) noexcept nogil
    cdef bint waits_beside(self, const Ask *ask) noexcept nogil
    cdef bint is_near(self, uint64_t start, uint64_t end) noexcept nogil
    cdef bint locate_now(self, uint64_t offset, uint64_t want, Target *target) noexcept nogil
    cdef void note(self, const Ask *ask) noexcept nogil
