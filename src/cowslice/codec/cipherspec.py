"""Which cipher an image asks for: algorithm, mode and the source of its IVs, and whether all that is possible.

It holds no key and encrypts nothing, so that an inspector can name a cipher without loading one.
A CipherSpec that exists is one that SectorCipher can run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cowslice.errors import UnsupportedImage

MODES = ("cbc", "ctr", "ecb", "xts")
IV_SOURCES = ("plain", "plain64", "essiv")
# Digest lengths in bytes: PBKDF2, the AF splitter and ESSIV use these hashes.
HASHES = {"md5": 16, "sha1": 20, "ripemd160": 20, "sha224": 28, "sha256": 32, "sha384": 48, "sha512": 64}
# Ciphers that LUKS1 images name and no maintained library offers.
_KNOWN_ONLY = ("serpent", "twofish")


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A block cipher: block and key lengths in bytes."""

    name: str
    block: int
    keys: tuple[int, ...]


ALGORITHMS = {
    "aes": Algorithm("aes", 16, (16, 24, 32)),
    "sm4": Algorithm("sm4", 16, (16,)),
    "cast5": Algorithm("cast5", 8, (16,)),
}


@dataclass(frozen=True, slots=True)
class CipherSpec:
    """A cipher over 512-byte sectors. `key_bytes` counts both halves in XTS; `iv_hash` is '' without ESSIV."""

    algorithm: Algorithm
    key_bytes: int
    mode: str
    iv_source: str
    iv_hash: str = ""

    def __str__(self) -> str:
        hashed = f":{self.iv_hash}" if self.iv_hash else ""
        return f"{self.algorithm.name}-{self.key_bits}-{self.mode}-{self.iv_source}{hashed}"

    @property
    def key_bits(self) -> int:
        """Bits of the key of the block cipher itself."""
        return self.key_bytes * 8 // (2 if self.mode == "xts" else 1)


LEGACY_AES = CipherSpec(ALGORITHMS["aes"], 16, "cbc", "plain64")


def parse_cipher(name: str, mode: str, key_bytes: int) -> CipherSpec:
    """The cipher that a LUKS1 header names, such as ("aes", "cbc-essiv:sha256", 32).

    Raises UnsupportedImage that names what is not possible.
    """
    algorithm = ALGORITHMS.get(name)
    if algorithm is None:
        known = " (no maintained library has it)" if name in _KNOWN_ONLY else ""
        raise _unsupported(f"cipher '{name}'{known}", f"one of {', '.join(ALGORITHMS)}", f"cipher-{name}")
    chaining, _, source = mode.partition("-")
    source, _, iv_hash = source.partition(":")
    if chaining == "ecb" and not source:
        source = "plain"  # ECB has no IV: a bare 'ecb' is as good
    spec = CipherSpec(algorithm, key_bytes, chaining, source, iv_hash)
    _check_mode(spec, mode)
    _check_key(spec)
    if source == "essiv":
        _check_essiv(spec)
    return spec


def hash_length(name: str) -> int:
    """Digest length in bytes. Raises UnsupportedImage for a hash that is not known, or not in this OpenSSL."""
    if name not in HASHES:
        raise _unsupported(f"hash '{name}'", f"one of {', '.join(HASHES)}", f"hash-{name}")
    if name not in hashlib.algorithms_available:
        raise _unsupported(f"hash '{name}'", "one that the system's OpenSSL offers", f"hash-{name}")
    return HASHES[name]


def _check_mode(spec: CipherSpec, mode: str) -> None:
    if spec.mode not in MODES or (spec.mode == "xts" and spec.algorithm.block != 16):
        expected = f"one of {', '.join(MODES)}; xts needs a cipher with 16-byte blocks"
        raise _unsupported(f"cipher mode '{mode}' with {spec.algorithm.name}", expected, f"cipher-mode-{spec.mode}")
    if spec.iv_source not in IV_SOURCES:
        raise _unsupported(f"IV generator in '{mode}'", f"one of {', '.join(IV_SOURCES)}", f"ivgen-{spec.iv_source}")
    if (spec.iv_source == "essiv") != bool(spec.iv_hash):
        expected = "a hash with essiv and with nothing else"
        raise _unsupported(f"cipher mode '{mode}'", expected, f"ivgen-{spec.iv_source}")


def _check_key(spec: CipherSpec) -> None:
    lengths = [length * 2 if spec.mode == "xts" else length for length in spec.algorithm.keys]
    if spec.key_bytes not in lengths:
        asked = f"a key of {spec.key_bytes} bytes for {spec.algorithm.name} in mode {spec.mode}"
        raise _unsupported(asked, f"one of {', '.join(map(str, lengths))}", "key-length")


def _check_essiv(spec: CipherSpec) -> None:
    """The hash of the key is a key itself, of the same algorithm."""
    length = hash_length(spec.iv_hash)
    if length not in spec.algorithm.keys:
        asked = f"essiv with hash '{spec.iv_hash}', whose {length} bytes are no key of {spec.algorithm.name},"
        expected = f"a digest of {', '.join(map(str, spec.algorithm.keys))} bytes"
        raise _unsupported(asked, expected, f"essiv-{spec.iv_hash}")


def _unsupported(what: str, expected: str, feature: str) -> UnsupportedImage:
    return UnsupportedImage(f"{what} is not supported, expected {expected}", features=(feature,))
