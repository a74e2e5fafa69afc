# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What compiled code shares that works through a library of the system: how it is found, and how Python decodes clusters.

It knows no format and no library.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t

cdef extern from "<dlfcn.h>" nogil:
    int RTLD_NOW
    void *dlopen(const char *name, int flags)
    void *dlsym(void *library, const char *name)

# Fill all of `out` from a stream that ends exactly there. `state` begins as NULL, and serves one call after another.
ctypedef bint (*Decode)(void **state, const uint8_t *stream, size_t length, uint8_t *out, size_t size) noexcept nogil
ctypedef void (*End)(void **state) noexcept nogil


cdef inline bytes decoded_once(Decode decode, End end, stream, size_t size):
    """The `size` bytes that the stream stands for, else None. Releases the GIL."""
    cdef Py_buffer view
    cdef void *state = NULL
    cdef bint whole
    cdef bytes data = PyBytes_FromStringAndSize(NULL, size)
    cdef uint8_t *out = <uint8_t *> PyBytes_AS_STRING(data)
    PyObject_GetBuffer(stream, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            whole = decode(&state, <const uint8_t *> view.buf, view.len, out, size)
            end(&state)
    finally:
        PyBuffer_Release(&view)
    return data if whole else None
