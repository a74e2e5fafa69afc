# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""AES over whole 512-byte sectors through libcrypto, without the GIL, on systems that have that library.

It is looked for by name when it is first wanted (Debian: libssl3), so nothing needs it to be built or to run: without it,
and for what it refuses, `codec.sectors` does the same. It does not know where sectors lie.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from cowslice.codec.whole cimport RTLD_NOW, dlopen, dlsym

cdef extern from "<endian.h>" nogil:
    uint64_t htole64(uint64_t)

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)

# openssl/evp.h, the same in 1.1 and in 3.
ctypedef const void *(*Kind)() noexcept nogil
ctypedef void *(*New)() noexcept nogil
ctypedef void (*Free)(void *context) noexcept nogil
ctypedef int (*Init)(void *context, const void *kind, void *engine, const uint8_t *key, const uint8_t *vector,
                     int enciphering) noexcept nogil
ctypedef int (*Update)(void *context, uint8_t *out, int *written, const uint8_t *data, int length) noexcept nogil
ctypedef int (*SetPadding)(void *context, int padding) noexcept nogil
ctypedef void (*ClearErrors)() noexcept nogil

cdef enum:
    SECTOR = 512
    BLOCK = 16
    AS_BEFORE = -1          # the direction of a context that has one

cdef void *library = NULL
cdef New new_context = NULL
cdef Free free_context = NULL
cdef Init init_context = NULL
cdef Update update = NULL
cdef SetPadding set_padding = NULL
cdef ClearErrors clear_errors = NULL
cdef bint sought = False


def available():
    """Whether the library is here."""
    global sought, library, new_context, free_context, init_context, update, set_padding, clear_errors
    if not sought:
        library = dlopen("libcrypto.so.3", RTLD_NOW)
        if library == NULL:
            library = dlopen("libcrypto.so.1.1", RTLD_NOW)
        if library != NULL:
            new_context = <New> dlsym(library, "EVP_CIPHER_CTX_new")
            free_context = <Free> dlsym(library, "EVP_CIPHER_CTX_free")
            init_context = <Init> dlsym(library, "EVP_CipherInit_ex")
            update = <Update> dlsym(library, "EVP_CipherUpdate")
            set_padding = <SetPadding> dlsym(library, "EVP_CIPHER_CTX_set_padding")
            clear_errors = <ClearErrors> dlsym(library, "ERR_clear_error")
        sought = True
    return (new_context != NULL and free_context != NULL and init_context != NULL and update != NULL
            and set_padding != NULL and clear_errors != NULL)


def maybe_aes(str mode not None, bytes key not None, *, bint short_numbers, bytes vector_key not None=b""):
    """Return AES in a `mode` with a `key`, both halves in XTS; None where the library is not here, or refuses.

    Vectors are the sector numbers, cut to 32 bits if `short_numbers`, and enciphered with a `vector_key`.
    """
    cdef EvpCipher cipher
    if not available():
        return None
    cipher = EvpCipher()
    cipher.numbered = <uint32_t> -1 if short_numbers else <uint64_t> -1
    cipher.kind = kind_of(len(key) // 2 if mode == "xts" else len(key), mode)
    memcpy(cipher.key, <const uint8_t *> key, min(len(key), sizeof(cipher.key)))
    if vector_key:
        cipher.vector_kind = kind_of(len(vector_key), "ecb")
        memcpy(cipher.vector_key, <const uint8_t *> vector_key, min(len(vector_key), sizeof(cipher.vector_key)))
    if cipher.kind == NULL or (vector_key and cipher.vector_kind == NULL):
        return None
    cipher.desks = cipher.new_desk()
    return None if cipher.desks == NULL else cipher


cdef const void *kind_of(size_t key_bytes, str mode) except? NULL:
    """EVP_CIPHER of AES with keys of so many bytes, NULL where the library has none."""
    cdef Kind kind = <Kind> dlsym(library, b"EVP_aes_%d_%s" % (key_bytes * 8, mode.encode()))
    return NULL if kind == NULL else kind()


cdef void *keyed(const void *kind, const uint8_t *key, bint enciphering) noexcept nogil:
    """A new context, NULL where there is no memory or the key is refused (two equal halves, in XTS)."""
    cdef void *context = new_context()
    if context != NULL and init_context(context, kind, NULL, key, NULL, enciphering) == 1 and set_padding(context, 0) == 1:
        return context
    free_context(context)
    clear_errors()  # else the next TLS connection of this thread takes them for its own
    return NULL


cdef void free_desk(Desk *desk) noexcept nogil:
    free_context(desk.contexts[0])
    free_context(desk.contexts[1])
    free_context(desk.vectors)
    free(desk)


cdef class EvpCipher:
    """Enciphers and deciphers sectors with one key, for any number of threads at once. Made by `maybe_aes`."""

    def __cinit__(self):
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self):
        cdef Desk *desk
        while self.desks != NULL:
            desk = self.desks
            self.desks = desk.next
            free_desk(desk)
        memset(self.key, 0, sizeof(self.key))
        memset(self.vector_key, 0, sizeof(self.vector_key))
        pthread_mutex_destroy(&self.lock)

    def transformed(self, uint64_t first_sector, data, *, bint enciphering):
        """Return whole sectors enciphered or deciphered, None where the library failed. Releases the GIL."""
        cdef Py_buffer view
        cdef uint64_t count, done
        cdef bytes result
        cdef uint8_t *out
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            count = view.len // SECTOR
            result = PyBytes_FromStringAndSize(NULL, count * SECTOR)
            out = <uint8_t *> PyBytes_AS_STRING(result)
            with nogil:
                done = self.transform(enciphering, first_sector, <const uint8_t *> view.buf, out, count)
        finally:
            PyBuffer_Release(&view)
        return result if done == count else None

    def decipher_in_place(self, uint64_t first_sector, buffer):
        """Decipher whole sectors where they are; return how many, fewer than all where the library failed."""
        cdef Py_buffer view
        cdef uint64_t done
        cdef uint8_t *at
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            at = <uint8_t *> view.buf
            with nogil:
                done = self.transform(False, first_sector, at, at, view.len // SECTOR)
        finally:
            PyBuffer_Release(&view)
        return done

    cdef uint64_t transform(self, bint enciphering, uint64_t first_sector, const uint8_t *source, uint8_t *target,
                            uint64_t sectors) noexcept nogil:
        """Encipher or decipher sectors, in place where `target` is `source`; returns how many, from the first on."""
        cdef Desk *desk = self.take_desk()
        cdef uint64_t done = 0
        if desk == NULL:
            return 0
        while done < sectors and self.transform_one(desk, enciphering, first_sector + done, source + done * SECTOR,
                                                    target + done * SECTOR):
            done += 1
        self.leave_desk(desk)
        return done

    cdef bint transform_one(self, Desk *desk, bint enciphering, uint64_t sector, const uint8_t *source,
                            uint8_t *target) noexcept nogil:
        cdef uint64_t vector[2]
        cdef uint8_t *at = <uint8_t *> vector
        cdef void *context = desk.contexts[enciphering]
        cdef int written = 0
        vector[0] = htole64(sector & self.numbered)
        vector[1] = 0
        if desk.vectors != NULL and (update(desk.vectors, at, &written, at, BLOCK) != 1 or written != BLOCK):
            return False
        return (init_context(context, NULL, NULL, NULL, at, AS_BEFORE) == 1
                and update(context, target, &written, source, SECTOR) == 1 and written == SECTOR)

    # -- desks ------------------------------------------------------------------------------------------------------

    cdef Desk *take_desk(self) noexcept nogil:
        """A desk that nobody else has, NULL where there is no memory for one more."""
        cdef Desk *desk
        pthread_mutex_lock(&self.lock)
        desk = self.desks
        if desk != NULL:
            self.desks = desk.next
        pthread_mutex_unlock(&self.lock)
        return desk if desk != NULL else self.new_desk()

    cdef void leave_desk(self, Desk *desk) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        desk.next = self.desks
        self.desks = desk
        pthread_mutex_unlock(&self.lock)

    cdef Desk *new_desk(self) noexcept nogil:
        cdef Desk *desk = <Desk *> calloc(1, sizeof(Desk))
        if desk == NULL:
            return NULL
        desk.contexts[0] = keyed(self.kind, self.key, False)
        desk.contexts[1] = keyed(self.kind, self.key, True)
        if self.vector_kind != NULL:
            desk.vectors = keyed(self.vector_kind, self.vector_key, True)
        if desk.contexts[0] == NULL or desk.contexts[1] == NULL or (self.vector_kind != NULL and desk.vectors == NULL):
            free_desk(desk)
            return NULL
        return desk
