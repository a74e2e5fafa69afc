"""Every image of the manifest, read by us and by QEMU: the same bytes, the same extents, the same faults."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import cowslice
from cowslice.ops.check import check
from cowslice.storage import FileStorage
from cowslice.testing import commandline, peers, recipes
from cowslice.testing.commandline import Said
from cowslice.testing.fixtures import Fixture, load_manifest, sample

pytestmark = peers.needs("qemu-img", "qemu-io")

ROWS = load_manifest(Path(__file__).with_name("matrix.tsv"))
SAMPLED = sample(400, seed=20261123)
COUNTS = ("check-errors", "corruptions", "leaks", "image-end-offset", "total-clusters", "allocated-clusters",
          "fragmented-clusters", "compressed-clusters")  # fmt: skip
SHAPES = 40  # reads of a random place and length for each image


@dataclass(frozen=True, slots=True)
class Judged:
    """An image and what QEMU says of it."""

    made: recipes.Made
    content: bytes

    def open(self, **options: Any) -> cowslice.Image:
        return cowslice.open(self.made.path, secret=self.made.secret, **options)


def _parameters() -> Iterator[Any]:
    for row in [*ROWS, *SAMPLED]:
        yield pytest.param(row, id=row.name, marks=[pytest.mark.long] if row.tier == "long" else [])


@pytest.fixture(scope="module", params=_parameters())
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judged]:
    fixture: Fixture = request.param
    directory = tmp_path_factory.mktemp("matrix")
    made = recipes.make(fixture, directory)
    yield Judged(made, _converted(made))
    shutil.rmtree(directory)


def _converted(made: recipes.Made, *options: str) -> bytes:
    """What qemu-img reads."""
    target = made.path.with_name("converted")
    peers.qemu_img("convert", *options, *made.qemu_source, "-O", "raw", target)
    content = target.read_bytes()
    target.unlink()
    return content


def test_qemu_reads_what_was_written(judged: Judged) -> None:
    assert judged.made.guest.differs(judged.content) is None


def test_the_whole_disk_reads_as_qemu_reads_it(judged: Judged) -> None:
    with judged.open() as disk:
        assert disk.size == len(judged.content)
        _same(disk.read(0, disk.size), judged.content)


def test_reads_of_any_place_and_length_agree(judged: Judged) -> None:
    chooser = random.Random(judged.made.fixture.name)
    with judged.open(l2_cache_size="64k", l2_cache_entry_size=512, warmup="off") as disk:
        for _ in range(SHAPES):
            offset = chooser.randrange(disk.size)
            length = min(chooser.choice((1, 511, 512, 4096, 70_000, 1_000_000)), disk.size - offset)
            _same(disk.read(offset, length), judged.content[offset : offset + length], offset)


def test_extents_are_those_of_qemu_img_map(judged: Judged) -> None:
    theirs = peers.qemu_img_json("map", *judged.made.qemu_source)
    with judged.open() as disk:
        ours = [_as_qemu(extent) for extent in disk.extents(0, disk.size)]
    assert list(_merged(ours)) == [_as_seven(extent) for extent in theirs]


def test_each_snapshot_reads_as_qemu_reads_it(judged: Judged) -> None:
    for name, guest in judged.made.snapshots:
        with judged.open(snapshot=name) as disk:
            content = disk.read(0, disk.size)
        assert guest.differs(content) is None
        _same(content, _converted(judged.made, "-l", f"snapshot.name={name}"))


def test_check_counts_what_qemu_img_check_counts(judged: Judged) -> None:
    checked = peers.qemu_img_json("check", *judged.made.qemu_source, expect=(0, 2, 3))
    with FileStorage(judged.made.path) as storage:
        report = check(storage)
    ours = {name: getattr(report, name.replace("-", "_")) for name in COUNTS}
    assert ours == {name: checked.get(name, 0) for name in COUNTS}, report.findings


def test_cowslice_info_prints_what_qemu_img_info_prints(judged: Judged) -> None:
    told = _said("info", "--output=json", judged.made.path).json
    ours = {name: value for name, value in told.items() if name != "cowslice"}
    assert ours == peers.qemu_img_json("info", judged.made.path)


def test_cowslice_map_prints_what_qemu_img_map_prints(judged: Judged) -> None:
    told = _said("map", "--output=json", *judged.made.qemu_source).json
    theirs = peers.qemu_img_json("map", *judged.made.qemu_source)
    assert list(_merged([_as_seven(extent) for extent in told])) == [_as_seven(extent) for extent in theirs]


def test_cowslice_convert_writes_what_qemu_img_convert_writes(judged: Judged) -> None:
    target = judged.made.path.with_name("ours")
    _said("convert", *judged.made.qemu_source, "-O", "raw", target)
    _same(target.read_bytes(), judged.content)
    target.unlink()


def _said(*arguments: str | Path) -> Said:
    said = commandline.cowslice(*arguments)
    assert said.status == 0, said.err
    return said


def _same(ours: bytes, theirs: bytes, start: int = 0) -> None:
    """Compare without printing megabytes."""
    if ours == theirs:
        return
    assert len(ours) == len(theirs)
    at = next(at for at, (mine, its) in enumerate(zip(ours, theirs, strict=True)) if mine != its)
    pytest.fail(f"guest offset {start + at:#x}: {ours[at : at + 8].hex()}, QEMU reads {theirs[at : at + 8].hex()}")


def _as_qemu(extent: cowslice.Extent) -> dict[str, Any]:
    shown = {name: getattr(extent, name) for name in ("start", "length", "depth", "present", "zero", "data")}
    return shown if extent.offset is None else {**shown, "offset": extent.offset}


def _as_seven(extent: dict[str, Any]) -> dict[str, Any]:
    """What QEMU 7.2 prints too."""
    return {name: value for name, value in extent.items() if name not in ("compressed", "filename")}


def _merged(extents: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Join what differs only in being compressed, which QEMU 7.2 does not show."""
    if not extents:
        return
    current = dict(extents[0])
    for before, extent in pairwise(extents):
        expected = {**before, "start": extent["start"], "length": extent["length"]}
        if "offset" in before:
            expected["offset"] = before["offset"] + before["length"]
        if extent == expected:
            current["length"] += extent["length"]
        else:
            yield current
            current = dict(extent)
    yield current
