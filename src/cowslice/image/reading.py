"""The truth about reading: for each piece of the span, the layer that answers fills it.

It does not know caches, threads or the compiled path, which only does the same faster. Every byte of the buffer is
written, or an error is raised and the buffer's content is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence

from cowslice.format.entries import Kind
from cowslice.image.layer import Layer, Piece, fill_zeros
from cowslice.image.mapping import resolve
from cowslice.units import MiB

MOST_TOGETHER = 16 * MiB  # compressed clusters that are looked up before the first is read: many times what cores need


def read_into(layers: Sequence[Layer], offset: int, buffer: memoryview) -> None:
    """Fill `buffer`, a view of bytes, with the guest bytes from `offset`. The span lies inside the top layer.

    Raises CorruptImage, StorageError or CryptoError for the first piece that cannot be read.
    """
    done = 0
    while done < len(buffer):
        done += read_piece(layers, offset + done, buffer[done:])


def read_piece(layers: Sequence[Layer], offset: int, buffer: memoryview) -> int:
    """Fill the beginning of `buffer`, as far as it is alike; return how many bytes that are. Raises as read_into."""
    depth, piece = resolve(layers, offset, len(buffer))
    if piece.kind is Kind.COMPRESSED and piece.length < len(buffer):
        return _read_compressed(layers, depth, piece, buffer)
    part = buffer[: piece.length]
    if piece.below:
        fill_zeros(part)
    else:
        layers[depth].fill(piece, part)
    return piece.length


def _read_compressed(layers: Sequence[Layer], depth: int, piece: Piece, buffer: memoryview) -> int:
    """Fill the compressed clusters that follow one another in one layer: together they use all cores."""
    pieces, parts, done = [], [], 0
    while piece.kind is Kind.COMPRESSED:
        pieces.append(piece)
        parts.append(buffer[done : done + piece.length])
        done += piece.length
        if done >= min(len(buffer), MOST_TOGETHER):
            break
        below, piece = resolve(layers, piece.start + piece.length, len(buffer) - done)
        if below != depth:
            break
    layers[depth].fill_all(pieces, parts)
    return done
