"""LUKS1 headers: each check, the key derivation budget, and real images of qemu-img for each cipher it offers."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cowslice.codec.afsplit import af_merge, af_split
from cowslice.codec.luks1 import (
    DEFAULT_ROUNDS,
    SLOT_OFF,
    STRIPES,
    KeySlot,
    LuksHeader,
    decode_luks1,
    encode_luks1,
    slot_rounds,
    unlock,
)
from cowslice.codec.sectors import SectorCipher, legacy_aes
from cowslice.errors import CryptoError, MalformedImage, UnsupportedImage
from cowslice.testing import peers

KEY = random.Random(1).randbytes(32)
SALT = random.Random(2).randbytes(32)


def make_header(**changes: Any) -> LuksHeader:
    """An AES-256-CBC header with slot 1 in use: 256 sectors per slot."""
    slots = tuple(KeySlot(n == 1, 3 if n == 1 else 0, SALT, 8 + n * 256) for n in range(8))
    header = LuksHeader(
        cipher_name="aes",
        cipher_mode="cbc-essiv:sha256",
        hash_name="sha256",
        payload_offset=8 + 8 * 256,
        key_bytes=32,
        digest=hashlib.pbkdf2_hmac("sha256", KEY, SALT, 5, 20),
        digest_salt=SALT,
        digest_iterations=5,
        uuid="c0ffee00-0000-4000-8000-000000000000",
        slots=slots,
    )
    return replace(header, **changes)


def with_slot(number: int, **changes: Any) -> LuksHeader:
    slots = list(make_header().slots)
    slots[number] = replace(slots[number], **changes)
    return make_header(slots=tuple(slots))


def material(header: LuksHeader, slot: KeySlot, passphrase: bytes) -> bytes:
    """The stored bytes of a slot that opens with `passphrase`."""
    split = af_split(KEY, noise=random.Random(3).randbytes(len(KEY) * (STRIPES - 1)), hash_name=header.hash_name)
    derived = hashlib.pbkdf2_hmac(header.hash_name, passphrase, slot.salt, slot.iterations, header.key_bytes)
    return SectorCipher(header.cipher, derived).encrypt(0, split)


def reader(header: LuksHeader, *slots: tuple[int, bytes]) -> Callable[[int, int], bytes]:
    """Read the area of a header whose numbered slots open with the given passphrases."""
    area = bytearray(header.payload_offset * 512)
    for number, passphrase in slots:
        at = header.slots[number].key_offset * 512
        stored = material(header, header.slots[number], passphrase)
        area[at : at + len(stored)] = stored
    return lambda offset, length: bytes(area[offset : offset + length])


def test_a_header_comes_back() -> None:
    assert decode_luks1(encode_luks1(make_header()) + b"what follows") == make_header()


def patched(offset: int, data: bytes) -> bytes:
    raw = bytearray(encode_luks1(make_header()))
    raw[offset : offset + len(data)] = data
    return bytes(raw)


@pytest.mark.parametrize(
    "raw, field",
    [
        (encode_luks1(make_header())[:-1], "length"),
        (patched(0, b"SKUL"), "magic"),
        (patched(6, b"\0\2"), "version"),
        (patched(8, b"a" * 32), "cipher name"),
        (patched(40, b"cbc\x1b[31m\0"), "cipher mode"),
        (patched(72, b"\xff\0"), "hash"),
        (patched(104, struct.pack(">I", 7)), "payload offset"),
        (patched(108, struct.pack(">I", 0)), "key length"),
        (patched(108, struct.pack(">I", 65)), "key length"),
        (patched(108, b"\xff" * 4), "key length"),
        (patched(164, bytes(4)), "digest iterations"),
        (patched(208, bytes(4)), "state of slot 0"),
        (patched(208 + 48 + 4, bytes(4)), "iterations of slot 1"),
        (patched(208 + 48 * 7 + 44, struct.pack(">I", 3999)), "stripes of slot 7"),
        (patched(208 + 40, struct.pack(">I", 1)), "key offset of slot 0"),
        (patched(208 + 48 * 7 + 40, struct.pack(">I", 8 + 7 * 256 + 1)), "key offset of slot 7"),
        (patched(208 + 48 * 7 + 40, b"\xff" * 4), "key offset of slot 7"),
        (patched(208 + 48 * 3 + 40, struct.pack(">I", 8 + 2 * 256 + 255)), "key offset of slot 3"),
    ],
)
def test_each_broken_field_is_named(raw: bytes, field: str) -> None:
    with pytest.raises(MalformedImage) as caught:
        decode_luks1(raw)
    assert caught.value.field == field
    assert caught.value.where == "LUKS header"
    assert str(caught.value).isprintable()


def test_a_uuid_is_shown_printable_and_within_its_field() -> None:
    header = decode_luks1(patched(168, b"\xff\x1b" * 20))
    assert header.uuid.isprintable()
    assert decode_luks1(encode_luks1(header)) == header


def test_a_slot_may_end_where_the_payload_begins() -> None:
    header = make_header()
    assert header.slots[7].key_offset + header.slot_sectors == header.payload_offset
    assert decode_luks1(encode_luks1(header)) == header


def test_an_inactive_slot_may_have_no_iterations() -> None:
    assert struct.pack(">II", SLOT_OFF, 0) in encode_luks1(make_header())


def test_a_header_of_an_unknown_cipher_decodes_but_does_not_open() -> None:
    header = decode_luks1(encode_luks1(make_header(cipher_name="serpent")))
    with pytest.raises(UnsupportedImage, match="serpent"):
        unlock(header, b"pass", lambda offset, length: bytes(length))


def test_an_unknown_hash_does_not_open() -> None:
    with pytest.raises(UnsupportedImage, match="whirlpool"):
        unlock(make_header(hash_name="whirlpool"), b"pass", lambda offset, length: bytes(length))


def test_the_passphrase_of_any_active_slot_opens() -> None:
    header = with_slot(6, active=True, iterations=4)
    read = reader(header, (1, b"first"), (6, b"second"))
    assert unlock(header, b"first", read) == KEY
    assert unlock(header, b"second", read) == KEY


def test_a_wrong_passphrase_opens_nothing() -> None:
    with pytest.raises(CryptoError, match="none of the 1 active"):
        unlock(make_header(), b"wrong", reader(make_header(), (1, b"right")))


def test_an_inactive_slot_is_not_tried() -> None:
    header = with_slot(1, active=False)
    with pytest.raises(CryptoError, match="none of the 0 active"):
        unlock(header, b"pass", reader(make_header(), (1, b"pass")))


def test_a_slot_that_costs_too_much_is_not_computed() -> None:
    header = with_slot(1, iterations=0xFFFFFFFF)
    with pytest.raises(CryptoError, match="4294967300 hash rounds") as caught:
        unlock(header, b"pass", reader(make_header(), (1, b"pass")))
    assert "Raise the limit" in caught.value.hint


def test_a_digest_that_costs_too_much_is_not_computed() -> None:
    with pytest.raises(CryptoError, match="hash rounds"):
        unlock(make_header(digest_iterations=0xFFFFFFFF), b"pass", reader(make_header(), (1, b"pass")))


def test_a_costly_slot_does_not_lock_out_the_next() -> None:
    header = with_slot(0, active=True, iterations=DEFAULT_ROUNDS)
    assert unlock(header, b"pass", reader(make_header(), (1, b"pass"))) == KEY


def test_the_budget_is_shared_by_all_slots_and_can_be_raised() -> None:
    header = with_slot(2, active=True, iterations=3)
    read, each = reader(header, (1, b"first"), (2, b"second")), slot_rounds(header, header.slots[1])
    assert each == 3 + 5
    assert unlock(header, b"second", read, max_rounds=2 * each) == KEY
    with pytest.raises(CryptoError, match="slot 2"):
        unlock(header, b"second", read, max_rounds=2 * each - 1)


def test_a_long_key_costs_a_round_for_each_digest_of_it() -> None:
    header = make_header(key_bytes=64, cipher_mode="xts-plain64", hash_name="sha1")
    assert slot_rounds(header, header.slots[1]) == 3 * 4 + 5


def test_missing_key_material_is_malformed() -> None:
    with pytest.raises(MalformedImage, match="key material"):
        unlock(make_header(), b"pass", lambda offset, length: bytes(length // 2))


@pytest.mark.parametrize("hash_name", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("length", [16, 24, 32, 64])
def test_a_split_key_merges_again_and_no_stripe_is_spare(hash_name: str, length: int) -> None:
    key, noise = random.Random(5).randbytes(length), random.Random(6).randbytes(length * 9)
    split = af_split(key, noise=noise, hash_name=hash_name)
    assert af_merge(split, key_bytes=length, stripes=10, hash_name=hash_name) == key
    for stripe in range(10):
        hurt = bytearray(split)
        hurt[stripe * length] ^= 1
        assert af_merge(bytes(hurt), key_bytes=length, stripes=10, hash_name=hash_name) != key


def test_a_split_key_of_another_length_is_refused() -> None:
    with pytest.raises(CryptoError, match="31 bytes"):
        af_merge(bytes(31), key_bytes=16, stripes=2, hash_name="sha256")


# What qemu-img 7.2 can make: aes-192 only in xts (its split key must fill whole sectors), essiv only with a hash whose
# digest is a key of the cipher. It times key derivation for more than two seconds per image, so most of them are long.
QEMU_CIPHERS = [
    ("aes-256", "xts", "plain64", "sha256"),
    ("aes-256", "cbc", "essiv:sha256", "sha512"),
    ("aes-128", "ctr", "plain", "sha1"),
]
MORE_QEMU_CIPHERS = [
    *((alg, "xts", iv, "sha256") for alg in ("aes-128", "aes-192") for iv in ("plain", "plain64")),
    ("aes-256", "xts", "plain", "sha256"),
    *((alg, mode, "plain64", "sha256") for alg in ("aes-128", "aes-256") for mode in ("cbc", "ecb", "ctr")),
    ("aes-256", "cbc", "plain", "sha256"),
    *(("aes-256", mode, "essiv:sha256", "sha256") for mode in ("xts", "cbc", "ctr")),
    ("aes-128", "cbc", "essiv:md5", "sha256"),
    ("cast5-128", "cbc", "plain64", "sha256"),
    ("cast5-128", "ctr", "plain", "sha256"),
    *(("aes-256", "xts", "plain64", name) for name in ("sha1", "sha224", "sha384", "sha512", "ripemd160", "md5")),
]
CIPHERS = [*QEMU_CIPHERS, *(pytest.param(*names, marks=pytest.mark.long) for names in MORE_QEMU_CIPHERS)]


def create(image: Path, options: str) -> None:
    """Make a 4 MiB image. qemu-img may fail to time key derivation when it takes no measurable time: ask again."""
    secret = ["--object", "secret,id=s,data=correct horse"]
    command = ["create", "-q", "-f", "qcow2", *secret, "-o", f"encrypt.key-secret=s,{options}", image, "4M"]
    for _ in range(40):
        if peers.run("qemu-img", *command, expect=None).returncode == 0:
            return
    peers.run("qemu-img", *command)


def write_pattern(image: Path, kind: str) -> None:
    target = f"driver=qcow2,encrypt.format={kind},encrypt.key-secret=s,file.filename={image}"
    peers.qemu_io(
        target,
        "write -P 0x5a 1998848 131072",
        "write -P 0xc3 2097664 512",
        image_format=None,
        options=["--object", "secret,id=s,data=correct horse", "--image-opts"],
    )


def stored_clusters(raw: bytes) -> dict[int, int]:
    """Host offset of each allocated guest cluster of a small image with 64 KiB clusters."""
    l1 = struct.unpack_from(">Q", raw, 40)[0]
    l2 = struct.unpack_from(">Q", raw, l1)[0] & 0x00FFFFFFFFFFFE00
    words = struct.unpack_from(">8192Q", raw, l2)
    return {n * 65536: word & 0x00FFFFFFFFFFFE00 for n, word in enumerate(words) if word}


def luks_area(raw: bytes) -> bytes:
    """The clusters that the crypto header extension points to."""
    at = struct.unpack_from(">I", raw, 100)[0]
    while True:
        kind, length = struct.unpack_from(">II", raw, at)
        if kind == 0x0537BE77:
            offset, size = struct.unpack_from(">QQ", raw, at + 8)
            return raw[offset : offset + size]
        assert kind, "the image has no crypto header"
        at += 8 + (length + 7) // 8 * 8


def expected_guest(offset: int) -> bytes:
    content = bytearray(4 << 20)
    content[1998848 : 1998848 + 131072] = b"\x5a" * 131072
    content[2097664 : 2097664 + 512] = b"\xc3" * 512
    return bytes(content[offset : offset + 65536])


@peers.needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("algorithm, mode, source, hash_name", CIPHERS)
def test_an_image_of_qemu_opens_and_decrypts(
    algorithm: str, mode: str, source: str, hash_name: str, tmp_path: Path
) -> None:
    image = tmp_path / "luks.qcow2"
    generator, _, iv_hash = source.partition(":")
    hashed = f",encrypt.ivgen-hash-alg={iv_hash}" if iv_hash else ""
    create(
        image,
        f"encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg={algorithm},encrypt.cipher-mode={mode},"
        f"encrypt.ivgen-alg={generator},encrypt.hash-alg={hash_name}{hashed}",
    )
    write_pattern(image, "luks")
    raw = image.read_bytes()
    area = luks_area(raw)
    header = decode_luks1(area)
    assert encode_luks1(header) == area[:592]
    key = unlock(header, b"correct horse", lambda offset, length: area[offset : offset + length])
    cipher = SectorCipher(header.cipher, key)
    clusters = stored_clusters(raw)
    assert len(clusters) == 3
    for guest, host in clusters.items():
        secret = raw[host : host + 65536].ljust(65536, b"\0")
        assert cipher.decrypt(host // 512, secret) == expected_guest(guest)
    with pytest.raises(CryptoError):
        unlock(header, b"wrong horse", lambda offset, length: area[offset : offset + length])


@peers.needs("qemu-img", "qemu-io")
def test_a_legacy_image_of_qemu_decrypts_by_guest_sector(tmp_path: Path) -> None:
    image = tmp_path / "aes.qcow2"
    create(image, "encrypt.format=aes")
    write_pattern(image, "aes")
    raw = image.read_bytes()
    cipher = legacy_aes(b"correct horse")
    for guest, host in stored_clusters(raw).items():
        assert cipher.decrypt(guest // 512, raw[host : host + 65536].ljust(65536, b"\0")) == expected_guest(guest)
