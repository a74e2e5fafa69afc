"""`cowslice check` counts what `qemu-img check` counts, on sound images and on images damaged by hand."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from cowslice.errors import CowsliceError
from cowslice.ops.check import check
from cowslice.ops.quickcheck import quick_check
from cowslice.storage.file import FileStorage
from cowslice.testing import peers
from cowslice.testing.commandline import cowslice
from cowslice.testing.damage import damage_metadata, make_worn_image

pytestmark = peers.needs("qemu-img", "qemu-io")

COUNTS = ("corruptions", "leaks", "check-errors", "image-end-offset", "total-clusters", "allocated-clusters",
          "fragmented-clusters", "compressed-clusters")  # fmt: skip


def _damaged(path: Path, seed: int) -> Path:
    chance = random.Random(seed)
    make_worn_image(path, chance)
    damage_metadata(path, chance)
    return path


def _qemu_says(path: Path) -> tuple[int, dict[str, Any] | None]:
    done = peers.run("qemu-img", "check", "--output=json", path, expect=None)
    return done.returncode, json.loads(done.stdout) if done.stdout.strip() else None


def _assert_agrees(path: Path) -> None:
    status, expected = _qemu_says(path)
    said = cowslice("check", "--output=json", path)
    assert said.status == status
    if expected is not None:
        ours = said.json
        ours.pop("cowslice", None)
        assert ours == expected


@pytest.mark.parametrize("seed", range(16))
def test_a_damaged_image_has_the_counts_and_the_status_of_qemu(tmp_path: Path, seed: int) -> None:
    _assert_agrees(_damaged(tmp_path / "disk.qcow2", seed))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 500))
def test_many_damaged_images_have_the_counts_of_qemu(tmp_path: Path, seed: int) -> None:
    _assert_agrees(_damaged(tmp_path / "disk.qcow2", seed))


@pytest.mark.parametrize("seed", range(20, 28))
def test_small_windows_and_several_threads_count_the_same(tmp_path: Path, seed: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("cowslice.ops.check.WORTH_THREADS", 0)
    path = _damaged(tmp_path / "disk.qcow2", seed)
    _, expected = _qemu_says(path)
    if expected is None:
        pytest.skip("QEMU cannot open this one")
    with FileStorage(path) as storage:
        report = check(storage, workers=3, window=7)
    assert {key: getattr(report, key.replace("-", "_")) for key in COUNTS} == {
        key: expected.get(key, 0) for key in COUNTS}


@pytest.mark.parametrize("seed", range(30, 50))
def test_the_quick_check_says_what_the_full_check_says_or_nothing(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    make_worn_image(path, chance)
    if seed % 2:
        damage_metadata(path, chance)
    quick = quick_check(str(path))
    if quick is None:
        return
    with FileStorage(path) as storage:
        full = check(storage)
    for key in COUNTS:
        name = key.replace("-", "_")
        assert getattr(quick, name) == getattr(full, name)
    assert not full.findings


def test_the_quick_check_has_an_answer_for_a_plain_image(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", "-o", "preallocation=metadata", path, "64M")
    quick = quick_check(str(path))
    assert quick is not None
    assert quick.allocated_clusters == 1024


def test_a_leak_says_which_host_cluster_it_is(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", path, "1M")
    with path.open("r+b") as file:
        file.truncate(10 * 65536)
        file.seek(2 * 65536 + 2 * 8)  # the refcount of host cluster 8
        file.write(b"\0\1")
    said = cowslice("check", "--output=json", path)
    assert said.status == 3
    finding = said.json["cowslice"]["findings"][0]
    assert (finding["kind"], finding["host-cluster"], finding["claims"]) == ("leak", 8, [])


def test_a_cluster_of_two_owners_is_told_with_both(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", path, "1M")
    peers.qemu_io(path, "write 0 128k")
    shared = peers.qemu_img_json("map", path)[0]["offset"]
    with path.open("r+b") as file:
        file.seek(4 * 65536 + 8)  # the second L2 entry
        file.write((1 << 63 | shared).to_bytes(8, "big"))
    said = cowslice("check", path)
    assert said.status == 2
    assert "claimed by guest offset 0x0 of active" in said.out
    assert "claimed by guest offset 0x10000 of active" in said.out


def test_a_raw_file_has_nothing_to_check(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(65536))
    said = cowslice("check", tmp_path / "disk.raw")
    assert said.status == 63
    assert peers.run("qemu-img", "check", "-f", "raw", tmp_path / "disk.raw", expect=None).returncode == 63


def test_nothing_the_image_names_is_opened(tmp_path: Path) -> None:
    base = tmp_path / "base.qcow2"
    peers.qemu_img("create", "-f", "qcow2", base, "1M")
    peers.qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", tmp_path / "top.qcow2")
    base.unlink()
    assert cowslice("check", tmp_path / "top.qcow2").status == 0


def test_a_check_changes_no_byte(tmp_path: Path) -> None:
    path = _damaged(tmp_path / "disk.qcow2", 3)
    copy = tmp_path / "copy"
    shutil.copyfile(path, copy)
    cowslice("check", path)
    assert path.read_bytes() == copy.read_bytes()


@pytest.mark.parametrize("length", [65536, 65536 * 2, 65536 * 3, 65536 * 5, 65536 * 9 + 1])
def test_a_truncated_image_is_judged_as_qemu_judges_it(tmp_path: Path, length: int) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", path, "1M")
    peers.qemu_io(path, "write 0 1M")
    with path.open("r+b") as file:
        file.truncate(length)
    _assert_agrees(path)


@pytest.mark.parametrize("length, status", [(0, 63), (3, 63), (7, 63), (71, 1), (103, 1)])
def test_a_header_that_is_cut_off_is_told_in_one_sentence(tmp_path: Path, length: int, status: int) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", path, "1M")
    with path.open("r+b") as file:
        file.truncate(length)
    said = cowslice("check", path)
    assert said.status == status
    assert said.err.startswith("cowslice: ")


def test_an_l1_table_that_repeats_one_l2_table_counts_it_as_often_as_qemu_does(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", "-o", "cluster_size=512", path, "128M")
    peers.qemu_io(path, "write 0 4k")
    data = bytearray(path.read_bytes())
    at = int.from_bytes(data[40:48], "big")
    data[at : at + 4096 * 8] = data[at : at + 8] * 4096
    path.write_bytes(data)
    _assert_agrees(path)


def test_what_is_told_of_many_findings_is_bounded_and_the_totals_are_not(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", "-o", "cluster_size=512", path, "4M")
    peers.qemu_io(path, *(f"write {offset} 512" for offset in range(0, 1 << 20, 1024)))
    data = bytearray(path.read_bytes())
    for place in range(0, len(data) - 8, 8):  # every copied flag of every entry goes
        if data[place] == 0x80 and not any(data[place + 1 : place + 4]):
            data[place] = 0
    path.write_bytes(data)
    _assert_agrees(path)
    ours = cowslice("check", "--output=json", path).json
    assert len(ours["cowslice"]["findings"]) == 256
    assert ours["corruptions"] == 256 + ours["cowslice"]["findings-left-out"]


def test_a_sparse_file_beyond_all_measure_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    with path.open("r+b") as file:
        file.truncate((1 << 31) * 512 + 512)
    said = cowslice("check", path)
    assert said.status == 1
    assert "host clusters" in said.err


def test_random_bytes_behind_a_magic_never_escape_as_a_foreign_exception(tmp_path: Path) -> None:
    chance = random.Random(5)
    path = tmp_path / "disk.qcow2"
    for _ in range(60):
        path.write_bytes(b"QFI\xfb\0\0\0\3" + chance.randbytes(600))
        with FileStorage(path) as storage:
            try:
                check(storage)
            except CowsliceError:
                continue
