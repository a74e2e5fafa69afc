"""The anti-forensic splitter of LUKS1: a key spread over stripes so that losing any one of them destroys it.

It does not know what the key opens. Source: LUKS1 on-disk format specification, section 2.4.
"""

from __future__ import annotations

import hashlib

from cowslice.errors import CryptoError


def af_merge(material: bytes, *, key_bytes: int, stripes: int, hash_name: str) -> bytes:
    """The key that `material`, `stripes` times `key_bytes` long, was made from."""
    _check(material, key_bytes * stripes)
    last = (stripes - 1) * key_bytes
    return _xor(_mixed(material[:last], key_bytes, hash_name), material[last:])


def af_split(key: bytes, *, noise: bytes, hash_name: str) -> bytes:
    """Spread `key` over stripes: `noise` is all of them but the last, random bytes, a multiple of the key's length."""
    _check(noise, len(noise) // len(key) * len(key))
    return noise + _xor(_mixed(noise, len(key), hash_name), key)


def _mixed(stripes: bytes, key_bytes: int, hash_name: str) -> bytes:
    """All but the last stripe folded into one: exclusive or, then diffusion, again and again."""
    mixed = bytes(key_bytes)
    for at in range(0, len(stripes), key_bytes):
        mixed = _diffused(_xor(mixed, stripes[at : at + key_bytes]), hash_name)
    return mixed


def _diffused(block: bytes, hash_name: str) -> bytes:
    """Each digest-sized piece replaced by the hash of its number (32 bits, big-endian) and itself."""
    step = hashlib.new(hash_name).digest_size
    pieces = []
    for number, at in enumerate(range(0, len(block), step)):
        piece = block[at : at + step]
        pieces.append(hashlib.new(hash_name, number.to_bytes(4, "big") + piece).digest()[: len(piece)])
    return b"".join(pieces)


def _xor(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).to_bytes(len(a), "big")


def _check(material: bytes, expected: int) -> None:
    if len(material) != expected:
        raise CryptoError(f"the split key has {len(material)} bytes, expected {expected}")
