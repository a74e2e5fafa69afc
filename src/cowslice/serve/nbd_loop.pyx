# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The compiled transmission of one NBD connection: every request that one `recv` brings, answered by one `send`.

It answers plain reads and writes in place; what would wait for a device, or takes long to inflate or decipher, goes to workers of
this connection, without the GIL; all else is handed over to Python, which knows commands, contexts and errors. It does not know
the handshake nor who listens. What must hold: no lock is kept across I/O on an image, a reply is sent whole, and a client
that stalls, vanishes or lies costs nobody but itself.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove

from cowslice.cache.clock cimport now_ns
from cowslice.cache.pthread cimport pthread_mutex_lock, pthread_mutex_unlock, pthread_self
from cowslice.image.fastpath cimport FastPath
from cowslice.image.recorder cimport ASKED_READ, record
from cowslice.image.translation cimport Target
from cowslice.serve.nbd_frames cimport (
    DISC, DONT_FRAGMENT, EXTENDED, FUA, PAYLOAD_LEN, READ, SIMPLE, WRITE, Ask, decode_request)
from cowslice.serve.nbd_inflight cimport ARENA, InFlight
from cowslice.serve.nbd_tally cimport count_reads
from cowslice.serve.nbd_waiting cimport await_bytes, gather, take_owed

from cowslice.errors import Closed
from cowslice.processors import cores

cdef enum:
    ROOM = 256 << 10            # bytes that one recv may bring
    MOST_ROOM = 4 << 20         # what more was needed for a payload is given back at once
    MOST_KEPT = 64 << 10        # of a payload that is refused: it takes less than a recv may bring anyway
    PIECE = 32 << 10            # bytes of data to send at once: the client reads them while the next are put together
    WINDOW = 8                  # reads that keep both sides busy: more need not be waited for
    MAX_PAYLOAD = 32 << 20      # that the protocol lets a client send without asking
    MOST_WAITING = 16           # threads of one connection that may wait for a device

cdef enum:  # why a transmission ended: places in ENDS
    GOES_ON, DISCONNECTED, VANISHED, GARBAGE, IDLE, BROKEN, NO_MEMORY

ENDS = ("", "disconnected", "vanished", "garbage", "idle", "broken", "no memory")


cdef class Loop(InFlight):
    """One connection after its handshake.

    `descriptor` is the connected socket, which blocks and stays the caller's; where it has a time limit (SO_RCVTIMEO), a
    client that waits for no answer and asks nothing for so long is put out. `fast` is the disk; `mode` 0, 1 or 2 for simple,
    structured or extended replies; `writable` lets the client write, and with `writethrough` all of that is handed over;
    `size`, `max_request` and `most_bytes` are bytes;
    `poll_max_ns` is how long it may wait awake for a client that goes on asking.
    `handover(command, flags, cookie, offset, length, payload, arrived, cost)` is called, with the GIL, in some thread of this
    connection for every request that is not answered here; `arrived` is its time by the monotonic clock, in nanoseconds. Each
    is ended by exactly one `finish(cost)`, and answered through `reply`. The payload of a request that is refused whatever it
    holds may be left out. Where it raises, the connection ends, and `fault` is what it raised.
    """

    def __cinit__(self, int descriptor, FastPath fast not None, *, int mode, uint64_t size, bint writable=False,
                  bint writethrough=False, uint64_t max_request=32 << 20, uint32_t most_requests=64,
                  uint64_t most_bytes=64 << 20, uint64_t poll_max_ns=0, handover):
        self.fd = descriptor
        self.fast = fast
        self.mode = mode
        self.size = size
        self.writable = writable
        self.writethrough = writethrough
        self.direct = fast.layers[0].file.alignment > 1
        self.max_request = max_request
        self.most_requests = most_requests
        self.most_bytes = most_bytes
        self.handover = handover
        self.head = 32 if mode == EXTENDED else 28
        self.vigil.longest = poll_max_ns
        self.vigil.spare = cores() - 1
        self.piece = PIECE if self.vigil.spare else ARENA  # on one processor both wait in turn anyway
        self.most_workers = cores() if fast.in_memory else max(cores(), MOST_WAITING)

    def __dealloc__(self):
        free(self.incoming)

    def refuse(self):
        """Hand over every request that comes from now on."""
        self.refusing = True

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

    cdef void give_back(self) noexcept nogil:
        """Part with the memory that only large payloads need, at once where it is much, else when one batch did without."""
        cdef uint8_t *smaller
        if self.room > MOST_ROOM or (self.room > ROOM and not self.needed):
            smaller = <uint8_t *> realloc(self.incoming, ROOM)
            if smaller != NULL:
                self.incoming = smaller
                self.room = ROOM
        self.needed = False

    cdef int receive(self) noexcept nogil:
        cdef ssize_t got
        cdef bint busy
        if self.have == 0:
            self.start = 0
            self.give_back()
        elif self.room - self.start - self.have < 4096 and not self.make_space(self.room):
            return NO_MEMORY
        while True:
            busy = self.pending > 0  # without the lock: only this thread adds, so what is 0 stays 0
            got = await_bytes(&self.vigil, self.fd, self.incoming + self.start + self.have, self.room - self.start - self.have)
            if got > 0:
                self.have += got
                if not self.has_window():
                    self.have += gather(&self.vigil, self.fd, self.incoming + self.start + self.have,
                                        self.room - self.start - self.have)
                return GOES_ON
            if got == 0:
                return VANISHED
            if errno != EINTR and not (errno == EAGAIN and busy):
                return IDLE if errno == EAGAIN else BROKEN

    cdef bint has_window(self) noexcept nogil:
        """Whether a client that sends many requests at once has just done so."""
        cdef const uint8_t *command = self.incoming + self.start + 6
        return self.have >= WINDOW * 28 and command[0] == 0 and command[1] == READ

    cdef int parse(self) noexcept nogil:
        """Answer every request that is here whole."""
        cdef Ask asks[BATCH]
        cdef Ask *ask
        cdef uint32_t count = 0
        cdef uint64_t size = 0, wanted = 0, head = self.head
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
                end = BROKEN
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
        cdef uint64_t payload = 0
        size[0] = 0
        if self.have < self.head:
            return GOES_ON
        if not decode_request(self.mode, self.incoming + self.start, ask):
            return GARBAGE
        if ask.command == DISC:
            return DISCONNECTED
        if ask.command == WRITE or (self.mode == EXTENDED and ask.flags & PAYLOAD_LEN):
            payload = ask.length
        if payload > max(self.max_request, <uint64_t> MAX_PAYLOAD):
            return GARBAGE  # where the next request begins can only be told by reading all of it
        if payload > MOST_KEPT and not self.takes(ask):
            size[0] = self.head if self.drop(payload) else 0
            return GOES_ON
        if self.have < self.head + payload:
            return GOES_ON if self.head + payload <= self.room - self.start or self.make_space(self.head + payload) else NO_MEMORY
        size[0] = self.head + payload
        self.needed |= size[0] > ROOM
        return GOES_ON

    cdef bint takes(self, const Ask *ask) noexcept nogil:
        """Whether a large payload is worth storing. For what is not, Python has an error, whatever it brings."""
        return ask.command == WRITE and self.writable and self.lies_inside(ask)

    cdef bint drop(self, uint64_t payload) noexcept nogil:
        """Let go what has come of the first request's payload: its header moves up to the end. Whether that was all."""
        cdef uint64_t here = min(self.have - self.head, payload - self.dropped)
        memmove(self.incoming + self.start + here, self.incoming + self.start, self.head)
        self.start += here
        self.have -= here
        self.dropped += here
        if self.dropped < payload:
            return False
        self.dropped = 0
        return True

    cdef bint lies_inside(self, const Ask *ask) noexcept nogil:
        """Inside the disk, and of a size that was agreed on."""
        return ask.length <= self.max_request and ask.length <= self.size and ask.offset <= self.size - ask.length

    cdef bint plain(self, const Ask *ask) noexcept nogil:
        """A read that needs no word of Python: without odd flags."""
        cdef uint16_t known = FUA if self.mode == SIMPLE else FUA | DONT_FRAGMENT
        return ask.command == READ and not (ask.flags & ~known or self.refusing) and ask.length > 0 and self.lies_inside(ask)

    # -- answers ----------------------------------------------------------------------------------------------------

    cdef bint answer_batch(self, Ask *asks, uint32_t count) noexcept nogil:
        """Translate what is resident under one lock, then read. False: the connection is broken."""
        cdef Target targets[BATCH]
        cdef bint answered[BATCH]
        cdef uint32_t first = 0, stop, i
        self.alone = (self.have < self.head and count == 1 and self.pending == 0) or self.vigil.spare == 0
        while first < count:
            stop = first + self.fitting(asks + first, count - first)
            if stop == first:
                if not self.flush():
                    return False
                stop = first + max(self.fitting(asks + first, count - first), <uint32_t> 1)
            self.answer_inside(asks + first, stop - first, targets, answered)
            pthread_mutex_lock(&self.lock)
            count_reads(&self.tally, self.size, asks + first, answered, stop - first, now_ns())
            pthread_mutex_unlock(&self.lock)
            for i in range(first, stop):
                if answered[i - first]:
                    record(self.fast.recorder, ASKED_READ, asks[i].offset, asks[i].length)
                elif not self.answer_later(&asks[i], &targets[i - first]):
                    return False
            first = stop
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

    cdef bint answer_later(self, Ask *ask, Target *target) noexcept nogil:
        """A read that could not be answered at once: by a worker, slowly, or by Python. False: the connection is broken."""
        if not self.fast.in_memory or self.takes_long(ask, target):
            return self.enqueue(ask, NULL)
        if self.answer_slowly(ask, &self.out):
            record(self.fast.recorder, ASKED_READ, ask.offset, ask.length)
            self.note(ask)
            return True
        return self.pass_on(ask, NULL, 0)

    cdef bint write_here(self, Ask *ask, const uint8_t *payload) noexcept nogil:
        """Write what needs no word of Python, or leave it to a worker where a device has to be waited for.

        False, and no answer, for any other.
        """
        if not (self.writable and self.fast.writable) or self.writethrough or self.refusing:
            return False
        if ask.flags & ~(PAYLOAD_LEN if self.mode == EXTENDED else 0):
            return False
        if ask.length == 0 or not self.lies_inside(ask):
            return False
        if self.is_slow(ask) or not self.fast.in_memory and not self.is_mapped(ask):
            self.enqueue(ask, payload)
            return True
        if self.out.used + 64 > ARENA and not self.flush():
            return False
        if self.write(ask, payload, &self.out):
            self.note(ask)
            return True
        if self.fast.in_memory or not self.waits_beside(ask):
            return False
        self.enqueue(ask, payload)
        return True

    cdef bint is_slow(self, const Ask *ask) noexcept nogil:
        """Whether a write waits for the device, or for much to be enciphered.

        A small one of a client that asks for nothing else meanwhile is done before a worker would have woken.
        """
        if ask.length > PIECE:
            return self.direct or (self.fast.layers[0].opaque and self.vigil.spare > 0)
        return self.direct and (self.pending > 0 or self.have > self.head + ask.length)
