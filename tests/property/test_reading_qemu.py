"""Chains of unlike layers made by QEMU at random: the same bytes and the same extents as QEMU's own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import cowslice
from cowslice.testing import peers

pytestmark = peers.needs("qemu-img", "qemu-io")
KiB = 1 << 10
SEEDS = [pytest.param(seed, marks=[pytest.mark.long] if seed >= 10 else []) for seed in range(150)]
_FIELDS = ("start", "length", "depth", "present", "zero", "data", "offset")


def make_chain(folder: Path, choose: random.Random) -> Path:
    """Two to five files, each of its own size, cluster size and kind, written to at random. Returns the top one."""
    below: tuple[str, str] | None = None
    if choose.random() < 0.5:
        make_raw(folder / "raw", choose.randrange(1, 6000) * 512, choose)
        below = ("raw", "raw")
    path = folder
    for level in range(choose.randint(1, 4)):
        path = folder / f"layer{level}"
        create(path, choose.randrange(1, 6000) * 512, below, choose)
        below = (path.name, "qcow2")
    return path


def make_raw(path: Path, size: int, choose: random.Random) -> None:
    """A sparse file whose length need not be a multiple of anything."""
    with path.open("wb") as file:
        file.truncate(size - choose.randrange(512))
        for _ in range(choose.randint(0, 4)):
            file.seek(choose.randrange(size))
            file.write(choose.randbytes(min(choose.randrange(1, 40_000), max(size - file.tell() - 512, 0))))


def create(path: Path, size: int, below: tuple[str, str] | None, choose: random.Random) -> None:
    extended = choose.random() < 0.4
    bits = choose.randint(14, 17) if extended else choose.randint(9, 17)
    options = [f"cluster_size={1 << bits}", f"extended_l2={'on' if extended else 'off'}"]
    options.append(f"compat={'0.10' if not extended and choose.random() < 0.2 else '1.1'}")
    if options[2].endswith("1.1"):
        options.append(f"compression_type={choose.choice(('zlib', 'zstd'))}")
    if below is None and choose.random() < 0.3:
        options.append("preallocation=metadata")
    named = ["-b", below[0], "-F", below[1]] if below else []
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", ",".join(options), *named, path, size)
    peers.qemu_io(path, *(command(size, 1 << bits, choose) for _ in range(choose.randint(1, 12))), expect=None)


def command(size: int, cluster: int, choose: random.Random) -> str:
    """One write, zero write, discard or compressed write; QEMU refuses a few, which is as good."""
    kind = choose.choice(("write", "write", "write -z", "write -z -u", "discard", "write -c"))
    if kind == "write -c":
        offset = choose.randrange(size) // cluster * cluster
        return f"write -c -P {choose.randrange(256)} {offset} {min(cluster, size - offset)}"
    offset = choose.randrange(size // 512) * 512
    length = min(choose.choice((512, 4096, 70 * KiB, 300 * KiB)), size - offset)
    return f"{kind} {f'-P {choose.randrange(256)} ' if kind == 'write' else ''}{offset} {length}"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_chain_reads_and_maps_as_qemu_says(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    path = make_chain(tmp_path, choose)
    peers.qemu_img("convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "converted")
    content = (tmp_path / "converted").read_bytes()
    with cowslice.open(path, l2_cache_size=choose.choice(("16k", "1M")), l2_cache_entry_size=512) as disk:
        assert disk.read(0, disk.size) == content
        for _ in range(20):
            offset = choose.randrange(disk.size)
            length = min(choose.randrange(100_000), disk.size - offset)
            assert disk.read(offset, length) == content[offset : offset + length]
        ours = joined([{name: getattr(extent, name) for name in _FIELDS} for extent in disk.extents()])
    theirs = peers.qemu_img_json("map", "-f", "qcow2", path)
    assert ours == joined([{name: extent.get(name) for name in _FIELDS} for extent in theirs])


def joined(extents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join neighbours that differ only in being compressed, which QEMU 7.2 does not show."""
    found: list[dict[str, Any]] = []
    for extent in extents:
        before = found[-1] if found else {}
        like = all(before.get(name) == extent[name] for name in ("depth", "present", "zero", "data"))
        if like and before["offset"] is None and extent["offset"] is None:
            before["length"] += extent["length"]
        else:
            found.append(dict(extent))
    return found
