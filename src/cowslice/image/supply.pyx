# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Host clusters that are counted already and that nothing points at: compiled writers take from them without the GIL.

It does not know where they come from (allocator.py). What must hold: a cluster is taken once; what a commit finds here it
gives back before it copies counts, so each cluster that an entry shows was counted before the commit which writes it (I1).
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, realloc

from cowslice.cache.pthread cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock

from cowslice.errors import InternalError

cimport cython


@cython.final
cdef class Supply:
    """One run of host clusters, by number, and those that were given back. Thread safe."""

    def __cinit__(self):
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self):
        free(self.returned)
        pthread_mutex_destroy(&self.lock)

    cdef bint has_some(self) noexcept nogil:
        cdef bint some
        pthread_mutex_lock(&self.lock)
        some = self.first < self.end
        pthread_mutex_unlock(&self.lock)
        return some

    cdef uint64_t take(self, uint64_t most, uint64_t *got, bint *fresh) noexcept nogil:
        """Take up to `most` clusters that follow each other; returns the first, `got` is 0 where none are left."""
        cdef uint64_t start
        pthread_mutex_lock(&self.lock)
        start = self.first
        got[0] = min(most, self.end - self.first)
        fresh[0] = self.fresh
        self.first += got[0]
        pthread_mutex_unlock(&self.lock)
        return start

    cdef bint give_back(self, uint64_t start, uint64_t count) noexcept nogil:
        """Let clusters be free again with the next commit; False, and a leak, when memory is out."""
        cdef uint64_t room = self.room * 2 or 16
        cdef ClusterRun *grown
        cdef bint fine = True
        pthread_mutex_lock(&self.lock)
        if self.returned_count == self.room:
            grown = <ClusterRun *> realloc(self.returned, room * sizeof(ClusterRun))
            fine = grown != NULL
            if fine:
                self.returned = grown
                self.room = room
        if fine:
            self.returned[self.returned_count] = ClusterRun(start, count)
            self.returned_count += 1
        pthread_mutex_unlock(&self.lock)
        return fine

    # -- for Python -------------------------------------------------------------------------------------------------

    def __bool__(self):
        return self.has_some()

    def stock(self, uint64_t start, uint64_t count, *, bint fresh):
        """Have these clusters ready; `fresh`: they read as zeros. Raises InternalError while others are left."""
        cdef bint fine
        pthread_mutex_lock(&self.lock)
        fine = self.first == self.end
        if fine:
            self.first, self.end, self.fresh = start, start + count, fresh
        pthread_mutex_unlock(&self.lock)
        if not fine:
            raise InternalError(f"{count} clusters from {start} on were stocked while others were left")

    def draw(self, uint64_t count, at=None, *, bint whole=False):
        """Take up to `count` clusters, as (first, clusters); `whole`: all or none. None unless they begin `at`."""
        cdef uint64_t start = 0 if at is None else at, got = 0
        cdef bint anywhere = at is None
        pthread_mutex_lock(&self.lock)
        if anywhere or start == self.first:
            start, got = self.first, min(count, self.end - self.first)
            if whole and got < count:
                got = 0
            self.first += got
        pthread_mutex_unlock(&self.lock)
        return start, got

    def fresh_from(self, uint64_t end):
        """The first cluster that is left of a run which reads as zeros and ends at `end`; `end` for no such run."""
        cdef uint64_t first = end
        pthread_mutex_lock(&self.lock)
        if self.fresh and self.end == end:
            first = self.first
        pthread_mutex_unlock(&self.lock)
        return first

    def put_back(self, uint64_t start, uint64_t count):
        """Keep clusters for the next `withdraw`."""
        self.give_back(start, count)

    def withdraw(self):
        """Take all away: (first, clusters, fresh) of the run that is left, and (first, clusters) of each given back."""
        cdef ClusterRun *returned
        cdef uint64_t first, end, count, i
        cdef bint fresh
        pthread_mutex_lock(&self.lock)
        first, end, fresh = self.first, self.end, self.fresh
        returned, count = self.returned, self.returned_count
        self.first = end
        self.returned = NULL
        self.returned_count = self.room = 0
        pthread_mutex_unlock(&self.lock)
        try:
            return (first, end - first, bool(fresh)), [(returned[i].start, returned[i].count) for i in range(count)]
        finally:
            free(returned)
