# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Which guest clusters are being rewritten, so that two writers never give one guest cluster two host clusters.

It does not know what is written. Whoever wants the image's allocation lock too claims first; nobody waits here with the GIL.
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, realloc

from cowslice.cache.pthread cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_unlock)

from contextlib import contextmanager

cimport cython


@cython.final
cdef class Claims:
    """Spans of guest clusters, each held by one request. Who wants a part of a held one waits."""

    def __cinit__(self):
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.released, NULL)

    def __dealloc__(self):
        free(self.held)
        pthread_mutex_destroy(&self.lock)
        pthread_cond_destroy(&self.released)

    cdef bint is_held(self, uint64_t first, uint64_t end) noexcept nogil:
        cdef uint64_t i
        for i in range(self.count):
            if self.held[i].first < end and first < self.held[i].end:
                return True
        return False

    cdef bint add(self, uint64_t first, uint64_t end) noexcept nogil:
        """Note a span; False when memory is out. The lock is held."""
        cdef uint64_t room = self.room * 2 or 16
        cdef Claimed *grown
        if self.count == self.room:
            grown = <Claimed *> realloc(self.held, room * sizeof(Claimed))
            if grown == NULL:
                return False
            self.held = grown
            self.room = room
        self.held[self.count] = Claimed(first, end)
        self.count += 1
        return True

    cdef bint seize(self, uint64_t first, uint64_t end) noexcept nogil:
        """Hold guest clusters [first, end) unless that needs waiting; whether they are held now."""
        cdef bint fine
        pthread_mutex_lock(&self.lock)
        fine = not self.is_held(first, end) and self.add(first, end)
        pthread_mutex_unlock(&self.lock)
        return fine

    cdef bint wait_for(self, uint64_t first, uint64_t end) noexcept nogil:
        """Hold guest clusters [first, end); False when memory is out."""
        cdef bint fine
        pthread_mutex_lock(&self.lock)
        while self.is_held(first, end):
            pthread_cond_wait(&self.released, &self.lock)
        fine = self.add(first, end)
        pthread_mutex_unlock(&self.lock)
        return fine

    cdef void release(self, uint64_t first, uint64_t end) noexcept nogil:
        cdef uint64_t i = 0
        pthread_mutex_lock(&self.lock)
        while self.held[i].first != first or self.held[i].end != end:  # held spans are disjoint: this is the one
            i += 1
        self.count -= 1
        self.held[i] = self.held[self.count]
        pthread_cond_broadcast(&self.released)
        pthread_mutex_unlock(&self.lock)

    @contextmanager
    def on(self, uint64_t first, uint64_t end):
        """Hold guest clusters [first, end), at least one, for the length of a `with` block."""
        cdef bint fine
        with nogil:
            fine = self.wait_for(first, end)
        if not fine:
            raise MemoryError("no memory for one more claim on guest clusters")
        try:
            yield
        finally:
            self.release(first, end)
