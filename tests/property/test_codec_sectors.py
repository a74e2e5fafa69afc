"""Sector ciphers over any data, and LUKS headers over any fields and any bytes."""

from __future__ import annotations

import contextlib
import copy

from hypothesis import given
from hypothesis import strategies as st

from cowslice.codec.cipherspec import CipherSpec, parse_cipher
from cowslice.codec.luks1 import HEADER_BYTES, SLOTS, KeySlot, LuksHeader, decode_luks1, encode_luks1
from cowslice.codec.sectors import SectorCipher
from cowslice.errors import MalformedImage, UnsupportedImage

MODES = st.sampled_from(["xts", "cbc", "ctr", "ecb"])
SOURCES = st.sampled_from(["plain", "plain64", "essiv:sha256", "essiv:md5"])
NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=31)


@st.composite
def ciphers(draw: st.DrawFn) -> SectorCipher:
    mode, size = draw(MODES), draw(st.sampled_from([16, 24, 32]))
    spec = parse_cipher("aes", f"{mode}-{draw(SOURCES)}", size * (2 if mode == "xts" else 1))
    return SectorCipher(spec, draw(st.binary(min_size=spec.key_bytes, max_size=spec.key_bytes)))


@given(
    cipher=ciphers(), first=st.integers(0, 1 << 55), seed=st.binary(min_size=1, max_size=64), count=st.integers(0, 9)
)
def test_what_is_encrypted_decrypts_and_each_sector_stands_alone(
    cipher: SectorCipher, first: int, seed: bytes, count: int
) -> None:
    data = (seed * (512 * count // len(seed) + 1))[: 512 * count]
    secret = cipher.encrypt(first, data)
    assert cipher.decrypt(first, secret) == data
    buffer = bytearray(secret)
    cipher.decrypt_in_place(first, buffer)
    assert buffer == data
    for n in range(count):
        assert cipher.decrypt(first + n, secret[n * 512 : n * 512 + 512]) == data[n * 512 : n * 512 + 512]


FIRSTS = st.integers(0, 1 << 32) | st.sampled_from([(1 << 32) - 3, 1 << 32, 1 << 55, (1 << 64) - 300])


@given(cipher=ciphers(), first=FIRSTS, seed=st.binary(min_size=1, max_size=64), count=st.integers(0, 9) | st.just(300))
def test_compiled_and_plain_passes_say_the_same(cipher: SectorCipher, first: int, seed: bytes, count: int) -> None:
    plain = plain_twin(cipher)
    data = (seed * (512 * count // len(seed) + 1))[: 512 * count]
    secret = plain.encrypt(first, data)
    assert cipher.encrypt(first, data) == secret
    assert cipher.decrypt(first, secret) == plain.decrypt(first, secret) == data
    ours, theirs = bytearray(data), bytearray(data)
    cipher.decrypt_in_place(first, ours)
    plain.decrypt_in_place(first, theirs)
    assert ours == theirs


def plain_twin(cipher: SectorCipher) -> SectorCipher:
    """The same cipher, of plain passes only."""
    twin = copy.copy(cipher)
    twin.compiled = None
    return twin


@st.composite
def headers(draw: st.DrawFn) -> LuksHeader:
    key_bytes = draw(st.sampled_from([16, 24, 32, 48, 64]))
    step = -(-key_bytes * 4000 // 4096) * 8
    order = draw(st.permutations(range(SLOTS)))
    slots = tuple(
        KeySlot(
            draw(st.booleans()),
            draw(st.integers(1, 2**32 - 1)),
            draw(st.binary(min_size=32, max_size=32)),
            8 + n * step,
        )
        for n in order
    )
    return LuksHeader(
        cipher_name=draw(NAMES),
        cipher_mode=draw(NAMES),
        hash_name=draw(NAMES),
        payload_offset=8 + SLOTS * step + draw(st.integers(0, 1 << 20)),
        key_bytes=key_bytes,
        digest=draw(st.binary(min_size=20, max_size=20)),
        digest_salt=draw(st.binary(min_size=32, max_size=32)),
        digest_iterations=draw(st.integers(1, 2**32 - 1)),
        uuid=draw(st.text("0123456789abcdef-", max_size=40)),
        slots=slots,
    )


@given(header=headers())
def test_any_sound_header_comes_back(header: LuksHeader) -> None:
    assert decode_luks1(encode_luks1(header)) == header


@given(header=headers(), flips=st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255)), max_size=4))
def test_a_hurt_header_decodes_to_its_bytes_or_is_malformed(header: LuksHeader, flips: list[tuple[int, int]]) -> None:
    raw = bytearray(encode_luks1(header))
    for place, change in flips:
        raw[place] ^= change
    with contextlib.suppress(MalformedImage):
        again = decode_luks1(bytes(raw))
        assert decode_luks1(encode_luks1(again)) == again


@given(raw=st.binary(max_size=700))
def test_any_bytes_are_a_header_or_malformed(raw: bytes) -> None:
    with contextlib.suppress(MalformedImage):
        decode_luks1(raw)
    with contextlib.suppress(MalformedImage):
        decode_luks1(b"LUKS\xba\xbe\0\1" + raw)


@given(name=NAMES | st.sampled_from(["aes", "cast5", "sm4"]), mode=NAMES | MODES, size=st.integers(0, 2**32 - 1))
def test_any_cipher_name_is_one_that_works_or_is_unsupported(name: str, mode: str, size: int) -> None:
    with contextlib.suppress(UnsupportedImage):
        assert isinstance(parse_cipher(name, mode, size), CipherSpec)
