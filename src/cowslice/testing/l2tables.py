"""Made-up L1 and L2 tables with an obvious reading, to hold maps against.

They know nothing of headers or data: host clusters may lie anywhere, entries may be rubbish. What `entry` says is read
from the very bytes that a map is given.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSET = 0x00FF_FFFF_FFFF_FE00


@dataclass(frozen=True, slots=True)
class L2Tables:
    """A file of L2 tables and the L1 table (big-endian bytes) that points at them."""

    cluster_bits: int
    extended: bool
    clusters: int
    l1: bytes
    content: bytes

    @property
    def entry_size(self) -> int:
        """Bytes of one L2 entry."""
        return 16 if self.extended else 8

    @property
    def table_entries(self) -> int:
        """Entries of one L2 table."""
        return (1 << self.cluster_bits) // self.entry_size

    def table(self, cluster: int) -> int:
        """Host offset of the L2 table of a guest cluster, 0 for none."""
        at = cluster // self.table_entries * 8
        return int.from_bytes(self.l1[at : at + 8], "big") & OFFSET

    def entry(self, cluster: int) -> tuple[int, int]:
        """(entry word, bitmap) of a guest cluster; zeros where the file ends before it."""
        table = self.table(cluster)
        if not table:
            return 0, 0
        at = table + cluster % self.table_entries * self.entry_size
        raw = self.content[at : at + self.entry_size].ljust(16, b"\0")
        return int.from_bytes(raw[:8], "big"), int.from_bytes(raw[8:], "big")

    def continues(self, before: int, after: int) -> bool:
        """Whether cluster `after` may stand in one run behind cluster `before`: alike, and the next host cluster."""
        (word, bitmap), (other, other_bitmap) = self.entry(before), self.entry(after)
        if (word | other) & COMPRESSED or bitmap != other_bitmap:
            return False
        return other == word + (1 << self.cluster_bits if word & ~(COPIED | 1) else 0)


def make_tables(
    seed: int, *, cluster_bits: int, extended: bool = False, tables: int = 3, kinds: str = "nnnzhcpr", longest: int = 40
) -> L2Tables:
    """Make tables of which some are missing, in random order in the file, filled with runs of the given kinds.

    Kinds: n normal, p preallocated zero, z zero, h hole, c compressed, r any 64 bits. Runs have 1 to `longest` each.
    """
    rng = random.Random(seed)
    entries = (1 << cluster_bits) // (16 if extended else 8)
    places = rng.sample(range(1, tables + 2), tables)
    missing = [rng.random() < 0.2 for _ in range(tables)]
    content = bytearray((tables + 2) << cluster_bits)
    for place, gone in zip(places, missing, strict=True):
        if not gone:
            words = _fill(rng, min(entries, 4096), cluster_bits, kinds, longest)
            start = rng.randrange(entries - len(words) + 1)
            _store(content, (place << cluster_bits) + start * (16 if extended else 8), words, rng, extended)
    l1 = [0 if gone else rng.choice([0, COPIED]) | place << cluster_bits
          for place, gone in zip(places, missing, strict=True)]
    clusters = rng.randrange((tables - 1) * entries + 1, tables * entries + 1)
    end = len(content) - rng.choice([0, 0, rng.randrange(1, 1 << cluster_bits)])
    return L2Tables(cluster_bits, extended, clusters, struct.pack(f">{tables}Q", *l1), bytes(content[:end]))


def _store(content: bytearray, at: int, words: list[int], rng: random.Random, extended: bool) -> None:
    if not extended:
        struct.pack_into(f">{len(words)}Q", content, at, *words)
        return
    pool = [0xFFFF_FFFF, 0, 0xFFFF_FFFF << 32] + [rng.getrandbits(64) for _ in range(rng.choice([0, 1, 5, 30]))]
    pool = rng.sample(pool, rng.randint(1, len(pool)))
    pairs = [part for word in words for part in (word, rng.choice(pool))]
    struct.pack_into(f">{len(pairs)}Q", content, at, *pairs)


def _fill(rng: random.Random, count: int, bits: int, kinds: str, longest: int) -> list[int]:
    words: list[int] = []
    while len(words) < count:
        words += _RUNS[rng.choice(kinds)](rng, rng.randint(1, longest), bits)
    return words[:count]


def _normal(rng: random.Random, length: int, bits: int) -> list[int]:
    start = rng.randrange(1, 1 << rng.choice([4, 20, 55 - bits]))
    tag = rng.choice([0, COPIED])
    return [tag | (start + i) << bits for i in range(length)]


def _compressed(rng: random.Random, length: int, bits: int) -> list[int]:
    place = 62 - (bits - 8)
    return [COMPRESSED | rng.randrange(1 << (bits - 8)) << place | rng.randrange(1 << min(place, 40))
            for _ in range(length)]


_RUNS: dict[str, Callable[[random.Random, int, int], list[int]]] = {
    "n": _normal,
    "p": lambda rng, length, bits: [word | 1 for word in _normal(rng, length, bits)],
    "z": lambda rng, length, bits: [1] * length,
    "h": lambda rng, length, bits: [0] * length,
    "c": _compressed,
    "r": lambda rng, length, bits: [rng.getrandbits(64)],
}
