"""The files of a backing chain opened one by one, each without those below it, for verbs that change the chain itself.

It does not know what they change. Names found inside images pass the same gate as when the whole chain is opened at
once: judged as names of the top file's folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from cowslice.errors import UnsupportedImage
from cowslice.image.gate import Gate, Reference, Role, Verdict, pass_gate, resolve, root_of, shown
from cowslice.image.image import Image
from cowslice.image.layer import fill_zeros
from cowslice.image.opening import has_magic
from cowslice.image.options import NAMED, OpenOptions
from cowslice.storage.base import MAX_OFFSET, Storage, check_span
from cowslice.storage.locate import locate
from cowslice.units import SECTOR

_RAW_FORMATS = ("raw", "file", "host_device")


class View(Storage):
    """What a disk shows, as an endless storage: zeros behind its end, and zeros only while `source` is None.

    It stands in for a backing file, so that writing can copy what that showed. The source is the caller's to close.
    """

    name = "the disk below"

    def __init__(self, source: Image | None = None) -> None:
        self.source = source

    def pread(self, offset: int, buffer: memoryview) -> int:
        check_span(offset, len(buffer))
        inside = 0 if self.source is None else min(max(self.source.size - offset, 0), len(buffer))
        if self.source is not None and inside:
            self.source.read_into(offset, buffer[:inside])
        fill_zeros(buffer[inside:])
        return len(buffer)

    def length(self) -> int:
        return MAX_OFFSET // SECTOR * SECTOR

    def close(self) -> None:
        """Nothing to close."""


@dataclass(frozen=True, slots=True)
class Below:
    """The backing file that an image names and the gate permits: its path, format, and the name as it is stored."""

    path: str
    format: str
    name: str


class RootedGate(Gate):
    """Judges as `inner` does, but every name as if an image in the folder `root` had it."""

    def __init__(self, inner: Gate, root: str) -> None:
        self._inner = inner
        self._root = root

    def judge(self, reference: Reference) -> Verdict:
        return self._inner.judge(replace(reference, root=self._root))


def open_apart(path: str, options: OpenOptions, view: View, *, writable: bool) -> Image:
    """Open one qcow2 image over `view` in place of its backing file. Raises as open_image does."""
    if options.format == "raw":
        raise UnsupportedImage(f"'{shown(path)}' is raw, expected a qcow2 image: a raw file has no backing file",
                               features=("backing file of a raw file",))
    return Image(path, replace(options, writable=writable, force_share=options.force_share and not writable,
                               backing=view, backing_format="raw", warmup="off"))


def open_whole(path: str, kind: str | None, options: OpenOptions, *, writable: bool = False) -> Image:
    """Open a file with all that it stands on, by the options of the top file. Raises as open_image does."""
    return Image(path, replace(options, format=kind, writable=writable, backing=NAMED, backing_format=None,
                               data_file=NAMED, force_share=options.force_share and not writable, warmup="off"))


def rooted(options: OpenOptions, path: str) -> OpenOptions:
    """The options for files below the image at `path`: its folder is what the gate goes by."""
    return replace(options, gate=RootedGate(options.gate, root_of(path)))


def below(image: Image, options: OpenOptions) -> Below | None:
    """What `image` names as its backing file, by `rooted` options. Raises ReferenceRefused, UnsupportedImage."""
    first = image.first_cluster
    if first is None or first.backing_name is None:
        return None
    kind, name = first.backing_format, os.fsdecode(first.backing_name)
    if kind not in (None, "qcow2", *_RAW_FORMATS):
        raise UnsupportedImage(f"'{shown(image.path)}' has a backing file of format '{shown(str(kind))}', expected "
                               "qcow2 or raw", features=(f"backing format {shown(str(kind))}",))
    reference = resolve(Role.BACKING, name, kind, image=image.path, root=root_of(image.path))
    pass_gate(options.gate, reference)
    if kind is None:
        kind = format_of(reference.target)
        if options.on_warning is not None:
            options.on_warning(f"'{shown(image.path)}' does not say the format of its backing file "
                               f"'{shown(reference.target)}', which looks like {kind}")
    return Below(reference.target, "raw" if kind in _RAW_FORMATS else kind, name)


def format_of(path: str) -> str:
    """The format that a file begins like. Raises StorageError."""
    with locate(path) as storage:
        return "qcow2" if has_magic(storage) else "raw"


def same_file(one: str, other: str) -> bool:
    """Whether two paths lead to one file; of names that are no paths, whether they are the same."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)
