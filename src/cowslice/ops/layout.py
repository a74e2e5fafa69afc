"""Writes a fully populated qcow2 image with our own encoders: the disk that a cache is measured on.

It needs no QEMU and reads nothing. What lies where is arithmetic: from the front of the file to its end the clusters
are header, refcount table, first refcount blocks, L1 table, then every L2 table right before the data it maps, with a
refcount block wherever the one before is full. That is where QEMU puts them when a guest fills its disk from the
start, so neither engine is given a map that no real image has. `layout` then only says which guest cluster has which
data cluster: in order, all shuffled, or shuffled in fragments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cowslice.errors import BadOption
from cowslice.format.entries import ALL_SUBCLUSTERS, encode_bitmap, encode_l1, encode_normal
from cowslice.format.extensions import encode_extensions, encode_feature_names
from cowslice.format.geometry import Geometry
from cowslice.format.header import Header, Incompatible, encode_header
from cowslice.format.limits import (
    MAX_CLUSTER_BITS,
    MAX_HOST_OFFSET,
    MAX_L1_BYTES,
    MAX_REFTABLE_BYTES,
    MIN_CLUSTER_BITS,
    MIN_CLUSTER_BITS_EXTENDED_L2,
)
from cowslice.storage import FileStorage, Storage
from cowslice.units import SECTOR, KiB, MiB, div_ceil, format_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

Layout = Literal["sequential", "random", "fragments"]
LAYOUTS: tuple[Layout, ...] = ("sequential", "random", "fragments")
Progress = Callable[[int, int], None]

_BATCH = 4 * MiB  # bytes of guest content made and written at a time: the CPU's L2, not memory, is the limit
_FEATURE_NAMES_FROM = 4096  # the table of feature names would fill too much of a smaller first cluster
# Odd, so that multiplying by it is a bijection of 64-bit words: no two guest words are alike (2^64 / golden ratio).
_MULTIPLIER = 0x9E3779B97F4A7C15
_SEED_STEP = 0xD1B54A32D192ED03


@dataclass(frozen=True, slots=True)
class PopulatedImage:
    """What was written. Sizes are bytes; `l2_bytes` is what the guest's map takes, whole tables counted."""

    size: int
    geometry: Geometry
    layout: Layout
    data_clusters: int
    l2_tables: int
    refblocks: int
    file_bytes: int

    @property
    def l2_bytes(self) -> int:
        return self.l2_tables * self.geometry.cluster_size


def write_populated_image(
    target: Storage | str | os.PathLike[str],
    *,
    size: int,
    cluster_bits: int = 16,
    layout: Layout = "sequential",
    fragment_bytes: int = 256 * KiB,
    extended_l2: bool = False,
    populate: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> PopulatedImage:
    """Write a version 3 image of `size` guest bytes in which every cluster is allocated.

    `target` is an empty writable storage (left open) or a path (made or emptied). "random" permutes all clusters,
    "fragments" pieces of `fragment_bytes`; the same `seed` gives the same image. Data clusters are holes that read
    as zeros, or with `populate` the bytes of `populated_content`. `on_progress` is given data bytes done and all.
    Raises BadOption for sizes that no image can have, StorageError.
    """
    geometry = Geometry(cluster_bits, extended_l2)
    _check(geometry, size, layout, fragment_bytes)
    plan = _plan_host(geometry, size)
    slots = _slots(plan, layout, fragment_bytes >> cluster_bits, seed)
    storage = target if isinstance(target, Storage) else FileStorage(target, "w")
    try:
        storage.truncate(plan.clusters << cluster_bits)
        _write_map(storage, plan, slots)
        if populate:
            _write_content(storage, plan, slots, seed=seed, on_progress=on_progress or _silent)
        _write_counts_and_header(storage, plan)
    finally:
        if storage is not target:
            storage.close()
    return PopulatedImage(
        size=size,
        geometry=geometry,
        layout=layout,
        data_clusters=plan.data_clusters,
        l2_tables=plan.l2_tables,
        refblocks=plan.refblocks,
        file_bytes=plan.clusters << cluster_bits,
    )


def populated_content(offset: int, length: int, *, seed: int = 0) -> bytes:
    """The guest bytes that `populate` writes at this span: every 8-byte word differs from every other one."""
    first = offset // 8
    words = _words(np.arange(first, div_ceil(offset + length, 8), dtype=np.uint64), seed)
    return words.tobytes()[offset - first * 8 :][:length]


@dataclass(frozen=True, slots=True)
class _HostPlan:
    """Which host cluster is what. An *item* is an L2 table or a data cluster, numbered as they follow each other."""

    geometry: Geometry
    size: int
    data_clusters: int
    l2_tables: int
    l1_clusters: int
    table_clusters: int
    front_blocks: int
    clusters: int

    @property
    def first_item(self) -> int:
        """The host cluster of item 0, behind header, refcount table, front blocks and L1 table."""
        return _first_item(self.table_clusters, self.front_blocks, self.l1_clusters)

    @property
    def refblocks(self) -> int:
        return div_ceil(self.clusters, self.geometry.refblock_entries)

    def block_clusters(self) -> NDArray[np.int64]:
        """The host cluster of each refcount block: the front ones together, every other one first in what it counts."""
        blocks = np.arange(self.refblocks, dtype=np.int64)
        return np.where(
            blocks < self.front_blocks, 1 + self.table_clusters + blocks, blocks * self.geometry.refblock_entries
        )

    def item_clusters(self, items: NDArray[np.int64]) -> NDArray[np.int64]:
        """The host clusters of items: one after another, leaving out those that are refcount blocks."""
        entries = self.geometry.refblock_entries
        before = self.front_blocks * entries - self.first_item
        behind = items - before
        return np.where(
            items < before,
            self.first_item + items,
            self.front_blocks * entries + behind // (entries - 1) * entries + behind % (entries - 1) + 1,
        )

    def table_clusters_of(self, tables: NDArray[np.int64]) -> NDArray[np.int64]:
        """The host clusters of L2 tables."""
        return self.item_clusters(tables * (self.geometry.l2_entries + 1))

    def data_clusters_of(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """The host clusters of data clusters, numbered in host order."""
        return self.item_clusters(slots + slots // self.geometry.l2_entries + 1)


def _check(geometry: Geometry, size: int, layout: str, fragment_bytes: int) -> None:
    lowest = MIN_CLUSTER_BITS_EXTENDED_L2 if geometry.extended_l2 else MIN_CLUSTER_BITS
    if not lowest <= geometry.cluster_bits <= MAX_CLUSTER_BITS:
        raise BadOption(f"cluster_bits is {geometry.cluster_bits}, expected {lowest} to {MAX_CLUSTER_BITS}")
    if size < SECTOR or size % SECTOR:
        raise BadOption(f"size is {size}, expected a positive multiple of {SECTOR}")
    if geometry.l1_entries(size) * 8 > MAX_L1_BYTES:
        most = MAX_L1_BYTES // 8 * geometry.l2_span
        raise BadOption(f"size is {size}, expected at most {format_size(most)} with these clusters")
    if layout not in LAYOUTS:
        raise BadOption(f"layout is '{layout}', expected {', '.join(LAYOUTS)}")
    if layout == "fragments" and (fragment_bytes < 1 or fragment_bytes % geometry.cluster_size):
        raise BadOption(f"fragment_bytes is {fragment_bytes}, expected a multiple of {geometry.cluster_size}")


def _first_item(table_clusters: int, front_blocks: int, l1_clusters: int) -> int:
    return 1 + table_clusters + front_blocks + l1_clusters


def _plan_host(geometry: Geometry, size: int) -> _HostPlan:
    """Grow the refcount table and the blocks at the front until they count themselves and everything else."""
    data_clusters, l2_tables = geometry.clusters(size), geometry.l1_entries(size)
    l1_clusters, entries = geometry.clusters(l2_tables * 8), geometry.refblock_entries
    table_clusters = front_blocks = 1
    while True:
        first = _first_item(table_clusters, front_blocks, l1_clusters)
        plan = _HostPlan(geometry, size, data_clusters, l2_tables, l1_clusters, table_clusters, front_blocks, 0)
        last = plan.item_clusters(np.array([data_clusters + l2_tables - 1], dtype=np.int64))
        clusters = int(last[0]) + 1
        needed = geometry.clusters(div_ceil(clusters, entries) * 8), div_ceil(first, entries)
        if needed == (table_clusters, front_blocks):
            break
        table_clusters, front_blocks = max(needed[0], table_clusters), max(needed[1], front_blocks)
    table_bytes, file_bytes = table_clusters << geometry.cluster_bits, clusters << geometry.cluster_bits
    if table_bytes > MAX_REFTABLE_BYTES or file_bytes > MAX_HOST_OFFSET:
        raise BadOption(f"size is {size}: its reference counts do not fit clusters of {geometry.cluster_size}")
    return _HostPlan(geometry, size, data_clusters, l2_tables, l1_clusters, table_clusters, front_blocks, clusters)


def _slots(plan: _HostPlan, layout: Layout, fragment_clusters: int, seed: int) -> NDArray[np.int64]:
    """For each guest cluster the number of its data cluster in host order."""
    count = plan.data_clusters
    if layout == "sequential":
        return np.arange(count, dtype=np.int64)
    shuffler = np.random.default_rng(seed)
    if layout == "random":
        return shuffler.permutation(count)
    guest = np.concatenate(
        [
            np.arange(piece * fragment_clusters, min((piece + 1) * fragment_clusters, count), dtype=np.int64)
            for piece in shuffler.permutation(div_ceil(count, fragment_clusters)).tolist()
        ]
    )
    return _inverse(guest)


def _inverse(permutation: NDArray[np.int64]) -> NDArray[np.int64]:
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation), dtype=np.int64)
    return inverse


def _write_map(storage: Storage, plan: _HostPlan, slots: NDArray[np.int64]) -> None:
    """Write every L2 table and the L1 table."""
    geometry = plan.geometry
    tables = plan.table_clusters_of(np.arange(plan.l2_tables, dtype=np.int64)) << geometry.cluster_bits
    copied = encode_normal(0, copied=True)
    for table, host in enumerate(tables.tolist()):
        mine = slots[table * geometry.l2_entries : (table + 1) * geometry.l2_entries]
        storage.pwrite(host, _l2_table(plan.data_clusters_of(mine), geometry, copied))
    l1 = tables.astype(np.uint64) | np.uint64(encode_l1(0, copied=True))
    storage.pwrite(_first_item(plan.table_clusters, plan.front_blocks, 0) << geometry.cluster_bits, _big_endian(l1))


def _l2_table(hosts: NDArray[np.int64], geometry: Geometry, copied: int) -> bytes:
    words = (hosts << geometry.cluster_bits).astype(np.uint64) | np.uint64(copied)
    if geometry.extended_l2:
        words = np.stack([words, np.full_like(words, encode_bitmap(ALL_SUBCLUSTERS, 0))], axis=1).ravel()
    return _big_endian(words).ljust(geometry.cluster_size, b"\0")


def _write_content(
    storage: Storage, plan: _HostPlan, slots: NDArray[np.int64], *, seed: int, on_progress: Progress
) -> None:
    """Write all guest bytes in host order: a disk is filled fastest from its start."""
    bits = plan.geometry.cluster_bits
    guests = _inverse(slots)
    step, done = max(_BATCH >> bits, 1), 0
    inside = np.arange(1 << (bits - 3), dtype=np.uint64)
    for first in range(0, plan.data_clusters, step):
        batch = guests[first : first + step].astype(np.uint64)
        words = _words((batch[:, None] << np.uint64(bits - 3)) + inside, seed)
        hosts = plan.data_clusters_of(np.arange(first, first + len(batch), dtype=np.int64))
        for start, end in _runs(hosts):
            storage.pwrite(int(hosts[start]) << bits, words[start:end].data.cast("B"))
        done += len(batch) << bits
        on_progress(min(done, plan.size), plan.size)


def _runs(hosts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Cut into (first, end) where the host clusters do not follow each other."""
    cuts = (np.flatnonzero(np.diff(hosts) != 1) + 1).tolist()
    return zip([0, *cuts], [*cuts, len(hosts)], strict=True)


def _write_counts_and_header(storage: Storage, plan: _HostPlan) -> None:
    """Write refcount blocks in which every cluster of the file counts one, their table and, last, the header."""
    geometry = plan.geometry
    blocks = plan.block_clusters() << geometry.cluster_bits
    ones = _ones(geometry.refblock_entries)
    for block, host in enumerate(blocks.tolist()):
        counted = min(plan.clusters - block * geometry.refblock_entries, geometry.refblock_entries)
        storage.pwrite(host, ones if counted == geometry.refblock_entries else _ones(counted))
    storage.pwrite(geometry.cluster_size, _big_endian(blocks.astype(np.uint64)))
    storage.pwrite(0, _first_cluster(plan))


def _first_cluster(plan: _HostPlan) -> bytes:
    geometry = plan.geometry
    header = Header(
        cluster_bits=geometry.cluster_bits,
        size=plan.size,
        l1_size=plan.l2_tables,
        l1_table_offset=_first_item(plan.table_clusters, plan.front_blocks, 0) << geometry.cluster_bits,
        refcount_table_offset=geometry.cluster_size,
        refcount_table_clusters=plan.table_clusters,
        incompatible=Incompatible.EXTENDED_L2 if geometry.extended_l2 else Incompatible(0),
    )
    names = [encode_feature_names()] if geometry.cluster_size > _FEATURE_NAMES_FROM else []
    return encode_header(header) + encode_extensions(names)


def _ones(count: int) -> bytes:
    """`count` refcounts of one, 16 bits each, big-endian."""
    return b"\0\1" * count


def _words(numbers: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """One word per number, never the same for two numbers; arithmetic is modulo 2^64."""
    shift = np.uint64((1 + seed * _SEED_STEP) % (1 << 64))
    return (numbers + shift) * np.uint64(_MULTIPLIER)


def _big_endian(words: NDArray[Any]) -> bytes:
    return words.astype(">u8").tobytes()


def _silent(done: int, total: int) -> None:
    """Tell nobody."""
