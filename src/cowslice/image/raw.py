"""A raw file as a layer: guest byte n is file byte n.

It does not know formats. A disk is made of sectors, so a file whose length is no multiple of 512 reads zeros up to the
next one, as with QEMU.
"""

from __future__ import annotations

from cowslice.format.entries import Kind
from cowslice.image.layer import Layer, Piece, fill_zeros, narrowed
from cowslice.storage.base import Storage
from cowslice.units import SECTOR, round_up


class RawLayer(Layer):
    """The bytes of `storage` as they are. Its size is taken once, here."""

    format = "raw"

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.data = storage
        self.size = round_up(storage.length(), SECTOR)

    def piece_at(self, offset: int, length: int) -> Piece:
        return Piece(offset, length, Kind.NORMAL, host=offset)

    def with_holes(self, piece: Piece) -> Piece:
        found = narrowed(piece, self.storage)
        if not found.hole:
            return found
        return Piece(found.start, found.length, Kind.ZERO_ALLOCATED, host=found.host, hole=True)

    def fill(self, piece: Piece, buffer: memoryview) -> None:
        if piece.kind is Kind.NORMAL:
            self.storage.read_into(piece.host, buffer)
        else:
            fill_zeros(buffer)
