"""Sector ciphers against OpenSSL's own modes, one sector at a time."""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from cowslice.codec import sectors
from cowslice.codec.cipherspec import CipherSpec, parse_cipher
from cowslice.codec.sectors import PASS_SECTORS, SectorCipher, legacy_aes
from cowslice.errors import CryptoError, OutOfRange, UnsupportedImage

AES = [
    (mode, source, size)
    for mode in ("xts", "cbc", "ecb", "ctr")
    for source in ("plain", "plain64", "essiv:sha256", "essiv:md5")
    for size in ((32, 64) if mode == "xts" else (16, 24, 32))
]
FAR = (1 << 32) + 5


def key_of(length: int) -> bytes:
    return random.Random(length).randbytes(length)


def vector_of(spec: CipherSpec, key: bytes, sector: int) -> bytes:
    if spec.iv_source == "plain":
        sector &= 0xFFFFFFFF
    vector = struct.pack("<QQ", sector, 0)
    if not spec.iv_hash:
        return vector
    return Cipher(algorithms.AES(hashlib.new(spec.iv_hash, key).digest()), modes.ECB()).encryptor().update(vector)


def reference(spec: CipherSpec, key: bytes, first_sector: int, data: bytes) -> bytes:
    """Encrypt sector by sector with the library's own mode."""
    made = {"xts": modes.XTS, "cbc": modes.CBC, "ctr": modes.CTR}
    pieces = []
    for n in range(len(data) // 512):
        vector = vector_of(spec, key, first_sector + n)
        mode = made[spec.mode](vector) if spec.mode in made else modes.ECB()
        pieces.append(Cipher(algorithms.AES(key), mode).encryptor().update(data[n * 512 : n * 512 + 512]))
    return b"".join(pieces)


@pytest.fixture(params=["compiled", "plain"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sectors through libcrypto, and through the plain passes."""
    if request.param == "plain":
        monkeypatch.setattr(sectors, "maybe_aes", lambda *key, **how: None)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("mode, source, size", AES)
def test_aes_agrees_with_openssl_in_both_directions(mode: str, source: str, size: int) -> None:
    spec, key = parse_cipher("aes", f"{mode}-{source}", size), key_of(size)
    data = random.Random(1).randbytes(512 * 9)
    cipher = SectorCipher(spec, key)
    secret = cipher.encrypt(FAR, data)
    assert secret == reference(spec, key, FAR, data)
    assert cipher.decrypt(FAR, secret) == data


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("mode", ["xts-plain64", "cbc-essiv:sha256", "ctr-plain64"])
@pytest.mark.parametrize("count", [1, PASS_SECTORS - 1, PASS_SECTORS, PASS_SECTORS + 1, 3 * PASS_SECTORS])
def test_any_number_of_sectors_goes_through_the_passes(mode: str, count: int) -> None:
    spec, key = parse_cipher("aes", mode, 32), key_of(32)
    data = random.Random(2).randbytes(512 * count)
    secret = reference(spec, key, 3, data)
    buffer = bytearray(secret)
    SectorCipher(spec, key).decrypt_in_place(3, buffer)
    assert buffer == data


def test_a_ctr_counter_carries_into_its_high_half() -> None:
    vectors = sectors.np.array([[0, 0xFEFFFFFFFFFFFFFF]], "<u8")  # low half, big-endian: 32 blocks cross its end
    blocks = sectors._counters(vectors, 32).tobytes()
    start = int.from_bytes(vectors.tobytes(), "big")
    assert [int.from_bytes(blocks[n * 16 : n * 16 + 16], "big") for n in range(32)] == [start + n for n in range(32)]


def test_plain_repeats_after_32_bits_and_plain64_does_not() -> None:
    data, key = bytes(512), key_of(32)
    short = SectorCipher(parse_cipher("aes", "cbc-plain", 32), key)
    long = SectorCipher(parse_cipher("aes", "cbc-plain64", 32), key)
    assert short.encrypt(1 << 32, data) == short.encrypt(0, data) == long.encrypt(0, data)
    assert long.encrypt(1 << 32, data) != long.encrypt(0, data)


@pytest.mark.parametrize("passphrase", [b"", b"short", b"exactly 16 bytes", b"longer than sixteen bytes"])
def test_the_legacy_key_is_the_passphrase_itself(passphrase: bytes) -> None:
    data, key = random.Random(4).randbytes(1024), (passphrase + bytes(16))[:16]
    secret = reference(parse_cipher("aes", "cbc-plain64", 16), key, 77, data)
    assert legacy_aes(passphrase).decrypt(77, secret) == data


@pytest.mark.parametrize(
    "name, mode, size, named",
    [
        ("serpent", "xts-plain64", 64, "serpent"),
        ("twofish", "cbc-plain64", 32, "twofish"),
        ("des3", "cbc-plain64", 24, "des3"),
        ("aes", "lrw-benbi", 32, "lrw"),
        ("aes", "xts", 32, "xts"),
        ("aes", "cbc-null", 32, "null"),
        ("aes", "cbc-essiv", 32, "essiv"),
        ("aes", "cbc-plain64:sha256", 32, "plain64:sha256"),
        ("aes", "cbc-essiv:sha1", 32, "20 bytes"),
        ("aes", "cbc-essiv:whirlpool", 32, "whirlpool"),
        ("aes", "xts-plain64", 48 + 1, "49 bytes"),
        ("aes", "cbc-plain64", 64, "64 bytes"),
        ("cast5", "xts-plain64", 32, "xts"),
    ],
)
def test_a_cipher_that_we_do_not_have_is_refused_by_name(name: str, mode: str, size: int, named: str) -> None:
    with pytest.raises(UnsupportedImage, match=named) as caught:
        parse_cipher(name, mode, size)
    assert len(caught.value.features) == 1


def test_a_bare_ecb_needs_no_iv() -> None:
    spec, key = parse_cipher("aes", "ecb", 16), key_of(16)
    assert SectorCipher(spec, key).encrypt(0, bytes(512)) == reference(spec, key, 0, bytes(512))


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(CryptoError, match="31 bytes"):
        SectorCipher(parse_cipher("aes", "cbc-plain64", 32), bytes(31))


@pytest.mark.parametrize("sector, length", [(0, 511), (0, 513), (-1, 512), ((1 << 64) - 1, 1024)])
def test_only_whole_numbered_sectors_are_taken(sector: int, length: int) -> None:
    with pytest.raises(OutOfRange, match=str(length)):
        legacy_aes(b"x").decrypt(sector, bytes(length))


def test_a_cipher_that_the_library_lacks_is_a_crypto_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sectors, "_algorithm", lambda name: getattr(sectors.algorithms, "NoSuchCipher"))  # noqa: B009
    with pytest.raises(CryptoError, match="'aes' is not available"):
        legacy_aes(b"x")


def test_reading_a_header_loads_neither_cryptography_nor_numpy() -> None:
    seen = "import sys, cowslice.codec.luks1, cowslice.codec.compression; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True).stdout
    assert "'cowslice.codec.luks1'" in loaded
    assert "'numpy'" not in loaded
    assert "'cryptography'" not in loaded
