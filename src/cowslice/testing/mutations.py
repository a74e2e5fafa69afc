"""Ways to spoil an image: cut it, flip its bits, set its fields to their extremes, point its tables at each other.

It knows the format and nothing of who will read the result. Everything is seeded: the same image and seed give the
same mutations, and each has a name that says what was done.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from cowslice.format.entries import COMPRESSED, COPIED, L1_OFFSET_MASK, ZERO
from cowslice.format.first_cluster import FirstCluster, decode_first_cluster
from cowslice.format.header import FIELD_OFFSETS, Header

WORD = 8
HEADER_WIDTHS = {
    "version": 4, "backing_file_offset": 8, "backing_file_size": 4, "cluster_bits": 4, "size": 8, "crypt_method": 4,
    "l1_size": 4, "l1_table_offset": 8, "refcount_table_offset": 8, "refcount_table_clusters": 4, "snapshot_count": 4,
    "snapshots_offset": 8, "incompatible": 8, "compatible": 8, "autoclear": 8, "refcount_order": 4, "header_length": 4,
    "compression_type": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mutation:
    """Bytes to write at offsets of an image, then the length (bytes) that the file shall have, or None to keep it."""

    name: str
    patches: tuple[tuple[int, bytes], ...] = ()
    length: int | None = None

    def encode(self) -> str:
        """One line of JSON."""
        patches = [(offset, data.hex()) for offset, data in self.patches]
        return json.dumps({"name": self.name, "patches": patches, "length": self.length})

    @classmethod
    def decode(cls, line: str) -> Mutation:
        read = json.loads(line)
        patches = tuple((offset, bytes.fromhex(data)) for offset, data in read["patches"])
        return cls(read["name"], patches, read["length"])

    def apply(self, image: bytes) -> bytes:
        """The spoiled image."""
        spoiled = bytearray(image)
        for offset, data in self.patches:
            spoiled[offset : offset + len(data)] = data
        return bytes(spoiled) if self.length is None else bytes(spoiled[: self.length])


@dataclass(frozen=True, slots=True)
class Region:
    """Where a structure lies in the host file, in bytes."""

    name: str
    offset: int
    length: int


def regions(image: bytes) -> list[Region]:
    """The metadata of a sound image: first cluster, tables, refcount blocks, L2 tables, snapshots, bitmaps."""
    first = decode_first_cluster(image)
    header, cluster = first.header, first.header.geometry.cluster_size
    found = [
        Region("header", 0, min(cluster, 1024)),
        Region("L1 table", header.l1_table_offset, header.l1_size * WORD),
        Region("refcount table", header.refcount_table_offset, header.refcount_table_clusters * cluster),
    ]
    found += [Region("L2 table", at, cluster) for at in _pointed(image, header.l1_table_offset, header.l1_size)]
    entries = header.refcount_table_clusters * cluster // WORD
    found += [Region("refcount block", at, cluster) for at in _pointed(image, header.refcount_table_offset, entries)]
    found += _optional_regions(first)
    return [region for region in found if region.length and region.offset < len(image)]


def truncations(image: bytes) -> Iterator[Mutation]:
    """Cut the file inside the header, at and inside every structure, and just before its end."""
    lengths = {0, 1, 3, 4, 8, 71, 72, 100, 103, 104, 111, 112, 120, 511, 512, 513, len(image) - 1, len(image) // 2}
    for region in regions(image):
        middle = region.offset + region.length // 2
        lengths |= {region.offset, region.offset + 1, middle, middle + 3, region.offset + region.length - 1}
    for length in sorted(lengths):
        if 0 <= length < len(image):
            yield Mutation(f"cut to {length} bytes", length=length)


def header_extremes(image: bytes, seed: int) -> Iterator[Mutation]:
    """Set each header field, one at a time, to values at its ends, in its middle, and by chance."""
    chooser = random.Random(seed)
    for field, width in HEADER_WIDTHS.items():
        top = (1 << 8 * width) - 1
        values = {0, 1, 2, top, top >> 1, (top >> 1) + 1, top - 511, chooser.randint(0, top), len(image), 1 << 16}
        values |= {1 << chooser.randrange(8 * width) for _ in range(3)}
        for value in sorted(value & top for value in values):
            yield _set_fields(f"{field} = {value:#x}", **{field: value})


def bit_flips(image: bytes, seed: int, count: int) -> Iterator[Mutation]:
    """Flip one to eight bits of one structure."""
    chooser = random.Random(seed)
    places = regions(image)
    for number in range(count):
        region = chooser.choice(places)
        patches = {}
        for _ in range(chooser.choice((1, 1, 2, 8))):
            at = region.offset + chooser.randrange(min(region.length, len(image) - region.offset))
            patches[at] = bytes([image[at] ^ 1 << chooser.randrange(8)])
        yield Mutation(f"flip {number} in the {region.name} at {sorted(patches)}", tuple(patches.items()))


def table_attacks(image: bytes, seed: int, count: int) -> Iterator[Mutation]:
    """Write a hostile word over entries of the tables: loops, far offsets, reserved bits, absurd streams."""
    chooser = random.Random(seed)
    header = decode_first_cluster(image).header
    tables = [region for region in regions(image) if region.name != "header"]
    targets = [region.offset for region in regions(image)]
    for number in range(count):
        region = chooser.choice(tables)
        words = min(region.length, len(image) - region.offset) // WORD
        if not words:
            continue
        word = _hostile_word(chooser, targets, len(image), header)
        first = chooser.randrange(words)
        run = chooser.choice((1, 1, 1, 4, words - first))
        patch = word.to_bytes(WORD, "big") * run
        yield Mutation(f"attack {number}: {run} words {word:#018x} from {first} of the {region.name}",
                       ((region.offset + first * WORD, patch),))  # fmt: skip


def size_attacks(image: bytes) -> Iterator[Mutation]:
    """Declare a disk as large as the format allows, with tables to match that the file does not have."""
    header = decode_first_cluster(image).header
    cluster = header.geometry.cluster_size
    places = (("its place", header.l1_table_offset), ("the end", len(image) & -cluster))
    for entries in (header.l1_size * 2 + 1, 1 << 16, 1 << 22):
        size = min(entries * header.geometry.l2_span, (1 << 63) - 512)
        for place, offset in places:
            yield _set_fields(f"{entries} L1 entries at {place}", size=size, l1_size=entries, l1_table_offset=offset)
    for count in (1, 65536):
        yield _set_fields(
            f"{count} snapshots in the L1 table", snapshot_count=count, snapshots_offset=header.l1_table_offset
        )


def all_mutations(image: bytes, *, seed: int, flips: int, attacks: int) -> Iterator[Mutation]:
    """Every kind; `flips` and `attacks` say how many of the random ones."""
    yield Mutation("untouched")
    yield from truncations(image)
    yield from header_extremes(image, seed)
    yield from size_attacks(image)
    yield from bit_flips(image, seed, flips)
    yield from table_attacks(image, seed, attacks)


def _hostile_word(chooser: random.Random, targets: list[int], length: int, header: Header) -> int:
    cluster = header.geometry.cluster_size
    offset = chooser.choice(
        (
            chooser.choice(targets),
            chooser.choice(targets) + chooser.choice((1, 8, 256, cluster // 2)),
            length & -cluster,
            length + 1000 * cluster,
            (1 << 56) - cluster,
            chooser.randrange(1 << 62),
            0,
        )
    )
    flags = chooser.choice((0, COPIED, COMPRESSED, ZERO, COPIED | ZERO, COMPRESSED | COPIED, 1 << 57))
    return (offset | flags) % (1 << 64)


def _set_fields(name: str, **values: int) -> Mutation:
    """Write header fields."""
    fields = ((FIELD_OFFSETS[field], value.to_bytes(HEADER_WIDTHS[field], "big")) for field, value in values.items())
    return Mutation(name, tuple(fields))


def _pointed(image: bytes, offset: int, entries: int) -> list[int]:
    """The clusters that a table of words points at, as far as the file has them."""
    table = image[offset : offset + entries * WORD]
    words = (int.from_bytes(table[at : at + WORD], "big") & L1_OFFSET_MASK for at in range(0, len(table), WORD))
    return [word for word in words if 0 < word < len(image)]


def _optional_regions(first: FirstCluster) -> list[Region]:
    found = []
    header, cluster = first.header, first.header.geometry.cluster_size
    if header.snapshot_count:
        found.append(Region("snapshot table", header.snapshots_offset, min(cluster, 256 * header.snapshot_count)))
    if first.bitmaps is not None:
        found.append(Region("bitmap directory", first.bitmaps.directory_offset, first.bitmaps.directory_size))
    if first.crypto is not None:
        found.append(Region("encryption header", first.crypto.offset, 592))
    return found
