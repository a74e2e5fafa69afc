# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Requests on their way to a capture file: a ring that any thread fills without the GIL, and one thread that writes it.

It does not know who asks. Who fills the ring never waits for the file: what finds no room is counted, and the count is
written where the requests are missing. A Recorder outlives its captures, so that a request which comes as one ends finds it.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

from cowslice.cache.clock cimport now_ns
from cowslice.cache.pthread cimport (
    pthread_cond_destroy, pthread_cond_init, pthread_cond_signal, pthread_cond_t, pthread_cond_wait, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock)

import threading

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *buffer, size_t count)

cdef extern from "<pthread.h>" nogil:
    int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex, const timespec *until)

cdef enum:
    CAPACITY = 1 << 17          # records: 2 MiB, what a busy disk asks in a tenth of a second
    MOST_PER_REQUEST = 4        # a count of lost ones, a full time, the upper half of a length, the request
    PATIENCE_MS = 250           # how long a record may lie in memory
    KIND_BITS = 3
    LONG = 5
    TIME = 6
    MARK = 7
    LOST = 0
    END = 1

cdef uint64_t FAR = <uint64_t> 1 << 31  # microseconds between records, from which on their low bits could mislead


cdef class Recorder:
    """Takes requests from the moment it is started until it is stopped; `recorded` and `lost` count them.

    `running` says whether. `capacity` is how many records may wait, a power of two.
    """

    def __cinit__(self, uint64_t capacity=CAPACITY):
        if capacity < 2 * MOST_PER_REQUEST or capacity & (capacity - 1):
            raise ValueError(f"capacity is {capacity}, expected a power of two from {2 * MOST_PER_REQUEST}")
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.wake, NULL)
        self.capacity = capacity

    def __dealloc__(self):
        free(self.ring)
        pthread_mutex_destroy(&self.lock)
        pthread_cond_destroy(&self.wake)

    # -- what compiled callers use: enter, put any number, leave; or tell for one -------------------------------------

    cdef uint64_t enter(self) noexcept nogil:
        """Take the lock; returns the time that `put` wants."""
        cdef uint64_t now = now_ns()
        pthread_mutex_lock(&self.lock)
        return (now - self.begun) // 1000 if now > self.begun else 0

    cdef void leave(self) noexcept nogil:
        cdef bint full = self.head - self.tail >= self.capacity // 2
        pthread_mutex_unlock(&self.lock)
        if full:
            pthread_cond_signal(&self.wake)

    cdef void put(self, uint64_t now, uint64_t kind, uint64_t offset, uint64_t length) noexcept nogil:
        """Record one request, or count it. Between `enter` and `leave`."""
        if not self.running:
            return
        if self.fault or self.capacity - (self.head - self.tail) < MOST_PER_REQUEST:
            self.lost += 1
            self.untold += 1
            return
        if self.untold:
            self.push(self.untold, MARK, LOST, self.latest)
            self.untold = 0
        if now >= self.latest + FAR or self.latest >= now + FAR:
            self.push(now, TIME, 0, now)
        self.latest = now
        if length >> 32:
            self.push(length >> 32, LONG, 0, now)
        self.push(offset, kind, <uint32_t> length, now)
        self.recorded += 1

    cdef void push(self, uint64_t value, uint64_t kind, uint32_t length, uint64_t now) noexcept nogil:
        cdef Record *record = &self.ring[self.head & (self.capacity - 1)]
        record.place = value << KIND_BITS | kind
        record.length = length
        record.time = <uint32_t> now
        self.head += 1

    cdef void tell(self, uint64_t kind, uint64_t offset, uint64_t length) noexcept nogil:
        self.put(self.enter(), kind, offset, length)
        self.leave()

    # -- what Python callers use --------------------------------------------------------------------------------------

    def note(self, uint64_t kind, uint64_t offset, uint64_t length):
        """Record one request: kind 0 read, 1 write, 2 flush, 3 discard, 4 zero. Does nothing unless `running`."""
        with nogil:
            self.tell(kind, offset, length)

    def start(self, int descriptor):
        """Begin to record into the file, behind what is there; the descriptor stays the caller's."""
        if self.running:
            raise ValueError("the recorder is running")
        if self.ring == NULL:
            self.ring = <Record *> malloc(self.capacity * sizeof(Record))
        if self.ring == NULL:
            raise MemoryError("no memory for a capture")
        self.head = self.tail = self.recorded = self.lost = self.untold = self.latest = 0
        self.fault = 0
        self.ending = False
        self.fd = descriptor
        self.begun = now_ns()
        self.thread = threading.Thread(target=self._drain, name="cowslice-capture", daemon=True)
        self.thread.start()
        pthread_mutex_lock(&self.lock)
        self.running = True
        pthread_mutex_unlock(&self.lock)

    def stop(self):
        """Write what is left, and the end. Returns 0, or the errno with which the file refused the rest."""
        if not self.running:
            return 0
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.running = False
            self.ending = True
            pthread_mutex_unlock(&self.lock)
            pthread_cond_signal(&self.wake)
        self.thread.join()
        self.thread = None
        free(self.ring)
        self.ring = NULL
        return self.fault

    # -- the writing thread -------------------------------------------------------------------------------------------

    def _drain(self):
        with nogil:
            self.drain()

    cdef uint64_t wait_for_records(self) noexcept nogil:
        """With the lock: until a good many are there, a while has passed, or the end has come. Returns how many."""
        cdef timespec until
        cdef int waited = 0
        clock_gettime(CLOCK_REALTIME, &until)
        until.tv_nsec += PATIENCE_MS * 1_000_000
        until.tv_sec += until.tv_nsec // 1_000_000_000
        until.tv_nsec %= 1_000_000_000
        while not self.ending and self.head - self.tail < self.capacity // 2 and waited == 0:
            waited = pthread_cond_timedwait(&self.wake, &self.lock, &until)
        return self.head - self.tail

    cdef void drain(self) noexcept nogil:
        cdef uint64_t waiting, first
        cdef bint more = True
        cdef int fault
        pthread_mutex_lock(&self.lock)
        while more:
            waiting = self.wait_for_records()
            if self.ending and not waiting:
                if self.untold:
                    self.push(self.untold, MARK, LOST, self.latest)
                self.push(self.recorded, MARK, END, self.latest)
                waiting = self.head - self.tail
                more = False
            first = self.tail & (self.capacity - 1)
            if waiting > self.capacity - first:
                waiting = self.capacity - first
            if not waiting:
                continue
            pthread_mutex_unlock(&self.lock)
            fault = 0 if self.fault else write_all(self.fd, <const uint8_t *> (self.ring + first), waiting * sizeof(Record))
            pthread_mutex_lock(&self.lock)
            if fault:
                self.fault = fault
            if self.fault:
                self.forget(first, waiting)
            self.tail += waiting
        pthread_mutex_unlock(&self.lock)

    cdef void forget(self, uint64_t first, uint64_t count) noexcept nogil:
        """Count the requests among records that the file did not take as lost."""
        cdef uint64_t i
        for i in range(first, first + count):
            if self.ring[i].place & ((1 << KIND_BITS) - 1) < LONG:
                self.recorded -= 1
                self.lost += 1


cdef int write_all(int fd, const uint8_t *bytes, uint64_t size) noexcept nogil:
    """0, or the errno of the write that failed."""
    cdef ssize_t done
    while size:
        done = write(fd, bytes, size)
        if done < 0 and errno != EINTR:
            return errno
        if done > 0:
            bytes += done
            size -= done
    return 0
