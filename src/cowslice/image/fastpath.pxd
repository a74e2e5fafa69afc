"""Translate and read or write in one call without the GIL, through a chain of plain layers."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from cowslice.image.passage cimport Passage
from cowslice.image.placing cimport Placing
from cowslice.image.recorder cimport Recorder
from cowslice.image.translation cimport Target

cdef class FastPath(Placing):
    cdef int active
    cdef bint closed
    cdef readonly bint writable
    cdef Passage passage
    cdef readonly Recorder recorder     # of what is asked here; it runs while a capture is open
    cdef uint64_t read_lone(self, uint64_t offset, uint8_t *buffer, uint64_t length) noexcept nogil
    cdef uint64_t write_span(self, uint64_t offset, const uint8_t *buffer, uint64_t length) noexcept nogil
    cdef uint64_t overwrite(self, uint64_t offset, const uint8_t *buffer, uint64_t length) noexcept nogil
    cdef uint64_t write_target(self, uint64_t offset, const uint8_t *buffer, const Target *target) noexcept nogil
    cdef void write_some(self, Batch batch, int64_t first, int64_t end) noexcept nogil
    cdef int64_t enter(self) noexcept nogil
    cdef void leave(self, int64_t ticket) noexcept nogil
    cdef void record_some(self, Batch batch, int64_t first, int64_t end) noexcept nogil
    cdef void read_batch(self, Batch batch) noexcept nogil
    cdef void read_some(self, Batch batch, int64_t first, int64_t end) noexcept nogil
    cdef void locate_some(self, Batch batch, int64_t first, int64_t end, Target *targets) noexcept nogil
    cdef fill_batch(self, Batch batch, Py_buffer *where, Py_buffer *into, uint64_t length)
    cdef run_batch(self, Batch batch, int depth)

# Many reads of one length, shared by the threads that do them.
cdef class Batch:
    cdef const int64_t *offsets
    cdef uint8_t *out
    cdef uint8_t *undone    # 1 where the compiled path could not finish
    cdef uint64_t length
    cdef int64_t count
    cdef int64_t next
    cdef bint writing
