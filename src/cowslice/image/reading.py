"""The truth about reading: for each piece of the span, the layer that answers fills it.

It does not know caches, threads or the compiled path, which only does the same faster. Every byte of the buffer is
written, or an error is raised and the buffer's content is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence

from cowslice.image.layer import Layer, fill_zeros
from cowslice.image.mapping import resolve


def read_into(layers: Sequence[Layer], offset: int, buffer: memoryview) -> None:
    """Fill `buffer`, a view of bytes, with the guest bytes from `offset`. The span lies inside the top layer.

    Raises CorruptImage, StorageError or CryptoError for the first piece that cannot be read.
    """
    done = 0
    while done < len(buffer):
        done += read_piece(layers, offset + done, buffer[done:])


def read_piece(layers: Sequence[Layer], offset: int, buffer: memoryview) -> int:
    """Fill the beginning of `buffer`, as far as it is one piece; return its length in bytes. Raises as read_into."""
    depth, piece = resolve(layers, offset, len(buffer))
    part = buffer[: piece.length]
    if piece.below:
        fill_zeros(part)
    else:
        layers[depth].fill(piece, part)
    return piece.length
