# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Whole clusters of one zstd frame through libzstd, without the GIL, on systems that have that library.

It is looked for by name when it is first wanted (Debian: libzstd1), so nothing needs it to be built or to run: without
it, `codec.compression` decodes. It says yes or no; what is wrong with a stream, and several frames, are judged there.
"""

from libc.stdint cimport uint8_t

from cowslice.codec.whole cimport RTLD_NOW, decoded_once, dlopen, dlsym

# zstd.h, stable since its version 1.4: the soname says that it is 1.
ctypedef void *(*Create)() noexcept nogil
ctypedef size_t (*Free)(void *state) noexcept nogil
ctypedef size_t (*FrameSize)(const void *stream, size_t length) noexcept nogil
ctypedef size_t (*Decompress)(void *state, void *out, size_t size, const void *stream, size_t length) noexcept nogil
ctypedef unsigned (*IsError)(size_t code) noexcept nogil

cdef enum:
    LEAST_FRAME = 6
    SINGLE_SEGMENT = 0x20  # of the byte behind the magic number (RFC 8878): the window is the content
    FIRST_WINDOW_LOG = 10
    MOST_WINDOW_LOG = 26  # streams with windows from 2^27 bytes on are left to the decoder that limits its memory

cdef Create create_state = NULL
cdef Free free_state = NULL
cdef FrameSize frame_size = NULL
cdef Decompress decompress = NULL
cdef IsError is_error = NULL
cdef bint sought = False


def available():
    """Whether the library is here."""
    global sought, create_state, free_state, frame_size, decompress, is_error
    cdef void *library
    if not sought:
        library = dlopen("libzstd.so.1", RTLD_NOW)
        if library != NULL:
            create_state = <Create> dlsym(library, "ZSTD_createDCtx")
            free_state = <Free> dlsym(library, "ZSTD_freeDCtx")
            frame_size = <FrameSize> dlsym(library, "ZSTD_findFrameCompressedSize")
            decompress = <Decompress> dlsym(library, "ZSTD_decompressDCtx")
            is_error = <IsError> dlsym(library, "ZSTD_isError")
        sought = True
    return _is_whole()


cdef inline bint _is_whole() noexcept nogil:
    return (create_state != NULL and free_state != NULL and frame_size != NULL and decompress != NULL
            and is_error != NULL)


def decompressed(stream, size_t size):
    """Return the `size` bytes that a stream of one frame of exactly that many stands for, else None.

    Bytes behind the frame are ignored. None also means that the library is not here. Releases the GIL.
    """
    return decoded_once(unzstd_whole, end_unzstd, stream, size) if available() else None


cdef bint unzstd_whole(void **state, const uint8_t *stream, size_t length, uint8_t *out, size_t size) noexcept nogil:
    """Fill all of `out` from one frame that ends exactly there; False for any other, and where there is no library.

    `available` must have been asked before. `state` begins as NULL, serves one call after another and is ended by
    `end_unzstd`.
    """
    cdef size_t frame
    if not _is_whole() or length < LEAST_FRAME or not _is_plain(stream):
        return False
    frame = frame_size(stream, length)
    if is_error(frame) or frame > length:
        return False
    if state[0] == NULL:
        state[0] = create_state()
    return state[0] != NULL and decompress(state[0], out, size, stream, frame) == size


cdef inline bint _is_plain(const uint8_t *stream) noexcept nogil:
    """Whether it begins as a frame of today's format does, with a window that every decoder takes."""
    if stream[0] != 0x28 or stream[1] != 0xB5 or stream[2] != 0x2F or stream[3] != 0xFD:
        return False
    return stream[4] & SINGLE_SEGMENT != 0 or FIRST_WINDOW_LOG + (stream[5] >> 3) <= MOST_WINDOW_LOG


cdef void end_unzstd(void **state) noexcept nogil:
    if state[0] != NULL:
        free_state(state[0])
        state[0] = NULL
