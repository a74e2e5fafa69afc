"""Ciphers over 512-byte sectors: AES through `codec.evp` where that can, else from one call of the bare block cipher.

It does not know where keys come from, nor whether a sector number counts guest or host sectors.
Loads `cryptography` and numpy: import it only where an encrypted image is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from cowslice.codec.cipherspec import LEGACY_AES, CipherSpec
from cowslice.codec.evp import EvpCipher, maybe_aes
from cowslice.errors import CryptoError, OutOfRange
from cowslice.units import SECTOR

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer
    from numpy.typing import NDArray

    Words = NDArray[np.uint64]

# Sectors per pass: data, tweaks and result (128 KiB each) stay together in a core's own cache.
PASS_SECTORS = 256
_WORD = np.dtype("<u8")
_BIG_WORD = np.dtype(">u8")


class SectorCipher:
    """Decrypts and encrypts whole sectors with one key. May be used by many threads at once.

    `compiled` does the same without the GIL; None where only this can.
    """

    __slots__ = ("_block", "_iv_block", "_tweak_block", "compiled", "spec")

    def __init__(self, spec: CipherSpec, key: bytes) -> None:
        """Take `key`, of exactly `spec.key_bytes`. Raises CryptoError where this machine lacks the cipher."""
        if len(key) != spec.key_bytes:
            raise CryptoError(f"the key has {len(key)} bytes, {spec} expects {spec.key_bytes}")
        self.spec = spec
        half = len(key) // 2 if spec.mode == "xts" else len(key)
        self._block = BlockCipher(spec.algorithm.name, key[:half])
        self._tweak_block = BlockCipher(spec.algorithm.name, key[half:]) if spec.mode == "xts" else None
        iv_key = hashlib.new(spec.iv_hash, key).digest() if spec.iv_source == "essiv" else b""
        self._iv_block = BlockCipher(spec.algorithm.name, iv_key) if iv_key else None
        self.compiled: EvpCipher | None = None
        if spec.algorithm.name == "aes":
            self.compiled = maybe_aes(spec.mode, key, short_numbers=spec.iv_source == "plain", vector_key=iv_key)

    def decrypt(self, first_sector: int, data: ReadableBuffer) -> bytes:
        """The plaintext of whole sectors, of which the first has number `first_sector`."""
        return self._transformed(first_sector, memoryview(data).cast("B"), decrypting=True)

    def decrypt_in_place(self, first_sector: int, buffer: WriteableBuffer) -> None:
        """Replace the ciphertext of whole sectors by its plaintext."""
        view = memoryview(buffer).cast("B")
        _check_span(first_sector, len(view))
        done = 0 if self.compiled is None else self.compiled.decipher_in_place(first_sector, view)
        self._passes(first_sector + done, view[done * SECTOR :], view[done * SECTOR :], decrypting=True)

    def encrypt(self, first_sector: int, data: ReadableBuffer) -> bytes:
        """The ciphertext of whole sectors, of which the first has number `first_sector`."""
        return self._transformed(first_sector, memoryview(data).cast("B"), decrypting=False)

    def _transformed(self, first_sector: int, source: memoryview, *, decrypting: bool) -> bytes:
        _check_span(first_sector, len(source))
        if self.compiled is not None:
            found = self.compiled.transformed(first_sector, source, enciphering=not decrypting)
            if found is not None:
                return found
        target = bytearray(len(source))
        self._passes(first_sector, source, memoryview(target), decrypting=decrypting)
        return bytes(target)

    def _passes(self, first_sector: int, source: memoryview, target: memoryview, *, decrypting: bool) -> None:
        step = PASS_SECTORS * SECTOR
        for at in range(0, len(source), step):
            piece = source[at : at + step]
            words = np.frombuffer(piece, _WORD).reshape(len(piece) // SECTOR, -1, self.spec.algorithm.block // 8)
            result = self._one_pass(first_sector + at // SECTOR, words, decrypting)
            target[at : at + step] = result.tobytes()

    def _one_pass(self, first_sector: int, words: Words, decrypting: bool) -> Words:
        """Transform sectors given as words[sector, block, word of the block]."""
        block = self._block.decrypt if decrypting else self._block.encrypt
        mode = self.spec.mode
        if mode == "ecb":
            return block(words)
        vectors = self._vectors(first_sector, len(words))
        if self._tweak_block is not None:
            tweaks = _tweaks(self._tweak_block.encrypt(vectors), words.shape[1])
            return block(words ^ tweaks) ^ tweaks
        if mode == "ctr":
            return self._block.encrypt(_counters(vectors, words.shape[1])) ^ words
        return _cbc_decrypted(block, words, vectors) if decrypting else _cbc_encrypted(block, words, vectors)

    def _vectors(self, first_sector: int, count: int) -> Words:
        """One IV per sector: its number, little-endian, cut to 32 bits for 'plain', encrypted for 'essiv'."""
        vectors = np.zeros((count, self.spec.algorithm.block // 8), _WORD)
        vectors[:, 0] = np.uint64(first_sector) + np.arange(count, dtype=np.uint64)
        if self.spec.iv_source == "plain":
            vectors[:, 0] &= np.uint64(0xFFFFFFFF)
        return vectors if self._iv_block is None else self._iv_block.encrypt(vectors)


class BlockCipher:
    """The bare block cipher over arrays of blocks, each block on its own."""

    __slots__ = ("_cipher",)

    def __init__(self, name: str, key: bytes) -> None:
        try:
            self._cipher = Cipher(_algorithm(name)(key), modes.ECB())
            self._cipher.encryptor()
        except (UnsupportedAlgorithm, ImportError, AttributeError) as error:
            raise CryptoError(f"cipher '{name}' is not available here: {error}") from None

    def encrypt(self, words: Words) -> Words:
        return self._run(self._cipher.encryptor(), words)

    def decrypt(self, words: Words) -> Words:
        return self._run(self._cipher.decryptor(), words)

    @staticmethod
    def _run(context: Any, words: Words) -> Words:
        return np.frombuffer(context.update(np.ascontiguousarray(words).data.cast("B")), _WORD).reshape(words.shape)


def legacy_aes(passphrase: bytes) -> SectorCipher:
    """The cipher of crypt_method 1: the passphrase itself is the key, cut or zero padded to 16 bytes.

    Sectors are numbered in the guest. QEMU uses AES-128 where the specification says 256 bits.
    """
    return SectorCipher(LEGACY_AES, passphrase[:16].ljust(16, b"\0"))


def _check_span(first_sector: int, length: int) -> None:
    if length % SECTOR or not 0 <= first_sector < 1 << 64 or first_sector + length // SECTOR > 1 << 64:
        asked = f"{length} bytes from sector {first_sector}"
        raise OutOfRange(f"{asked} asked of a cipher, expected whole {SECTOR}-byte sectors with 64-bit numbers")


def _algorithm(name: str) -> Callable[[bytes], Any]:
    if name == "cast5":
        from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5

        return CAST5
    return {"aes": algorithms.AES, "sm4": algorithms.SM4}[name]


def _tweaks(first: Words, count: int) -> Words:
    """All tweaks of XTS: tweak j of a sector is its first one times x to the j in GF(2^128) (IEEE 1619, 5.2).

    Each step doubles what is known: the tweaks of blocks n..2n-1 are those of 0..n-1 times x to the n.
    """
    tweaks = np.empty((len(first), count, 2), _WORD)
    tweaks[:, 0] = first
    known = 1
    while known < count:
        low, high = tweaks[:, :known, 0], tweaks[:, :known, 1]
        bits, rest = np.uint64(known), np.uint64(64 - known)
        over = high >> rest
        tweaks[:, known : 2 * known, 1] = high << bits | low >> rest
        tweaks[:, known : 2 * known, 0] = low << bits ^ _reduced(over)
        known *= 2
    return tweaks


def _reduced(over: Words) -> Words:
    """What was shifted out, times x^7 + x^2 + x + 1. At most 16 bits come in, so nothing is shifted out again."""
    folded: Words = over ^ over << np.uint64(1) ^ over << np.uint64(2) ^ over << np.uint64(7)
    return folded


def _counters(vectors: Words, count: int) -> Words:
    """Counter blocks of CTR: block j of a sector is its IV plus j, as one big-endian number."""
    start = vectors.view(_BIG_WORD).astype(np.uint64)
    stored = np.empty((len(start), count, start.shape[1]), _WORD)
    blocks = stored.view(_BIG_WORD)
    low = start[:, -1:] + np.arange(count, dtype=np.uint64)
    blocks[:, :, -1] = low
    if start.shape[1] == 2:
        blocks[:, :, 0] = start[:, :1] + (low < start[:, -1:])
    return stored


def _cbc_decrypted(block: Callable[[Words], Words], words: Words, vectors: Words) -> Words:
    plain = block(words).copy()
    plain[:, 1:] ^= words[:, :-1]
    plain[:, 0] ^= vectors
    return plain


def _cbc_encrypted(block: Callable[[Words], Words], words: Words, vectors: Words) -> Words:
    """Each block needs the one before it; the sectors go side by side."""
    secret = np.empty_like(words)
    before = vectors
    for n in range(words.shape[1]):
        before = block(words[:, n] ^ before)
        secret[:, n] = before
    return secret
