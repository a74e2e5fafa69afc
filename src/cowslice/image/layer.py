"""What one file of a chain answers: which piece of the guest disk lies where, and what its bytes are.

It does not know the other files of the chain. A piece never reaches beyond what was asked, nor beyond the layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from cowslice.format.entries import Kind
from cowslice.format.header import Header
from cowslice.storage.base import Storage
from cowslice.units import MiB

_ZEROS = memoryview(bytes(MiB))
BELOW = (Kind.UNALLOCATED, Kind.RESERVED)  # kinds that the next layer answers


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` guest bytes from `start` of one kind, never MIXED; all offsets are bytes.

    `host` is where byte `start` lies in the layer's data storage, or where a compressed stream begins; -1 for nowhere.
    `stored` bounds a compressed stream. `hole` says that the file itself stores nothing there and reads as zeros.
    """

    start: int
    length: int
    kind: Kind
    host: int = -1
    stored: int = 0
    hole: bool = False

    @property
    def below(self) -> bool:
        """Whether the next layer of the chain answers for these bytes."""
        return self.kind in BELOW


class Layer(ABC):
    """One image file. Methods may be called by many threads at once; offsets lie inside `size` (bytes)."""

    format: str
    size: int
    storage: Storage
    data: Storage
    header: Header | None = None

    @property
    def name(self) -> str:
        """The path or URL it was opened by; of a storage, the storage's name."""
        return self.storage.name

    @property
    def shows_offsets(self) -> bool:
        """Whether host offsets may be read without the image: false when the content is encrypted."""
        return True

    @abstractmethod
    def piece_at(self, offset: int, length: int) -> Piece:
        """Return the piece that begins at `offset`, at most `length` (>= 1) bytes long. Raises CorruptImage."""

    @abstractmethod
    def fill(self, piece: Piece, buffer: memoryview) -> None:
        """Write the bytes of a piece of this layer that is not `below` into `buffer`, which has its length."""

    def fill_all(self, pieces: Sequence[Piece], buffers: Sequence[memoryview]) -> None:
        """Fill several pieces as `fill` does; a layer may read or decompress them together."""
        for piece, buffer in zip(pieces, buffers, strict=True):
            self.fill(piece, buffer)

    def with_holes(self, piece: Piece) -> Piece:
        """Return the beginning of the piece up to where the storage changes between stored and not stored."""
        return piece


def narrowed(piece: Piece, data: Storage) -> Piece:
    """The beginning of a piece with host bytes that is all stored or all a hole in `data`."""
    span = next(iter(data.extents(piece.host, piece.length)))
    length = min(piece.length, span.length)
    return Piece(piece.start, length, piece.kind, piece.host, piece.stored, hole=not span.data)


def fill_zeros(buffer: memoryview) -> None:
    """Write zeros over the whole buffer of bytes."""
    for start in range(0, len(buffer), len(_ZEROS)):
        part = buffer[start : start + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]
