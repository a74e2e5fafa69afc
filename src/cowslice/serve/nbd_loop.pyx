# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The compiled transmission of one NBD connection: every request that one `recv` brings, answered by one `send`.

It answers plain reads and writes in place; what would wait for a device, or takes long to inflate or decipher, goes to workers of
this connection, without the GIL; all else is handed over to Python, which knows commands, contexts and errors. It does not know
the handshake nor who listens. What must hold: no lock is kept across I/O on an image, a reply is sent whole, and a client
that stalls, vanishes or lies costs nobody but itself.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from cowslice.cache.pthread cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_signal, pthread_cond_wait, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock)
from cowslice.image.fastpath cimport FastPath
from cowslice.image.recorder cimport ASKED_READ, ASKED_WRITE, record
from cowslice.image.translation cimport Target
from cowslice.serve.nbd_answering cimport Answering
from cowslice.serve.nbd_frames cimport (
    DISC, DONT_FRAGMENT, EXTENDED, FUA, PAYLOAD_LEN, READ, SIMPLE, WRITE, Arena, Ask, decode_request, put_done, reserve)
from cowslice.serve.nbd_tally cimport Tally, count_reads, count_write, describe
from cowslice.serve.nbd_waiting cimport await_bytes, gather, take_owed

import os
import socket
import struct
import threading

from cowslice.errors import Closed
from cowslice.processors import cores

cdef extern from "<pthread.h>" nogil:
    uint64_t pthread_self()

cdef extern from "<sys/socket.h>" nogil:
    int MSG_NOSIGNAL
    int SHUT_RD
    int SHUT_RDWR
    ssize_t send(int fd, const void *buffer, size_t size, int flags)
    int shutdown(int fd, int how)

cdef enum:
    ROOM = 256 << 10            # bytes that one recv may bring
    ARENA = 1 << 20             # bytes of replies put together before they are sent
    PIECE = 32 << 10            # bytes of data to send at once: the client reads them while the next are put together
    WINDOW = 8                  # reads that keep both sides busy: more need not be waited for
    MAX_PAYLOAD = 32 << 20      # that the protocol lets a client send without asking
    MOST_WAITING = 16           # threads of one connection that may wait for a device

cdef enum:  # why a transmission ended: places in ENDS
    GOES_ON, DISCONNECTED, VANISHED, GARBAGE, IDLE, BROKEN, STOPPED, NO_MEMORY, FAULT

ENDS = ("", "disconnected", "vanished", "garbage", "idle", "broken", "stopped", "no memory", "fault")


cdef inline uint64_t now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <uint64_t> t.tv_sec * 1_000_000_000 + t.tv_nsec


cdef class Loop(Answering):
    """One connection after its handshake.

    `descriptor` is the connected socket, which stays the caller's; `fast` the disk; `mode` 0, 1 or 2 for simple, structured or
    extended replies; `writable` lets the client write; `size`, `max_request` and `most_bytes` are bytes, `idle` seconds
    without a request, 0 for ever; `poll_max_ns` is how long it may wait awake for a client that goes on asking.
    `handover(command, flags, cookie, offset, length, payload)` is called, with the GIL, in some thread of this connection for
    every request that is no plain read; each is ended by exactly one `finish(length)`, and answered through `reply`.
    """

    def __cinit__(self, int descriptor, FastPath fast not None, *, int mode, uint64_t size, bint writable=False,
                  uint64_t max_request=32 << 20, uint32_t most_requests=64, uint64_t most_bytes=64 << 20, double idle=0.0,
                  uint64_t poll_max_ns=0, handover):
        pthread_mutex_init(&self.sending, NULL)
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.settled, NULL)
        pthread_cond_init(&self.work, NULL)
        self.fd = descriptor
        self.fast = fast
        self.mode = mode
        self.size = size
        self.writable = writable and fast.writable
        self.max_request = max_request
        self.most_requests = most_requests
        self.most_bytes = most_bytes
        self.handover = handover
        self.threads = []
        self.idle_ms = <int> (idle * 1000)
        self.vigil.longest = poll_max_ns
        self.vigil.spare = cores() - 1
        self.piece = PIECE if self.vigil.spare else ARENA  # on one processor both wait in turn anyway
        self.most_workers = cores() if fast.in_memory else max(cores(), MOST_WAITING)

    def __dealloc__(self):
        free(self.incoming)
        free(self.out.bytes)
        pthread_mutex_destroy(&self.sending)
        pthread_mutex_destroy(&self.lock)
        pthread_cond_destroy(&self.settled)
        pthread_cond_destroy(&self.work)

    def run(self, bytes leftover not None=b""):
        """Serve until the connection ends; `leftover` came behind the handshake. Returns why it ended, one of ENDS."""
        cdef int end
        if self.fast.closed:
            raise Closed("the image is closed")
        self.prepare(leftover)
        self.fast.active += 1
        try:
            with nogil:
                self.home = pthread_self()
                end = self.serve()
                self.home = 0
                self.wait_for_rest()
            for thread in self.threads:
                thread.join()
        finally:
            self.fast.active -= 1
        return ENDS[end]

    cdef prepare(self, bytes leftover):
        if not self.make_space(max(<uint64_t> len(leftover), ROOM)):
            raise MemoryError("no memory for an NBD connection")
        memcpy(self.incoming, <const uint8_t *> leftover, len(leftover))
        self.have = len(leftover)
        os.set_blocking(self.fd, True)
        with socket.socket(fileno=os.dup(self.fd)) as same:
            same.setblocking(True)
            patience = struct.pack("ll", self.idle_ms // 1000, self.idle_ms % 1000 * 1000)
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)

    cdef void wait_for_rest(self) noexcept nogil:
        """Until all that was handed over is finished; then the workers go home."""
        pthread_mutex_lock(&self.lock)
        while self.pending:
            pthread_cond_wait(&self.settled, &self.lock)
        self.leaving = True
        pthread_cond_broadcast(&self.work)
        pthread_mutex_unlock(&self.lock)

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

    def finish(self, uint64_t length):
        """A request of that length, handed over before, needs nothing more."""
        with nogil:
            self.settle(length)

    def stop(self):
        """Take no more requests; `run` returns once those that arrived are answered."""
        self.stopping = True
        shutdown(self.fd, SHUT_RD)

    def abandon(self):
        """Cut the connection: whoever waits to send gives up."""
        self.stopping = True
        shutdown(self.fd, SHUT_RDWR)

    def counters(self):
        """What was answered here, as a dict: reads, bytes, handed_over, sends, latency_seconds, latencies, heat."""
        pthread_mutex_lock(&self.lock)
        cdef Tally t = self.tally
        pthread_mutex_unlock(&self.lock)
        return describe(&t)

    # -- bytes in ---------------------------------------------------------------------------------------------------

    cdef int serve(self) noexcept nogil:
        cdef int end = GOES_ON
        while end == GOES_ON:
            end = self.parse()
            if not self.flush():
                return BROKEN
            if end == GOES_ON:
                end = self.receive()
        take_owed(&self.vigil, self.fd)
        return end

    cdef bint make_space(self, uint64_t wanted) noexcept nogil:
        """Let `wanted` bytes fit from the first unread one on."""
        cdef uint8_t *grown
        if self.start:
            memmove(self.incoming, self.incoming + self.start, self.have)
            self.start = 0
        if wanted <= self.room:
            return True
        grown = <uint8_t *> realloc(self.incoming, wanted)
        if grown == NULL:
            return False
        self.incoming = grown
        self.room = wanted
        return True

    cdef int receive(self) noexcept nogil:
        cdef ssize_t got
        if self.have == 0:
            self.start = 0
        elif self.room - self.start - self.have < 4096 and not self.make_space(self.room):
            return NO_MEMORY
        while True:
            got = await_bytes(&self.vigil, self.fd, self.incoming + self.start + self.have, self.room - self.start - self.have)
            if got > 0:
                self.have += got
                if not self.has_window():
                    self.have += gather(&self.vigil, self.fd, self.incoming + self.start + self.have,
                                        self.room - self.start - self.have)
                return GOES_ON
            if got == 0:
                return STOPPED if self.stopping else VANISHED
            if errno != EINTR:
                return IDLE if self.idle_ms else BROKEN

    cdef bint has_window(self) noexcept nogil:
        """Whether a client that sends many requests at once has just done so."""
        cdef const uint8_t *command = self.incoming + self.start + 6
        return self.have >= WINDOW * 28 and command[0] == 0 and command[1] == READ

    cdef int parse(self) noexcept nogil:
        """Answer every request that is here whole."""
        cdef Ask asks[BATCH]
        cdef Ask *ask
        cdef uint32_t count = 0
        cdef uint64_t size = 0, wanted = 0, head = 32 if self.mode == EXTENDED else 28
        cdef uint64_t arrived = now_ns()
        cdef int end
        while True:
            ask = &asks[count]
            end = self.take_one(ask, &size)
            if size == 0 or end != GOES_ON:
                break
            ask.arrived = arrived
            if self.plain(ask):
                count += 1
                wanted += ask.length
            elif ask.command == WRITE and self.write_here(ask, self.incoming + self.start + head):
                pass
            elif not self.pass_on(ask, self.incoming + self.start + head, size - head):
                end = FAULT
            self.start += size
            self.have -= size
            if end != GOES_ON:
                break
            if count == BATCH or wanted >= self.piece:
                if not self.answer_batch(asks, count) or not self.flush():
                    return BROKEN
                count, wanted = 0, 0
        if count and not self.answer_batch(asks, count):
            return BROKEN
        return end

    cdef int take_one(self, Ask *ask, uint64_t *size) noexcept nogil:
        """Decode the request at the front. `size` is what it takes with its payload, 0 while it is not whole."""
        cdef uint64_t head = 32 if self.mode == EXTENDED else 28
        size[0] = 0
        if self.have < head:
            return GOES_ON
        if not decode_request(self.mode, self.incoming + self.start, ask):
            return GARBAGE
        if ask.command == DISC:
            return DISCONNECTED
        if ask.command == WRITE or (self.mode == EXTENDED and ask.flags & PAYLOAD_LEN):
            if ask.length > max(self.max_request, <uint64_t> MAX_PAYLOAD):
                return GARBAGE  # where the next request begins can only be told by reading all of it
            head += ask.length
        if self.have < head:
            return GOES_ON if head <= self.room - self.start or self.make_space(head) else NO_MEMORY
        size[0] = head
        return GOES_ON

    cdef bint plain(self, const Ask *ask) noexcept nogil:
        """A read that needs no word of Python: inside the disk, of a size that was agreed on, without odd flags."""
        cdef uint16_t known = FUA if self.mode == SIMPLE else FUA | DONT_FRAGMENT
        if ask.command != READ or ask.flags & ~known:
            return False
        return 0 < ask.length <= self.max_request and ask.length <= self.size and ask.offset <= self.size - ask.length

    # -- answers ----------------------------------------------------------------------------------------------------

    cdef bint answer_batch(self, Ask *asks, uint32_t count) noexcept nogil:
        """Translate what is resident under one lock, then read. False: the connection is broken."""
        cdef Target targets[BATCH]
        cdef bint answered[BATCH]
        cdef uint32_t first = 0, stop, i
        while first < count:
            stop = first + self.fitting(asks + first, count - first)
            if stop == first:
                if not self.flush():
                    return False
                stop = first + max(self.fitting(asks + first, count - first), <uint32_t> 1)
            self.answer_inside(asks + first, stop - first, targets, answered)
            for i in range(first, stop):
                if answered[i - first]:
                    record(self.fast.recorder, ASKED_READ, asks[i].offset, asks[i].length)
                elif not self.answer_later(&asks[i], &targets[i - first]):
                    return False
            first = stop
        pthread_mutex_lock(&self.lock)
        count_reads(&self.tally, self.size, asks, count, now_ns())
        pthread_mutex_unlock(&self.lock)
        return True

    cdef uint32_t fitting(self, const Ask *asks, uint32_t count) noexcept nogil:
        """How many of the next replies the arena takes before it must be sent."""
        cdef uint64_t used = self.out.used
        cdef uint32_t i
        for i in range(count):
            used += asks[i].length + 64
            if used > ARENA:
                return i
        return count

    cdef void answer_inside(self, const Ask *asks, uint32_t count, Target *targets, bint *answered) noexcept nogil:
        """Answer what can be at once, inside the passage of a disk that changes, but never across a send."""
        cdef int64_t ticket = self.fast.enter()
        cdef uint32_t i
        self.locate_batch(asks, count, targets)
        for i in range(count):
            answered[i] = self.answer(&asks[i], &targets[i], &self.out)
        self.fast.leave(ticket)

    cdef bint answer_later(self, const Ask *ask, Target *target) noexcept nogil:
        """A read that could not be answered at once: by a worker, slowly, or by Python. False: the connection is broken."""
        if not self.fast.in_memory or self.takes_long(ask, target):
            return self.enqueue(ask)
        if self.answer_slowly(ask, &self.out):
            record(self.fast.recorder, ASKED_READ, ask.offset, ask.length)
            return True
        return self.pass_on(ask, NULL, 0)

    cdef bint write_here(self, const Ask *ask, const uint8_t *payload) noexcept nogil:
        """Overwrite in place what is the disk's alone. False, and no answer, for all that Python must see."""
        cdef int64_t ticket
        cdef uint64_t done
        if not self.writable or ask.flags & ~(PAYLOAD_LEN if self.mode == EXTENDED else 0):
            return False
        if not 0 < ask.length <= self.max_request or ask.length > self.size or ask.offset > self.size - ask.length:
            return False
        if (self.out.used + 64 > ARENA and not self.flush()) or not reserve(&self.out, 64):
            return False
        ticket = self.fast.enter()
        done = self.fast.write_span(ask.offset, payload, ask.length)
        self.fast.leave(ticket)
        if done < ask.length:
            return False
        record(self.fast.recorder, ASKED_WRITE, ask.offset, ask.length)
        put_done(self.mode, &self.out, ask)
        pthread_mutex_lock(&self.lock)
        count_write(&self.tally, self.size, ask, now_ns())
        pthread_mutex_unlock(&self.lock)
        return True

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
                self.broken = True
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

    # -- what does not go at once -----------------------------------------------------------------------------------

    cdef void admit(self, uint64_t length) noexcept nogil:
        """Count a request in, once those before it have left room: this is what slows a flood down to our pace."""
        pthread_mutex_lock(&self.lock)
        while self.pending and (self.pending >= self.most_requests or self.pending_bytes + length > self.most_bytes):
            pthread_cond_wait(&self.settled, &self.lock)
        self.pending += 1
        self.pending_bytes += length
        pthread_mutex_unlock(&self.lock)

    cdef void settle(self, uint64_t length) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        self.pending -= 1
        self.pending_bytes -= length
        pthread_cond_broadcast(&self.settled)
        pthread_mutex_unlock(&self.lock)

    cdef bint pass_on(self, const Ask *ask, const uint8_t *payload, uint64_t payload_size) noexcept nogil:
        """Hand a request over to Python, after sending what is ready: it may be long until the next send.

        A write that need not be stable is answered soon; many of them are answered with one send.
        """
        if (ask.command != WRITE or ask.flags & FUA or self.out.used > ARENA // 2) and not self.flush():
            return False
        self.admit(ask.length)
        return self.tell(ask, payload, payload_size)

    cdef bint tell(self, const Ask *ask, const uint8_t *payload, uint64_t payload_size) noexcept with gil:
        self.tally.handed_over += 1
        try:
            self.handover(ask.command, ask.flags, ask.cookie, ask.offset, ask.length, payload[:payload_size])
            return True
        except BaseException as fault:
            # The thread that serves has no caller to raise to: it ends the connection, and `fault` says why.
            self.fault = fault
            self.settle(ask.length)
            return False

    cdef bint enqueue(self, const Ask *ask) noexcept nogil:
        """Leave a read to the workers, of whom there is one more while all are busy."""
        cdef Job *job = <Job *> malloc(sizeof(Job))
        cdef bint short_handed
        if job == NULL or not self.flush():
            free(job)
            return False
        self.admit(ask.length)
        job.ask = ask[0]
        job.next = NULL
        pthread_mutex_lock(&self.lock)
        if self.last == NULL:
            self.first = job
        else:
            self.last.next = job
        self.last = job
        self.queued += 1
        short_handed = self.queued > self.idle_workers and self.workers < self.most_workers
        pthread_cond_signal(&self.work)
        pthread_mutex_unlock(&self.lock)
        return not short_handed or self.hire()

    cdef bint hire(self) noexcept with gil:
        try:
            thread = threading.Thread(target=self._toil, name="cowslice-nbd-worker", daemon=True)
            thread.start()
        except RuntimeError as fault:
            self.fault = fault
            return self.workers > 0  # those that are there will do
        self.threads.append(thread)
        self.workers += 1
        return True

    def _toil(self):
        with nogil:
            self.toil()

    cdef void toil(self) noexcept nogil:
        cdef Job *job
        while True:
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
            if job == NULL:
                return
            self.do_job(job)
            free(job)

    cdef void do_job(self, Job *job) noexcept nogil:
        cdef Arena own
        memset(&own, 0, sizeof(Arena))
        own.bytes = <uint8_t *> malloc(job.ask.length + 256)
        own.room = job.ask.length + 256 if own.bytes != NULL else 0
        if self.answer_slowly(&job.ask, &own):
            record(self.fast.recorder, ASKED_READ, job.ask.offset, job.ask.length)
            self.send_all(own.bytes, own.used)
            self.settle(job.ask.length)
        elif not self.tell(&job.ask, NULL, 0):
            self.broken = True
        free(own.bytes)
