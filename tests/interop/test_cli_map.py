"""`cowslice map` prints what `qemu-img map` prints."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from cowslice.testing import peers
from cowslice.testing.commandline import cowslice
from cowslice.testing.damage import make_worn_image

pytestmark = peers.needs("qemu-img", "qemu-io")


def _as_7_2(extents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the key `compressed`, and neighbours joined that only it told apart."""
    joined: list[dict[str, Any]] = []
    for extent in extents:
        plain = {key: value for key, value in extent.items() if key != "compressed"}
        last = joined[-1] if joined else None
        if last is not None and _continues(last, plain):
            last["length"] += plain["length"]
        else:
            joined.append(plain)
    return joined


def _continues(last: dict[str, Any], extent: dict[str, Any]) -> bool:
    alike = all(last.get(key) == extent.get(key) for key in ("depth", "present", "zero", "data"))
    if "offset" not in last or "offset" not in extent:
        return alike and ("offset" in last) == ("offset" in extent)
    return alike and last["offset"] + last["length"] == extent["offset"]


def _assert_agrees(path: Path, *options: str) -> None:
    said = cowslice("map", "--output=json", *options, path)
    assert said.status == 0, said.err
    assert _as_7_2(said.json) == _as_7_2(peers.qemu_img_json("map", *options, path))


@pytest.mark.parametrize("seed", range(10))
def test_the_json_is_that_of_qemu(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "disk.qcow2"
    make_worn_image(path, random.Random(seed))
    _assert_agrees(path)


@pytest.mark.parametrize("options", [["-s", "1M"], ["-l", "200k"], ["-s", "70k", "-l", "1500k"],
                                     ["--start-offset=3M", "--max-length=10M"]])  # fmt: skip
def test_a_part_of_the_map_is_that_of_qemu(tmp_path: Path, options: list[str]) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", path, "4M")
    peers.qemu_io(path, "write 64k 256k", "write 1M 1M", "write -z 2M 64k")
    _assert_agrees(path, *options)


def test_a_chain_is_that_of_qemu(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    peers.qemu_img("create", "-f", "qcow2", base, "2M")
    peers.qemu_io(base, "write 0 1M", "write -c 1M 64k")
    peers.qemu_img("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top, "4M")
    peers.qemu_io(top, "write 512k 64k", "write -z 640k 64k", "write 3M 64k")
    _assert_agrees(top)
    table = cowslice("map", top).out
    assert "compressed" in table
    assert str(base) in table


def test_a_start_behind_the_end_is_refused(tmp_path: Path) -> None:
    peers.qemu_img("create", "-f", "qcow2", tmp_path / "disk.qcow2", "1M")
    assert cowslice("map", "-s", "2M", tmp_path / "disk.qcow2").status == 1


def test_image_options_name_the_file_and_its_cache(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", path, "1M")
    peers.qemu_io(path, "write 0 128k")
    said = cowslice("map", "--image-opts", "--output=json", f"driver=qcow2,file.filename={path},l2-cache-size=64k")
    assert _as_7_2(said.json) == peers.qemu_img_json("map", path)


def test_a_raw_file_without_data_is_one_hole(tmp_path: Path) -> None:
    with (tmp_path / "disk.raw").open("wb") as file:
        file.truncate(1 << 20)
    _assert_agrees(tmp_path / "disk.raw", "-f", "raw")


@pytest.mark.parametrize("verb", ["info", "map", "check"])
def test_an_image_that_is_being_written_is_read_only_when_forced(tmp_path: Path, verb: str) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", path, "1M")
    with peers.qemu_nbd(path):
        refused = cowslice(verb, path)
        assert refused.status == 1
        assert "-U" in refused.err
        assert cowslice(verb, "-U", path).status == 0
        assert cowslice(verb, "--image-opts", f"file.filename={path},force-share=on").status == 0
