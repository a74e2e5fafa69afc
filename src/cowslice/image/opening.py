"""From a file to an open layer: its format, its header, its data file, its key and its L1 table.

It does not know the other layers of the chain, nor opens what the image names unless chain.py hands it over.
Whatever the bytes are, only cowslice.errors come out, and they name the file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from cowslice.errors import BadOption, CowsliceError, CryptoError, ImageError, NotAnImage, ReadOnly
from cowslice.format.findings import escaped
from cowslice.format.first_cluster import PREFIX_LENGTH, FirstCluster, decode_first_cluster, first_cluster_length
from cowslice.format.header import MAGIC
from cowslice.image.gate import shown
from cowslice.image.options import OpenOptions, Source
from cowslice.image.snapshots import find_snapshot, load_snapshot_l1, load_snapshots, read_l1
from cowslice.storage.base import Storage
from cowslice.storage.file import Locking
from cowslice.storage.locate import locate


@dataclass(frozen=True, slots=True)
class Place:
    """An open storage and the path or URL it was found at, '' for a storage that the caller opened himself."""

    storage: Storage
    path: str

    @property
    def identity(self) -> object:
        """What tells this file from every other, whatever it is called."""
        descriptor = self.storage.fileno()
        if descriptor < 0:
            return self.path or id(self.storage)
        status = os.fstat(descriptor)
        return ("device", status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """A qcow2 file that was understood. `size` is guest bytes and `l1` the table that maps them."""

    place: Place
    first: FirstCluster
    size: int
    l1: bytes
    l1_offset: int


def open_place(source: Source, options: OpenOptions, stack: ExitStack, *, writable: bool = False) -> Place:
    """Open a path, URL or storage; what is opened here is closed by `stack`, a given storage is not.

    Raises ReadOnly where `writable` is asked of something that can only be read.
    """
    if isinstance(source, Storage):
        if writable and not source.writable:
            raise ReadOnly(f"cannot write to '{source.name}': it was opened for reading only")
        return Place(source, "")
    path = os.fspath(source)
    locking: Locking = "force-share" if options.force_share and not writable else True
    storage = locate(path, "r+" if writable else "r", direct=options.direct, locking=locking)
    stack.callback(storage.close)
    return Place(storage, path)


def decide_format(place: Place, wanted: str | None) -> str:
    """Return "qcow2" or "raw": what was asked for, else qcow2 when its magic is there. Raises NotAnImage.

    Nothing is ever guessed to be raw: a raw disk is whatever its guest wrote, a qcow2 header included.
    """
    if wanted is not None:
        return wanted
    if has_magic(place.storage):
        return "qcow2"
    start = place.storage.read(0, len(MAGIC)).hex()
    raise NotAnImage(f"'{shown(place.storage.name)}' begins with {start}, expected the qcow2 magic {MAGIC.hex()}",
                     hint="To read it as a raw disk, say so: format 'raw'.")


def has_magic(storage: Storage) -> bool:
    """Whether the storage begins like a qcow2 image."""
    return storage.read(0, len(MAGIC)) == MAGIC


def read_first_cluster(storage: Storage) -> FirstCluster:
    """Read and check the header, extensions and backing name. Raises NotAnImage, MalformedImage, UnsupportedImage."""
    with naming(storage):
        length = first_cluster_length(storage.read(0, min(PREFIX_LENGTH, storage.length())))
        return decode_first_cluster(storage.read(0, min(length, storage.length())))


def open_file(place: Place, snapshot: str | None) -> OpenedFile:
    """Understand a qcow2 file up to its L1 table, active or of the snapshot with this id or name."""
    storage = place.storage
    first = read_first_cluster(storage)
    header = first.header
    with naming(storage):
        if snapshot is None:
            needed = header.geometry.l1_entries(header.size)
            l1 = read_l1(storage, header.l1_table_offset, needed, header.l1_size)
            return OpenedFile(place, first, header.size, l1, header.l1_table_offset)
        found = find_snapshot(load_snapshots(storage, header), snapshot)
        size, l1 = load_snapshot_l1(storage, header, found)
        return OpenedFile(place, first, size, l1, found.l1_offset)


@contextmanager
def naming(storage: Storage) -> Iterator[None]:
    """Put the file's name before the message of an error about its content that leaves the block."""
    try:
        yield
    except (ImageError, BadOption, CryptoError) as error:
        _prefix(error, storage.name)
        raise


def _prefix(error: CowsliceError, name: str) -> None:
    error.args = (f"'{escaped(os.fsencode(name))}': {error}", *error.args[1:])
