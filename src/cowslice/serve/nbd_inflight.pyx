# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What one NBD connection has under way: the room for it, the threads that wait for devices, and the one way out.

It does not know how requests come in. What must hold: each request that was admitted is settled exactly once, whoever
fails; a reply is sent whole; and when nothing can be sent any more, whoever waits for the client learns it.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from cowslice.cache.clock cimport now_ns
from cowslice.cache.pthread cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_signal, pthread_cond_wait, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, pthread_self)
from cowslice.image.hostread cimport read_at_once
from cowslice.image.recorder cimport ASKED_READ, ASKED_WRITE, record
from cowslice.image.translation cimport Target
from cowslice.serve.nbd_answering cimport Answering
from cowslice.serve.nbd_frames cimport BLOCK_STATUS, CACHE, FUA, READ, WRITE, Arena, Ask, put_done, reserve
from cowslice.serve.nbd_tally cimport Tally, count_read, count_write, describe

import threading

cdef extern from "<sys/socket.h>" nogil:
    int MSG_NOSIGNAL
    int SHUT_RDWR
    ssize_t send(int fd, const void *buffer, size_t size, int flags)
    int shutdown(int fd, int how)

cdef enum:
    MOST_PROBED = 64 << 10      # bytes: to copy more takes long anyway

cdef enum:  # bytes that a request holds, as transmission.cost_of has them
    STATUS_COST = 256 << 10
    CACHE_COST = 1 << 20


cdef inline uint64_t cost_of(const Ask *ask, uint64_t payload_size, uint64_t max_request) noexcept nogil:
    """About how many bytes a request holds until its answer is sent; what is refused holds next to nothing."""
    if ask.command == READ:
        return ask.length if ask.length <= max_request else 0
    if ask.command == BLOCK_STATUS:
        return STATUS_COST
    return CACHE_COST if ask.command == CACHE else payload_size


cdef class InFlight(Answering):
    """One connection's requests from where they were understood to where they are answered: the twin of workers.InFlight.

    Whoever derives from it fills the fields that the constructor leaves.
    """

    def __cinit__(self):
        pthread_mutex_init(&self.sending, NULL)
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.settled, NULL)
        pthread_cond_init(&self.work, NULL)
        self.threads = []

    def __dealloc__(self):
        free(self.out.bytes)
        pthread_mutex_destroy(&self.sending)
        pthread_mutex_destroy(&self.lock)
        pthread_cond_destroy(&self.settled)
        pthread_cond_destroy(&self.work)

    def reply(self, *parts):
        """Send the parts as one message; False when the connection cannot take it any more. Any thread may call."""
        cdef const uint8_t[::1] view = parts[0] if len(parts) == 1 else b"".join(parts)
        cdef bint sent
        if view.shape[0] == 0:
            return not self.broken
        if pthread_self() == self.home and self.out.used + view.shape[0] <= ARENA and reserve(&self.out, view.shape[0]):
            memcpy(self.out.bytes + self.out.used, &view[0], view.shape[0])  # goes with the next send of the loop
            self.out.used += view.shape[0]
            return not self.broken
        with nogil:
            sent = self.send_all(&view[0], view.shape[0])
        return sent

    def is_home(self):
        """Whether the calling thread is the one that takes requests in: it must not be kept waiting."""
        return pthread_self() == self.home

    def finish(self, uint64_t cost):
        """A request that was handed over with that cost needs nothing more."""
        with nogil:
            self.settle(cost)

    def abandon(self, fault=None):
        """Cut the connection: whoever waits for the client gives up. `fault` is why, where somebody must be told."""
        if fault is not None:
            self.fault = fault
        self.give_up()

    def counters(self):
        """What was answered here, as a dict: reads, bytes, handed_over, sends, latency_seconds, latencies, heat."""
        pthread_mutex_lock(&self.lock)
        cdef Tally t = self.tally
        pthread_mutex_unlock(&self.lock)
        return describe(&t)

    # -- bytes out --------------------------------------------------------------------------------------------------

    cdef bint send_all(self, const uint8_t *data, uint64_t size) noexcept nogil:
        """Send one whole message or several; nobody's bytes come between."""
        cdef uint64_t done = 0
        cdef ssize_t sent
        pthread_mutex_lock(&self.sending)
        while done < size and not self.broken:
            sent = send(self.fd, data + done, size - done, MSG_NOSIGNAL)
            if sent >= 0:
                done += sent
            elif errno != EINTR:
                self.give_up()
        pthread_mutex_unlock(&self.sending)
        return done == size

    cdef bint flush(self) noexcept nogil:
        cdef bint sent = True
        if self.out.used:
            sent = self.send_all(self.out.bytes, self.out.used)
            self.tally.sends += 1
        self.out.used = 0
        if self.out.room > 4 * ARENA:
            free(self.out.bytes)
            self.out.bytes = NULL
            self.out.room = 0
        return sent and not self.broken

    cdef void give_up(self) noexcept nogil:
        """Nothing goes out any more; who waits for the client, in `recv` or in `send`, wakes."""
        self.broken = True
        shutdown(self.fd, SHUT_RDWR)

    # -- room -------------------------------------------------------------------------------------------------------

    cdef void admit(self, uint64_t cost) noexcept nogil:
        """Count a request in, once those before it have left room: this is what slows a flood down to our pace."""
        pthread_mutex_lock(&self.lock)
        while self.pending and (self.pending >= self.most_requests or self.pending_bytes + cost > self.most_bytes):
            pthread_cond_wait(&self.settled, &self.lock)
        self.pending += 1
        self.pending_bytes += cost
        pthread_mutex_unlock(&self.lock)

    cdef void settle(self, uint64_t cost) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        self.pending -= 1
        self.pending_bytes -= cost
        pthread_cond_broadcast(&self.settled)
        pthread_mutex_unlock(&self.lock)

    cdef void wait_for_rest(self) noexcept nogil:
        """Until all that was handed over is finished; then the workers go home."""
        pthread_mutex_lock(&self.lock)
        while self.pending:
            pthread_cond_wait(&self.settled, &self.lock)
        self.leaving = True
        pthread_cond_broadcast(&self.work)
        pthread_mutex_unlock(&self.lock)

    # -- Python -----------------------------------------------------------------------------------------------------

    cdef bint pass_on(self, Ask *ask, const uint8_t *payload, uint64_t payload_size) noexcept nogil:
        """Hand a request over to Python, after sending what is ready: it may be long until the next send.

        A write that need not be stable is answered soon; many of them are answered with one send.
        """
        if (ask.command != WRITE or ask.flags & FUA or self.out.used > ARENA // 2) and not self.flush():
            return False
        ask.cost = cost_of(ask, payload_size, self.max_request)
        self.admit(ask.cost)
        return self.tell(ask, payload, payload_size)

    cdef bint tell(self, const Ask *ask, const uint8_t *payload, uint64_t payload_size) noexcept with gil:
        self.tally.handed_over += 1
        try:
            self.handover(
                ask.command, ask.flags, ask.cookie, ask.offset, ask.length, payload[:payload_size], ask.arrived, ask.cost)
            return True
        except BaseException as fault:
            # The thread that serves has no caller to raise to: it ends the connection, and `fault` says why.
            self.abandon(fault)
            self.settle(ask.cost)
            return False

    # -- workers ----------------------------------------------------------------------------------------------------

    cdef bint enqueue(self, Ask *ask, const uint8_t *payload) noexcept nogil:
        """Leave a read, or a write with its payload, to the workers, of whom there is one more while all are busy.

        Where there can be none it is done here. False: the connection is broken.
        """
        cdef uint64_t copied = ask.length if payload != NULL else 0
        cdef Job *job = NULL
        if not self.flush():
            return False
        ask.cost = ask.length
        self.admit(ask.cost)
        if self.is_short_handed():
            self.hire()
        if self.workers:
            job = <Job *> malloc(sizeof(Job) + copied)
        if job == NULL:
            self.do_job(ask, payload)
            return not self.broken
        job.ask = ask[0]
        job.payload = <uint8_t *> (job + 1) if payload != NULL else NULL
        memcpy(job + 1, payload, copied)
        self.put_last(job)
        return True

    cdef void put_last(self, Job *job) noexcept nogil:
        job.next = NULL
        pthread_mutex_lock(&self.lock)
        if self.last == NULL:
            self.first = job
        else:
            self.last.next = job
        self.last = job
        self.queued += 1
        pthread_cond_signal(&self.work)
        pthread_mutex_unlock(&self.lock)

    cdef bint is_short_handed(self) noexcept nogil:
        """Whether one more job would wait although there may be one more worker."""
        cdef bint short_handed
        pthread_mutex_lock(&self.lock)
        short_handed = self.queued >= self.idle_workers and self.workers < self.most_workers
        pthread_mutex_unlock(&self.lock)
        return short_handed

    cdef void hire(self) noexcept with gil:
        try:
            thread = threading.Thread(target=self._toil, name="cowslice-nbd-worker", daemon=True)
            thread.start()
        except (MemoryError, RuntimeError):
            return  # the system has no more threads: those that are there will do
        self.threads.append(thread)
        self.workers += 1

    def _toil(self):
        with nogil:
            self.toil()

    cdef void toil(self) noexcept nogil:
        cdef Job *job = self.next_job()
        while job != NULL:
            self.do_job(&job.ask, job.payload)
            free(job)
            job = self.next_job()

    cdef Job *next_job(self) noexcept nogil:
        """Wait for one; NULL: there will be no more."""
        cdef Job *job
        pthread_mutex_lock(&self.lock)
        while self.first == NULL and not self.leaving:
            self.idle_workers += 1
            pthread_cond_wait(&self.work, &self.lock)
            self.idle_workers -= 1
        job = self.first
        if job != NULL:
            self.first = job.next
            self.last = NULL if job.next == NULL else self.last
            self.queued -= 1
        pthread_mutex_unlock(&self.lock)
        return job

    cdef void do_job(self, const Ask *ask, const uint8_t *payload) noexcept nogil:
        cdef uint64_t room = 256 + (ask.length if payload == NULL else 0)
        cdef Arena own
        memset(&own, 0, sizeof(Arena))
        own.bytes = <uint8_t *> malloc(room)
        own.room = room if own.bytes != NULL else 0
        if not (self.answer_slowly(ask, &own) if payload == NULL else self.write(ask, payload, &own)):
            self.tell(ask, payload, ask.length if payload != NULL else 0)
        else:
            if payload == NULL:
                record(self.fast.recorder, ASKED_READ, ask.offset, ask.length)
            if self.send_all(own.bytes, own.used):
                self.note(ask)
            self.settle(ask.cost)
        free(own.bytes)

    cdef bint write(self, const Ask *ask, const uint8_t *payload, Arena *out) noexcept nogil:
        """Write as far as that needs no word of Python; False, and nothing in the arena, where it does."""
        cdef int64_t ticket
        cdef uint64_t done
        if not reserve(out, 64):
            return False
        ticket = self.fast.enter()
        done = self.fast.write_span(ask.offset, payload, ask.length)
        self.fast.leave(ticket)
        if done < ask.length:
            return False
        record(self.fast.recorder, ASKED_WRITE, ask.offset, ask.length)
        put_done(self.mode, out, ask)
        return True

    cdef bint is_mapped(self, const Ask *ask) noexcept nogil:
        """Whether the map of a write's first bytes is in memory."""
        cdef Target target
        return self.locate_now(ask.offset, ask.length, &target)

    cdef bint waits_beside(self, const Ask *ask) noexcept nogil:
        """Whether a device has to be asked for what stands beside a write in its first or last cluster. For the loop's thread."""
        cdef uint64_t mask = (<uint64_t> 1 << self.fast.layers[0].cluster_bits) - 1, end = ask.offset + ask.length
        return not self.is_near(ask.offset & ~mask, ask.offset) or not self.is_near(end, min(end + mask & ~mask, self.size))

    cdef bint is_near(self, uint64_t start, uint64_t end) noexcept nogil:
        """Whether these guest bytes are read without waiting: zeros, or in the page cache."""
        cdef Target target
        if start == end:
            return True
        if end - start > MOST_PROBED or not self.locate_now(start, end - start, &target):
            return False
        if target.length < end - start or target.stored or not reserve(&self.out, MOST_PROBED):
            return False
        if target.layer == NULL:
            return True
        return read_at_once(&target.layer.file, self.out.bytes + self.out.used, target.length, target.host)

    cdef bint locate_now(self, uint64_t offset, uint64_t want, Target *target) noexcept nogil:
        """Locate without loading anything."""
        cdef bint found
        if self.fast.maps_count:
            pthread_mutex_lock(&self.fast.cache.lock)
        found = self.fast.locate(offset, want, True, target)
        if self.fast.maps_count:
            pthread_mutex_unlock(&self.fast.cache.lock)
        return found

    cdef void note(self, const Ask *ask) noexcept nogil:
        """Count a read or a write that was answered just now."""
        pthread_mutex_lock(&self.lock)
        if ask.command == WRITE:
            count_write(&self.tally, self.size, ask, now_ns())
        else:
            count_read(&self.tally, self.size, ask, now_ns())
        pthread_mutex_unlock(&self.lock)
