"""The sizes that follow from a header, and all index arithmetic over guest offsets.

It does not know where a table lies. Guest offsets, spans and sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from cowslice.units import div_ceil

SUBCLUSTERS = 32


@dataclass(frozen=True, slots=True)
class Geometry:
    """How an image is cut up. Holds for any values that a decoded header may have; checks nothing itself."""

    cluster_bits: int
    extended_l2: bool = False
    refcount_order: int = 4

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster, host and guest alike."""
        return 1 << self.cluster_bits

    @property
    def l2_entry_size(self) -> int:
        """Bytes of one L2 entry: 8, or 16 with subclusters."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_bits(self) -> int:
        """log2 of the entries of one L2 table."""
        return self.cluster_bits - (4 if self.extended_l2 else 3)

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table, which fills one cluster."""
        return 1 << self.l2_bits

    @property
    def l2_span(self) -> int:
        """Guest bytes that one L2 table maps."""
        return 1 << (self.l2_bits + self.cluster_bits)

    @property
    def subclusters(self) -> int:
        """Parts of a cluster that have a state of their own: 1 or 32."""
        return SUBCLUSTERS if self.extended_l2 else 1

    @property
    def subcluster_size(self) -> int:
        """Bytes of a subcluster; the whole cluster where there are none."""
        return self.cluster_size // self.subclusters

    @property
    def refcount_bits(self) -> int:
        """Width of one refcount in bits: 1, 2, 4 ... 64."""
        return 1 << self.refcount_order

    @property
    def max_refcount(self) -> int:
        """The greatest count that fits the width."""
        return (1 << self.refcount_bits) - 1

    @property
    def refblock_entries(self) -> int:
        """Refcounts in one refcount block, which fills one cluster."""
        return (self.cluster_size * 8) >> self.refcount_order

    @property
    def refblock_span(self) -> int:
        """Host bytes that one refcount block counts."""
        return self.refblock_entries << self.cluster_bits

    def clusters(self, length: int) -> int:
        """Clusters that `length` bytes need."""
        return div_ceil(length, self.cluster_size)

    def l1_entries(self, size: int) -> int:
        """L1 entries that a guest disk of `size` bytes needs."""
        return div_ceil(size, self.l2_span)

    def l1_index(self, guest_offset: int) -> int:
        """Which L1 entry maps the guest byte."""
        return guest_offset >> (self.l2_bits + self.cluster_bits)

    def l2_index(self, guest_offset: int) -> int:
        """Which entry of its L2 table maps the guest byte."""
        return (guest_offset >> self.cluster_bits) & (self.l2_entries - 1)

    def subcluster_index(self, guest_offset: int) -> int:
        """Which subcluster of its cluster holds the guest byte; 0 where there are none."""
        return (guest_offset & (self.cluster_size - 1)) // self.subcluster_size

    def in_cluster(self, offset: int) -> int:
        """Bytes from the start of the cluster, of a guest or a host offset."""
        return offset & (self.cluster_size - 1)

    def is_aligned(self, offset: int) -> bool:
        """Whether the offset is the start of a cluster."""
        return offset & (self.cluster_size - 1) == 0
