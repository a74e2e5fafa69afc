# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""From a read that an NBD client asks for to its reply in an arena: data, and holes where the client takes them.

It sends nothing and waits for nobody but the storage. On a disk that changes, each answer is made inside the passage.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from cowslice.cache.pthread cimport pthread_mutex_lock, pthread_mutex_unlock
from cowslice.image.enciphered cimport read_enciphered_at_once
from cowslice.image.hostread cimport read_at_once
from cowslice.image.translation cimport Target
from cowslice.serve.nbd_frames cimport DONT_FRAGMENT, REPLY_DONE, SIMPLE, Arena, Ask, put_data, put_hole, reserve

cdef enum:
    LEAST_HOLE = 4096           # a shorter hole costs more as a chunk of its own than as zeros
    MOST_DECIPHERED = 64 << 10  # bytes: to wake another thread takes as long as that


cdef class Answering:
    """What a loop answers by itself, on the disk behind `fast` of `size` guest bytes, in the reply `mode` agreed on."""

    cdef void locate_batch(self, const Ask *asks, uint32_t count, Target *targets) noexcept nogil:
        cdef uint32_t i, deep
        if self.fast.maps_count:
            pthread_mutex_lock(&self.fast.cache.lock)
        for deep in range(2):
            for i in range(count):
                self.fast.foresee(asks[i].offset, deep)
        for i in range(count):
            if not self.fast.locate(asks[i].offset, asks[i].length, True, &targets[i]):
                targets[i].length = 0
        if self.fast.maps_count:
            pthread_mutex_unlock(&self.fast.cache.lock)

    cdef bint takes_long(self, const Ask *ask, Target *target) noexcept nogil:
        """Whether a read of a disk in memory begins with what is work enough for another thread: to inflate, or to decipher."""
        if target.length == 0 and not self.fast.locate(ask.offset, ask.length, False, target):
            return False
        return target.stored != 0 or self.is_much(ask, target)

    cdef bint is_much(self, const Ask *ask, const Target *target) noexcept nogil:
        """Whether so much is to be deciphered that what is asked next should not wait for it."""
        return not self.alone and target.layer != NULL and target.layer.opaque and ask.length > MOST_DECIPHERED

    cdef bint answer(self, const Ask *ask, const Target *target, Arena *out) noexcept nogil:
        """A read that lies in one piece and needs no waiting; False for any other."""
        cdef uint64_t before = out.used
        cdef uint8_t *data
        if target.length < ask.length or target.stored or self.is_much(ask, target):
            return False
        if target.layer == NULL and self.mode != SIMPLE and not ask.flags & DONT_FRAGMENT and ask.length >= LEAST_HOLE:
            return put_hole(self.mode, out, ask, ask.offset, ask.length, REPLY_DONE)
        if not reserve(out, 64 + ask.length):
            return False
        data = put_data(self.mode, out, ask, ask.offset, ask.length, REPLY_DONE)
        if target.layer == NULL:
            memset(data, 0, ask.length)
        elif not self.read_here(target, data, ask.length):
            out.used = before
            return False
        return True

    cdef bint read_here(self, const Target *target, uint8_t *data, uint64_t length) noexcept nogil:
        if target.layer.opaque:
            return read_enciphered_at_once(target, data, length)
        return read_at_once(&target.layer.file, data, length, target.host)

    cdef bint answer_slowly(self, const Ask *ask, Arena *out) noexcept nogil:
        """Any plain read, piece by piece, loading what is not resident. False, and nothing in the arena, where Python must help."""
        cdef uint64_t before = out.used
        cdef uint8_t *data
        cdef int64_t ticket
        cdef bint answered
        if not reserve(out, 64 + ask.length):
            return False
        ticket = self.fast.enter()
        if self.mode != SIMPLE and not ask.flags & DONT_FRAGMENT:
            answered = self.answer_in_chunks(ask, out)
        else:
            data = put_data(self.mode, out, ask, ask.offset, ask.length, REPLY_DONE)
            answered = self.fast.read_span(ask.offset, data, ask.length) == ask.length
        self.fast.leave(ticket)
        if not answered:
            out.used = before
        return answered

    cdef bint answer_in_chunks(self, const Ask *ask, Arena *out) noexcept nogil:
        """One chunk for each stretch of data and each hole worth it."""
        cdef uint64_t done = 0, stretch
        cdef uint16_t flags
        cdef uint8_t *data
        cdef bint hole
        while done < ask.length:
            if not self.stretch_at(ask.offset + done, ask.length - done, &stretch, &hole):
                return False
            flags = REPLY_DONE if done + stretch == ask.length else 0
            if hole:
                if not put_hole(self.mode, out, ask, ask.offset + done, stretch, flags):
                    return False
            else:
                if not reserve(out, 64 + stretch):
                    return False
                data = put_data(self.mode, out, ask, ask.offset + done, stretch, flags)
                if self.fast.read_span(ask.offset + done, data, stretch) < stretch:
                    return False
            done += stretch
        return True

    cdef bint stretch_at(self, uint64_t offset, uint64_t want, uint64_t *length, bint *hole) noexcept nogil:
        """How far from `offset` it is all data (short holes included), or all one hole worth a chunk."""
        cdef Target target
        cdef bint found
        length[0] = 0
        hole[0] = False
        while length[0] < want:
            if not self.fast.locate(offset + length[0], want - length[0], False, &target):
                return False
            found = target.layer == NULL and (target.length >= LEAST_HOLE or hole[0])
            if length[0] and found != hole[0]:
                return True
            hole[0] = found
            length[0] += target.length
        return True
