"""From a guest span to what holds it: which layer of the chain answers, where, and with what meaning.

It reads no guest data. Extents carry the meaning and the numbers of `qemu-img map`; neighbours that continue each other
are one extent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from cowslice.format.entries import Kind
from cowslice.image.layer import Layer, Piece


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` guest bytes from `start` that are all alike, in bytes.

    `depth`: the layer that answers, 0 on top. `present`: that layer itself says what these bytes are. `zero`: they
    read as zeros. `data`: they are stored. `offset` is their place in `filename`, None when it cannot be read plainly.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None
    filename: str | None

    @property
    def end(self) -> int:
        return self.start + self.length

    def continued_by(self, other: Extent) -> bool:
        """Whether `other` begins where this one ends, in guest and host, and is like it."""
        if other.start != self.start + self.length or other.depth != self.depth or other.filename != self.filename:
            return False
        if (other.present, other.zero, other.data, other.compressed) != \
                (self.present, self.zero, self.data, self.compressed):
            return False
        return other.offset == (None if self.offset is None else self.offset + self.length)


def resolve(layers: Sequence[Layer], offset: int, length: int, *, holes: bool = False) -> tuple[int, Piece]:
    """Find the layer that answers for the byte at `offset`, as (depth, piece from there, at most `length` long).

    A piece that is still `below` reads as zeros: no layer holds it. With `holes` pieces also end where the layer's
    file changes between stored and not stored.
    """
    last = len(layers) - 1
    for depth, layer in enumerate(layers):
        piece = layer.piece_at(offset, length)
        if not piece.below:
            return depth, layer.with_holes(piece) if holes else piece
        if depth == last or offset >= layers[depth + 1].size:
            break
        length = min(piece.length, layers[depth + 1].size - offset)
    return depth, piece


def extents(layers: Sequence[Layer], offset: int, length: int) -> Iterator[Extent]:
    """Yield the extents that cover exactly the span, in order, not merged."""
    end = offset + length
    while offset < end:
        depth, piece = resolve(layers, offset, end - offset, holes=True)
        yield extent_of(layers[depth], depth, piece)
        offset += piece.length


def extent_of(layer: Layer, depth: int, piece: Piece) -> Extent:
    """Say what a piece means."""
    kind = piece.kind
    stored = kind in (Kind.NORMAL, Kind.COMPRESSED)
    offset = piece.host if piece.host >= 0 and kind is not Kind.COMPRESSED and layer.shows_offsets else None
    return Extent(
        start=piece.start, length=piece.length, depth=depth, present=not piece.below,
        zero=not stored or piece.hole, data=stored, compressed=kind is Kind.COMPRESSED,
        offset=offset, filename=None if offset is None else layer.data.name)


def merged(pieces: Iterable[Extent]) -> Iterator[Extent]:
    """Join neighbours that continue each other."""
    current: Extent | None = None
    for extent in pieces:
        if current is not None and current.continued_by(extent):
            current = replace(current, length=current.length + extent.length)
            continue
        if current is not None:
            yield current
        current = extent
    if current is not None:
        yield current
