# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Look at large buffers without the GIL: where they are all zeros, and where two of them differ.

It does not know what the bytes are. One call per buffer, of any size; nothing is copied or kept.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint64_t
from libc.string cimport memcmp

cdef enum:
    BLOCK = 256

cdef inline bint _zero(const unsigned char *p, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0, j
    cdef uint64_t found
    while i + BLOCK <= n:
        found = 0
        for j in range(BLOCK // 8):
            found |= (<const uint64_t *>(p + i))[j]
        if found:
            return False
        i += BLOCK
    while i < n:
        if p[i]:
            return False
        i += 1
    return True


def is_zero(buffer):
    """Whether every byte is zero. An empty buffer is."""
    cdef Py_buffer view
    cdef bint zero
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    with nogil:
        zero = _zero(<const unsigned char *>view.buf, view.len)
    PyBuffer_Release(&view)
    return zero


def data_runs(buffer, Py_ssize_t unit):
    """[(start, end)] in bytes of the runs of units that are not all zeros, ascending; the last unit may be short."""
    cdef Py_buffer view
    cdef Py_ssize_t at = 0, step, start = -1
    cdef bint zero
    cdef const unsigned char *p
    cdef list runs = []
    if unit <= 0:
        raise ValueError(f"unit is {unit}, expected at least 1")
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    p = <const unsigned char *>view.buf
    with nogil:
        while at < view.len:
            step = min(unit, view.len - at)
            zero = _zero(p + at, step)
            if zero and start >= 0:
                with gil:
                    runs.append((start, at))
                start = -1
            elif not zero and start < 0:
                start = at
            at += step
    if start >= 0:
        runs.append((start, view.len))
    PyBuffer_Release(&view)
    return runs


def first_difference(one, other):
    """The index of the first byte that differs, or -1. Both buffers have the same length."""
    cdef Py_buffer left, right
    cdef Py_ssize_t at = 0, step
    cdef const unsigned char *a
    cdef const unsigned char *b
    PyObject_GetBuffer(one, &left, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(other, &right, PyBUF_SIMPLE)
    except BaseException:
        PyBuffer_Release(&left)
        raise
    try:
        if left.len != right.len:
            raise ValueError(f"the buffers have {left.len} and {right.len} bytes, expected the same length")
        a = <const unsigned char *>left.buf
        b = <const unsigned char *>right.buf
        with nogil:
            while at < left.len:
                step = min(4096, left.len - at)
                if memcmp(a + at, b + at, step):
                    break
                at += step
            while at < left.len and a[at] == b[at]:
                at += 1
        return at if at < left.len else -1
    finally:
        PyBuffer_Release(&left)
        PyBuffer_Release(&right)
