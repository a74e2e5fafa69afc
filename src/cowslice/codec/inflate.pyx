# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Whole clusters of raw deflate through libdeflate, without the GIL, on systems that have that library.

It is looked for by name when it is first wanted (Debian: libdeflate0), so nothing needs it to be built or to run: without
it, `codec.compression` inflates. It says yes or no; what is wrong with a stream is told there too.
"""

from libc.stdint cimport uint8_t

from cowslice.codec.whole cimport RTLD_NOW, decoded_once, dlopen, dlsym

# libdeflate.h, stable since its version 1.0: the soname says so.
ctypedef void *(*Alloc)() noexcept nogil
ctypedef int (*Decompress)(
    void *state, const void *stream, size_t length, void *out, size_t size, size_t *made) noexcept nogil
ctypedef void (*Free)(void *state) noexcept nogil

cdef Alloc alloc_state = NULL
cdef Decompress decompress = NULL
cdef Free free_state = NULL
cdef bint sought = False


def available():
    """Whether the library is here."""
    global sought, alloc_state, decompress, free_state
    cdef void *library
    if not sought:
        library = dlopen("libdeflate.so.0", RTLD_NOW)
        if library != NULL:
            alloc_state = <Alloc> dlsym(library, "libdeflate_alloc_decompressor")
            decompress = <Decompress> dlsym(library, "libdeflate_deflate_decompress")
            free_state = <Free> dlsym(library, "libdeflate_free_decompressor")
        sought = True
    return alloc_state != NULL and decompress != NULL and free_state != NULL


def inflated(stream, size_t size):
    """Return the `size` bytes that a stream of exactly that many stands for, else None; bytes behind it are ignored.

    None also means that the library is not here. Releases the GIL.
    """
    return decoded_once(inflate_whole, end_inflating, stream, size) if available() else None


cdef bint inflate_whole(void **state, const uint8_t *stream, size_t length, uint8_t *out, size_t size) noexcept nogil:
    """Fill all of `out` from a stream that ends exactly there; False for any other, and where there is no library.

    `available` must have been asked before. `state` begins as NULL, serves one call after another and is ended by
    `end_inflating`.
    """
    if alloc_state == NULL or decompress == NULL or free_state == NULL:
        return False
    if state[0] == NULL:
        state[0] = alloc_state()
    # Without a place for the number of bytes made, that has to be `size`.
    return state[0] != NULL and decompress(state[0], stream, length, out, size, NULL) == 0


cdef void end_inflating(void **state) noexcept nogil:
    if state[0] != NULL:
        free_state(state[0])
        state[0] = NULL
