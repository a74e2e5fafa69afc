"""Compressed payloads: both codecs, whatever follows the stream, and everything that must be refused."""

from __future__ import annotations

import os
import random
import struct
import threading
import zlib
from pathlib import Path

import pytest

from cowslice.codec import compression
from cowslice.codec.compression import MAX_FRAMES, Compression, compress_cluster, decompress_cluster
from cowslice.errors import BadOption, CorruptImage, UnsupportedImage
from cowslice.testing import peers

CLUSTER = 65536
KINDS = pytest.mark.parametrize("kind", list(Compression), ids=lambda kind: kind.name.lower())
EMPTY_FRAME = bytes.fromhex("28b52ffd2000010000")


def prose(length: int, seed: int = 1) -> bytes:
    """Bytes that compress to about a third, with matches at every distance."""
    chance = random.Random(seed)
    words = [chance.randbytes(chance.randrange(2, 12)) for _ in range(min(400, length // 32))]
    return b"".join(chance.choice(words) for _ in range(length // 3))[:length]


def frame(data: bytes, **options: int) -> bytes:
    zstd = compression._zstd()
    return zstd.compress(data, options={getattr(zstd.CompressionParameter, name): n for name, n in options.items()})


@pytest.fixture(params=["isal", "zlib"])
def inflater(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with ISA-L, and again as if it were not installed."""
    if request.param == "zlib":
        monkeypatch.setattr(compression, "_isal_zlib", lambda: None)
        monkeypatch.setattr(compression, "_igzip", lambda: None)
    return str(request.param)


@KINDS
@pytest.mark.parametrize("size", [512, 4096, CLUSTER, 2 << 20])
@pytest.mark.usefixtures("inflater")
def test_a_cluster_comes_back_with_the_next_stream_behind_it(kind: Compression, size: int) -> None:
    data = prose(size)
    payload = compress_cluster(kind, data)
    assert payload is not None
    assert decompress_cluster(kind, payload + prose(511, 2), size) == data


@KINDS
def test_what_does_not_shrink_is_not_compressed(kind: Compression) -> None:
    assert compress_cluster(kind, os.urandom(CLUSTER)) is None


@KINDS
def test_a_payload_is_never_as_long_as_its_cluster(kind: Compression) -> None:
    # the fewer random bytes, the shorter the payload: somewhere it crosses the limit
    for noise in range(480, 513):
        payload = compress_cluster(kind, random.Random(noise).randbytes(noise) + bytes(512 - noise))
        assert payload is None or len(payload) < 512


@KINDS
@pytest.mark.usefixtures("inflater")
def test_every_truncation_is_refused_or_already_whole(kind: Compression) -> None:
    data = prose(4096)
    payload = compress_cluster(kind, data)
    assert payload is not None
    for end in range(len(payload)):
        try:
            assert decompress_cluster(kind, payload[:end], 4096) == data
        except CorruptImage:
            continue
        assert end >= len(payload) - 2  # deflate: only the end mark of the last block was cut


@KINDS
@pytest.mark.usefixtures("inflater")
def test_a_stream_that_ends_early_is_damage_not_zeros(kind: Compression) -> None:
    payload = compress_cluster(kind, prose(CLUSTER - 512))
    assert payload is not None
    with pytest.raises(CorruptImage) as caught:
        decompress_cluster(kind, payload, CLUSTER)
    assert str(CLUSTER - 512) in str(caught.value) or kind == Compression.ZSTD
    assert caught.value.structure == "compressed cluster"


@KINDS
@pytest.mark.usefixtures("inflater")
@pytest.mark.parametrize("payload", [b"", bytes(512), b"\xff" * 512], ids=["nothing", "zeros", "ones"])
def test_bytes_that_are_no_stream_are_refused(kind: Compression, payload: bytes) -> None:
    with pytest.raises(CorruptImage):
        decompress_cluster(kind, payload, CLUSTER)


@pytest.mark.usefixtures("inflater")
def test_a_deflate_stream_may_be_longer_than_the_cluster() -> None:
    data = prose(2 * CLUSTER)
    payload = compress_cluster(Compression.DEFLATE, data)
    assert payload is not None
    assert decompress_cluster(Compression.DEFLATE, payload, CLUSTER) == data[:CLUSTER]


@pytest.mark.usefixtures("inflater")
def test_deflate_matches_32_kib_back_are_read() -> None:
    far = random.Random(3).randbytes(32000)
    data = far + far + bytes(CLUSTER - 64000)
    encoder = zlib.compressobj(9, zlib.DEFLATED, -15)
    payload = encoder.compress(data) + encoder.flush()
    assert len(payload) < 40000
    assert decompress_cluster(Compression.DEFLATE, payload, CLUSTER) == data


@pytest.mark.usefixtures("inflater")
@pytest.mark.parametrize("fast", [False, True])
def test_deflate_is_written_for_a_4_kib_window(fast: bool) -> None:
    data = prose(CLUSTER)
    payload = compress_cluster(Compression.DEFLATE, data, fast=fast)
    assert payload is not None
    decoder = zlib.decompressobj(-12)  # fed in small steps it cannot look back into its own output
    pieces = [decoder.decompress(payload, 100)]
    while not decoder.eof:
        pieces.append(decoder.decompress(decoder.unconsumed_tail, 100))
    assert b"".join(pieces) == data


@KINDS
def test_a_level_is_obeyed_and_an_impossible_one_refused(kind: Compression) -> None:
    data = prose(CLUSTER)
    quick, best = compress_cluster(kind, data, level=1), compress_cluster(kind, data, level=9)
    assert quick is not None
    assert best is not None
    assert len(best) < len(quick)
    with pytest.raises(BadOption, match="77"):
        compress_cluster(kind, data, level=77)


def test_zstd_frames_follow_one_another() -> None:
    data = prose(CLUSTER)
    payload = frame(data[:1000]) + EMPTY_FRAME + frame(data[1000:40000], checksum_flag=1) + frame(data[40000:])
    assert decompress_cluster(Compression.ZSTD, payload + EMPTY_FRAME + b"next", CLUSTER) == data


def test_a_zstd_skippable_frame_yields_nothing() -> None:
    data = prose(CLUSTER)
    skippable = struct.pack("<II", 0x184D2A50, 5) + b"hello"
    assert decompress_cluster(Compression.ZSTD, skippable + frame(data) + b"next", CLUSTER) == data


def test_the_last_zstd_frame_must_be_complete() -> None:
    data = prose(CLUSTER)
    payload = frame(data[:40000]) + frame(data[40000:], checksum_flag=1)
    with pytest.raises(CorruptImage):
        decompress_cluster(Compression.ZSTD, payload[:-1], CLUSTER)


def test_a_wrong_zstd_checksum_is_damage() -> None:
    payload = bytearray(frame(prose(CLUSTER), checksum_flag=1))
    payload[-1] ^= 1
    with pytest.raises(CorruptImage):
        decompress_cluster(Compression.ZSTD, payload, CLUSTER)


def test_a_zstd_frame_that_runs_past_the_cluster_is_damage() -> None:
    with pytest.raises(CorruptImage, match="does not end"):
        decompress_cluster(Compression.ZSTD, frame(prose(CLUSTER + 1)), CLUSTER)


def test_a_zstd_frame_of_unknown_content_size_is_read() -> None:
    data = prose(CLUSTER)
    encoder = compression._zstd().ZstdCompressor()
    payload = encoder.compress(data[:99]) + encoder.compress(data[99:]) + encoder.flush()
    assert decompress_cluster(Compression.ZSTD, payload, CLUSTER) == data


def test_endless_empty_zstd_frames_are_refused() -> None:
    assert decompress_cluster(Compression.ZSTD, EMPTY_FRAME + frame(bytes(CLUSTER)), CLUSTER) == bytes(CLUSTER)
    with pytest.raises(CorruptImage, match="frames"):
        decompress_cluster(Compression.ZSTD, EMPTY_FRAME * (MAX_FRAMES + 1), CLUSTER)


@KINDS
def test_a_payload_that_would_fill_memory_stops_at_the_cluster(kind: Compression) -> None:
    zeros = bytes(64 << 20)
    if kind == Compression.DEFLATE:
        encoder = zlib.compressobj(9, zlib.DEFLATED, -12)
        payload = encoder.compress(zeros) + encoder.flush()
        assert decompress_cluster(kind, payload, CLUSTER) == bytes(CLUSTER)
    else:
        with pytest.raises(CorruptImage):
            decompress_cluster(kind, frame(zeros), CLUSTER)


def test_an_unknown_compression_type_is_named() -> None:
    with pytest.raises(UnsupportedImage, match="type 2") as caught:
        decompress_cluster(2, b"", CLUSTER)
    assert caught.value.features == ("compression-type-2",)
    with pytest.raises(UnsupportedImage, match="type 3"):
        compress_cluster(3, bytes(CLUSTER))


@KINDS
def test_many_threads_decompress_beside_one_another(kind: Compression) -> None:
    clusters = [prose(CLUSTER, seed) for seed in range(8)]
    payloads = [compress_cluster(kind, data) or b"" for data in clusters]
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(n for n in list(range(8)) * 3 if decompress_cluster(kind, payloads[n], CLUSTER) != clusters[n])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@KINDS
@peers.needs("qemu-img", "qemu-io")
def test_qemu_reads_what_we_compress(kind: Compression, tmp_path: Path) -> None:
    """Swap the payload of a compressed cluster that qemu-img made for ours, and let QEMU compare the content."""
    raw, image = tmp_path / "raw", tmp_path / "image.qcow2"
    raw.write_bytes(prose(CLUSTER))
    peers.qemu_img("convert", "-c", "-O", "qcow2", "-o", f"compression_type={_name(kind)}", raw, image)
    offset, length = _only_compressed_span(image)
    with image.open("r+b") as file:
        file.seek(offset)
        theirs = file.read(length)
        assert decompress_cluster(kind, theirs, CLUSTER) == raw.read_bytes()
        for fast in (False, True):
            ours = compress_cluster(kind, raw.read_bytes(), fast=fast)
            assert ours is not None
            file.seek(offset)
            file.write(ours.ljust(8192, b"\xaa"))
            file.flush()
            _claim_sectors(image, offset, len(ours))
            peers.qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, image)


def _name(kind: Compression) -> str:
    return "zlib" if kind == Compression.DEFLATE else "zstd"


def _only_l2_entry(image: Path) -> tuple[int, int]:
    """Host offset and value of guest cluster 0's L2 entry (64 KiB clusters)."""
    content = image.read_bytes()
    l1 = struct.unpack_from(">Q", content, 40)[0]
    l2 = struct.unpack_from(">Q", content, l1)[0] & 0x00FFFFFFFFFFFE00
    return l2, struct.unpack_from(">Q", content, l2)[0]


def _only_compressed_span(image: Path) -> tuple[int, int]:
    word = _only_l2_entry(image)[1]
    offset = word & ((1 << 54) - 1)
    return offset, ((word >> 54 & 0xFF) + 1) * 512 - (offset & 511)


def _claim_sectors(image: Path, offset: int, length: int) -> None:
    place = _only_l2_entry(image)[0]
    sectors = (offset + length - 1) // 512 - offset // 512
    with image.open("r+b") as file:
        file.seek(place)
        file.write(struct.pack(">Q", 1 << 62 | sectors << 54 | offset))
