"""Whole zstd frames through libzstd: all of a cluster that ends where its frame does, or nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.codec import compression, unzstd
from cowslice.errors import CorruptImage

pytestmark = pytest.mark.skipif(not unzstd.available(), reason="libzstd is not here")
zstd: Any = compression._zstd()


@given(st.binary(min_size=1, max_size=4000), st.integers(-5, 19), st.booleans(), st.binary(max_size=600))
def test_what_was_compressed_comes_back_whatever_follows_it(
    data: bytes, level: int, checksum: bool, rest: bytes
) -> None:
    options = {zstd.CompressionParameter.compression_level: level, zstd.CompressionParameter.checksum_flag: checksum}
    assert unzstd.decompressed(zstd.compress(data, options=options) + rest, len(data)) == data


@pytest.mark.parametrize("size", [0, 999, 1001])
def test_a_frame_of_another_length_is_refused(size: int) -> None:
    assert unzstd.decompressed(zstd.compress(b"cow" * 333 + b"!"), size) is None


def test_a_frame_without_an_end_is_refused() -> None:
    assert unzstd.decompressed(zstd.compress(b"cow" * 1000)[:-1], 3000) is None


def test_several_frames_are_left_to_the_plain_decoder() -> None:
    frames = zstd.compress(b"a" * 2000) + zstd.compress(b"b" * 1000)
    assert unzstd.decompressed(frames, 3000) is None
    assert compression.decompress_cluster(compression.Compression.ZSTD, frames, 3000) == b"a" * 2000 + b"b" * 1000


def test_a_huge_window_is_left_to_the_decoder_that_limits_its_memory() -> None:
    encoder = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27,
                                           zstd.CompressionParameter.content_size_flag: False})
    frame = encoder.compress(b"cow" * 1000) + encoder.flush()
    assert frame[5] >> 3 == 27 - 10
    assert unzstd.decompressed(frame, 3000) is None


@given(st.integers(0, 1 << 32))
def test_of_a_damaged_frame_the_plain_decoder_says_the_same_bytes_or_it_is_refused(seed: int) -> None:
    chance = random.Random(seed)
    words = [chance.randbytes(5) for _ in range(50)]
    frame = bytearray(zstd.compress(b"".join(chance.choice(words) for _ in range(800))))
    frame[chance.randrange(len(frame))] ^= 1 << chance.randrange(8)
    found = unzstd.decompressed(bytes(frame), 4000)
    if found is not None:
        assert found == compression._frames(bytes(frame), 4000)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_decoded_as_the_plain_decoder_does(stream: bytes) -> None:
    found = unzstd.decompressed(b"\x28\xb5\x2f\xfd" + stream, 64)
    if found is None:
        return
    try:
        assert found == compression._frames(b"\x28\xb5\x2f\xfd" + stream, 64)
    except CorruptImage:
        pytest.fail("what the plain decoder refuses was taken")
