"""AES through the system's libcrypto: one cipher for many threads, or none where only the plain passes can."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from cowslice.codec import evp
from cowslice.codec.cipherspec import parse_cipher
from cowslice.codec.sectors import SectorCipher

here = pytest.mark.skipif(not evp.available(), reason="libcrypto is not here")
KEY = random.Random(1).randbytes(64)
DATA = random.Random(2).randbytes(512 * 40)


@here
@pytest.mark.parametrize("mode, size", [("xts", 32), ("xts", 64), ("cbc", 16), ("cbc", 24), ("ctr", 32), ("ecb", 16)])
def test_what_is_enciphered_is_deciphered_in_place_and_beside(mode: str, size: int) -> None:
    cipher = evp.maybe_aes(mode, KEY[:size], short_numbers=False)
    assert cipher is not None
    secret = cipher.transformed(7, DATA, enciphering=True)
    assert secret is not None
    assert secret != DATA
    assert cipher.transformed(7, secret, enciphering=False) == DATA
    buffer = bytearray(secret)
    assert cipher.decipher_in_place(7, buffer) == 40
    assert buffer == DATA


@here
def test_a_key_that_libcrypto_refuses_is_left_to_the_plain_passes() -> None:
    key = KEY[:32] * 2
    assert evp.maybe_aes("xts", key, short_numbers=False) is None
    cipher = SectorCipher(parse_cipher("aes", "xts-plain64", 64), key)
    assert cipher.compiled is None
    assert cipher.decrypt(3, cipher.encrypt(3, DATA)) == DATA


@pytest.mark.parametrize("mode, size", [("xts", 48), ("xts", 20), ("gcm-siv", 32), ("cbc", 0), ("cbc", 80)])
def test_a_mode_or_key_length_that_nobody_has_is_none(mode: str, size: int) -> None:
    assert evp.maybe_aes(mode, bytes(size), short_numbers=False) is None


def test_without_the_library_the_plain_passes_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = parse_cipher("aes", "xts-plain64", 64)
    before = SectorCipher(spec, KEY).encrypt(5, DATA)
    monkeypatch.setattr(evp, "available", lambda: False)
    cipher = SectorCipher(spec, KEY)
    assert cipher.compiled is None
    assert cipher.encrypt(5, DATA) == before
    buffer = bytearray(before)
    cipher.decrypt_in_place(5, buffer)
    assert buffer == DATA


def test_many_threads_share_one_cipher() -> None:
    cipher = SectorCipher(parse_cipher("aes", "cbc-essiv:sha256", 32), KEY[:32])
    secrets = [cipher.encrypt(number, DATA) for number in range(16)]

    def turn(number: int) -> bool:
        buffer = bytearray(secrets[number])
        cipher.decrypt_in_place(number, buffer)
        return buffer == DATA and cipher.encrypt(number, DATA) == secrets[number]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(turn, [number % 16 for number in range(800)]))
