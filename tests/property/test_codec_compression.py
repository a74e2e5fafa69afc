"""Compression for any content, and decompression of any bytes: the cluster or an ImageError, nothing else."""

from __future__ import annotations

import contextlib
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowslice.codec import compression
from cowslice.codec.compression import Compression, compress_cluster, decompress_cluster
from cowslice.errors import CorruptImage

KINDS = st.sampled_from(list(Compression))
CONTENT = st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.integers(1, 300)), min_size=1, max_size=20)
TAIL = st.binary(max_size=600)


def cluster_of(pieces: list[tuple[bytes, int]], size: int) -> bytes:
    content = b"".join(piece * times for piece, times in pieces)
    return (content * (size // len(content) + 1))[:size]


@given(kind=KINDS, pieces=CONTENT, bits=st.integers(9, 17), tail=TAIL, fast=st.booleans())
def test_any_content_comes_back_whatever_follows_its_stream(
    kind: Compression, pieces: list[tuple[bytes, int]], bits: int, tail: bytes, fast: bool
) -> None:
    data = cluster_of(pieces, 1 << bits)
    payload = compress_cluster(kind, data, fast=fast)
    if payload is not None:
        assert len(payload) < len(data)
        assert decompress_cluster(kind, payload + tail, len(data)) == data


@given(kind=KINDS, noise=st.binary(max_size=2000))
def test_any_bytes_yield_a_whole_cluster_or_an_image_error(kind: Compression, noise: bytes) -> None:
    with contextlib.suppress(CorruptImage):
        assert len(decompress_cluster(kind, noise, 512)) == 512


@given(kind=KINDS, pieces=CONTENT, flips=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 7)), max_size=4))
def test_flipped_bits_yield_a_whole_cluster_or_an_image_error(
    kind: Compression, pieces: list[tuple[bytes, int]], flips: list[tuple[int, int]]
) -> None:
    payload = bytearray(compress_cluster(kind, cluster_of(pieces, 4096)) or b"x")
    for place, bit in flips:
        payload[place % len(payload)] ^= 1 << bit
    with contextlib.suppress(CorruptImage):
        assert len(decompress_cluster(kind, payload, 4096)) == 4096


@settings(max_examples=200)
@given(pieces=CONTENT, window=st.integers(9, 15), level=st.integers(1, 9), cut=st.integers(0, 100), tail=TAIL)
def test_isal_and_zlib_agree_on_every_stream(
    pieces: list[tuple[bytes, int]], window: int, level: int, cut: int, tail: bytes
) -> None:
    isal = pytest.importorskip("isal")
    assert isal
    encoder = zlib.compressobj(level, zlib.DEFLATED, -window)
    payload = encoder.compress(cluster_of(pieces, 8192)) + encoder.flush()
    damaged = payload[: len(payload) - cut] + tail
    assert _outcome(damaged) == _outcome_of_zlib(damaged)


def _outcome(payload: bytes) -> bytes | None:
    try:
        return decompress_cluster(Compression.DEFLATE, payload, 8192)
    except CorruptImage:
        return None


def _outcome_of_zlib(payload: bytes) -> bytes | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "_isal_zlib", lambda: None)
        return _outcome(payload)
