# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""One NBD connection kept busy: requests leave in windows, replies are parsed in bulk, all without the GIL.

It does not know the handshake: it is given a socket on which transmission has begun. What must hold: each request is
answered once and whole, or the run ends with an error; a window leaves as soon as the replies of one `recv` are read.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memmove, memset

from cowslice.errors import BadOption, RemoteProtocolError, StorageError

cdef extern from *:
    """
    #define HIGH_PRODUCT(a, b) ((uint64_t) (((unsigned __int128) (a) * (b)) >> 64))
    """
    uint16_t bswap16 "__builtin_bswap16"(uint16_t) nogil
    uint32_t bswap32 "__builtin_bswap32"(uint32_t) nogil
    uint64_t bswap64 "__builtin_bswap64"(uint64_t) nogil
    int leading_zeros "__builtin_clzll"(unsigned long long) nogil
    uint64_t high_product "HIGH_PRODUCT"(uint64_t, uint64_t) nogil

cdef extern from "<sys/socket.h>" nogil:
    enum: MSG_DONTWAIT
    enum: MSG_NOSIGNAL
    enum: SHUT_RDWR
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    ssize_t recv(int fd, void *buffer, size_t size, int flags)
    enum: SOL_SOCKET
    enum: SO_RCVTIMEO
    int setsockopt(int fd, int level, int option, const void *value, unsigned int size)
    int shutdown(int fd, int how)

cdef extern from "<poll.h>" nogil:
    enum: POLLIN
    enum: POLLOUT
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int milliseconds)

cdef extern from "<time.h>" nogil:
    enum: CLOCK_MONOTONIC
    enum: CLOCK_THREAD_CPUTIME_ID
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *t)

cdef enum:
    ROOM = 256 << 10        # bytes of one recv: the processor's cache should hold them
    PATIENCE_MS = 30_000
    MOST_IOV = 1024         # of one sendmsg, as Linux allows
    REQUEST_SIZE = 28
    READ = 0
    WRITE = 1
    REQUEST_MAGIC = 0x25609513
    SIMPLE_MAGIC = 0x67446698
    STRUCTURED_MAGIC = 0x668E33EF
    CHUNK_NONE = 0
    CHUNK_DATA = 1
    CHUNK_HOLE = 2
    CHUNK_IS_ERROR = 0x8000
    MOST_ERROR_BYTES = 8192 # of an error chunk: a string of the protocol has 4096 at most

MOST_DEPTH = DEPTHS
LATENCY_BUCKETS = BUCKETS


cdef inline uint64_t clock_ns(int clock) noexcept nogil:
    cdef timespec t
    clock_gettime(clock, &t)
    return <uint64_t> t.tv_sec * 1000000000 + t.tv_nsec


cdef inline uint16_t be16(const uint8_t *p) noexcept nogil:
    cdef uint16_t value
    memcpy(&value, p, 2)
    return bswap16(value)


cdef inline uint32_t be32(const uint8_t *p) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, p, 4)
    return bswap32(value)


cdef inline uint64_t be64(const uint8_t *p) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, p, 8)
    return bswap64(value)


cdef inline uint32_t latency_bucket(uint64_t value) noexcept nogil:
    """32 buckets for each doubling: a bucket is at most 3 % wide."""
    cdef int top
    if value < 32:
        return <uint32_t> value
    top = 63 - leading_zeros(value)
    return (top - 4) * 32 + <uint32_t> (value >> (top - 5) & 31)


def latency_floor(uint32_t bucket):
    """The least nanoseconds that are counted in a bucket."""
    if bucket < 32:
        return bucket
    return <uint64_t> (32 + bucket % 32) << (bucket // 32 - 1)


cdef inline uint64_t next_random(uint64_t *state) noexcept nogil:
    """SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    cdef uint64_t z
    state[0] += <uint64_t> 0x9E3779B97F4A7C15
    z = state[0]
    z = (z ^ (z >> 30)) * <uint64_t> 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t> 0x94D049BB133111EB
    return z ^ (z >> 31)


cdef class Load:
    """Requests of `length` bytes to one export, `depth` under way at once, for `seconds` or until `count` are answered.

    They lie in `span` bytes from `start`: at random for `step` 0, else walking `step` bytes at a time from `first`, round
    and round. `write_percent` of them write: the bytes of `content` where it is given, else noise. `content` holds what the
    whole disk should hold, and every answer is compared with it. The descriptor stays the caller's, and must block.
    """

    def __cinit__(self, int descriptor, *, uint64_t start, uint64_t span, uint32_t length, uint32_t depth, uint64_t first=0,
                  uint64_t step=0, uint64_t seed=0, uint32_t write_percent=0, uint64_t count=0, double seconds=0.0,
                  bint structured=False, content=None):
        if not (1 <= depth <= DEPTHS and 1 <= length <= span and write_percent <= 100 and (count or seconds > 0)):
            raise BadOption(f"a load of depth {depth}, length {length} in {span} bytes, {write_percent}% writes, {count} "
                            f"requests and {seconds} seconds cannot be run")
        self.fd = descriptor
        self.start, self.length, self.depth = start, length, depth
        self.span = span - span % length
        self.step, self.position, self.dice = step % self.span if step else 0, first % self.span, seed
        if step and not self.step:
            self.step = self.span  # a whole round: the same place again
        self.write_percent, self.count, self.seconds, self.structured = write_percent, count, seconds, structured
        self.closing = -1
        self.take_memory()
        if content is not None:
            PyObject_GetBuffer(content, &self.content, PyBUF_SIMPLE)
            self.has_content = True
            if <uint64_t> self.content.len < start + self.span:
                raise BadOption(f"the content has {self.content.len} bytes, expected {start + self.span}")

    def take_memory(self):
        cdef uint32_t i
        self.slots = <Slot *> calloc(self.depth, sizeof(Slot))
        self.idle = <uint16_t *> calloc(self.depth, sizeof(uint16_t))
        self.headers = <uint8_t *> calloc(self.depth, REQUEST_SIZE)
        self.out = <iovec *> calloc(2 * self.depth, sizeof(iovec))
        self.incoming = <uint8_t *> malloc(ROOM)
        self.noise = <uint8_t *> malloc(self.length)
        if not (self.slots and self.idle and self.headers and self.out and self.incoming and self.noise):
            raise MemoryError("no memory for a load")
        for i in range(self.length):
            self.noise[i] = <uint8_t> (i * 167 + 13)
        for i in range(self.depth):
            self.idle[i] = <uint16_t> (self.depth - 1 - i)
        self.idle_count = self.depth

    def __dealloc__(self):
        if self.has_content:
            PyBuffer_Release(&self.content)
        free(self.slots)
        free(self.idle)
        free(self.headers)
        free(self.out)
        free(self.incoming)
        free(self.noise)

    def run(self):
        """Run the load in the calling thread, once. Raises RemoteProtocolError, StorageError; error replies are counted."""
        cdef int end
        cdef uint64_t began, busy
        cdef timespec patience
        patience.tv_sec, patience.tv_nsec = PATIENCE_MS // 1000, 0  # as a timeval: the fraction is zero in either
        setsockopt(self.fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience))
        with nogil:
            began = clock_ns(CLOCK_MONOTONIC)
            busy = clock_ns(CLOCK_THREAD_CPUTIME_ID)
            if self.seconds > 0:
                self.deadline = began + <uint64_t> (self.seconds * 1e9)
            self.now = began
            end = self.drive()
            self.elapsed = clock_ns(CLOCK_MONOTONIC) - began
            self.busy = clock_ns(CLOCK_THREAD_CPUTIME_ID) - busy
        if end != DONE and not self.stopping:
            raise self.complaint(end)

    def stop(self):
        """End a run in another thread now, without waiting for answers."""
        self.stopping = True
        shutdown(self.fd, SHUT_RDWR)

    def counters(self):
        """What was answered, as a dict; times in nanoseconds. `latencies` counts by bucket, see `latency_floor`."""
        cdef uint32_t i
        return {
            "requests": self.answered, "writes": self.writes, "errors": self.errors, "first_error": self.first_error,
            "bytes": (self.answered - self.errors) * self.length, "elapsed": self.elapsed, "busy": self.busy,
            "latencies": [self.latencies[i] for i in range(BUCKETS)],
        }

    def complaint(self, int end):
        under_way = self.depth - self.idle_count
        if end == LOST:
            return StorageError(f"the server closed the connection with {under_way} requests unanswered")
        if end == SILENT:
            return StorageError(f"the server answered nothing for {PATIENCE_MS // 1000} seconds, with {under_way} requests "
                                f"under way")
        if end == DIFFERENT:
            return StorageError(f"the bytes read at offset {self.blamed} are not those expected")
        return RemoteProtocolError(f"the server broke the protocol: {self.fault.decode()} ({self.blamed:#x})")

    # -- out --------------------------------------------------------------------------------------------------------

    cdef int drive(self) noexcept nogil:
        cdef int end = GOES_ON
        while end == GOES_ON:
            if self.out_next == self.out_count:
                self.issue()
                if self.idle_count == self.depth:
                    return DONE
            end = self.push()
            if end == GOES_ON:
                end = self.pull()
        return end

    cdef void issue(self) noexcept nogil:
        """Put a window together: a request for every idle slot. Nothing of the last one is left to send."""
        cdef uint8_t *header = self.headers
        cdef Slot *slot
        cdef uint32_t number
        cdef uint64_t chosen
        self.out_count = self.out_next = 0
        if self.stopping or (self.deadline and self.now >= self.deadline):
            return
        while self.idle_count and (not self.count or self.issued < self.count):
            self.idle_count -= 1
            number = self.idle[self.idle_count]
            slot = &self.slots[number]
            chosen = next_random(&self.dice)
            slot.turn += 1
            slot.sent = self.now
            slot.offset = self.next_offset(chosen)
            slot.got = 0
            slot.busy = True
            slot.failed = False
            slot.writes = self.write_percent != 0 and (chosen & 0xFFFFFF) % 100 < self.write_percent
            (<uint32_t *> header)[0] = bswap32(REQUEST_MAGIC)
            (<uint32_t *> header)[1] = bswap32(WRITE if slot.writes else READ)
            (<uint64_t *> (header + 8))[0] = bswap64(slot.turn << 16 | number)
            (<uint64_t *> (header + 16))[0] = bswap64(slot.offset)
            (<uint32_t *> (header + 24))[0] = bswap32(self.length)
            self.add_out(header, REQUEST_SIZE)
            if slot.writes:
                self.add_out(<uint8_t *> self.content.buf + slot.offset if self.has_content else self.noise, self.length)
            header += REQUEST_SIZE
            self.issued += 1

    cdef uint64_t next_offset(self, uint64_t chosen) noexcept nogil:
        cdef uint64_t place
        if not self.step:
            return self.start + high_product(chosen, self.span // self.length) * self.length
        place = self.position
        self.position += self.step
        if self.position >= self.span:
            self.position -= self.span
        return self.start + (place if place + self.length <= self.span else self.span - self.length)

    cdef void add_out(self, const uint8_t *bytes, uint64_t size) noexcept nogil:
        """What lies right behind the bytes before it leaves in one piece with them."""
        cdef iovec *before = &self.out[self.out_count - 1]
        if self.out_count and <const uint8_t *> before.iov_base + before.iov_len == bytes:
            before.iov_len += size
            return
        self.out[self.out_count].iov_base = <void *> bytes
        self.out[self.out_count].iov_len = size
        self.out_count += 1

    cdef int push(self) noexcept nogil:
        """Send what the socket takes without waiting."""
        cdef msghdr message
        cdef ssize_t sent
        memset(&message, 0, sizeof(msghdr))
        while self.out_next < self.out_count:
            message.msg_iov = self.out + self.out_next
            message.msg_iovlen = min(self.out_count - self.out_next, MOST_IOV)
            sent = sendmsg(self.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent < 0:
                if errno == EINTR:
                    continue
                return GOES_ON if errno == EAGAIN else LOST
            while self.out_next < self.out_count and <size_t> sent >= self.out[self.out_next].iov_len:
                sent -= self.out[self.out_next].iov_len
                self.out_next += 1
            if sent:
                self.out[self.out_next].iov_base = <uint8_t *> self.out[self.out_next].iov_base + sent
                self.out[self.out_next].iov_len -= sent
        return GOES_ON

    # -- in ---------------------------------------------------------------------------------------------------------

    cdef int wait_both(self) noexcept nogil:
        """Wait until the socket takes or gives: a server that is stuck sending to us takes nothing from us."""
        cdef pollfd watched
        watched.fd = self.fd
        watched.events = POLLIN | POLLOUT
        watched.revents = 0
        return SILENT if poll(&watched, 1, PATIENCE_MS) == 0 else GOES_ON

    cdef int pull(self) noexcept nogil:
        """Take what came, and read it; wait for it unless there is something to send."""
        cdef int flags = MSG_DONTWAIT if self.out_next < self.out_count else 0
        cdef ssize_t got = recv(self.fd, self.incoming + self.have, ROOM - self.have, flags)
        if got < 0 and errno == EINTR:
            return GOES_ON
        if got < 0 and errno == EAGAIN:
            return self.wait_both() if flags else SILENT
        if got <= 0:
            return LOST
        self.have += got
        self.now = clock_ns(CLOCK_MONOTONIC)
        return self.parse()

    cdef int parse(self) noexcept nogil:
        cdef const uint8_t *p = self.incoming
        cdef uint64_t left = self.have, taken
        cdef int64_t size
        cdef int end
        while True:
            if self.body:
                taken = min(left, self.body)
                if self.body_counts and self.has_content and not self.same(p, self.body_offset, taken):
                    return DIFFERENT
                self.body_offset += taken
                self.body -= taken
                p += taken
                left -= taken
            if self.body:
                break
            if self.closing >= 0:
                end = self.settle()
                if end != GOES_ON:
                    return end
            if left < 16:  # no header is shorter
                break
            size = self.header(p, left)
            if size < 0:
                return <int> -size
            if size == 0:
                break
            p += size
            left -= size
        memmove(self.incoming, p, left)
        self.have = left
        return GOES_ON

    cdef int64_t header(self, const uint8_t *p, uint64_t left) noexcept nogil:
        """Bytes that the header takes, 0 when it is not there yet, or the negative end of the run."""
        cdef uint32_t magic = be32(p)
        if magic == STRUCTURED_MAGIC and self.structured:
            return self.chunk(p, left)
        if magic == SIMPLE_MAGIC:
            return self.simple(p, left)
        return self.broken(b"no reply begins with this number", magic)

    cdef int64_t simple(self, const uint8_t *p, uint64_t left) noexcept nogil:
        cdef uint32_t error = be32(p + 4)
        cdef int64_t number = self.find(be64(p + 8))
        cdef Slot *slot
        if number < 0:
            return number
        slot = &self.slots[number]
        if self.structured and not slot.writes:
            return self.broken(b"a simple reply to a read, although structured replies were agreed", be64(p + 8))
        self.closing = number
        if error:
            self.note_error(slot, error)
        elif not slot.writes:
            slot.got = self.length
            self.body, self.body_offset, self.body_counts = self.length, slot.offset, True
        return 16

    cdef int64_t chunk(self, const uint8_t *p, uint64_t left) noexcept nogil:
        cdef uint32_t size, kind
        cdef uint32_t fixed
        cdef int64_t number
        if left < 20:
            return 0
        kind, size = be16(p + 6), be32(p + 16)
        number = self.find(be64(p + 8))
        if number < 0:
            return number
        fixed = 6 if kind & CHUNK_IS_ERROR else 8 if kind == CHUNK_DATA else 12 if kind == CHUNK_HOLE else 0
        if size < fixed or (kind == CHUNK_NONE and size) or (kind == CHUNK_HOLE and size != 12):
            return self.broken(b"a chunk of an impossible size", size)
        if left < 20 + fixed:
            return 0
        number = self.chunk_body(p, &self.slots[number], kind, size) or number
        if number < 0:
            return number
        if be16(p + 4) & 1:
            self.closing = <int64_t> (be64(p + 8) & 0xFFFF)
        return 20 + fixed

    cdef int64_t chunk_body(self, const uint8_t *p, Slot *slot, uint32_t kind, uint32_t size) noexcept nogil:
        """0, or the negative end of the run. What follows the fixed fields is left to `body`."""
        cdef uint64_t offset = be64(p + 20) if kind == CHUNK_DATA or kind == CHUNK_HOLE else 0
        if kind & CHUNK_IS_ERROR:
            if size > MOST_ERROR_BYTES or not be32(p + 20):
                return self.broken(b"an error chunk without an error, or too long", size)
            self.note_error(slot, be32(p + 20))
            self.body, self.body_counts = size - 6, False
            return 0
        if kind == CHUNK_NONE:
            return 0
        if slot.writes or (kind != CHUNK_DATA and kind != CHUNK_HOLE):
            return self.broken(b"a chunk of this kind answers nothing that was asked", kind)
        size = size - 8 if kind == CHUNK_DATA else be32(p + 28)
        if not self.expect(slot, offset, size):
            return self.broken(b"a chunk lies outside what was asked, or brings nothing, or too much", offset)
        if kind == CHUNK_HOLE:
            return 0 if self.zero(offset, size) else -DIFFERENT
        self.body, self.body_offset, self.body_counts = size, offset, True
        return 0

    cdef int64_t find(self, uint64_t cookie) noexcept nogil:
        """The slot of a cookie that is under way."""
        cdef uint64_t number = cookie & 0xFFFF
        if number >= self.depth or not self.slots[number].busy or self.slots[number].turn != cookie >> 16:
            return self.broken(b"a reply to a request that is not under way", cookie)
        return <int64_t> number

    cdef bint expect(self, Slot *slot, uint64_t offset, uint64_t size) noexcept nogil:
        """May these bytes belong to the answer? They are counted."""
        if not size or offset < slot.offset or offset - slot.offset > self.length:
            return False
        if size > self.length - (offset - slot.offset) or size > self.length - slot.got:
            return False
        slot.got += <uint32_t> size
        return True

    cdef bint same(self, const uint8_t *p, uint64_t offset, uint64_t size) noexcept nogil:
        self.blamed = offset
        return memcmp(<const uint8_t *> self.content.buf + offset, p, size) == 0

    cdef bint zero(self, uint64_t offset, uint64_t size) noexcept nogil:
        """Is the expected content zero there? Unknown content may be."""
        cdef const uint8_t *p = <const uint8_t *> self.content.buf + offset
        self.blamed = offset
        return not self.has_content or (p[0] == 0 and memcmp(p, p + 1, size - 1) == 0)

    cdef void note_error(self, Slot *slot, uint32_t error) noexcept nogil:
        if not slot.failed:
            self.errors += 1
        slot.failed = True
        if not self.first_error:
            self.first_error = error

    cdef int settle(self) noexcept nogil:
        """The reply in hand is whole."""
        cdef Slot *slot = &self.slots[self.closing]
        if not slot.writes and not slot.failed and slot.got != self.length:
            return <int> -self.broken(b"a reply ended before all bytes had come", slot.got)
        self.latencies[latency_bucket(self.now - slot.sent)] += 1
        self.answered += 1
        self.writes += slot.writes
        slot.busy = False
        self.idle[self.idle_count] = <uint16_t> self.closing
        self.idle_count += 1
        self.closing = -1
        return GOES_ON

    cdef int64_t broken(self, const char *fault, uint64_t value) noexcept nogil:
        self.fault = fault
        self.blamed = value
        return -BROKEN
