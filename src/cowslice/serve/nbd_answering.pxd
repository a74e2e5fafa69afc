"""Answers of compiled code to NBD reads."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from cowslice.image.fastpath cimport FastPath
from cowslice.image.translation cimport Target
from cowslice.serve.nbd_frames cimport Arena, Ask

cdef class Answering:
    cdef FastPath fast
    cdef int mode
    cdef uint64_t size
    cdef bint alone             # nothing else is asked meanwhile, or no other processor would do it
    cdef void locate_batch(self, const Ask *asks, uint32_t count, Target *targets) noexcept nogil
    cdef bint takes_long(self, const Ask *ask, Target *target) noexcept nogil
    cdef bint is_much(self, const Ask *ask, const Target *target) noexcept nogil
    cdef bint answer(self, const Ask *ask, const Target *target, Arena *out) noexcept nogil
    cdef bint read_here(self, const Target *target, uint8_t *data, uint64_t length) noexcept nogil
    cdef bint answer_slowly(self, const Ask *ask, Arena *out) noexcept nogil
    cdef bint answer_in_chunks(self, const Ask *ask, Arena *out) noexcept nogil
    cdef bint stretch_at(self, uint64_t offset, uint64_t want, uint64_t *length, bint *hole) noexcept nogil
