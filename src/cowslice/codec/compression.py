"""The payload of a compressed cluster: raw deflate or zstd frames, to and from exactly one cluster of guest bytes.

It does not know where a payload is stored. Input and output are bounded by the cluster, whatever the payload claims,
and a payload that yields less than a cluster is an error, never zeros.
"""

from __future__ import annotations

import sys
import zlib
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING, Any

from cowslice.codec import inflate, unzstd
from cowslice.errors import BadOption, CorruptImage, UnsupportedImage

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STRUCTURE = "compressed cluster"
# Read with the largest window that deflate has: writers other than QEMU may use it. Negative: no zlib wrapper.
READ_WINDOW = -15
# Write with 4 KiB: QEMU's reader asks for no more.
WRITE_WINDOW = -12
WRITE_MEMORY_LEVEL = 9
# Each frame costs a codec context (about 10 us). One frame per cluster is what is written in practice; an empty frame
# takes 9 bytes, so a hostile 2 MiB cluster could hold half a million of them.
MAX_FRAMES = 4096
DEFLATE_LEVELS = range(10)
ZSTD_LEVELS = range(-131072, 23)


class Compression(IntEnum):
    """The header's compression_type."""

    DEFLATE = 0
    ZSTD = 1


def decompress_cluster(kind: int, payload: ReadableBuffer, cluster_size: int) -> bytes:
    """Return the `cluster_size` bytes that `payload` stands for; what follows the stream in it is ignored.

    Releases the GIL while it works. Raises CorruptImage if the payload is damaged or yields another number of bytes,
    UnsupportedImage if `kind` is not a Compression. Source: specification "Compressed Clusters Descriptor".
    """
    if kind == Compression.DEFLATE:
        return _inflate(payload, cluster_size)
    if kind == Compression.ZSTD:
        return _unzstd(payload, cluster_size)
    raise _unknown(kind)


def compress_cluster(kind: int, data: ReadableBuffer, *, level: int | None = None, fast: bool = False) -> bytes | None:
    """Return the payload of one whole cluster, or None where it would not be smaller than the cluster.

    `level` is that of the library (deflate 0..9, zstd -131072..22; None: its default). `fast` asks for the vectorised
    deflate: ten times the speed for payloads 5 % larger; without ISA-L it means level 1. Releases the GIL.
    Raises BadOption for another level, UnsupportedImage if `kind` is not a Compression.
    """
    view = memoryview(data)
    if kind == Compression.DEFLATE:
        payload = _deflate(view, _level(level, DEFLATE_LEVELS), fast)
    elif kind == Compression.ZSTD:
        payload = _zstd().compress(view, _level(level, ZSTD_LEVELS))
    else:
        raise _unknown(kind)
    return payload if len(payload) < view.nbytes else None


def _inflate(payload: ReadableBuffer, cluster_size: int) -> bytes:
    """Inflate with libdeflate, else with ISA-L, both much faster than zlib; what they refuse, zlib judges."""
    whole = inflate.inflated(payload, cluster_size)
    if whole is not None:
        return whole
    isal = None if inflate.available() else _isal_zlib()
    if isal is not None:
        try:
            data: bytes = isal.decompressobj(READ_WINDOW).decompress(payload, cluster_size)
            if len(data) == cluster_size:
                return data
        except isal.error:
            pass
    try:
        data = zlib.decompressobj(READ_WINDOW).decompress(payload, cluster_size)
    except zlib.error as error:
        raise _damaged("deflate", str(error)) from None
    return _whole(data, cluster_size, "deflate")


def _unzstd(payload: ReadableBuffer, cluster_size: int) -> bytes:
    """Decode one frame with the system's library, where that is here; what it refuses, frame after frame."""
    data = unzstd.decompressed(payload, cluster_size)
    return _frames(payload, cluster_size) if data is None else data


def _frames(payload: ReadableBuffer, cluster_size: int) -> bytes:
    """Decode frame after frame until the cluster is full."""
    zstd = _zstd()
    rest = memoryview(payload)
    pieces: list[bytes] = []
    missing = cluster_size
    for _ in range(MAX_FRAMES):
        try:
            frame = rest[: zstd.get_frame_size(rest)]
            piece = _one_frame(zstd.ZstdDecompressor(), frame, missing)
        except zstd.ZstdError as error:
            raise _damaged("zstd", f"{error} after {cluster_size - missing} of {cluster_size} bytes") from None
        pieces.append(piece)
        missing -= len(piece)
        if not missing:
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        rest = rest[len(frame) :]
    raise _damaged("zstd", f"more than {MAX_FRAMES} frames for {cluster_size} bytes")


def _one_frame(decoder: Any, frame: memoryview, most: int) -> bytes:
    """All of one frame, which must end within `most` bytes: its checksum is read even if nothing is left to fill."""
    piece: bytes = decoder.decompress(frame, most)
    while not decoder.eof:
        more: bytes = decoder.decompress(b"", most - len(piece) + 1)
        piece += more
        if len(piece) > most or not (more or decoder.eof):
            raise _damaged("zstd", f"the last frame does not end with the cluster, {most} bytes from its start")
    return piece


def _deflate(data: memoryview, level: int | None, fast: bool) -> bytes:
    igzip = _igzip() if fast else None
    if igzip is not None:
        payload: bytes = igzip.compress(
            data, igzip.ISAL_BEST_COMPRESSION, igzip.COMP_DEFLATE, igzip.MEM_LEVEL_DEFAULT, -WRITE_WINDOW
        )
        return payload
    chosen = level if level is not None else zlib.Z_BEST_SPEED if fast else zlib.Z_DEFAULT_COMPRESSION
    encoder = zlib.compressobj(chosen, zlib.DEFLATED, WRITE_WINDOW, WRITE_MEMORY_LEVEL)
    return encoder.compress(data) + encoder.flush()


def _level(level: int | None, allowed: range) -> int | None:
    if level is None or level in allowed:
        return level
    raise BadOption(f"compression level is {level}, expected {allowed[0]} to {allowed[-1]}")


def _whole(data: bytes, cluster_size: int, codec: str) -> bytes:
    if len(data) == cluster_size:
        return data
    raise _damaged(codec, f"it ends after {len(data)} bytes, expected {cluster_size}")


def _damaged(codec: str, why: str) -> CorruptImage:
    return CorruptImage(f"the {codec} stream of a compressed cluster is damaged: {why}", structure=STRUCTURE)


def _unknown(kind: int) -> UnsupportedImage:
    message = f"compression type {kind} is not known, expected 0 (deflate) or 1 (zstd)"
    return UnsupportedImage(message, features=(f"compression-type-{kind}",))


@cache
def _isal_zlib() -> Any:
    try:
        from isal import isal_zlib
    except ImportError:
        return None
    return isal_zlib


@cache
def _igzip() -> Any:
    try:
        from isal import igzip_lib
    except ImportError:
        return None
    return igzip_lib


@cache
def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd
