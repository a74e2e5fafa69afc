"""Whole streams through libdeflate: all of a cluster that ends where its stream does, or nothing."""

from __future__ import annotations

import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.codec import inflate

pytestmark = pytest.mark.skipif(not inflate.available(), reason="libdeflate is not here")


def deflated(data: bytes, *, level: int = 6, window: int = -15, end: int = zlib.Z_FINISH) -> bytes:
    encoder = zlib.compressobj(level, zlib.DEFLATED, window)
    return encoder.compress(data) + encoder.flush(end)


@given(st.binary(min_size=1, max_size=4000), st.integers(0, 9), st.integers(-15, -9), st.binary(max_size=600))
def test_what_was_deflated_comes_back_whatever_follows_it(data: bytes, level: int, window: int, rest: bytes) -> None:
    assert inflate.inflated(deflated(data, level=level, window=window) + rest, len(data)) == data


@pytest.mark.parametrize("size", [999, 1001])
def test_a_stream_of_another_length_is_refused(size: int) -> None:
    assert inflate.inflated(deflated(bytes(1000)), size) is None


def test_a_stream_without_an_end_is_refused() -> None:
    assert inflate.inflated(deflated(b"cow" * 1000, end=zlib.Z_SYNC_FLUSH), 3000) is None


@given(st.integers(0, 1 << 32))
def test_of_a_damaged_stream_zlib_says_the_same_bytes_or_it_is_refused(seed: int) -> None:
    chance = random.Random(seed)
    words = [chance.randbytes(5) for _ in range(50)]
    stream = bytearray(deflated(b"".join(chance.choice(words) for _ in range(800))))
    stream[chance.randrange(len(stream))] ^= 1 << chance.randrange(8)
    found = inflate.inflated(stream, 4000)
    if found is not None:
        assert found == zlib.decompressobj(-15).decompress(stream, 4000)
