"""Whatever an image holds, reading, mapping, checking and describing it ends with an answer or a cowslice error.

The images go through it in a process of their own, under limits of memory and time (see cowslice.testing.ordeal).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cowslice.ops.check import check
from cowslice.ops.layout import write_populated_image
from cowslice.storage import FileStorage
from cowslice.testing import ordeal, peers, recipes
from cowslice.testing.fixtures import ORDINARY
from cowslice.testing.limited import put_through
from cowslice.testing.mutations import all_mutations, bit_flips, table_attacks
from cowslice.units import KiB

PLAIN = replace(ORDINARY, cluster_size=4096)
BASES = {
    "plain": PLAIN,
    "old": replace(PLAIN, version=2, compression="zlib", snapshots="several"),
    "rich": replace(PLAIN, compression="zstd", snapshots="several", bitmaps="several", content="zeros"),
    "deflate": replace(PLAIN, cluster_size=1024, compression="zlib", refcount_bits=64, content="discards"),
    "subclusters": replace(PLAIN, cluster_size=16384, l2="extended", compression="zlib", content="zeros"),
    "one bit": replace(PLAIN, cluster_size=512, refcount_bits=1, content="zeros"),
    "aes": replace(PLAIN, encryption="aes", content="zeros"),
    "luks": replace(PLAIN, cluster_size=65536, encryption="luks"),
    "backed": replace(PLAIN, backing="chain", snapshots="one"),
    "data file": replace(PLAIN, data_file="mapped", content="zeros"),
    "raw data file": replace(PLAIN, data_file="raw", preallocation="metadata", bitmaps="several"),
}
COUNTS = ("corruptions", "leaks", "image-end-offset", "allocated-clusters", "fragmented-clusters")
SLOW_TO_OPEN = 10  # of the images that derive a key at each open, one mutation in so many of the others'
QUICK = {"flips": 30, "attacks": 40}
LONG = {"flips": 600, "attacks": 600}


def _put_base_through(base: str, directory: Path, *, seed: int, amount: dict[str, int], step: int = 1) -> None:
    made = recipes.make(BASES[base], directory)
    image = made.path.read_bytes()
    mutations = list(all_mutations(image, seed=seed, **amount))
    chosen = mutations[:: step * (SLOW_TO_OPEN if made.fixture.encryption == "luks" else 1)]
    answers = put_through(made.path, chosen, made.secret)
    assert all(step.startswith("ok") for step in answers[0].values()), answers[0]
    assert any("Error" in step or "Image" in step for answer in answers for step in answer.values())


@pytest.mark.parametrize("base", BASES)
@peers.needs("qemu-img", "qemu-io")
def test_a_spoiled_image_is_read_or_refused(base: str, tmp_path: Path) -> None:
    _put_base_through(base, tmp_path, seed=1, amount=QUICK, step=2)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("base", BASES)
@peers.needs("qemu-img", "qemu-io")
def test_many_spoiled_images_are_read_or_refused(base: str, seed: int, tmp_path: Path) -> None:
    _put_base_through(base, tmp_path, seed=seed, amount=LONG)


@pytest.mark.parametrize("extended_l2", [False, True])
def test_a_spoiled_image_of_our_own_is_read_or_refused(extended_l2: bool, tmp_path: Path) -> None:
    path = tmp_path / "image"
    bits = 14 if extended_l2 else 12
    write_populated_image(path, size=700 * KiB, cluster_bits=bits, layout="random", extended_l2=extended_l2)
    answers = put_through(path, all_mutations(path.read_bytes(), seed=7, **QUICK))
    assert all(step.startswith("ok") for step in answers[0].values()), answers[0]


@pytest.mark.parametrize("base", ["rich", "subclusters", "deflate", "backed"])
@peers.needs("qemu-img", "qemu-io")
def test_what_both_read_and_count_in_a_spoiled_image_is_the_same(base: str, tmp_path: Path) -> None:
    _compare_with_qemu(base, tmp_path, seed=3, count=15)


@pytest.mark.long
@pytest.mark.parametrize("base", [base for base in BASES if base not in ("luks", "aes")])
@peers.needs("qemu-img", "qemu-io")
def test_what_both_read_and_count_in_many_spoiled_images_is_the_same(base: str, tmp_path: Path) -> None:
    _compare_with_qemu(base, tmp_path, seed=4, count=400)


def _compare_with_qemu(base: str, directory: Path, *, seed: int, count: int) -> None:
    """Where QEMU reads the whole disk and we do too, the bytes agree; where it can check the image, the counts do."""
    made = recipes.make(BASES[base], directory)
    image = made.path.read_bytes()
    for mutation in [*bit_flips(image, seed, count), *table_attacks(image, seed, count)]:
        made.path.write_bytes(mutation.apply(image))
        _assert_reads_alike(made.path, mutation.name)
        _assert_counts_alike(made.path, mutation.name)


def _assert_reads_alike(path: Path, name: str) -> None:
    ours = ordeal.undergo(path)["read"]
    target = path.with_name("converted")
    done = peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, target, expect=None)
    if done.returncode == 0 and ours.startswith("ok"):
        assert ours == f"ok {ordeal.described(target.read_bytes())}", name


def _assert_counts_alike(path: Path, name: str) -> None:
    done = peers.run("qemu-img", "check", "-f", "qcow2", "--output=json", path, expect=None)
    if not done.stdout:
        return  # QEMU does not open it: a bad bitmap or snapshot record is enough
    theirs = json.loads(done.stdout)
    with FileStorage(path) as storage:
        report = check(storage)
    if report.check_errors:  # a table that the file ends in is no table for us, zeros for QEMU
        assert done.returncode, name
        return
    ours = {name: getattr(report, name.replace("-", "_")) for name in COUNTS}
    assert ours == {name: theirs.get(name, 0) for name in COUNTS}, name
