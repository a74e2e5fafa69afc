"""The kinds of metadata that a host cluster can hold, as fences number them and messages name them."""

from __future__ import annotations

from enum import IntEnum


class Structure(IntEnum):
    """What lies inside a fence; `label` names it in a sentence."""

    HEADER = 0
    L1_TABLE = 1
    L2_TABLE = 2
    REFTABLE = 3
    REFBLOCK = 4
    SNAPSHOT_TABLE = 5
    SNAPSHOT_L1 = 6
    BITMAP_DIRECTORY = 7
    BITMAP_TABLE = 8
    CRYPTO_HEADER = 9
    BITMAP_DATA = 10

    @property
    def label(self) -> str:
        return _LABELS[self]


_LABELS = ("the header", "the L1 table", "an L2 table", "the refcount table", "a refcount block",
           "the snapshot table", "the L1 table of a snapshot", "the bitmap directory", "a bitmap table",
           "the encryption header", "the bits of a bitmap")
