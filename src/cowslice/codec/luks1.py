"""The LUKS1 header: its record, its bytes, every check on it, and the way from a passphrase to the master key.

It does not know where the header lies, and loads no cipher before a key slot is tried.
What a header asks to compute is bounded: key derivation stops at a budget of hash rounds.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from cowslice.codec.afsplit import af_merge
from cowslice.codec.cipherspec import CipherSpec, hash_length, parse_cipher
from cowslice.errors import CryptoError, MalformedImage
from cowslice.units import SECTOR, div_ceil, round_up

HEADER_BYTES = 592
MAGIC = b"LUKS\xba\xbe"
SLOTS = 8
STRIPES = 4000
SLOT_ON = 0x00AC71F3
SLOT_OFF = 0x0000DEAD
DIGEST_BYTES = 20
UUID_BYTES = 40
# Slots start at 4096 and take a multiple of that: 8 sectors.
SLOT_ALIGNMENT = 8
# Two halves of 256 bits: no LUKS1 cipher takes more.
MAX_KEY_BYTES = 64
# About half a minute on one core. A slot made in 2 s, the usual time, costs some 10 million rounds.
DEFAULT_ROUNDS = 1 << 26

_FIXED = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")


@dataclass(frozen=True, slots=True)
class KeySlot:
    """One of eight places for the master key. `key_offset` is in sectors from the start of the header."""

    active: bool
    iterations: int
    salt: bytes
    key_offset: int


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """The header as it is stored. `payload_offset` is in sectors; qcow2 has no payload there but keeps the rule."""

    cipher_name: str
    cipher_mode: str
    hash_name: str
    payload_offset: int
    key_bytes: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]

    @property
    def cipher(self) -> CipherSpec:
        """The cipher of payload and key slots. Raises UnsupportedImage."""
        return parse_cipher(self.cipher_name, self.cipher_mode, self.key_bytes)

    @property
    def slot_sectors(self) -> int:
        """Sectors that the split key of one slot takes."""
        return round_up(div_ceil(self.key_bytes * STRIPES, SECTOR), SLOT_ALIGNMENT)


def decode_luks1(data: bytes) -> LuksHeader:
    """Decode and check the first 592 bytes of a LUKS1 header. Raises MalformedImage with the field that is wrong."""
    if len(data) < HEADER_BYTES:
        raise _malformed("length", f"{len(data)} bytes", f"at least {HEADER_BYTES}")
    magic, version, name, mode, hash_name, payload, key_bytes, digest, salt, iterations, uuid = _FIXED.unpack_from(data)
    if magic != MAGIC:
        raise _malformed("magic", magic.hex(), MAGIC.hex())
    if version != 1:
        raise _malformed("version", version, "1")
    header = LuksHeader(
        cipher_name=_text("cipher name", name),
        cipher_mode=_text("cipher mode", mode),
        hash_name=_text("hash", hash_name),
        payload_offset=payload,
        key_bytes=key_bytes,
        digest=digest,
        digest_salt=salt,
        digest_iterations=iterations,
        uuid=_shown(uuid.split(b"\0")[0])[:UUID_BYTES],
        slots=tuple(_decode_slot(data, number) for number in range(SLOTS)),
    )
    _check(header)
    return header


def encode_luks1(header: LuksHeader) -> bytes:
    """The 592 bytes of a header. Raises MalformedImage if decoding would refuse them."""
    _check(header)
    fixed = _FIXED.pack(
        MAGIC, 1, *_names(header), header.payload_offset, header.key_bytes, header.digest,
        header.digest_salt, header.digest_iterations, header.uuid.encode("ascii", "replace"),
    )  # fmt: skip
    slots = (
        _SLOT.pack(SLOT_ON if slot.active else SLOT_OFF, slot.iterations, slot.salt, slot.key_offset, STRIPES)
        for slot in header.slots
    )
    return fixed + b"".join(slots)


def unlock(
    header: LuksHeader, passphrase: bytes, read: Callable[[int, int], bytes], *, max_rounds: int = DEFAULT_ROUNDS
) -> bytes:
    """The master key, from the first slot that `passphrase` opens.

    `read(offset, length)` returns bytes at an offset from the start of the header. `max_rounds` bounds the hash rounds
    of all slots together; a slot that asks for more is passed over. Raises CryptoError if no slot opens,
    UnsupportedImage if the cipher or hash is not known.
    """
    header.cipher  # noqa: B018 - refused before any work is done
    active = [(number, slot) for number, slot in enumerate(header.slots) if slot.active]
    passed_over = []
    for number, slot in active:
        rounds = slot_rounds(header, slot)
        if rounds > max_rounds:
            passed_over.append((number, rounds))
            continue
        max_rounds -= rounds
        key = _open_slot(header, slot, passphrase, read)
        if key is not None:
            return key
    if passed_over:
        raise _too_costly(*passed_over[0], max_rounds)
    raise CryptoError(f"none of the {len(active)} active key slots of the LUKS header opens with this passphrase")


def slots_of(
    header: LuksHeader, passphrase: bytes, read: Callable[[int, int], bytes], *, max_rounds: int = DEFAULT_ROUNDS
) -> list[int]:
    """The numbers of all active slots that `passphrase` opens. Arguments and errors are those of `unlock`."""
    found = []
    for number, slot in enumerate(header.slots):
        if not slot.active:
            continue
        rounds = slot_rounds(header, slot)
        if rounds > max_rounds:
            raise _too_costly(number, rounds, max_rounds)
        max_rounds -= rounds
        if _open_slot(header, slot, passphrase, read) is not None:
            found.append(number)
    return found


def slot_rounds(header: LuksHeader, slot: KeySlot) -> int:
    """Hash rounds that trying one slot takes: PBKDF2 derives one digest's length of key at a time."""
    length = hash_length(header.hash_name)
    deriving = slot.iterations * div_ceil(header.key_bytes, length)
    return deriving + header.digest_iterations * div_ceil(DIGEST_BYTES, length)


def _open_slot(header: LuksHeader, slot: KeySlot, passphrase: bytes, read: Callable[[int, int], bytes]) -> bytes | None:
    from cowslice.codec.sectors import SectorCipher  # loads numpy and cryptography

    derived = hashlib.pbkdf2_hmac(header.hash_name, passphrase, slot.salt, slot.iterations, header.key_bytes)
    length = header.key_bytes * STRIPES
    stored = read(slot.key_offset * SECTOR, round_up(length, SECTOR))
    if len(stored) < length:
        raise _malformed("key material", f"{len(stored)} bytes from sector {slot.key_offset}", f"at least {length}")
    material = SectorCipher(header.cipher, derived).decrypt(0, stored)[:length]
    key = af_merge(material, key_bytes=header.key_bytes, stripes=STRIPES, hash_name=header.hash_name)
    digest = hashlib.pbkdf2_hmac(header.hash_name, key, header.digest_salt, header.digest_iterations, DIGEST_BYTES)
    return key if hmac.compare_digest(digest, header.digest) else None


def _decode_slot(data: bytes, number: int) -> KeySlot:
    state, iterations, salt, key_offset, stripes = _SLOT.unpack_from(data, _FIXED.size + number * _SLOT.size)
    if state not in (SLOT_ON, SLOT_OFF):
        raise _malformed(f"state of slot {number}", f"{state:#010x}", f"{SLOT_ON:#010x} or {SLOT_OFF:#010x}")
    if stripes != STRIPES:
        raise _malformed(f"stripes of slot {number}", stripes, str(STRIPES))
    return KeySlot(state == SLOT_ON, iterations, salt, key_offset)


def _check(header: LuksHeader) -> None:
    """Everything that no single field shows."""
    if not 0 < header.key_bytes <= MAX_KEY_BYTES:
        raise _malformed("key length", header.key_bytes, f"1 to {MAX_KEY_BYTES} bytes")
    if not header.digest_iterations:
        raise _malformed("digest iterations", 0, "at least 1")
    if header.payload_offset < SLOT_ALIGNMENT:
        raise _malformed("payload offset", header.payload_offset, f"at least sector {SLOT_ALIGNMENT}")
    for number, slot in enumerate(header.slots):
        _check_slot(header, number, slot)
    _check_overlap(header)


def _check_slot(header: LuksHeader, number: int, slot: KeySlot) -> None:
    if slot.active and not slot.iterations:
        raise _malformed(f"iterations of slot {number}", 0, "at least 1 in an active slot")
    first, last = div_ceil(HEADER_BYTES, SECTOR), header.payload_offset - header.slot_sectors
    if not first <= slot.key_offset <= last:
        raise _malformed(f"key offset of slot {number}", slot.key_offset, f"a sector from {first} to {last}")


def _check_overlap(header: LuksHeader) -> None:
    order = sorted(range(len(header.slots)), key=lambda number: header.slots[number].key_offset)
    for number, following in pairwise(order):
        end = header.slots[number].key_offset + header.slot_sectors
        if header.slots[following].key_offset < end:
            start = header.slots[following].key_offset
            raise _malformed(
                f"key offset of slot {following}", start, f"sector {end}, where slot {number} ends, or more"
            )


def _names(header: LuksHeader) -> Iterator[bytes]:
    for field, text in (
        ("cipher name", header.cipher_name), ("cipher mode", header.cipher_mode), ("hash", header.hash_name),
    ):  # fmt: skip
        _text(field, (raw := text.encode("ascii", "replace").ljust(32, b"\0")))
        yield raw


def _text(field: str, raw: bytes) -> str:
    """A NUL-terminated name, which must be printable ASCII."""
    text, end, _ = raw[:32].partition(b"\0")
    if not end or len(raw) > 32 or not text.isascii() or not text.decode("ascii").isprintable():
        raise _malformed(field, _shown(raw), "printable ASCII, ended by a zero byte within 32 bytes")
    return text.decode("ascii")


def _shown(raw: bytes) -> str:
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in raw.decode("ascii", "backslashreplace"))


def _too_costly(number: int, rounds: int, budget: int) -> CryptoError:
    return CryptoError(
        f"key slot {number} of the LUKS header asks for {rounds} hash rounds, {budget} of the budget are left",
        hint=f"Raise the limit to {rounds} rounds or more if you trust this image.",
    )


def _malformed(field: str, value: object, expected: str) -> MalformedImage:
    return MalformedImage(f"LUKS header: {field} is {value}, expected {expected}", where="LUKS header", field=field)
