# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The cheapest answers that an NBD client can get: every read brings whatever lies in memory, without a look at any disk.

It does not know the handshake. It only serves to show how fast a client would be if its server did nothing, so it never sleeps while the
client goes on, and all that is no short read ends the connection.
"""

from libc.errno cimport EAGAIN, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memmove

from cowslice.cache.clock cimport now_ns

cdef extern from *:
    uint32_t bswap32 "__builtin_bswap32"(uint32_t) nogil
    uint64_t bswap64 "__builtin_bswap64"(uint64_t) nogil

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT
    int MSG_PEEK
    int MSG_NOSIGNAL
    ssize_t recv(int fd, void *buffer, size_t size, int flags)
    ssize_t send(int fd, const void *buffer, size_t size, int flags)

cdef enum:
    ROOM = 64 << 10             # bytes of one recv
    ARENA = 2 << 20             # bytes of replies before they are sent
    PIECE = 32 << 10            # bytes that are sent at once: the client reads them while the next are put together
    WINDOW = 8                  # requests that keep both sides busy
    LONE = 56                   # bytes of two requests: less is one
    LOOKS = 4                   # between two yields
    LONGEST = 1 << 20           # bytes of a read
    SIMPLE = 0                  # of cowslice.nbd.wire.Mode
    EXTENDED = 2
    MOST_HEAD = 40              # bytes before the data of a reply
    AWAKE_NS = 10_000_000       # without a request it sleeps after all
    MOMENT_NS = 10_000          # for more requests to come before the first is answered
    MOST_RELUCTANT = 255        # times that this is passed over once it has brought nothing again and again

cdef struct Habit:
    uint32_t passing
    uint32_t reluctance
    uint32_t owed               # bytes that were looked at and still lie in the socket
    bint lone                   # one request came last time

# Magic, no flags, command 0.
cdef uint64_t READ_REQUEST = 0x25609513_0000_0000
cdef uint64_t EXTENDED_READ_REQUEST = 0x21e41c71_0000_0000
cdef uint32_t SIMPLE_REPLY = 0x67446698
cdef uint32_t STRUCTURED_REPLY = 0x668e33ef
cdef uint32_t EXTENDED_REPLY = 0x6e8a278c
cdef uint32_t LAST_DATA = 0x0001_0001  # flag DONE, type OFFSET_DATA


def answer_blank(int descriptor, int mode, bytes leftover not None):
    """Answer reads on a connected socket until the client asks anything else or leaves. `mode` is the Mode that was agreed on, `leftover`
    what came behind the handshake."""
    cdef uint8_t *incoming = <uint8_t *> calloc(1, ROOM)
    cdef uint8_t *out = <uint8_t *> calloc(1, ARENA)
    cdef uint64_t have = len(leftover)
    try:
        if incoming == NULL or out == NULL or have > ROOM:
            raise MemoryError("no memory for an NBD connection")
        memcpy(incoming, <const uint8_t *> leftover, have)
        with nogil:
            serve(descriptor, mode, incoming, have, out)
    finally:
        free(incoming)
        free(out)


cdef void serve(int fd, int mode, uint8_t *incoming, uint64_t have, uint8_t *out) noexcept nogil:
    cdef uint64_t at, used, length
    cdef uint64_t size = 32 if mode == EXTENDED else 28
    cdef uint64_t wanted = bswap64(EXTENDED_READ_REQUEST if mode == EXTENDED else READ_REQUEST)
    cdef ssize_t got
    cdef Habit habit = Habit(0, 0, 0, False)
    while True:
        at = used = 0
        while have - at >= size:
            length = length_at(mode, incoming + at)
            if (<uint64_t *> (incoming + at))[0] != wanted or length > LONGEST:
                return
            if used >= PIECE or used + length + MOST_HEAD > ARENA:
                if not send_all(fd, out, used):
                    return
                used = 0
            used += put_head(mode, incoming + at, length, out + used) + length
            at += size
        memmove(incoming, incoming + at, have - at)
        have -= at
        if not send_all(fd, out, used):
            return
        got = receive(fd, incoming + have, ROOM - have, &habit)
        if got <= 0:
            return
        have += got


cdef uint64_t length_at(int mode, const uint8_t *request) noexcept nogil:
    return bswap64((<const uint64_t *> (request + 24))[0]) if mode == EXTENDED else bswap32((<const uint32_t *> (request + 24))[0])


cdef uint64_t put_head(int mode, const uint8_t *request, uint64_t length, uint8_t *p) noexcept nogil:
    """The head of the reply to a read; its data is what lies behind. Returns the bytes of the head."""
    memcpy(p + 8, request + 8, 8)
    if mode == SIMPLE:
        (<uint32_t *> p)[0] = bswap32(SIMPLE_REPLY)
        (<uint32_t *> p)[1] = 0
        return 16
    (<uint32_t *> p)[0] = bswap32(EXTENDED_REPLY if mode == EXTENDED else STRUCTURED_REPLY)
    (<uint32_t *> p)[1] = bswap32(LAST_DATA)
    if mode != EXTENDED:
        (<uint32_t *> p)[4] = bswap32(<uint32_t> (8 + length))
        memcpy(p + 20, request + 16, 8)
        return 28
    memcpy(p + 16, request + 16, 8)
    (<uint64_t *> p)[3] = bswap64(8 + length)
    memcpy(p + 32, request + 16, 8)
    return 40


cdef bint send_all(int fd, const uint8_t *data, uint64_t size) noexcept nogil:
    cdef uint64_t done = 0
    cdef ssize_t sent
    while done < size:
        sent = send(fd, data + done, size - done, MSG_NOSIGNAL)
        if sent < 0:
            return False
        done += sent
    return True


cdef ssize_t receive(int fd, uint8_t *buffer, uint64_t room, Habit *habit) noexcept nogil:
    """What a blocking recv answers, without sleeping while the client goes on."""
    cdef uint64_t began = now_ns()
    cdef uint32_t looks = 0
    cdef ssize_t got
    take_owed(fd, habit)
    while now_ns() - began < AWAKE_NS:
        got = look(fd, buffer, room, habit)
        if got > 0:
            return got if got >= WINDOW * 28 else got + gather(fd, buffer + got, room - got, habit)
        if got == 0 or errno != EAGAIN:
            return got
        looks += 1
        if looks % LOOKS == 0:
            sched_yield()
    return recv(fd, buffer, room, 0)


cdef ssize_t look(int fd, uint8_t *buffer, uint64_t room, Habit *habit) noexcept nogil:
    """A lone request is answered before it is taken out of the socket, which takes longer."""
    cdef ssize_t got = LONE
    if habit.lone and room >= LONE:
        got = recv(fd, buffer, LONE, MSG_DONTWAIT | MSG_PEEK)
        habit.owed = <uint32_t> got if 0 < got < LONE else 0
    if got == LONE:
        got = recv(fd, buffer, room, MSG_DONTWAIT)
    if got > 0:
        habit.lone = got < LONE
    return got


cdef void take_owed(int fd, Habit *habit) noexcept nogil:
    cdef uint8_t seen[LONE]
    cdef ssize_t got
    while habit.owed:
        got = recv(fd, seen, habit.owed, 0)
        habit.owed = habit.owed - <uint32_t> got if got > 0 else 0


cdef uint64_t gather(int fd, uint8_t *buffer, uint64_t room, Habit *habit) noexcept nogil:
    """What more a client with many requests under way sends in a moment: answered together they cost it less."""
    cdef uint64_t began, total = 0
    cdef ssize_t got
    if habit.passing:
        habit.passing -= 1
        return 0
    take_owed(fd, habit)
    began = now_ns()
    while total < room and now_ns() - began < MOMENT_NS:
        sched_yield()
        got = recv(fd, buffer + total, room - total, MSG_DONTWAIT)
        total += max(got, 0)
    habit.reluctance = 0 if total else min(2 * habit.reluctance + 1, <uint32_t> MOST_RELUCTANT)
    habit.passing = habit.reluctance
    return total
