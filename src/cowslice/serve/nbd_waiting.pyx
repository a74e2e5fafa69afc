# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""How a connection waits for its client: awake for a moment where that has paid before, asleep otherwise.

A client that asks one thing after another is kept waiting by two wake-ups far longer than by a read; who stays awake saves one, and
one that has many requests under way sends the next ones soon. It does not know what is asked. What must hold: a wait is at most `longest`
awake, one processor is always left to others, and who is wanted elsewhere sleeps.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint64_t

from cowslice.cache.clock cimport now_ns

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT
    int MSG_PEEK
    ssize_t recv(int fd, void *buffer, size_t size, int flags)

cdef extern from *:
    """
    static int cowslice_awake;  /* connections of this process that wait awake */
    static inline int cowslice_count_awake(int by) { return __atomic_add_fetch(&cowslice_awake, by, __ATOMIC_RELAXED); }
    """
    int count_awake "cowslice_count_awake"(int by) noexcept nogil

cdef enum:
    MOST_CAUTIOUS = 8192    # more of them, where the processor was wanted by others
    TRUSTED = 8             # short waits in a row after which the next is expected to be short
    MOMENT = 10_000         # nanoseconds for more requests to come: a client takes 4 or 5 us for each
    MOST_RELUCTANT = 255    # times that gathering is passed over once it has brought nothing again and again
    LONE = 56               # bytes of two requests: less is one
    LOOKS = 4               # between two yields
    LATE = 20_000           # nanoseconds: a processor that comes back later from a yield is wanted by somebody else


cdef ssize_t await_bytes(Vigil *vigil, int fd, uint8_t *buffer, uint64_t room) noexcept nogil:
    """What a blocking `recv` answers, with its errno.

    A lone request may be left in the socket until `take_owed`: to free what another processor put there takes longer than to answer.
    """
    cdef uint64_t began
    cdef ssize_t got = -1
    cdef bint nothing = True
    take_owed(vigil, fd)
    if vigil.longest == 0:
        return recv(fd, buffer, room, 0)
    began = now_ns()
    if vigil.trust >= TRUSTED + vigil.caution:
        if count_awake(1) <= vigil.spare:
            got = look(vigil, began, fd, buffer, room)
            nothing = got < 0 and errno == EAGAIN
        count_awake(-1)
    if nothing:
        got = recv(fd, buffer, room, 0)
    if got > 0:
        vigil.trust = min(vigil.trust + 1, TRUSTED + MOST_CAUTIOUS) if now_ns() - began <= vigil.longest else 0
    vigil.lone = 0 < got < LONE
    return got


cdef void take_owed(Vigil *vigil, int fd) noexcept nogil:
    """Take out of the socket what was already looked at."""
    cdef uint8_t seen[LONE]
    cdef ssize_t got
    while vigil.owed:
        got = recv(fd, seen, vigil.owed, 0)
        if got > 0:
            vigil.owed -= <uint32_t> got
        elif got == 0 or errno != EINTR:
            vigil.owed = 0  # the connection is gone, and the next wait says so


cdef uint64_t gather(Vigil *vigil, int fd, uint8_t *buffer, uint64_t room) noexcept nogil:
    """How many more bytes come within a moment behind those that came.

    A client that sends one request after another has more under way: answered together they cost both sides less, and it
    need not be woken for each. Where nothing came it is tried less and less often.
    """
    cdef uint64_t total = 0
    if vigil.longest == 0:
        return 0
    if vigil.passing:
        vigil.passing -= 1
        return 0
    take_owed(vigil, fd)
    if count_awake(1) <= vigil.spare:
        total = collect(vigil, fd, buffer, room)
    count_awake(-1)
    vigil.reluctance = 0 if total else min(2 * vigil.reluctance + 1, <uint32_t> MOST_RELUCTANT)
    vigil.passing = vigil.reluctance
    return total


cdef uint64_t collect(Vigil *vigil, int fd, uint8_t *buffer, uint64_t room) noexcept nogil:
    """What comes meanwhile; the end of the stream, or a fault, is left to the next wait."""
    cdef uint64_t began = now_ns(), before = began, now, total = 0
    cdef ssize_t got
    while total < room:
        sched_yield()
        got = recv(fd, buffer + total, room - total, MSG_DONTWAIT)
        if got == 0 or (got < 0 and errno != EAGAIN):
            break
        total += max(got, 0)
        now = now_ns()
        if now - began > min(vigil.longest, <uint64_t> MOMENT) or now - before > LATE:
            break
        before = now
    return total


cdef ssize_t look(Vigil *vigil, uint64_t began, int fd, uint8_t *buffer, uint64_t room) noexcept nogil:
    """Look again and again whether something is there, letting everybody else go first; -1 and EAGAIN: it is not."""
    cdef uint64_t before = began, now
    cdef uint32_t looks = 0
    cdef ssize_t got
    while True:
        got = look_once(vigil, fd, buffer, room)
        if got >= 0 or errno != EAGAIN:
            vigil.caution = max(vigil.caution, <uint32_t> 1) - 1
            return got
        now = now_ns()
        if now - before > LATE:
            vigil.caution = min(4 * vigil.caution + TRUSTED, <uint32_t> MOST_CAUTIOUS)
            return got
        if now - began > vigil.longest:
            return got
        before = now
        looks += 1
        if looks % LOOKS == 0:
            sched_yield()


cdef ssize_t look_once(Vigil *vigil, int fd, uint8_t *buffer, uint64_t room) noexcept nogil:
    cdef ssize_t got
    if not vigil.lone or room < LONE:
        return recv(fd, buffer, room, MSG_DONTWAIT)
    got = recv(fd, buffer, LONE, MSG_DONTWAIT | MSG_PEEK)
    if got == LONE:
        return recv(fd, buffer, room, MSG_DONTWAIT)
    vigil.owed = <uint32_t> max(got, 0)
    return got
