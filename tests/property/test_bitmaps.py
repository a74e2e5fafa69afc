"""Bitmaps of a disk that lives: beside sets of granules, over many sessions, judged by QEMU in the end."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import cowslice
from cowslice.testing import peers
from cowslice.units import KiB

pytestmark = peers.needs("qemu-img")
GRANULARITIES = (512, 1024, 4 * KiB, 64 * KiB)


@dataclass(slots=True)
class Model:
    """What a bitmap `must` mark, for bytes have changed there, and what it `may` mark, for a change was asked there."""

    granularity: int
    enabled: bool = True
    must: set[int] = field(default_factory=set)
    may: set[int] = field(default_factory=set)

    def granules(self, offset: int, length: int) -> set[int]:
        return set(range(offset // self.granularity, -(-(offset + length) // self.granularity))) if length else set()

    def note(self, offset: int, length: int, changed: list[int]) -> None:
        if self.enabled:
            self.may |= self.granules(offset, length)
            self.must |= {at // self.granularity for at in changed}

    def join(self, other: Model) -> None:
        for number in other.must:
            self.must |= self.granules(number * other.granularity, other.granularity)
        for number in other.may:
            self.may |= self.granules(number * other.granularity, other.granularity)

    def cut(self, size: int) -> None:
        last = -(-size // self.granularity)
        self.must = {number for number in self.must if number < last}
        self.may = {number for number in self.may if number < last}


class Life:
    """One image and the models of its bitmaps; each move is done to both."""

    def __init__(self, path: Path, seed: int) -> None:
        self.dice = random.Random(seed)
        self.cluster = self.dice.choice((512, 4 * KiB, 64 * KiB))
        self.path = path
        self.models: dict[str, Model] = {}
        extended = self.cluster == 64 * KiB and self.dice.random() < 0.5
        cowslice.create(path, 40 * max(self.cluster, 4 * KiB) + 512, format="qcow2", cluster_size=self.cluster,
                        extended_l2=extended)
        self.disk = self.opened()

    def opened(self) -> cowslice.Image:
        return cowslice.open(self.path, "r+", format="qcow2", warmup="off")

    def span(self) -> tuple[int, int]:
        start = self.dice.randrange(self.disk.size)
        return start, min(self.disk.size - start, self.dice.choice((1, 700, self.cluster, 5 * self.cluster)))

    def play(self, moves: int) -> None:
        choices = [self.write] * 5 + [self.zero, self.zero, self.discard, self.compress, self.add, self.add,
                                      self.remove, self.clear, self.switch, self.merge, self.reopen, self.resize,
                                      self.flush, self.snapshot]
        for _ in range(moves):
            self.dice.choice(choices)()
            self.agree()

    def agree(self) -> None:
        names = {one.name.decode() for one in self.disk.bitmaps}
        assert names == set(self.models)
        for name, model in self.models.items():
            marked = set()
            for start, length in self.disk.dirty_extents(name):
                marked |= model.granules(start, length)
            assert model.must <= marked <= model.may, name

    def change(self, act: str, offset: int, length: int, *arguments: object) -> None:
        before = self.disk.read(0, self.disk.size)
        getattr(self.disk, act)(offset, *arguments)
        after = self.disk.read(0, self.disk.size)
        changed = [at for at in range(0, len(after), 512) if after[at : at + 512] != before[at : at + 512]]
        for model in self.models.values():
            model.note(offset, length, changed)

    def write(self) -> None:
        offset, length = self.span()
        self.change("write", offset, length, self.dice.randbytes(length))

    def zero(self) -> None:
        offset, length = self.span()
        self.change("zero", offset, length, length)

    def discard(self) -> None:
        offset, length = self.span()
        self.change("discard", offset, length, length)

    def compress(self) -> None:
        offset = self.dice.randrange(self.disk.size // self.cluster) * self.cluster
        self.change("write_compressed", offset, self.cluster, bytes([self.dice.randrange(1, 9)]) * self.cluster)

    def add(self) -> None:
        name = f"b{self.dice.randrange(1000)}"
        if name not in self.models and len(self.models) < 4:
            granularity, enabled = self.dice.choice(GRANULARITIES), self.dice.random() < 0.8
            self.disk.add_bitmap(name, granularity=granularity, enabled=enabled)
            self.models[name] = Model(granularity, enabled)

    def any(self) -> str:
        return self.dice.choice(sorted(self.models)) if self.models else ""

    def remove(self) -> None:
        if name := self.any():
            self.disk.remove_bitmap(name)
            del self.models[name]

    def clear(self) -> None:
        if name := self.any():
            self.disk.clear_bitmap(name)
            self.models[name].must, self.models[name].may = set(), set()

    def switch(self) -> None:
        if name := self.any():
            model = self.models[name]
            model.enabled = not model.enabled
            (self.disk.enable_bitmap if model.enabled else self.disk.disable_bitmap)(name)

    def merge(self) -> None:
        if name := self.any():
            source = self.any()
            self.disk.merge_bitmap(name, source)
            self.models[name].join(self.models[source])
            self.models[name].cut(self.disk.size)

    def reopen(self) -> None:
        self.disk.close()
        self.disk = self.opened()

    def resize(self) -> None:
        before, after = self.disk.size, self.dice.randrange(1, 80) * max(self.cluster, 4 * KiB) + 512
        self.disk.resize(after, shrink=True)
        for model in self.models.values():
            model.note(min(before, after) // self.cluster * self.cluster, abs(after - before) + self.cluster, [])
            model.cut(after)

    def flush(self) -> None:
        self.disk.flush()

    def snapshot(self) -> None:
        name = f"s{len(self.disk.snapshots)}"
        self.disk.snapshot(name)
        self.change("write", 0, 100, self.dice.randbytes(100))
        self.disk.apply_snapshot(name)
        for model in self.models.values():
            model.note(0, self.disk.size, list(range(0, self.disk.size, 512)))
        self.disk.delete_snapshot(name)


def live(path: Path, seed: int, moves: int) -> None:
    life = Life(path, seed)
    life.play(moves)
    live_view = {name: list(life.disk.dirty_extents(name)) for name in life.models}
    life.disk.close()
    with cowslice.open(path, format="qcow2") as disk:
        assert {name: list(disk.dirty_extents(name)) for name in life.models} == live_view
    peers.qemu_img("check", "-q", path)
    listed = peers.qemu_img_json("info", path)["format-specific"]["data"].get("bitmaps", [])
    assert {one["name"]: (one["granularity"], one["flags"]) for one in listed} == \
        {name: (model.granularity, ["auto"] if model.enabled else []) for name, model in life.models.items()}


@pytest.mark.parametrize("seed", range(10))
def test_bitmaps_mark_what_has_changed_over_many_sessions(tmp_path: Path, seed: int) -> None:
    live(tmp_path / "disk.qcow2", seed, 40)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 300))
def test_bitmaps_mark_what_has_changed_in_any_life(tmp_path: Path, seed: int) -> None:
    live(tmp_path / "disk.qcow2", seed, 120)
