"""Changing the first cluster of an image that is open: one sector last, and alone.

It does not know why a field changes. What must hold: invariant I5, the sector with the header's fields is written in
one request after all that it points to is stable, and is synced by itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cowslice.format.first_cluster import FirstCluster, encode_first_cluster, lay_out
from cowslice.storage.base import Storage
from cowslice.units import SECTOR

if TYPE_CHECKING:
    from cowslice.image.qcow2 import Qcow2Layer


def switch_header(layer: Qcow2Layer, **fields: object) -> None:
    """Change fields of the header (names of format.header.Header) on disk, stably, and then in memory.

    All else in the first cluster stays as it is. Raises StorageError; then it is unknown whether the disk has changed.
    """
    header = replace(layer.first.header, **fields)  # type: ignore[arg-type]
    switch_first_cluster(layer, replace(layer.first, header=header))


def switch_first_cluster(layer: Qcow2Layer, first: FirstCluster) -> None:
    """Replace header, extensions and backing name on disk, stably, and then in memory. The places are as `first` says.

    Sectors behind the first are written and synced before it: until then the old header makes of them what it did.
    Raises BadOption where the parts do not fit the first cluster, StorageError.
    """
    raw = encode_first_cluster(first)
    old = len(encode_first_cluster(layer.first))
    write_first_cluster(layer.storage, raw.ljust(old, b"\0"))
    layer.adopt(first)


def rearranged(first: FirstCluster, **changes: object) -> FirstCluster:
    """The same with other `header`, `extensions` or `raw_backing_name`, laid out anew one behind the other."""
    wanted = replace(first, **changes)  # type: ignore[arg-type]
    return lay_out(wanted.header, wanted.extensions, wanted.raw_backing_name)


def write_first_cluster(storage: Storage, raw: bytes) -> None:
    """Write the bytes of a first cluster so that the sector of the header comes last."""
    head, rest = raw[:SECTOR], raw[SECTOR:]
    if rest and storage.read(SECTOR, len(rest)) != rest:
        storage.pwrite(SECTOR, rest)
        storage.sync()
    storage.pwrite(0, head)
    storage.sync()
