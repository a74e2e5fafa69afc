"""Another backing name for an image that is open: after a crash it has the old name or the new one, whole.

It does not know whether the disk reads as before. What must hold: invariant I5, and what the old header points at stays
untouched until the sector that points elsewhere is stable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cowslice.format.extensions import Extension, encode_extensions
from cowslice.format.first_cluster import FirstCluster, encode_first_cluster, lay_out
from cowslice.image.headerswitch import switch_first_cluster
from cowslice.units import SECTOR, round_up

if TYPE_CHECKING:
    from cowslice.image.qcow2 import Qcow2Layer
    from cowslice.storage.base import Storage


def renamed(first: FirstCluster, extensions: Sequence[Extension], name: bytes) -> FirstCluster:
    """The same with other extensions and backing name. Raises BadOption where they do not fit the first cluster.

    A name that reaches beyond the first sector lies beside the old one where there is room, never over it.
    """
    placed = lay_out(first.header, extensions, name)
    start, end = _name(placed)
    if all(end <= begin or stop <= max(start, SECTOR) for begin, stop in _behind_sector(first)):
        return placed
    beside = round_up(max(start, *(stop for _, stop in _behind_sector(first))), 8)
    if beside + len(name) > 1 << first.header.cluster_bits:
        return placed
    return replace(placed, header=replace(placed.header, backing_file_offset=beside))


def switch_backing_name(layer: Qcow2Layer, first: FirstCluster) -> None:
    """Replace the first cluster by `renamed` parts, stably, and then in memory. Raises BadOption, StorageError."""
    old, new = encode_first_cluster(layer.first), encode_first_cluster(first)
    length = max(len(old), len(new), SECTOR)
    old, new = old.ljust(length, b"\0"), new.ljust(length, b"\0")
    both = bytearray(old)
    for start, end in _behind_sector(first):
        both[start:end] = new[start:end]
    if all(both[start:end] == old[start:end] for start, end in _behind_sector(layer.first)):
        _write(layer.storage, SECTOR, both[SECTOR:])  # each header finds what it points at
        _write(layer.storage, 0, new[:SECTOR])
    switch_first_cluster(layer, first)  # tidies up behind the first sector


def _write(storage: Storage, offset: int, content: bytes | bytearray) -> None:
    if content:
        storage.pwrite(offset, content)
        storage.sync()


def _name(first: FirstCluster) -> tuple[int, int]:
    """Where the name begins and ends."""
    header = first.header
    return header.backing_file_offset, header.backing_file_offset + len(first.raw_backing_name)


def _behind_sector(first: FirstCluster) -> list[tuple[int, int]]:
    """What the header needs behind the first sector, which is written whole or not at all: (begin, end) in bytes."""
    used = (0, first.header.header_length + len(encode_extensions(first.extensions))), _name(first)
    return [(max(start, SECTOR), end) for start, end in used if end > SECTOR]
