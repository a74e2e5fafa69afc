"""Persistent bitmaps that QEMU and cowslice keep in turns: both mark what either has written, and say the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cowslice as library
from cowslice.testing import peers
from cowslice.testing.commandline import cowslice

pytestmark = peers.needs("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")

KiB, MiB = 1 << 10, 1 << 20
SIZE = 5 * MiB + 512
SHAPES = ["cluster_size=64k", "cluster_size=512", "cluster_size=64k,extended_l2=on", "cluster_size=2M",
          "cluster_size=4k,lazy_refcounts=on"]
Spans = list[tuple[int, int]]


def make(path: Path, options: str = "cluster_size=64k") -> Path:
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, SIZE)
    return path


def listed(path: Path) -> list[dict[str, Any]]:
    """What `qemu-img info` says of the bitmaps."""
    said = peers.qemu_img_json("info", path)["format-specific"]["data"].get("bitmaps", [])
    return [{**one, "flags": sorted(one["flags"])} for one in said]


def theirs(path: Path, name: str) -> Spans:
    """What a bitmap marks as QEMU serves it."""
    with peers.qemu_nbd(path, "-r", "-B", name) as uri:
        return mapped(uri, name)


def mapped(uri: str, name: str) -> Spans:
    found = peers.nbdinfo_json(uri, f"--map=qemu:dirty-bitmap:{name}")
    return joined((one["offset"], one["length"]) for one in found if one["type"] == 1)


def joined(spans: Any) -> Spans:
    result: Spans = []
    for start, length in spans:
        if result and sum(result[-1]) == start:
            result[-1] = result[-1][0], result[-1][1] + length
        else:
            result.append((start, length))
    return result


def ours(path: Path, name: str) -> Spans:
    with library.open(path, warmup="off") as disk:
        return joined(disk.dirty_extents(name))


def test_both_command_lines_leave_the_same_bitmaps(tmp_path: Path) -> None:
    mine, other = make(tmp_path / "mine"), make(tmp_path / "other")
    for path in (mine, other):
        peers.qemu_img("bitmap", "--add", path, "day")
        peers.qemu_io(path, "write 1M 64k", "write 5M 512", "discard 0 64k")
    for words in (
        ["--add", "-g", "512", "PATH", "fine"], ["--merge", "day", "PATH", "fine"], ["--disable", "PATH", "day"],
        ["--add", "--disable", "--merge", "day", "--merge", "fine", "-g", "2M", "PATH", "both"],
        ["--add", "--clear", "--disable", "--enable", "PATH", "empty"], ["--clear", "--enable", "PATH", "day"],
        ["--add", "--remove", "PATH", "gone"],
    ):
        said = cowslice("bitmap", *(mine if one == "PATH" else one for one in words))
        assert said.status == 0, said.err
        peers.qemu_img("bitmap", *(other if one == "PATH" else one for one in words))
    assert listed(mine) == listed(other)
    assert {one["name"]: one["granularity"] for one in listed(mine)} == {
        "day": 64 * KiB, "fine": 512, "both": 2 * MiB, "empty": 64 * KiB}
    for name in ("day", "fine", "both", "empty"):
        assert theirs(mine, name) == theirs(other, name) == ours(mine, name) == ours(other, name)
    assert ours(mine, "fine")
    assert "No errors" in peers.qemu_img("check", mine)


def test_a_bitmap_of_another_image_is_merged_as_by_qemu(tmp_path: Path) -> None:
    mine, other, source = (make(tmp_path / name) for name in ("mine", "other", "source"))
    for path in (mine, other, source):
        peers.qemu_img("bitmap", "--add", "-g", "4k", path, "day")
    peers.qemu_io(source, "write 2M 1k")
    assert cowslice("bitmap", "--merge", "day", "-b", source, "-F", "qcow2", mine, "day").status == 0
    peers.qemu_img("bitmap", "--merge", "day", "-b", source, "-F", "qcow2", other, "day")
    assert theirs(mine, "day") == theirs(other, "day") == [(2 * MiB, 4 * KiB)]


@pytest.mark.parametrize("options", SHAPES)
def test_writers_in_turns_mark_all_that_either_has_written(options: str, tmp_path: Path) -> None:
    path, dice = make(tmp_path / "disk", options), random.Random(options)
    peers.qemu_img("bitmap", "--add", "-g", "512", path, "fine")
    assert cowslice("bitmap", "--add", "-g", "64k", path, "day").status == 0
    sectors: set[int] = set()
    for turn in range(6):
        spans = [(dice.randrange(SIZE // 512 - 200) * 512, dice.randrange(1, 200) * 512) for _ in range(4)]
        if turn % 2:
            with library.open(path, "r+", warmup="off") as disk:
                for number, (start, length) in enumerate(spans):
                    disk.zero(start, length) if number == 3 else disk.write(start, dice.randbytes(length))
        else:
            peers.qemu_io(path, *(f"write {'-z' if number == 3 else ''} {start} {length}"
                                  for number, (start, length) in enumerate(spans)))
        sectors |= {at for start, length in spans for at in range(start, start + length, 512)}
        assert theirs(path, "fine") == ours(path, "fine") == joined((at, 512) for at in sorted(sectors))
    grains = sorted({at // (64 * KiB) for at in sectors})
    assert theirs(path, "day") == ours(path, "day") == joined(
        (at * 64 * KiB, min(64 * KiB, SIZE - at * 64 * KiB)) for at in grains)
    assert "No errors" in peers.qemu_img("check", path)


def test_a_client_sees_what_it_has_written_marked(tmp_path: Path) -> None:
    path = make(tmp_path / "disk")
    peers.qemu_img("bitmap", "--add", "-g", "4k", path, "day")
    with library.open(path, "r+") as disk, library.serve(
            disk, unix=str(tmp_path / "socket"), writable=True, bitmaps=["day"]):
        uri = f"nbd+unix:///?socket={tmp_path / 'socket'}"
        peers.qemu_io(uri, "write 1M 4k", "flush", image_format="raw")   # it allocates
        peers.qemu_io(uri, "write 1028k 4k", "write -z 2M 64k", "discard 3M 64k", image_format="raw")
        assert mapped(uri, "day") == [(MiB, 8 * KiB), (2 * MiB, 64 * KiB), (3 * MiB, 64 * KiB)]
    assert theirs(path, "day") == [(MiB, 8 * KiB), (2 * MiB, 64 * KiB), (3 * MiB, 64 * KiB)]


@pytest.mark.parametrize("size", [SIZE + 3 * MiB, 2 * MiB, 512])
def test_a_bitmap_follows_the_size_as_with_qemu(size: int, tmp_path: Path) -> None:
    mine, other = make(tmp_path / "mine", "cluster_size=4k"), make(tmp_path / "other", "cluster_size=4k")
    for path in (mine, other):
        peers.qemu_img("bitmap", "--add", "-g", "64k", path, "day")
        peers.qemu_io(path, "write 0 512", "write 3M 512", f"write {SIZE - 512} 512")
    assert cowslice("resize", "--shrink", mine, size).status == 0
    peers.qemu_img("resize", "-q", "--shrink", other, size)
    peers.qemu_io(other, f"write {size - 512} 512")
    peers.qemu_io(mine, f"write {size - 512} 512")
    assert listed(mine) == listed(other)
    kept = theirs(other, "day")
    assert set(spread(kept)) <= set(spread(theirs(mine, "day")))  # what is cut off may count as a change
    assert theirs(mine, "day") == ours(mine, "day")
    assert "No errors" in peers.qemu_img("check", mine)


def spread(spans: Spans) -> list[int]:
    return [at for start, length in spans for at in range(start, start + length, 512)]


def test_an_image_with_bitmaps_stays_of_version_3(tmp_path: Path) -> None:
    path = make(tmp_path / "disk")
    peers.qemu_img("bitmap", "--add", path, "day")
    said = cowslice("amend", "-o", "compat=0.10", path)
    assert said.status != 0
    assert "bitmaps" in said.err
    assert listed(path)
    assert "No errors" in peers.qemu_img("check", path)


# -- writers that do not finish ---------------------------------------------------------------------------------------

_WRITER = """
import sys, cowslice
with cowslice.open(sys.argv[1], "r+") as disk:
    disk.write(1 << 20, b"x" * 512)
    disk.flush()
    print("written", flush=True)
    sys.stdin.read()
"""


def killed_writer(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
                          ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        writer.send_signal(signal.SIGKILL)


def killed_qemu(path: Path) -> None:
    """One that serves it, has written to it and is killed."""
    pid = path.with_suffix(".pid")
    socket = path.with_suffix(".sock")
    peers.run("qemu-nbd", "-f", "qcow2", "-k", socket, "--fork", "--pid-file", pid, "--persistent", path)
    peers.qemu_io(f"nbd+unix:///?socket={socket}", "write 1M 512", "flush", image_format="raw")
    os.kill(int(pid.read_text()), signal.SIGKILL)
    while Path(f"/proc/{pid.read_text().strip()}").exists():
        pass


@pytest.mark.parametrize("kill", [killed_writer, killed_qemu])
def test_after_a_kill_both_say_in_use_refuse_and_remove(kill: Any, tmp_path: Path) -> None:
    path = make(tmp_path / "disk")
    peers.qemu_img("bitmap", "--add", path, "day")
    kill(path)
    peers.qemu_img("bitmap", "--add", "--disable", path, "kept")
    assert [one["flags"] for one in listed(path)] == [["auto", "in-use"], []]
    assert cowslice("info", "--output=json", path).json["format-specific"]["data"]["bitmaps"][0]["flags"] == [
        "in-use", "auto"]
    for act in ("--clear", "--enable", "--disable"):
        said = cowslice("bitmap", act, path, "day")
        assert said.status == 1
        assert "'day' cannot be used: a writer did not finish it" in said.err
        peers.qemu_img("bitmap", act, path, "day", expect=1)
    for words in (["bitmap", "--merge", "day", path, "kept"], ["serve", "-B", "day", "-k", tmp_path / "socket", path]):
        said = cowslice(*words)
        assert said.status in (1, 64)
        assert "a writer did not finish it" in said.err
    with library.open(path, "r+") as disk:  # it is written all the same
        disk.write(2 * MiB, b"y")
    assert [one["flags"] for one in listed(path)] == [["auto", "in-use"], []]
    assert cowslice("bitmap", "--remove", path, "day").status == 0
    assert listed(path) == [{"name": "kept", "granularity": 64 * KiB, "flags": []}]
    peers.qemu_img("check", "-r", "leaks", path)
    assert "No errors" in peers.qemu_img("check", path)


def test_bitmaps_of_an_image_without_its_backing_file_are_changed(tmp_path: Path) -> None:
    path = tmp_path / "top"
    peers.qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "missing", "-F", "raw", path, MiB)
    assert cowslice("bitmap", "--add", path, "day").status == 0
    assert cowslice("bitmap", "--list", "--output=json", path).json == [
        {"name": "day", "granularity": 64 * KiB, "flags": ["auto"], "dirty": 0}]


def test_bitmaps_of_an_image_with_a_data_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'},data_file_raw=on", path, SIZE)
    assert cowslice("bitmap", "--add", path, "day").status == 0
    with library.open(path, "r+") as disk:
        disk.write(MiB, b"x")
        disk.zero(2 * MiB, 64 * KiB)
    assert theirs(path, "day") == ours(path, "day") == [(MiB, 64 * KiB), (2 * MiB, 64 * KiB)]
    assert "No errors" in peers.qemu_img("check", path)


@pytest.mark.parametrize("words", [
    ["--add", "--merge", "missing", "PATH", "new"], ["--clear", "--add", "PATH", "day"],
    ["--disable", "--remove", "--enable", "PATH", "day"], ["--add", "--add", "PATH", "new"],
    ["--add", "-g", "768", "PATH", "new"], ["--remove", "--merge", "kept", "PATH", "day"],
    ["--remove", "--add", "--merge", "kept", "PATH", "day"],
], ids=" ".join)
def test_of_several_actions_those_before_the_one_that_fails_stay_done(words: list[str], tmp_path: Path) -> None:
    mine, other = make(tmp_path / "mine"), make(tmp_path / "other")
    for path in (mine, other):
        peers.qemu_img("bitmap", "--add", path, "day")
        peers.qemu_img("bitmap", "--add", "-g", "4k", path, "kept")
        peers.qemu_io(path, "write 1M 512")
    status = cowslice("bitmap", *(mine if one == "PATH" else one for one in words)).status
    expected = peers.run("qemu-img", "bitmap", *(other if one == "PATH" else one for one in words), expect=None)
    assert (status == 0) == (expected.returncode == 0)
    assert listed(mine) == listed(other)
    for name in (one["name"] for one in listed(other)):
        assert theirs(mine, name) == theirs(other, name) == ours(mine, name)
    assert "No errors" in peers.qemu_img("check", mine)


def test_bitmaps_of_an_encrypted_image_named_by_its_options_are_changed(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    secret = ["--object", "secret,id=key,data=words"]
    peers.qemu_img("create", "-q", "-f", "qcow2", *secret, "-o",
                   "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10", path, MiB)
    opts = f"driver=qcow2,encrypt.key-secret=key,file.filename={path}"
    said = cowslice("bitmap", *secret, "--image-opts", "--add", "--disable", opts, "day")
    assert said.status == 0, said.err
    peers.qemu_img("bitmap", *secret, "--image-opts", "--enable", opts, "day")
    assert [(one["name"], one["flags"]) for one in listed(path)] == [("day", ["auto"])]
