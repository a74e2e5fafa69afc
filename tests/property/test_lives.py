"""A machine that plays whole lives of images: hypothesis chooses what happens next, and shortens what goes wrong.

Beside the image runs a model of its disk, of every snapshot and of where each bitmap began. QEMU makes the image, has
its turns in between, and judges at the end: nothing is wrong, and it reads the same bytes, of all snapshots too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import cowslice
from cowslice.image.options import OpenOptions
from cowslice.image.refcounts import RefcountOverflow
from cowslice.ops.amend import amend
from cowslice.ops.amendrules import Amendment
from cowslice.ops.commit import commit
from cowslice.ops.rebase import Backing, rebase
from cowslice.testing import peers, steps
from cowslice.testing.modeldisk import ModelDisk
from cowslice.testing.twin import Files, Shape, Twin, judge, make_files, shape_by_chance
from cowslice.units import KiB, MiB, round_up

pytestmark = peers.needs("qemu-img", "qemu-io")

UNIT = 512
LARGEST = 2 * MiB
MOST_SHOTS, MOST_BITMAPS = 4, 3
chances = st.integers(0, 1 << 32).map(random.Random)
shapes = st.one_of(
    st.integers(0, 1 << 32).map(lambda seed: shape_by_chance(random.Random(seed))),
    st.sampled_from([Shape(4096, encryption="luks"), Shape(64 * KiB, encryption="luks", backing="raw")]),
)


class Life(RuleBasedStateMachine):
    """One image, from its making by QEMU to its judgement by QEMU."""

    files: Files
    twin: Twin

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="cowslice-life-", dir="/dev/shm"))
        self.shots: dict[str, bytes] = {}
        self.begun: dict[str, bytes] = {}  # of each bitmap: what the disk held when it began
        self.number = 0

    @initialize(shape=shapes)
    def begin(self, shape: Shape) -> None:
        self.files = make_files(shape, self.place)
        self.twin = Twin(shape, ModelDisk(self.files.content), self.files.open)

    @property
    def shape(self) -> Shape:
        return self.files.shape

    @property
    def plain(self) -> bool:
        """Whether QEMU's programs need no more than the name."""
        return self.shape.encryption == self.shape.data_file == "none"

    @property
    def has_disk(self) -> bool:
        """Whether there is a disk long enough for every step."""
        return self.twin.model.size >= self.shape.cluster_size

    # -- what a guest does ------------------------------------------------------------------------------------------

    @rule(chance=chances, act=st.sampled_from([steps.write, steps.zero, steps.discard, steps.write, steps.read]))
    @precondition(lambda self: self.has_disk)
    def work(self, chance: random.Random, act: steps.Step) -> None:
        act(self.twin, chance)

    @rule(chance=chances)
    @precondition(lambda self: self.has_disk and self.twin.model.size >= 6 * UNIT)
    def write_many(self, chance: random.Random) -> None:
        steps.write_many(self.twin, chance)

    @rule(chance=chances)
    @precondition(lambda self: self.has_disk)
    def write_compressed(self, chance: random.Random) -> None:
        steps.write_compressed(self.twin, chance)

    @rule()
    def flush(self) -> None:
        self.twin.flush()

    @rule()
    def reopen(self) -> None:
        self.twin.reopen()

    # -- snapshots --------------------------------------------------------------------------------------------------

    @rule()
    @precondition(lambda self: self.shape.data_file == "none" and len(self.shots) < MOST_SHOTS)
    def take(self) -> None:
        name = self.fresh("shot")
        with contextlib.suppress(RefcountOverflow):  # of one or two bits: then nothing has changed
            self.twin.disk.snapshot(name)
            self.shots[name] = bytes(self.twin.model.content)

    @rule(chance=chances)
    @precondition(lambda self: self.shots)
    def apply(self, chance: random.Random) -> None:
        name = chance.choice(list(self.shots))
        with contextlib.suppress(RefcountOverflow):
            self.twin.disk.apply_snapshot(name)
            self.twin.model = ModelDisk(self.shots[name])

    @rule(chance=chances)
    @precondition(lambda self: self.shots)
    def delete(self, chance: random.Random) -> None:
        name = chance.choice(list(self.shots))
        self.twin.disk.delete_snapshot(name)
        del self.shots[name]

    # -- bitmaps ----------------------------------------------------------------------------------------------------

    @rule(granularity=st.sampled_from([512, 4 * KiB, 64 * KiB]))
    @precondition(lambda self: self.shape.version == 3 and self.shape.cluster_size > UNIT
                  and len(self.begun) < MOST_BITMAPS)
    def add_bitmap(self, granularity: int) -> None:
        """Not in a header of one sector, which long names may fill."""
        name = self.fresh("bitmap")
        self.twin.disk.add_bitmap(name, granularity=granularity)
        self.begun[name] = bytes(self.twin.model.content)

    @rule(chance=chances)
    @precondition(lambda self: self.begun)
    def clear_bitmap(self, chance: random.Random) -> None:
        name = chance.choice(list(self.begun))
        self.twin.disk.clear_bitmap(name)
        self.begun[name] = bytes(self.twin.model.content)

    @rule(chance=chances)
    @precondition(lambda self: self.begun)
    def remove_bitmap(self, chance: random.Random) -> None:
        name = chance.choice(list(self.begun))
        self.twin.disk.remove_bitmap(name)
        del self.begun[name]

    # -- another size, other counts, other files below --------------------------------------------------------------

    @rule(chance=chances, preallocation=st.sampled_from(["off", "off", "metadata", "full"]))
    @precondition(lambda self: self.shape.encryption == "none" and (self.shape.version == 3 or not self.shots))
    def resize(self, chance: random.Random, preallocation: str) -> None:
        now, cluster = self.twin.model.size, self.shape.cluster_size
        size = chance.choice((now + UNIT, now - UNIT, now // 2, now * 2, now + 3 * cluster, 64 * KiB))
        size = min(max(size, UNIT), LARGEST) // UNIT * UNIT
        self.twin.disk.resize(size, shrink=True, preallocation=preallocation if size > now else "off")
        self.resized(size)

    def resized(self, size: int) -> None:
        """Bitmaps forget what was behind the end."""
        self.twin.model = ModelDisk(fitted(self.twin.model.content, size))
        self.begun = {name: fitted(content, size) for name, content in self.begun.items()}

    @rule(bits=st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
    @precondition(lambda self: self.shape.version == 3)
    def amend(self, bits: int) -> None:
        self.twin.close()
        with contextlib.suppress(RefcountOverflow):
            amend(str(self.files.image), self.apart(), Amendment(refcount_bits=bits))
            self.become(refcount_bits=bits)
        self.twin.disk = self.twin.opened()

    def apart(self) -> OpenOptions:
        return OpenOptions(format="qcow2", secret=self.shape.secret)

    def become(self, **changes: object) -> None:
        self.files.shape = self.twin.shape = dataclasses.replace(self.shape, **changes)  # type: ignore[arg-type]

    def fresh(self, word: str) -> str:
        self.number += 1
        return f"{word}{self.number}"

    @rule(keep=st.booleans())
    @precondition(lambda self: self.shape.backing != "none" and self.shape.version == 3 and not self.shots)
    def commit(self, keep: bool) -> None:
        """Not with snapshots, which would show the base's new bytes."""
        self.twin.close()
        commit(str(self.files.image), self.apart(), keep=keep)
        self.twin.disk = self.twin.opened()

    @rule(chance=chances, named=st.sampled_from(["", "raw", "qcow2"]))
    @precondition(lambda self: self.shape.data_file != "raw" and not self.shots and self.shape.version == 3)
    def rebase(self, chance: random.Random, named: str) -> None:
        self.twin.close()
        rebase(str(self.files.image), self.apart(), self.other_backing(chance, named))
        self.become(backing=named or "none")
        self.twin.disk = self.twin.opened()

    def other_backing(self, chance: random.Random, kind: str) -> Backing:
        """A file that holds partly what the disk does, and is shorter or longer."""
        if not kind:
            return Backing()
        content = bytearray(self.twin.model.content[: chance.choice((64 * KiB, LARGEST))])
        content[len(content) // 3 : len(content) // 2] = chance.randbytes(len(content) // 2 - len(content) // 3)
        name = self.fresh("below")
        raw = self.place / name
        raw.write_bytes(content.ljust(round_up(max(len(content), 1), UNIT), b"\0"))
        if kind == "raw":
            return Backing(name, "raw")
        peers.qemu_img("convert", "-q", "-f", "raw", "-O", "qcow2", raw, f"{raw}.qcow2")
        return Backing(f"{name}.qcow2", "qcow2")

    # -- QEMU goes on in between ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def handed_over(self) -> Iterator[None]:
        """QEMU's programs have the image for the block."""
        self.twin.close()
        yield
        self.twin.disk = self.twin.opened()

    @rule(chance=chances)
    @precondition(lambda self: self.has_disk and self.shape.encryption == "none")
    def qemu_writes(self, chance: random.Random) -> None:
        commands = []
        for _ in range(3):
            offset, length = steps.span(self.twin, chance)
            value = chance.randrange(1, 256)
            commands += [f"write -P {value} {offset} {length}"]
            self.twin.model.write(offset, bytes([value]) * length)
        offset, length = steps.span(self.twin, chance)
        commands += [f"write -z {chance.choice(('', '-u'))} {offset} {length}"]
        self.twin.model.zero(offset, length)
        with self.handed_over():
            peers.qemu_io(self.files.image, *commands)

    @rule(chance=chances)
    @precondition(lambda self: self.has_disk and self.plain)
    def qemu_compresses(self, chance: random.Random) -> None:
        """Where there is a cluster already it refuses."""
        size = self.shape.cluster_size
        offset, value = chance.randrange(self.twin.model.size // size) * size, chance.randrange(1, 256)
        command = f"write -c -P {value} {offset} {size}"
        with self.handed_over():
            wrote = peers.run("qemu-io", "-f", "qcow2", "-c", command, self.files.image, expect=(0, 1)).returncode == 0
        if wrote:
            self.twin.model.write(offset, bytes([value]) * size)

    @rule()
    @precondition(lambda self: self.plain and len(self.shots) < MOST_SHOTS and self.shape.refcount_bits >= 4)
    def qemu_takes(self) -> None:
        name = self.fresh("shot")
        with self.handed_over():
            peers.qemu_img("snapshot", "-c", name, self.files.image)
        self.shots[name] = bytes(self.twin.model.content)

    @rule(chance=chances)
    @precondition(lambda self: self.plain and self.shots)
    def qemu_deletes(self, chance: random.Random) -> None:
        name = chance.choice(list(self.shots))
        with self.handed_over():
            peers.qemu_img("snapshot", "-d", name, self.files.image)
        del self.shots[name]

    @rule(chance=chances)
    @precondition(lambda self: self.plain and self.shots and self.shape.refcount_bits >= 4 and not self.begun)
    def qemu_applies(self, chance: random.Random) -> None:
        """Not beside bitmaps, which QEMU does not tell of it."""
        name = chance.choice(list(self.shots))
        with self.handed_over():
            peers.qemu_img("snapshot", "-a", name, self.files.image)
        self.twin.model = ModelDisk(self.shots[name])

    @rule(clusters=st.integers(1, 8))
    @precondition(lambda self: self.plain and self.twin.model.size < LARGEST and self.shape.version == 3)
    def qemu_grows(self, clusters: int) -> None:
        size = self.twin.model.size + clusters * self.shape.cluster_size
        with self.handed_over():
            peers.qemu_img("resize", "-q", "-f", "qcow2", self.files.image, size)
        self.resized(size)

    # -- the end ----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if hasattr(self, "twin"):
                self.judge()
        finally:
            shutil.rmtree(self.place)

    def judge(self) -> None:
        self.twin.read_all()
        self.twin.close()
        judge(self.files, self.twin.model)
        for name, content in self.shots.items():
            self.judge_snapshot(name, content)
        with self.files.open("r") as disk:
            for name, before in self.begun.items():
                self.judge_bitmap(disk, name, before)

    def judge_snapshot(self, name: str, content: bytes) -> None:
        """QEMU shows a snapshot as long as the disk is now."""
        with self.files.open("r", snapshot=name) as disk:
            assert disk.read(0, disk.size) == content, f"snapshot {name} of {self.shape}"
        raw = self.place / "shot.raw"
        peers.qemu_img("convert", "-l", name, *self.files.source, "-O", "raw", raw)
        alike = min(len(content), self.twin.model.size)
        assert raw.read_bytes()[:alike] == content[:alike], f"snapshot {name} of {self.shape} as QEMU reads it"

    def judge_bitmap(self, disk: cowslice.Image, name: str, before: bytes) -> None:
        """It may mark more than what differs, for instance what was written twice."""
        now = self.twin.model.content
        sectors = range(0, min(len(before), len(now)), UNIT)
        changed = {at for at in sectors if now[at : at + UNIT] != before[at : at + UNIT]}
        marked = {at for start, length in disk.dirty_extents(name) for at in range(start, start + length, UNIT)}
        assert changed <= marked, f"bitmap {name} of {self.shape} misses {sorted(changed - marked)[:5]}"


def fitted(content: bytes, size: int) -> bytes:
    return bytes(content[:size].ljust(size, b"\0"))


def live(examples: int, length: int) -> None:
    run_state_machine_as_test(Life, settings=settings(
        max_examples=examples, stateful_step_count=length, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck)))


def test_whatever_happens_to_an_image_it_is_sound_and_holds_its_bytes() -> None:
    live(5, 20)


@pytest.mark.long
def test_many_long_lives_leave_sound_images_that_hold_their_bytes() -> None:
    live(400, 60)
