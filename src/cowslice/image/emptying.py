"""Making a whole image say nothing, so that its backing file shows everywhere.

It does not know why. Entries become unallocated, never zero; host clusters that they owned become drops of the next
commit (I3). Snapshots keep what they share.
"""

from __future__ import annotations

from cowslice.format.entries import L1_OFFSET_MASK
from cowslice.image.punching import Cause
from cowslice.image.writing import Writer

CLUSTERS_AT_ONCE = 1024  # under one hold of the lock


def vacate(writer: Writer) -> None:
    """Forget every guest cluster of the layer that `writer` writes to. Raises CorruptImage, StorageError."""
    writer.commits.check()
    layer, geometry = writer.layer, writer.layer.geometry
    if writer.track is not None:
        writer.track(0, layer.size)
    clusters = geometry.clusters(layer.size)
    step = min(CLUSTERS_AT_ONCE, geometry.l2_entries)
    for first in range(0, clusters, step):
        if writer.tables.l1[first >> geometry.l2_bits] & L1_OFFSET_MASK:
            _vacate_some(writer, first, min(first + step, clusters))
            writer.relieve()


def _vacate_some(writer: Writer, first: int, end: int) -> None:
    """Entries of one L2 table."""
    tables, planner, bits = writer.tables, writer.planner, writer.layer.geometry.cluster_bits
    with writer.claims.on(first, end), tables.lock:
        found = [planner.vacated(writer.layer.checked(planner.decode(*words), cluster))
                 for cluster, words in enumerate(writer.entries(first, end - first), first)]
        blanks = [blank for blank in found if blank is not None]
        if not blanks:
            return
        tables.own_table(first)
        tables.slices.store(first, writer.packed([(0, 0)] * (end - first)))
        for blank in blanks:
            if blank.dropped is not None:
                host, length = blank.dropped
                tables.drop(host, count=length >> bits, cause=Cause.SNAPSHOT)
