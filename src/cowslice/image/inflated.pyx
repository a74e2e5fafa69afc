# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compressed clusters of host files, inflated without the GIL and kept for a while: the compiled twin of image.compressed.

It only does faster what that does: of a stream that does not end with its cluster, or that cannot be read, it says False,
and image.compressed finds out why. A cluster is inflated whole, once for all who want it meanwhile, and no lock is held
while anything is read, inflated or copied.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from cowslice.cache.pthread cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_wait, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock)
from cowslice.codec.inflate cimport end_inflating, inflate_whole
from cowslice.codec.unzstd cimport end_unzstd, unzstd_whole
from cowslice.image.hostread cimport File, manner_of, read_host

cdef enum:
    FIRST_BUCKETS = 64


cdef inline uint64_t mixed(const Stream *stream) noexcept nogil:
    cdef uint64_t n = (stream.host ^ <uint64_t> stream.layer << 56) * <uint64_t> 0x9E3779B97F4A7C15
    return n >> 32


cdef inline bint same(const Stream *one, const Stream *other) noexcept nogil:
    return one.host == other.host and one.layer == other.layer and one.stored == other.stored


cdef void discard(Kept *kept) noexcept nogil:
    free(kept.bytes)
    free(kept)


cdef class InflatedClusters:
    """Clusters of all layers of one chain: at most `budget` bytes, the least recently used goes first.

    With a budget of 0 nothing is kept, but threads still share what is under way.
    """

    def __cinit__(self, uint64_t budget):
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.landing, NULL)
        self.budget = budget
        self.bucket_count = FIRST_BUCKETS
        self.buckets = <Kept **> calloc(FIRST_BUCKETS, sizeof(Kept *))
        if self.buckets == NULL:
            raise MemoryError("no memory for decompressed clusters")

    def __dealloc__(self):
        if self.buckets != NULL:
            self.trim()
        free(self.buckets)
        pthread_mutex_destroy(&self.lock)
        pthread_cond_destroy(&self.landing)

    def read_part(self, int descriptor, uint32_t alignment, uint32_t layer, uint64_t size, uint64_t host, uint64_t stored,
                  uint64_t skip, target, *, bint zstd=False):
        """Fill `target` with the bytes from `skip` of a cluster of `size` bytes; False where image.compressed must."""
        cdef Py_buffer view
        cdef File file
        cdef Stream stream
        cdef bint done
        file.fd = descriptor
        file.alignment = alignment
        file.manner = 0
        stream.layer = layer
        stream.host = host
        stream.stored = stored
        stream.size = size
        stream.zstd = zstd
        PyObject_GetBuffer(target, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            with nogil:
                done = self.read(&file, &stream, skip, <uint8_t *> view.buf, view.len)
        finally:
            PyBuffer_Release(&view)
        return done

    def limit(self, uint64_t budget):
        """Keep at most `budget` bytes from now on."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.budget = budget
            self.make_room(0)
            pthread_mutex_unlock(&self.lock)

    def counters(self):
        """What was done so far, under the names of CompressedStatistics."""
        pthread_mutex_lock(&self.lock)
        found = {
            "hits": self.hits, "misses": self.misses, "joined": self.joined, "evictions": self.evictions,
            "reads": self.reads, "read_bytes": self.read_bytes, "used": self.used,
        }
        pthread_mutex_unlock(&self.lock)
        return found

    def trim(self):
        """Give all memory back that nobody uses now; return how many bytes of clusters."""
        cdef uint64_t freed, evictions
        cdef Desk *desk
        with nogil:
            pthread_mutex_lock(&self.lock)
            evictions = self.evictions
            freed = self.make_room(self.budget)
            self.evictions = evictions
            while self.desks != NULL:
                desk = self.desks
                self.desks = desk.next
                end_inflating(&desk.inflating)
                end_unzstd(&desk.unzstd)
                free(desk.stream)
                free(desk)
            pthread_mutex_unlock(&self.lock)
        return freed

    # -- reading ----------------------------------------------------------------------------------------------------

    cdef bint read(self, const File *file, const Stream *stream, uint64_t skip, uint8_t *out, uint64_t length) noexcept nogil:
        """Copy `length` bytes from `skip` of a cluster, loading it unless it is kept. False: nothing is known about it."""
        cdef Kept *kept
        cdef bint sound
        if skip > stream.size or length > stream.size - skip:
            return False
        pthread_mutex_lock(&self.lock)
        kept = self.place_of(stream)[0]
        if kept == NULL:
            self.misses += 1
            kept = self.add(stream)
            pthread_mutex_unlock(&self.lock)
            return kept != NULL and self.load(file, kept, skip, out, length)
        if kept.landed:
            self.hits += 1
        else:
            self.joined += 1
        kept.users += 1
        while not kept.landed:
            pthread_cond_wait(&self.landing, &self.lock)
        if kept.listed and kept != self.newest:
            self.unchain(kept)
            self.append(kept)
        sound = kept.sound
        pthread_mutex_unlock(&self.lock)
        if sound:
            memcpy(out, kept.bytes + skip, length)
        self.leave(kept)
        return sound

    cdef bint load(self, const File *file, Kept *kept, uint64_t skip, uint8_t *out, uint64_t length) noexcept nogil:
        """Land a cluster that this thread has added."""
        cdef Desk *desk
        cdef bint sound
        pthread_mutex_lock(&self.lock)
        desk = self.take_desk()
        pthread_mutex_unlock(&self.lock)
        sound = desk != NULL and self.fill(file, kept, desk)
        pthread_mutex_lock(&self.lock)
        if desk != NULL:
            desk.next = self.desks
            self.desks = desk
        self.reads += 1
        self.read_bytes += kept.stream.stored
        kept.landed = True
        kept.sound = sound
        if kept.listed and not (sound and kept.stream.size <= self.budget):
            self.unlist(kept)
        pthread_cond_broadcast(&self.landing)
        pthread_mutex_unlock(&self.lock)
        if sound:
            memcpy(out, kept.bytes + skip, length)
        self.leave(kept)
        return sound

    cdef bint fill(self, const File *file, Kept *kept, Desk *desk) noexcept nogil:
        cdef const Stream *stream = &kept.stream
        if desk.room < stream.stored:
            free(desk.stream)
            desk.stream = <uint8_t *> malloc(stream.stored)
            desk.room = stream.stored if desk.stream != NULL else 0
        if desk.room < stream.stored or kept.bytes == NULL:
            return False
        if not read_host(file, desk.stream, stream.stored, stream.host):
            return False
        if stream.zstd:
            return unzstd_whole(&desk.unzstd, desk.stream, stream.stored, kept.bytes, stream.size)
        return inflate_whole(&desk.inflating, desk.stream, stream.stored, kept.bytes, stream.size)

    # -- what is kept; all of it with the lock held ------------------------------------------------------------------

    cdef Kept **place_of(self, const Stream *stream) noexcept nogil:
        """Where the pointer to a cluster is, or would be."""
        cdef Kept **place = &self.buckets[mixed(stream) & (self.bucket_count - 1)]
        while place[0] != NULL and not same(&place[0].stream, stream):
            place = &place[0].chained
        return place

    cdef Kept *add(self, const Stream *stream) noexcept nogil:
        """List a cluster that is to be loaded by this thread; what it displaces goes first, so that memory is used again."""
        cdef Kept *kept
        cdef Kept **place
        if stream.size <= self.budget:
            self.make_room(stream.size)
        kept = <Kept *> calloc(1, sizeof(Kept))
        if kept == NULL:
            return NULL
        kept.bytes = <uint8_t *> malloc(stream.size)
        kept.stream = stream[0]
        kept.users = 1
        kept.listed = True
        self.widen()
        place = self.place_of(stream)
        place[0] = kept
        self.append(kept)
        self.listed += 1
        self.used += stream.size
        return kept

    cdef void widen(self) noexcept nogil:
        """Twice the buckets once they are full on average; without the memory for that, looking up takes longer."""
        cdef Kept **wide
        cdef Kept *kept = self.oldest
        if self.listed < self.bucket_count:
            return
        wide = <Kept **> calloc(2 * self.bucket_count, sizeof(Kept *))
        if wide == NULL:
            return
        free(self.buckets)
        self.buckets = wide
        self.bucket_count *= 2
        while kept != NULL:
            kept.chained = self.buckets[mixed(&kept.stream) & (self.bucket_count - 1)]
            self.buckets[mixed(&kept.stream) & (self.bucket_count - 1)] = kept
            kept = kept.newer

    cdef void append(self, Kept *kept) noexcept nogil:
        """Make it the newest."""
        kept.newer = NULL
        kept.older = self.newest
        if self.newest != NULL:
            self.newest.newer = kept
        else:
            self.oldest = kept
        self.newest = kept

    cdef void unchain(self, Kept *kept) noexcept nogil:
        """Take it out of the order of age."""
        if kept.older != NULL:
            kept.older.newer = kept.newer
        else:
            self.oldest = kept.newer
        if kept.newer != NULL:
            kept.newer.older = kept.older
        else:
            self.newest = kept.older

    cdef void unlist(self, Kept *kept) noexcept nogil:
        """Let nobody find it any more; whoever uses it last frees it."""
        cdef Kept **place = self.place_of(&kept.stream)
        place[0] = kept.chained
        self.unchain(kept)
        kept.listed = False
        self.listed -= 1
        self.used -= kept.stream.size

    cdef uint64_t make_room(self, uint64_t wanted) noexcept nogil:
        """Forget the oldest until `wanted` more bytes fit the budget, but none on its way; return the bytes forgotten."""
        cdef Kept *kept = self.oldest
        cdef Kept *newer
        cdef uint64_t before = self.used
        while kept != NULL and self.used + wanted > self.budget:
            newer = kept.newer
            if kept.landed:
                self.unlist(kept)
                self.evictions += 1
                if kept.users == 0:
                    discard(kept)
            kept = newer
        return before - self.used

    cdef Desk *take_desk(self) noexcept nogil:
        cdef Desk *desk = self.desks
        if desk == NULL:
            return <Desk *> calloc(1, sizeof(Desk))
        self.desks = desk.next
        return desk

    # ---------------------------------------------------------------------------------------------------------------

    cdef void leave(self, Kept *kept) noexcept nogil:
        """This thread uses it no more."""
        pthread_mutex_lock(&self.lock)
        kept.users -= 1
        if kept.users == 0 and not kept.listed:
            discard(kept)
        pthread_mutex_unlock(&self.lock)
