# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""How a connection waits for its client: awake for a moment where that has paid before, asleep otherwise.

A client that asks one thing after another is kept waiting by two wake-ups far longer than by a read; who stays awake saves one. It does
not know what is asked. What must hold: a wait is at most `longest` awake, one processor is always left to others, and who
is wanted elsewhere sleeps.
"""

from libc.errno cimport EAGAIN, errno
from libc.stdint cimport uint8_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT
    ssize_t recv(int fd, void *buffer, size_t size, int flags)

cdef extern from *:
    """
    static int cowslice_awake;  /* connections of this process that wait awake */
    static inline int cowslice_count_awake(int by) { return __atomic_add_fetch(&cowslice_awake, by, __ATOMIC_RELAXED); }
    """
    int count_awake "cowslice_count_awake"(int by) noexcept nogil

cdef enum:
    TRUSTED = 8             # short waits in a row after which the next is expected to be short
    LATE = 20_000           # nanoseconds: a processor that comes back later from a yield is wanted by somebody else


cdef inline uint64_t now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <uint64_t> t.tv_sec * 1_000_000_000 + t.tv_nsec


cdef ssize_t await_bytes(Vigil *vigil, int fd, uint8_t *buffer, uint64_t room) noexcept nogil:
    """What a blocking `recv` answers, with its errno."""
    cdef uint64_t began
    cdef ssize_t got = -1
    cdef bint nothing = True
    if vigil.longest == 0:
        return recv(fd, buffer, room, 0)
    began = now_ns()
    if vigil.trust >= TRUSTED:
        if count_awake(1) <= vigil.spare:
            got = look(vigil.longest, began, fd, buffer, room)
            nothing = got < 0 and errno == EAGAIN
        count_awake(-1)
    if nothing:
        got = recv(fd, buffer, room, 0)
    if got > 0:
        vigil.trust = min(vigil.trust + 1, TRUSTED) if now_ns() - began <= vigil.longest else 0
    return got


cdef ssize_t look(uint64_t longest, uint64_t began, int fd, uint8_t *buffer, uint64_t room) noexcept nogil:
    """Look again and again whether something is there, letting everybody else go first; -1 and EAGAIN: it is not."""
    cdef uint64_t before = began, now
    cdef ssize_t got
    while True:
        got = recv(fd, buffer, room, MSG_DONTWAIT)
        if got >= 0 or errno != EAGAIN:
            return got
        now = now_ns()
        if now - began > longest or now - before > LATE:
            return got
        before = now
        sched_yield()
