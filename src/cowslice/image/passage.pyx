# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Requests in flight on one disk: counted in two epochs, so that a moment can be told at which all of an earlier one are over.

It does not know what a request does. What must hold: an epoch begins only when nobody is inside of the one before the
last; while the passage is paused nobody is inside but whoever paused it; nobody waits here with the GIL.
"""

from libc.stdint cimport int64_t

from cowslice.cache.pthread cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_unlock)

from contextlib import contextmanager

from cowslice.errors import InternalError

cimport cython

cdef extern from *:
    """
    /* Passages that this thread is inside of by `with`, so that what it calls may enter again while others must wait. */
    #define COWSLICE_PLACES 16
    typedef struct { void *passage; int64_t ticket; int depth; } cowslice_place;
    static __thread cowslice_place cowslice_places[COWSLICE_PLACES];

    static cowslice_place *cowslice_find_place(void *passage) {
        for (int i = 0; i < COWSLICE_PLACES; i++)
            if (cowslice_places[i].depth && cowslice_places[i].passage == passage) return &cowslice_places[i];
        return NULL;
    }

    static cowslice_place *cowslice_free_place(void) {
        for (int i = 0; i < COWSLICE_PLACES; i++)
            if (!cowslice_places[i].depth) return &cowslice_places[i];
        return NULL;
    }

    static inline int64_t cowslice_load(int64_t *from) { return __atomic_load_n(from, __ATOMIC_SEQ_CST); }
    static inline void cowslice_put(int64_t *into, int64_t value) { __atomic_store_n(into, value, __ATOMIC_SEQ_CST); }
    static inline int64_t cowslice_add(int64_t *into, int64_t by) { return __atomic_add_fetch(into, by, __ATOMIC_SEQ_CST); }
    """
    ctypedef struct Place "cowslice_place":
        void *passage
        int64_t ticket
        int depth
    Place *find_place "cowslice_find_place"(void *passage) noexcept nogil
    Place *free_place "cowslice_free_place"() noexcept nogil
    int64_t load "cowslice_load"(int64_t *place) noexcept nogil
    void put "cowslice_put"(int64_t *place, int64_t value) noexcept nogil
    int64_t add "cowslice_add"(int64_t *place, int64_t by) noexcept nogil


cdef enum:
    ALONE = -1      # the ticket of the thread that paused a passage: it is not counted


cdef Place *take_place() except NULL:
    """Somewhere to note that this thread is inside a passage."""
    cdef Place *place = free_place()
    if place == NULL:
        raise InternalError("a thread is inside more passages than are foreseen")
    return place


@cython.final
cdef class Passage:
    """The way into a disk that is written to: every request is inside from before it asks the map until its bytes are done.

    `with passage:` is for requests in Python; a thread that is inside may enter again, also while others are kept out.
    """

    def __cinit__(self):
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.left, NULL)
        pthread_cond_init(&self.resumed, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)
        pthread_cond_destroy(&self.left)
        pthread_cond_destroy(&self.resumed)

    cdef int64_t enter(self) noexcept nogil:
        """Be counted; waits while the passage is paused. What it answers is for `leave`."""
        cdef int64_t epoch
        while True:
            epoch = load(&self.epoch)
            add(&self.inside[epoch & 1], 1)
            # Only who was counted before the epoch changed and the bar fell is sure to be seen by those who did it.
            if epoch == load(&self.epoch) and (not load(&self.barred) or find_place(<void *> self) != NULL):
                return epoch
            self.leave(epoch)
            if load(&self.barred) and find_place(<void *> self) == NULL:
                pthread_mutex_lock(&self.lock)
                while load(&self.barred):
                    pthread_cond_wait(&self.resumed, &self.lock)
                pthread_mutex_unlock(&self.lock)

    cdef void leave(self, int64_t ticket) noexcept nogil:
        add(&self.inside[ticket & 1], -1)
        if load(&self.barred):
            pthread_mutex_lock(&self.lock)
            pthread_cond_broadcast(&self.left)
            pthread_mutex_unlock(&self.lock)

    cdef void bar(self) noexcept nogil:
        """Keep others out, one after the other, and wait until those inside have left."""
        pthread_mutex_lock(&self.lock)
        while load(&self.barred):
            pthread_cond_wait(&self.resumed, &self.lock)
        put(&self.barred, 1)
        while load(&self.inside[0]) + load(&self.inside[1]):
            pthread_cond_wait(&self.left, &self.lock)
        pthread_mutex_unlock(&self.lock)

    cdef void unbar(self) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        put(&self.barred, 0)
        pthread_cond_broadcast(&self.resumed)
        pthread_mutex_unlock(&self.lock)

    cdef bint advance(self, int64_t wanted) noexcept nogil:
        """Step towards an epoch as far as nobody inside forbids it; whether it is reached."""
        cdef bint reached
        pthread_mutex_lock(&self.lock)
        while self.epoch < wanted and load(&self.inside[(self.epoch + 1) & 1]) == 0:
            put(&self.epoch, self.epoch + 1)
        reached = self.epoch >= wanted
        pthread_mutex_unlock(&self.lock)
        return reached

    # -- for Python -------------------------------------------------------------------------------------------------

    def __enter__(self):
        cdef Place *place = find_place(<void *> self)
        if place == NULL:
            place = take_place()
            with nogil:
                place.ticket = self.enter()
            place.passage = <void *> self
        place.depth += 1
        return self

    def __exit__(self, kind, error, trace):
        cdef Place *place = find_place(<void *> self)
        if place == NULL:
            raise InternalError("a passage was left by a thread that is not inside")
        place.depth -= 1
        if place.depth == 0:
            self.leave(place.ticket)

    def stamp(self):
        """Note this moment, for `passed`."""
        return load(&self.epoch)

    def passed(self, int64_t stamp):
        """Have all requests ended that were inside at that stamp? Those of the calling thread count too."""
        cdef bint reached
        with nogil:
            reached = self.advance(stamp + 2)
        return reached

    def pause(self):
        """Let nobody else enter any more, and return when nobody is inside. The same thread must resume, and may enter.

        Raises InternalError when this thread is inside itself, for it would wait for ever.
        """
        cdef Place *place = find_place(<void *> self)
        if place != NULL:
            raise InternalError("a passage was paused by a thread that is inside")
        place = take_place()
        with nogil:
            self.bar()
        place.passage = <void *> self
        place.ticket = ALONE
        place.depth = 1

    def resume(self):
        """Let others in again. Raises InternalError unless this thread has paused the passage."""
        cdef Place *place = find_place(<void *> self)
        if place == NULL or place.ticket != ALONE or place.depth != 1:
            raise InternalError("a passage was resumed by a thread that had not paused it, or is still inside")
        place.depth = 0
        self.unbar()

    @contextmanager
    def exclusive(self):
        """Be alone inside for the length of a `with` block, see `pause`."""
        self.pause()
        try:
            yield
        finally:
            self.resume()
