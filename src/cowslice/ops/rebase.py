"""Change which backing file an image has, so that the disk reads as before, or only what the header says.

It does not know terminals. What old and new backing file show differently is copied into the image and stable before
the header changes: cut off at any moment, the image is right over one of the two.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from cowslice.errors import BadOption, ReferenceRefused, UnsupportedImage
from cowslice.format.extensions import ExtensionType, with_extension
from cowslice.format.first_cluster import FirstCluster
from cowslice.format.header import Autoclear
from cowslice.format.limits import MAX_BACKING_FORMAT, MAX_BACKING_NAME
from cowslice.image.gate import Deny, Reference, Role, resolve, root_of, shown
from cowslice.image.headerswitch import rearranged, switch_first_cluster
from cowslice.image.image import Image
from cowslice.image.mapping import extent_of
from cowslice.image.mapping import resolve as answer
from cowslice.image.options import OpenOptions
from cowslice.image.qcow2 import Qcow2Layer
from cowslice.ops.apart import View, below, open_apart, open_whole, rooted, same_file
from cowslice.ops.compressedinto import compressible_unit
from cowslice.units import MiB

CHUNK = 2 * MiB  # the largest cluster: a chunk holds whole ones
_LOOK_AHEAD = 1 << 30  # bytes that are passed over in one step: it keeps progress moving

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Backing:
    """The backing file that an image shall have: the name as it is stored, "" for none, and its format."""

    name: str = ""
    format: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            if self.format is not None:
                raise BadOption(f"the backing format is '{self.format}', expected it only beside a backing file")
            return
        if not self.format:
            raise BadOption(f"the backing file is '{self.name}' without a format",
                            hint="Say what it is, qcow2 or raw: a guessed format lets a guest choose what is read.")
        if len(self.format) > MAX_BACKING_FORMAT or not self.format.isascii() or not self.format.isprintable():
            raise BadOption(f"the backing format is {self.format!r}, expected the name of a format")
        length = len(os.fsencode(self.name))
        if "\0" in self.name or length > MAX_BACKING_NAME:
            raise BadOption(f"the backing file is a name of {length} bytes, expected at most {MAX_BACKING_NAME} "
                            "without zero bytes")

    def reference(self, image: str) -> Reference:
        """Where the name leads when the image at this path has it. Raises ReferenceRefused."""
        return resolve(Role.BACKING, self.name, self.format, image=image, root=root_of(image))


def rebase(path: str, options: OpenOptions, backing: Backing, *, unsafe: bool = False, compress: bool = False,
           progress: Progress | None = None) -> None:
    """Give the image at `path` another backing file. `unsafe`: change the header only, so the disk may read otherwise.

    `compress`: whole clusters that are copied into the image are compressed where that makes them smaller.
    The new file is the caller's to name; what it names in turn passes the gate. `progress(done, total)` counts bytes.
    Raises ReferenceRefused for loops, UnsupportedImage, BadOption where the name does not fit, and the errors of
    opening, reading and writing.
    """
    _refuse_itself(path, options, backing)
    with ExitStack() as stack:
        new = None if unsafe or not backing.name else stack.enter_context(_open_new(path, options, backing))
        view = View()
        image = stack.enter_context(open_apart(path, options, view, writable=True))
        layer = image.layers[0]
        assert isinstance(layer, Qcow2Layer)
        if backing.name and layer.first.header.autoclear & Autoclear.RAW_EXTERNAL:
            raise UnsupportedImage(f"'{shown(path)}' has raw external data, expected no backing file: it could not be "
                                   "seen through a raw file", features=("backing file with raw external data",))
        if compress:
            compressible_unit(image)
        _renamed(layer.first, backing)  # fail before anything is copied
        if not unsafe:
            view.source = _open_old(stack, image, rooted(options, path))
            _copy(image, view.source, new, compress=compress, progress=progress)
        image.flush()
        switch_first_cluster(layer, _renamed(layer.first, backing))


def _refuse_itself(path: str, options: OpenOptions, backing: Backing) -> None:
    if not backing.name:
        return
    reference = backing.reference(path)
    if reference.local and same_file(reference.target, path):
        raise ReferenceRefused(f"'{shown(path)}' cannot be its own backing file")
    verdict = options.gate.judge(reference)
    if isinstance(verdict, Deny) and options.on_warning is not None:
        options.on_warning(f"the image will open only where the gate permits its backing file: {verdict.reason}")


def _open_new(path: str, options: OpenOptions, backing: Backing) -> Image:
    if backing.format not in ("qcow2", "raw"):
        raise BadOption(f"the backing format is '{backing.format}', expected qcow2 or raw")
    target = backing.reference(path).target
    image = open_whole(target, backing.format, rooted(options, target))
    if any(same_file(layer.name, path) for layer in image.layers):
        image.close()
        raise ReferenceRefused(f"'{shown(path)}' is a backing file of '{shown(target)}', so that it would be its own")
    return image


def _open_old(stack: ExitStack, image: Image, options: OpenOptions) -> Image | None:
    found = below(image, options)
    return None if found is None else stack.enter_context(open_whole(found.path, found.format, options))


def _renamed(first: FirstCluster, backing: Backing) -> FirstCluster:
    """The first cluster with the new name and format."""
    kind = backing.format.encode() if backing.format else None
    extensions = with_extension(first.extensions, ExtensionType.BACKING_FORMAT, kind)
    return rearranged(first, extensions=extensions, raw_backing_name=os.fsencode(backing.name))


def _copy(image: Image, old: Image | None, new: Image | None, *, compress: bool, progress: Progress | None) -> None:
    """Bring into the image what it leaves to its backing file and the new one shows otherwise."""
    offset, top = 0, image.layers[0]
    while offset < image.size:
        piece = top.piece_at(offset, min(image.size - offset, _LOOK_AHEAD))
        length = piece.length
        if piece.below:
            most, unit = _step(image, offset, piece.length, compress=compress)
            length = _alike(old, new, offset, most)
            if compress and length < most:
                length = length // unit * unit
            if not length:
                length = min(most, CHUNK - offset % CHUNK)
                shown_before, shown_now = _shown(old, offset, length), _shown(new, offset, length)
                _copy_differences(image, offset, shown_before, shown_now, unit=unit, compress=compress)
        offset += length
        if progress is not None:
            progress(offset, image.size)


def _step(image: Image, offset: int, length: int, *, compress: bool) -> tuple[int, int]:
    """How many bytes from here can be handled alike, and the unit that is copied whole.

    That is a subcluster; to compress it is a cluster, where all of it is left to the backing file.
    """
    assert image.geometry is not None
    size, unit = image.geometry.cluster_size, image.geometry.subcluster_size
    if not compress:
        return length, unit
    if offset + length == image.size and not offset % size:
        return length, size
    if offset % size or length < size:
        return min(length, size - offset % size), unit
    return length // size * size, size


def _copy_differences(image: Image, start: int, old: bytes, new: bytes, *, unit: int, compress: bool) -> None:
    """Write the old bytes of each unit that differs, neighbours together, and zeros as zeros."""
    if old == new:
        return
    assert image.geometry is not None
    whole = compress and unit == image.geometry.cluster_size and not start % unit
    write, at = image.write_compressed if whole else image.write, 0
    while at < len(old):
        kind, first = _kind(old, new, at, unit), at
        while at < len(old) and _kind(old, new, at, unit) == kind:
            at += unit
        end = min(at, len(old))
        if kind == "zero":
            image.zero(start + first, end - first)
        elif kind == "data":
            write(start + first, old[first:end])


def _kind(old: bytes, new: bytes, at: int, unit: int) -> str:
    part = old[at : at + unit]
    if part == new[at : at + unit]:
        return ""
    return "data" if any(part) else "zero"


def _alike(old: Image | None, new: Image | None, offset: int, length: int) -> int:
    """Bytes from here that both show alike, as far as their maps tell; 0 where they must be read."""
    (one, of_one), (other, of_other) = _place(old, offset, length), _place(new, offset, length)
    return min(of_one, of_other) if one is not None and one == other else 0


def _place(image: Image | None, offset: int, length: int) -> tuple[object, int]:
    """What tells where the bytes from here come from, None where nothing does, and how many bytes come from there."""
    if image is None or offset >= image.size:
        return "zeros", length
    depth, piece = answer(image.layers, offset, min(length, image.size - offset), holes=True)
    extent = extent_of(image.layers[depth], depth, piece)
    if extent.zero:
        return "zeros", extent.length
    descriptor = image.layers[depth].data.fileno()
    if extent.offset is None or descriptor < 0:
        return None, extent.length
    status = os.fstat(descriptor)
    return (status.st_dev, status.st_ino, extent.offset), extent.length


def _shown(image: Image | None, offset: int, length: int) -> bytes:
    """What a disk shows, with zeros behind its end."""
    inside = 0 if image is None else min(max(image.size - offset, 0), length)
    return (image.read(offset, inside) if image is not None and inside else b"").ljust(length, b"\0")
