"""From an encrypted image and its secret to the cipher of its sectors.

It does not decipher data. Ciphers are heavy to load, so they are imported only when an image is encrypted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowslice.errors import CryptoError, MalformedImage
from cowslice.format.first_cluster import FirstCluster
from cowslice.format.header import CryptMethod
from cowslice.storage.base import Storage

if TYPE_CHECKING:
    from cowslice.codec.sectors import SectorCipher
    from cowslice.image.options import Secret


def open_cipher(
    storage: Storage, first: FirstCluster, secret: Secret | None, *, max_rounds: int | None
) -> SectorCipher | None:
    """Return the cipher of an image, None when it is not encrypted. `max_rounds` bounds key derivation, None: as usual.

    Raises CryptoError without a secret, with a wrong one, or when a key slot costs too much; MalformedImage for a
    damaged LUKS header. A wrong secret of the legacy method cannot be noticed: its data then reads as noise.
    """
    method = first.header.crypt_method
    if method == CryptMethod.NONE:
        return None
    passphrase = passphrase_of(secret, storage.name)
    if method == CryptMethod.AES:
        from cowslice.codec.sectors import legacy_aes

        return legacy_aes(passphrase)
    return _luks(storage, first, passphrase, max_rounds)


def passphrase_of(secret: Secret | None, name: str) -> bytes:
    """The bytes of a secret for the file of this name. Raises CryptoError when there is none."""
    given = secret(name) if callable(secret) else secret
    if given is None:
        raise CryptoError("it is encrypted and no secret was given, expected its passphrase", hint="Give it as secret.")
    return given.encode() if isinstance(given, str) else bytes(given)


def _luks(storage: Storage, first: FirstCluster, passphrase: bytes, max_rounds: int | None) -> SectorCipher:
    from cowslice.codec.luks1 import DEFAULT_ROUNDS, HEADER_BYTES, decode_luks1, unlock
    from cowslice.codec.sectors import SectorCipher

    pointer = first.crypto
    if pointer is None:
        raise MalformedImage("crypt_method is 2 (LUKS), but no extension says where the header is",
                             where="header extensions", field="crypto")
    if pointer.length < HEADER_BYTES:
        raise MalformedImage(f"the LUKS header has {pointer.length} bytes, expected at least {HEADER_BYTES}",
                             where="header extensions", field="crypto")
    header = decode_luks1(storage.read(pointer.offset, HEADER_BYTES))

    def read(offset: int, length: int) -> bytes:
        return storage.read(pointer.offset + offset, max(min(length, pointer.length - offset), 0))

    key = unlock(header, passphrase, read, max_rounds=DEFAULT_ROUNDS if max_rounds is None else max_rounds)
    return SectorCipher(header.cipher, key)
