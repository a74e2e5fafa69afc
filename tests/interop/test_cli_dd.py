"""`cowslice dd` copies the blocks that were asked for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cowslice.testing import peers
from cowslice.testing.commandline import cowslice

pytestmark = peers.needs("qemu-img", "qemu-io")

SIZE = 3_000_320


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dd")
    raw = bytearray(SIZE)
    chosen = random.Random(1)
    for _ in range(20):
        at = chosen.randrange(SIZE - 50_000)
        raw[at : at + 50_000] = chosen.randbytes(50_000)
    (folder / "raw").write_bytes(raw)
    peers.qemu_img("convert", "-f", "raw", "-O", "qcow2", folder / "raw", folder / "disk.qcow2")
    return folder / "disk.qcow2"


@pytest.mark.parametrize("blocks", [
    {}, {"count": 1}, {"skip": 10, "count": 5}, {"skip": 5, "count": 10}, {"bs": "64k", "skip": 3, "count": 40},
    {"bs": "1M", "skip": 1}, {"bs": 1000, "count": 7, "skip": 2}, {"skip": 5860}, {"count": 0}, {"bs": "1M", "skip": 2},
    {"count": 1 << 60, "skip": 1}, {"skip": 1 << 60},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("target_format", ["raw", "qcow2"])
def test_count_blocks_behind_skip_blocks_are_copied(
    tmp_path: Path, disk: Path, blocks: dict[str, int | str], target_format: str
) -> None:
    said = cowslice("dd", "-O", target_format, f"if={disk}", f"of={tmp_path / 'out'}",
                    *(f"{name}={value}" for name, value in blocks.items()))
    assert (said.status, said.out, said.err) == (0, "", "")
    size = {"64k": 65536, "1M": 1 << 20}.get(str(blocks.get("bs", 512)), 0) or int(blocks.get("bs", 512))
    raw, start = disk.with_name("raw").read_bytes(), min(int(blocks.get("skip", 0)) * size, SIZE)
    wanted = raw[start : start + int(blocks.get("count", SIZE)) * size]
    copied = tmp_path / "out"
    if target_format == "qcow2":
        assert "No errors" in peers.qemu_img("check", copied)
        copied = tmp_path / "out.raw"
        peers.qemu_img("convert", "-O", "raw", tmp_path / "out", copied)
    assert copied.read_bytes() == wanted.ljust(-(-len(wanted) // 512) * 512, b"\0")


@pytest.mark.parametrize("blocks", [[], ["count=9"], ["bs=4096", "skip=7"], ["bs=3000", "count=5"]], ids=str)
def test_where_qemu_counts_rightly_the_copies_are_the_same(tmp_path: Path, disk: Path, blocks: list[str]) -> None:
    assert cowslice("dd", *blocks, f"if={disk}", f"of={tmp_path / 'ours'}").status == 0
    peers.qemu_img("dd", "-f", "qcow2", "-O", "raw", *blocks, f"if={disk}", f"of={tmp_path / 'theirs'}")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_zeros_of_the_source_are_holes_of_the_copy(tmp_path: Path) -> None:
    peers.qemu_img("create", "-q", "-f", "qcow2", tmp_path / "disk", "1T")
    assert cowslice("dd", "bs=1G", "skip=1", f"if={tmp_path / 'disk'}", f"of={tmp_path / 'out'}").status == 0
    assert (tmp_path / "out").stat().st_size == 1023 << 30
    assert (tmp_path / "out").stat().st_blocks == 0


@pytest.mark.parametrize("operands", [
    [], ["if=disk"], ["of=out"], ["if=disk", "of=out", "seek=1"], ["if=disk", "of=out", "bs=0"],
    ["if=disk", "of=out", "count=-1"], ["if=disk", "of=out", "count"], ["if=disk", "of=disk"],
], ids=" ".join)  # fmt: skip
def test_a_wrong_command_line_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operands: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk").write_bytes(b"x" * 512)
    assert cowslice("dd", *operands).status == 64
    assert not Path("out").exists()
    assert Path("disk").read_bytes() == b"x" * 512
