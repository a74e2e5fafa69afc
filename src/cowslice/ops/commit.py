"""Copy what the layers above a base hold into that base, then empty the top one.

It does not know terminals. Nothing of the top file changes before the base is stable: whenever the work is cut off, the
top disk reads as it did, and committing again completes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

from cowslice.errors import ReferenceRefused, UnsupportedImage
from cowslice.format.entries import Kind
from cowslice.image.gate import shown
from cowslice.image.image import Image
from cowslice.image.layer import Layer
from cowslice.image.mapping import resolve
from cowslice.image.options import NAMED, OpenOptions
from cowslice.image.reading import read_into
from cowslice.ops.apart import Below, View, below, open_apart, open_whole, rooted, same_file
from cowslice.ops.pace import Pace
from cowslice.units import SECTOR, MiB, round_up

CHUNK = 1 * MiB
_LOOK_AHEAD = 1 << 30  # bytes of one span that is not read: it keeps progress moving
_ZERO_KINDS = (Kind.ZERO, Kind.ZERO_ALLOCATED)

Progress = Callable[[int, int], None]
Span = tuple[int, int, str]


def commit(path: str, options: OpenOptions, *, base: str | None = None, keep: bool = False, rate: int = 0,
           progress: Progress | None = None) -> None:
    """Commit the image at `path` into its backing file, or into `base`, a file further down its chain.

    The image is emptied, unless `keep` or a `base` is given. A base that is shorter grows. `rate`: bytes copied in a
    second, 0 for any. `progress(done, total)` counts bytes. Raises UnsupportedImage without such a base,
    ReferenceRefused, and the errors of opening, reading and writing.
    """
    keep, pace = keep or base is not None, Pace(rate)
    with ExitStack() as stack:
        top = stack.enter_context(open_apart(path, options, View(), writable=not keep))
        options = rooted(options, path)
        above, found = _above(stack, top, options, base)
        with _open_base(found, options, top.size) as target:
            _copy([image.layers[0] for image in above], target, pace, progress)
        if not keep:
            top.vacate()
            top.flush()


def _above(stack: ExitStack, top: Image, options: OpenOptions, base: str | None) -> tuple[list[Image], Below]:
    """The images above the base, top first, and the base."""
    above, seen = [top], [top.path]
    while True:
        found = below(above[-1], options)
        if found is None:
            raise _no_base(top, base)
        if any(same_file(found.path, path) for path in seen):
            raise ReferenceRefused(f"'{shown(found.path)}' is its own backing file, directly or through others")
        if base is None or base == found.name or same_file(base, found.path):
            return above, found
        if found.format == "raw" or len(above) >= options.max_depth:
            raise _no_base(top, base)
        above.append(stack.enter_context(_open_between(found, options)))
        seen.append(found.path)


def _open_between(found: Below, options: OpenOptions) -> Image:
    """A layer that is only read."""
    return open_apart(found.path, replace(options, format="qcow2", data_file=NAMED), View(), writable=False)


def _no_base(top: Image, base: str | None) -> UnsupportedImage:
    if base is None:
        return UnsupportedImage(f"'{shown(top.path)}' has no backing file to commit to", features=("no backing file",))
    return UnsupportedImage(f"'{shown(base)}' is not in the backing chain of '{shown(top.path)}'",
                            features=("no such backing file",))


def _open_base(found: Below, options: OpenOptions, size: int) -> Image:
    """The base, open for writing and at least `size` bytes long."""
    base = open_whole(found.path, found.format, options, writable=True)
    try:
        if base.size < size:
            base.resize(round_up(size, SECTOR))
    except BaseException:
        base.close()
        raise
    return base


def _copy(layers: Sequence[Layer], base: Image, pace: Pace, progress: Progress | None) -> None:
    """Bring the base up to date, stably."""
    size, buffer = layers[0].size, memoryview(bytearray(CHUNK))
    for start, length, content in _merged(_spans(layers)):
        if content == "zero":
            base.zero(start, length)
        elif content == "data":
            pace.spend(length)
            read_into(layers, start, buffer[:length])
            base.write(start, buffer[:length])
        if progress is not None:
            progress(start + length, size)
    base.flush()


def _spans(layers: Sequence[Layer]) -> Iterator[Span]:
    """(start, length, what the layers hold there): "data", "zero", or "" where the base shows through."""
    offset, size = 0, layers[0].size
    while offset < size:
        depth, piece = resolve(layers, offset, min(size - offset, _LOOK_AHEAD))
        if piece.below and depth == len(layers) - 1:
            content = ""
        else:  # behind the end of a layer that is not the lowest there are zeros, whatever the base holds
            content = "zero" if piece.below or piece.kind in _ZERO_KINDS else "data"
        length = piece.length if content != "data" else min(piece.length, CHUNK - offset % CHUNK)
        yield offset, length, content
        offset += length


def _merged(spans: Iterator[Span]) -> Iterator[Span]:
    """Join neighbours that are alike; data not beyond multiples of CHUNK, where a buffer ends."""
    current = None
    for start, length, content in spans:
        if current is not None and current[2] == content and (content != "data" or start % CHUNK):
            current = (current[0], current[1] + length, content)
            continue
        if current is not None:
            yield current
        current = (start, length, content)
    if current is not None:
        yield current
