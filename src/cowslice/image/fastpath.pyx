# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The compiled path: translate, then `pread` or `pwrite`, in one call without the GIL.

It only does faster what image.reading and image.writing do; whatever is not plain it leaves to them by returning early,
so it raises nothing of its own about an image. No lock is held while reading or writing; on an image that may be written
each request goes through the passage. Who answers a request, records it: a whole one that begins here, here.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from cowslice.cache.pthread cimport pthread_mutex_lock, pthread_mutex_unlock
from cowslice.image.enciphered cimport write_enciphered
from cowslice.image.fences cimport Fences
from cowslice.image.hostread cimport write_host
from cowslice.image.passage cimport Passage
from cowslice.image.placing cimport Placing
from cowslice.image.recorder cimport ASKED_READ, ASKED_WRITE, Recorder, record
from cowslice.image.translation cimport PlainLayer, Target

import threading

from cowslice.errors import Closed, OutOfRange, RequestError
from cowslice.processors import cores

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int)

cdef extern from *:
    int64_t fetch_add "__sync_fetch_and_add"(int64_t *, int64_t) noexcept nogil

cdef enum:
    CLAIM = 64              # requests that a thread of a batch takes at once


cdef class FastPath(Placing):
    """The compiled twin of image.reading, and of what image.writing does in place and to clusters that are not there.

    The storages behind the descriptors must stay open until `close` has returned.
    """

    def __cinit__(self):
        self.recorder = Recorder()

    # -- reading ----------------------------------------------------------------------------------------------------

    cdef uint64_t read_lone(self, uint64_t offset, uint8_t *buffer, uint64_t length) noexcept nogil:
        """As read_span, but several compressed clusters are left to image.reading, which inflates them on all cores."""
        cdef uint64_t done = 0
        cdef Target target
        while done < length:
            if not self.locate(offset + done, length - done, False, &target):
                break
            if target.stored and done + target.length < length:
                break
            if not self.read_target(&target, buffer + done, target.length):
                break
            done += target.length
        return done

    def read_into(self, uint64_t offset, buffer, uint64_t start=0, bint noted=False):
        """Fill `buffer` with the guest bytes from `offset`, beginning at its byte `start`; returns where it stopped.

        That is the length of the buffer, or the first byte that image.reading has to provide. A capture has it as a read,
        unless it was `noted` or goes on with one. Raises OutOfRange, Closed.
        """
        cdef Py_buffer view
        cdef uint64_t done
        cdef int64_t ticket
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            if self.closed:
                raise Closed("the image is closed")
            if offset > self.size or <uint64_t> view.len > self.size - offset:
                raise OutOfRange(f"{view.len} bytes at offset {offset} reach beyond the end of the disk at {self.size}")
            if start >= <uint64_t> view.len:
                return view.len
            self.active += 1
            with nogil:
                if start == 0 and not noted:
                    record(self.recorder, ASKED_READ, offset, view.len)
                done = start + self.read_lone(offset + start, <uint8_t *> view.buf + start, view.len - start)
            self.active -= 1
            return done
        finally:
            PyBuffer_Release(&view)

    # -- writing ----------------------------------------------------------------------------------------------------

    def resize(self, uint64_t size):
        """Let the top layer have `size` guest bytes. Only while no request is inside."""
        self.layers[0].size = size
        self.size = size

    def make_writable(self, Passage passage not None, Fences fences not None):
        """Let the top layer be written in place. From now on each request goes through `passage`."""
        self.passage = passage
        self.fences = fences
        self.writable = True
        self.writes_in_place = True

    def stop_writing(self):
        """Leave every write to image.writing, which refuses it (I9)."""
        self.writes_in_place = False

    cdef uint64_t write_span(self, uint64_t offset, const uint8_t *buffer, uint64_t length) noexcept nogil:
        """Write as far as this path can; returns the bytes done. Inside the passage."""
        cdef uint64_t done = 0, part
        while done < length:
            part = self.overwrite(offset + done, buffer + done, length - done)
            if part == 0:
                part = self.place(offset + done, buffer + done, length - done)
            if part == 0:
                break
            done += part
        return done

    cdef uint64_t overwrite(self, uint64_t offset, const uint8_t *buffer, uint64_t length) noexcept nogil:
        """Write as many bytes as are there already in one piece; 0 where none are, or the plain path must.

        Sectors are claimed: image.writing, to write a part of one, reads it and writes all of it back.
        """
        cdef PlainLayer *layer = self.layers
        cdef Target target
        cdef uint64_t first, end, part = 0
        if not layer.opaque:
            return self.write_target(offset, buffer, &target) if self.locate_own(offset, length, &target) else 0
        if not self.can_encipher(layer, offset, length):
            return 0
        first, end = offset >> layer.cluster_bits, (offset + length - 1 >> layer.cluster_bits) + 1
        if not self.claims.seize(first, end):
            return 0
        if self.locate_own(offset, length, &target):
            part = self.write_target(offset, buffer, &target)
        self.claims.release(first, end)
        return part

    cdef uint64_t write_target(self, uint64_t offset, const uint8_t *buffer, const Target *target) noexcept nogil:
        """Overwrite what is there; returns its length, 0 where that fails."""
        cdef bint fine
        if self.marks.count:
            self.marks.mark(offset, target.length)
        if target.layer.opaque:
            fine = write_enciphered(target.layer, buffer, target.length, target.host, offset)
        else:
            fine = write_host(&target.layer.file, buffer, target.length, target.host)
        return target.length if fine else 0

    def write_from(self, uint64_t offset, buffer, uint64_t start=0):
        """Write `buffer` at guest byte `offset`, from its byte `start` on; returns where it stopped.

        That is its length, or the first byte that image.writing has to place, or that the storage refused. Raises
        OutOfRange, Closed.
        """
        cdef Py_buffer view
        cdef uint64_t done
        cdef int64_t ticket
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
        try:
            if self.closed:
                raise Closed("the image is closed")
            if offset > self.size or <uint64_t> view.len > self.size - offset:
                raise OutOfRange(f"{view.len} bytes at offset {offset} reach beyond the end of the disk at {self.size}")
            if not self.writable or start >= <uint64_t> view.len:
                return min(start, <uint64_t> view.len)
            self.active += 1
            with nogil:
                if start == 0:
                    record(self.recorder, ASKED_WRITE, offset, view.len)
                ticket = self.passage.enter()
                done = start + self.write_span(offset + start, <const uint8_t *> view.buf + start, view.len - start)
                self.passage.leave(ticket)
            self.active -= 1
            return done
        finally:
            PyBuffer_Release(&view)

    def write_many(self, offsets, uint64_t length, data, int depth=1):
        """Write `length` bytes of `data` at each offset (a buffer of int64), as read_many reads.

        Returns the indexes of the requests that this path could not finish; a part of them may be written.
        """
        cdef Py_buffer where, source
        cdef Batch batch = Batch()
        PyObject_GetBuffer(offsets, &where, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(data, &source, PyBUF_SIMPLE)
            try:
                self.fill_batch(batch, &where, &source, length)
                batch.writing = True
                self.run_batch(batch, depth)
                return [i for i in range(batch.count) if batch.undone[i]]
            finally:
                PyBuffer_Release(&source)
        finally:
            PyBuffer_Release(&where)

    cdef void write_some(self, Batch batch, int64_t first, int64_t end) noexcept nogil:
        cdef int64_t i
        if not self.writable:
            memset(batch.undone + first, 1, end - first)
            return
        for i in range(first, end):
            batch.undone[i] = self.write_span(batch.offsets[i], batch.out + i * batch.length, batch.length) < batch.length

    cdef int64_t enter(self) noexcept nogil:
        return self.passage.enter() if self.writable else 0

    cdef void leave(self, int64_t ticket) noexcept nogil:
        if self.writable:
            self.passage.leave(ticket)

    # -- many at once -----------------------------------------------------------------------------------------------

    def read_many(self, offsets, uint64_t length, out, int depth=1):
        """Read `length` bytes at each offset (a buffer of int64) into `out`, one behind the other.

        `depth` requests are under way at once, one thread each. Returns the indexes of the requests that this path could not
        finish; their bytes in `out` are unknown. Raises OutOfRange, Closed, RequestError for buffers that do not fit.
        """
        cdef Py_buffer where, into
        cdef Batch batch = Batch()
        PyObject_GetBuffer(offsets, &where, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(out, &into, PyBUF_SIMPLE | PyBUF_WRITABLE)
            try:
                self.fill_batch(batch, &where, &into, length)
                self.run_batch(batch, depth)
                return [i for i in range(batch.count) if batch.undone[i]]
            finally:
                PyBuffer_Release(&into)
        finally:
            PyBuffer_Release(&where)

    cdef fill_batch(self, Batch batch, Py_buffer *where, Py_buffer *into, uint64_t length):
        cdef int64_t i
        cdef const int64_t *offsets = <const int64_t *> where.buf
        if self.closed:
            raise Closed("the image is closed")
        if where.len % 8 or length > self.size:
            raise RequestError(f"offsets must be 64-bit integers and length at most {self.size}, not {length}")
        batch.count = where.len // 8
        if <uint64_t> into.len < batch.count * length:
            raise RequestError(f"out has {into.len} bytes, expected at least {batch.count} * {length}")
        for i in range(batch.count):
            if offsets[i] < 0 or <uint64_t> offsets[i] > self.size - length:
                raise OutOfRange(f"{length} bytes at offset {offsets[i]} reach beyond the end of the disk at {self.size}")
        batch.offsets = offsets
        batch.out = <uint8_t *> into.buf
        batch.length = length
        batch.undone = <uint8_t *> calloc(batch.count + 1, 1)
        if batch.undone == NULL:
            raise MemoryError(f"no memory for a batch of {batch.count} reads")

    def _work(self, Batch batch not None):
        with nogil:
            self.read_batch(batch)

    cdef run_batch(self, Batch batch, int depth):
        """The calling thread works too. What lies in memory never waits, so there a thread per processor does it all."""
        cdef int64_t useful = (batch.count + CLAIM - 1) // CLAIM
        if depth > 1 and self.in_memory:
            useful = min(useful, <int64_t> cores())
        threads = [threading.Thread(target=self._work, args=(batch,), daemon=True) for _ in range(1, min(depth, useful))]
        self.active += 1
        try:
            for thread in threads:
                thread.start()
            self._work(batch)
            for thread in threads:
                thread.join()
        finally:
            self.active -= 1

    cdef void read_batch(self, Batch batch) noexcept nogil:
        cdef int64_t first = fetch_add(&batch.next, CLAIM)
        cdef int64_t ticket
        while first < batch.count:
            if self.recorder.running:
                self.record_some(batch, first, min(first + CLAIM, batch.count))
            ticket = self.enter()
            if batch.writing:
                self.write_some(batch, first, min(first + CLAIM, batch.count))
            else:
                self.read_some(batch, first, min(first + CLAIM, batch.count))
            self.leave(ticket)
            first = fetch_add(&batch.next, CLAIM)

    cdef void record_some(self, Batch batch, int64_t first, int64_t end) noexcept nogil:
        cdef uint64_t now = self.recorder.enter()
        cdef int64_t i
        for i in range(first, end):
            self.recorder.put(now, ASKED_WRITE if batch.writing else ASKED_READ, batch.offsets[i], batch.length)
        self.recorder.leave()

    cdef void read_some(self, Batch batch, int64_t first, int64_t end) noexcept nogil:
        """Translate what is resident under one lock, then read; the rest goes one by one."""
        cdef Target targets[CLAIM]
        cdef Target *target
        cdef uint8_t *out
        cdef int64_t i
        self.locate_some(batch, first, end, targets)
        for i in range(first, end):
            target = &targets[i - first]
            out = batch.out + i * batch.length
            if target.length < batch.length:
                batch.undone[i] = self.read_lone(batch.offsets[i], out, batch.length) < batch.length
            else:
                batch.undone[i] = not self.read_target(target, out, batch.length)

    cdef void locate_some(self, Batch batch, int64_t first, int64_t end, Target *targets) noexcept nogil:
        """A target's length is 0 where it could not be told at once."""
        cdef int64_t i
        cdef uint32_t deep
        if self.maps_count:
            pthread_mutex_lock(&self.cache.lock)
        for deep in range(2):
            for i in range(first, end):
                self.foresee(batch.offsets[i], deep)
        for i in range(first, end):
            if not self.locate(batch.offsets[i], batch.length, True, &targets[i - first]):
                targets[i - first].length = 0
        if self.maps_count:
            pthread_mutex_unlock(&self.cache.lock)

    def close(self):
        """Refuse new reads and wait for those under way."""
        self.closed = True
        while self.active:
            with nogil:
                usleep(200)


cdef class Batch:
    def __dealloc__(self):
        free(self.undone)
