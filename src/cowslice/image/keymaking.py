"""Makes the keys of a new encrypted image: a LUKS1 header around a random master key, and key slots that open it.

It does not know where the header lies. How many rounds a slot costs is measured here and now, so that opening takes
the time that was asked for on a machine like this one.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from dataclasses import dataclass, replace

from cowslice.codec.afsplit import af_split
from cowslice.codec.cipherspec import CipherSpec, hash_length, parse_cipher
from cowslice.codec.luks1 import (
    DIGEST_BYTES,
    SLOT_ALIGNMENT,
    SLOTS,
    STRIPES,
    KeySlot,
    LuksHeader,
    encode_luks1,
)
from cowslice.errors import BadOption, UnsupportedImage
from cowslice.image.createoptions import LUKS_DETAILS, CreateOptions
from cowslice.units import SECTOR, div_ceil, round_up

MIN_ITERATIONS = 1000  # RFC 2898, 4.2
DEFAULT_ITER_TIME = 2000  # milliseconds
SALT_BYTES = 32
_MEASURED_SECONDS = 0.05  # of one thread: long enough that starting it does not count
_MAX_ITERATIONS = (1 << 32) - 1
# A digest of the master key is checked once more for each slot: it may cost an eighth of a second where a slot has one.
_DIGEST_SHARE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyChoices:
    """The cipher of a LUKS image and what opening it costs; `iter_time` is milliseconds. Names are those of QEMU."""

    cipher_alg: str = "aes-256"
    cipher_mode: str = "xts"
    ivgen_alg: str = "plain64"
    ivgen_hash_alg: str | None = None
    hash_alg: str = "sha256"
    iter_time: int = DEFAULT_ITER_TIME

    @property
    def cipher(self) -> CipherSpec:
        """The cipher they name. Raises BadOption for one that cannot be made here."""
        name, _, bits = self.cipher_alg.partition("-")
        if not bits.isascii() or not bits.isdigit():
            raise BadOption(f"cipher_alg is '{self.cipher_alg}', expected a name and a key length such as aes-256")
        halves = 2 if self.cipher_mode == "xts" else 1
        try:
            hash_length(self.hash_alg)
            return parse_cipher(name, self.mode_name, int(bits[:5]) // 8 * halves)
        except UnsupportedImage as error:
            raise BadOption(str(error)) from None

    @property
    def mode_name(self) -> str:
        """The mode as a LUKS header names it, such as "cbc-essiv:sha256"."""
        hashed = f":{self.ivgen_hash_alg or 'sha256'}" if self.ivgen_alg == "essiv" else ""
        return f"{self.cipher_mode}-{self.ivgen_alg}{hashed}"


@dataclass(frozen=True, slots=True)
class NewKeys:
    """A LUKS header as bytes to write at offsets from its start, its length in bytes, and the master key it guards."""

    header: LuksHeader
    pieces: tuple[tuple[int, bytes], ...]
    key: bytes = b""

    @property
    def length(self) -> int:
        return self.header.payload_offset * SECTOR


def choices_of(options: CreateOptions) -> KeyChoices:
    """What the options of an image say, and the defaults for what they leave open."""
    given = {name: getattr(options, name) for name in LUKS_DETAILS if getattr(options, name) is not None}
    return KeyChoices(**given)


def header_bytes(choices: KeyChoices) -> int:
    """Bytes from the start of the LUKS header to the end of its last key slot. Raises BadOption."""
    return _slot_place(SLOTS, choices.cipher.key_bytes) * SECTOR


def make_keys(passphrase: bytes, choices: KeyChoices) -> NewKeys:
    """A new random master key that `passphrase` opens through the first of eight slots. Raises BadOption."""
    key = os.urandom(choices.cipher.key_bytes)
    header = _empty_header(key, choices)
    header, material = fill_slot(header, 0, passphrase, key, iter_time=choices.iter_time)
    offset = header.slots[0].key_offset * SECTOR
    return NewKeys(header, ((0, encode_luks1(header)), (offset, material)), key)


def fill_slot(
    header: LuksHeader, number: int, passphrase: bytes, key: bytes, *, iter_time: int = DEFAULT_ITER_TIME
) -> tuple[LuksHeader, bytes]:
    """The header with slot `number` active, and the key material to write at that slot's key offset.

    Whoever has `passphrase` gets `key`, the master key, after about `iter_time` milliseconds of one processor.
    """
    from cowslice.codec.sectors import SectorCipher  # loads numpy and cryptography

    salt = os.urandom(SALT_BYTES)
    iterations = _iterations(header.hash_name, header.key_bytes, iter_time)
    derived = hashlib.pbkdf2_hmac(header.hash_name, passphrase, salt, iterations, header.key_bytes)
    noise = os.urandom(header.key_bytes * (STRIPES - 1))
    material = af_split(key, noise=noise, hash_name=header.hash_name)
    stored = SectorCipher(header.cipher, derived).encrypt(0, material + bytes(-len(material) % SECTOR))
    slots = list(header.slots)
    slots[number] = KeySlot(True, iterations, salt, slots[number].key_offset)
    return replace(header, slots=tuple(slots)), stored


def _empty_header(key: bytes, choices: KeyChoices) -> LuksHeader:
    """A header with the digest of the key and eight slots that nobody can open."""
    salt = os.urandom(SALT_BYTES)
    iterations = _iterations(choices.hash_alg, DIGEST_BYTES, choices.iter_time / _DIGEST_SHARE)
    header = LuksHeader(
        cipher_name=choices.cipher.algorithm.name, cipher_mode=choices.mode_name, hash_name=choices.hash_alg,
        payload_offset=0, key_bytes=len(key),
        digest=hashlib.pbkdf2_hmac(choices.hash_alg, key, salt, iterations, DIGEST_BYTES),
        digest_salt=salt, digest_iterations=iterations, uuid=str(uuid.uuid4()), slots=(),
    )  # fmt: skip
    slots = tuple(KeySlot(False, 0, bytes(SALT_BYTES), _slot_place(number, len(key))) for number in range(SLOTS))
    return replace(header, payload_offset=_slot_place(SLOTS, len(key)), slots=slots)


def _slot_place(number: int, key_bytes: int) -> int:
    """The sector where the key material of a slot begins."""
    return SLOT_ALIGNMENT + number * round_up(div_ceil(key_bytes * STRIPES, SECTOR), SLOT_ALIGNMENT)


def _iterations(hash_name: str, key_bytes: int, milliseconds: float) -> int:
    """PBKDF2 iterations that take so long on one processor here, never less than MIN_ITERATIONS."""
    tried, taken = MIN_ITERATIONS, 0.0
    while taken < _MEASURED_SECONDS:
        tried *= 4 if taken * 4 < _MEASURED_SECONDS else 2
        start = time.thread_time()
        hashlib.pbkdf2_hmac(hash_name, b"passphrase", b"salt", tried, key_bytes)
        taken = time.thread_time() - start
    return min(max(int(tried / taken * milliseconds / 1000), MIN_ITERATIONS), _MAX_ITERATIONS)
