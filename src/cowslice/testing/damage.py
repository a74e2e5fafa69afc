"""Small images with a life behind them, made by QEMU's tools, and damage done to their metadata by hand.

It does not know what a check finds. The same seed makes the same image and the same damage.
"""

from __future__ import annotations

import random
from pathlib import Path

from cowslice.format.entries import L1_OFFSET_MASK
from cowslice.format.words import unpack_words
from cowslice.ops.references import load_tables
from cowslice.ops.tables import L1Tree, Tables
from cowslice.storage.file import FileStorage
from cowslice.testing import peers


def make_worn_image(path: Path, chance: random.Random) -> None:
    """Make a small image of any version, cluster size and refcount width, with writes and snapshots at random."""
    cluster = chance.choice([512, 1024, 4096, 16384, 65536])
    version_2 = chance.random() < 0.15
    bits = 16 if version_2 else chance.choice([1, 2, 4, 8, 16, 16, 32, 64])
    data_file = not version_2 and chance.random() < 0.1
    options = [f"cluster_size={cluster}", "compat=0.10" if version_2 else f"refcount_bits={bits}"]
    if not version_2 and cluster >= 16384 and chance.random() < 0.4:
        options.append("extended_l2=on")
    if data_file:
        options.append(f"data_file={path}.data")
    size = chance.choice([cluster * 20, cluster * 200, 1 << 20, 3 << 20])
    peers.qemu_img("create", "-f", "qcow2", "-o", ",".join(options), path, size)
    _write(path, chance, size, cluster, compressed=not data_file, count=chance.randrange(1, 12))
    if not data_file and bits > 1:
        for number in range(chance.choice([0, 0, 1, 2])):
            peers.qemu_img("snapshot", "-c", f"s{number}", path, expect=None)
            _write(path, chance, size, cluster, compressed=True, count=chance.randrange(6))
    if not version_2 and chance.random() < 0.2:
        peers.qemu_img("bitmap", "--add", path, "b0", expect=None)


def damage_metadata(path: Path, chance: random.Random) -> None:
    """Change up to five bytes of refcounts, refcount table, L1 and L2 tables; sometimes none."""
    with FileStorage(path, locking=False) as storage:
        tables = load_tables(storage)
        places = [_place(tables, chance) for _ in range(chance.choice([0, 1, 1, 2, 5]))]
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            before = (file.read(1) or b"\0")[0]
            file.seek(place)
            file.write(bytes([chance.choice([before ^ 1 << chance.randrange(8), chance.randrange(256), 0, 255])]))


def _write(path: Path, chance: random.Random, size: int, cluster: int, *, compressed: bool, count: int) -> None:
    commands = []
    for _ in range(count):
        offset = chance.randrange(size) // 512 * 512
        length = min(size - offset, chance.choice([512, cluster, cluster * 3, cluster * 10]))
        kind = chance.choice(["write -P 7", "write -P 9", "write -P 200", "write -z", "discard", "write -c -P 5"])
        if "-c" in kind:
            offset, length = offset // cluster * cluster, cluster
            if not compressed or offset + length > size:
                continue
        commands.append(f"{kind} {offset} {length}")
    if commands:
        peers.qemu_io(path, *commands, expect=None)


def _place(tables: Tables, chance: random.Random) -> int:
    """A byte of some table."""
    blocks = [word & ~0x1FF for word in tables.reftable if word]
    tree = chance.choice(tables.trees)
    kind = chance.choice(["refcount", "refcount", "l1", "reftable", "l2", "l2", "l2", "l2"])
    l2 = [word & L1_OFFSET_MASK for word in unpack_words(tables.storage.read(tree.offset, tree.entries * 8)) if word]
    if kind == "refcount":
        used = max(1, tables.clusters * tables.geometry.refcount_bits // 8)
        return chance.choice(blocks) + chance.randrange(min(tables.geometry.cluster_size, used))
    if kind == "reftable":
        return tables.header.refcount_table_offset + chance.randrange(16)
    if kind == "l1" or not l2:
        return _l1_byte(tree, chance)
    entries = min(tables.geometry.l2_entries, tables.geometry.clusters(tables.header.size))
    return chance.choice(l2) + chance.randrange(entries * tables.geometry.l2_entry_size)


def _l1_byte(tree: L1Tree, chance: random.Random) -> int:
    return tree.offset + chance.randrange(8 * tree.entries)
