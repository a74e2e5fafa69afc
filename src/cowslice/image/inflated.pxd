"""Compressed clusters of a chain as compiled code reads them."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from cowslice.cache.pthread cimport pthread_cond_t, pthread_mutex_t
from cowslice.image.hostread cimport File

# One compressed cluster: whose it is, and where its stream lies in the layer's file.
cdef struct Stream:
    uint32_t layer
    uint64_t host
    uint64_t stored         # bytes from `host` in which the stream ends
    uint64_t size           # bytes of the cluster
    bint zstd               # else deflate

# A cluster that is inflated, or on its way.
cdef struct Kept:
    Stream stream
    uint8_t *bytes
    uint32_t users          # threads that fill it, wait for it or copy from it
    bint landed
    bint sound              # once landed: it has its bytes
    bint listed             # it can be found, and is freed by who takes it off the list
    Kept *chained           # the next one in its bucket
    Kept *older
    Kept *newer

# What one thread needs to inflate.
cdef struct Desk:
    uint8_t *stream
    uint64_t room
    void *inflating
    void *unzstd
    Desk *next

cdef class InflatedClusters:
    cdef pthread_mutex_t lock   # of everything below; never held while anything is read, inflated or copied
    cdef pthread_cond_t landing
    cdef uint64_t budget
    cdef uint64_t used          # bytes of all that is listed
    cdef Kept **buckets
    cdef uint64_t bucket_count  # a power of two
    cdef uint64_t listed
    cdef Kept *oldest
    cdef Kept *newest
    cdef Desk *desks            # those that nobody uses
    cdef uint64_t hits, misses, joined, evictions, reads, read_bytes
    cdef bint read(self, const File *file, const Stream *stream, uint64_t skip, uint8_t *out, uint64_t length) noexcept nogil
    cdef bint load(self, const File *file, Kept *kept, uint64_t skip, uint8_t *out, uint64_t length) noexcept nogil
    cdef bint fill(self, const File *file, Kept *kept, Desk *desk) noexcept nogil
    cdef Kept **place_of(self, const Stream *stream) noexcept nogil
    cdef Kept *add(self, const Stream *stream) noexcept nogil
    cdef void widen(self) noexcept nogil
    cdef void append(self, Kept *kept) noexcept nogil
    cdef void unchain(self, Kept *kept) noexcept nogil
    cdef void unlist(self, Kept *kept) noexcept nogil
    cdef void leave(self, Kept *kept) noexcept nogil
    cdef uint64_t make_room(self, uint64_t wanted) noexcept nogil
    cdef Desk *take_desk(self) noexcept nogil
