"""Who refers to given host clusters: every structure and every L2 entry that does, in words.

It does not count; it runs only after a check found clusters worth asking about.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

from cowslice.errors import StorageError
from cowslice.format.entries import L1_OFFSET_MASK
from cowslice.format.refcounts import REFTABLE_OFFSET_MASK
from cowslice.ops.refcheck import claims
from cowslice.ops.tables import Tables, most_tables

MAX_OWNERS = 16  # told for one cluster; a hostile image may have billions


def claims_of(tables: Tables, wanted: Sequence[int]) -> dict[int, list[str]]:
    """Owners of each wanted host cluster (ascending numbers); at most MAX_OWNERS each."""
    found: dict[int, list[str]] = {cluster: [] for cluster in wanted}
    for area in tables.areas:
        _claim(tables, found, area.offset, area.length, area.owner)
    for index, word in enumerate(tables.reftable):
        if offset := word & REFTABLE_OFFSET_MASK:
            _claim(tables, found, offset, 1, f"refcount block {index}")
    keys = array("Q", wanted)
    buffer = bytearray(tables.geometry.cluster_size)
    for tree in tables.trees:
        with suppress(StorageError):
            for index, word in islice(tree.tables(), most_tables(tables)):
                offset = word & L1_OFFSET_MASK
                _claim(tables, found, offset, 1, f"the L2 table {index} of {tree.owner}")
                tables.storage.read_into(offset, buffer)
                _claim_entries(tables, found, buffer, keys, index=index, owner=tree.owner)
    return found


def _claim(tables: Tables, found: dict[int, list[str]], offset: int, length: int, owner: str) -> None:
    bits = tables.geometry.cluster_bits
    first, last = offset >> bits, (offset + max(length, 1) - 1) >> bits
    if last - first > len(found):
        clusters = [cluster for cluster in found if first <= cluster <= last]
    else:
        clusters = [cluster for cluster in range(first, last + 1) if cluster in found]
    for cluster in clusters:
        if len(found[cluster]) < MAX_OWNERS:
            found[cluster].append(owner)


def _claim_entries(
    tables: Tables, found: dict[int, list[str]], buffer: bytearray, keys: array[int], *, index: int, owner: str
) -> None:
    geometry = tables.geometry
    for entry, cluster in claims(buffer, keys, cluster_bits=geometry.cluster_bits, extended=geometry.extended_l2):
        if len(found[cluster]) < MAX_OWNERS:
            guest = (index << geometry.l2_bits | entry) << geometry.cluster_bits
            found[cluster].append(f"guest offset {guest:#x} of {owner}")
