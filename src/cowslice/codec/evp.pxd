"""Whole sectors enciphered and deciphered through libcrypto, without the GIL."""

from libc.stdint cimport uint8_t, uint64_t

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass

# What one thread works with at a time: contexts that hold the expanded key.
cdef struct Desk:
    void *contexts[2]       # that deciphers, that enciphers
    void *vectors           # that makes ESSIV vectors of sector numbers, else NULL
    Desk *next

cdef class EvpCipher:
    cdef const void *kind           # EVP_CIPHER of the sectors
    cdef const void *vector_kind    # and of their vectors, NULL without ESSIV
    cdef uint8_t key[64]
    cdef uint8_t vector_key[32]
    cdef uint64_t numbered          # the bits of a sector number that count
    cdef pthread_mutex_t lock       # of `desks`, those that nobody uses now
    cdef Desk *desks
    cdef uint64_t transform(self, bint enciphering, uint64_t first_sector, const uint8_t *source, uint8_t *target, uint64_t sectors) noexcept nogil
    cdef Desk *take_desk(self) noexcept nogil
    cdef Desk *new_desk(self) noexcept nogil
    cdef void leave_desk(self, Desk *desk) noexcept nogil
    cdef bint transform_one(self, Desk *desk, bint enciphering, uint64_t sector, const uint8_t *source, uint8_t *target) noexcept nogil
