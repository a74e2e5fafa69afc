"""`cowslice info` prints what `qemu-img info` prints, and never opens what an image names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cowslice.testing import peers
from cowslice.testing.commandline import cowslice

pytestmark = peers.needs("qemu-img", "qemu-io")

SECRET = ("--object", "secret,id=s,data=open sesame")
LUKS = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
ESSIV = "encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256"
IMAGES = {
    "plain": [],
    "version 2": ["-o", "compat=0.10"],
    "small clusters": ["-o", "cluster_size=512,refcount_bits=64"],
    "extended": ["-o", "extended_l2=on,lazy_refcounts=on"],
    "zstd": ["-o", "compression_type=zstd,cluster_size=2M"],
    "aes": [*SECRET, "-o", "encrypt.format=aes,encrypt.key-secret=s"],
    "luks": [*SECRET, "-o", LUKS],
    "luks cbc": [*SECRET, "-o", f"{LUKS},{ESSIV}"],
}  # fmt: skip


def _assert_agrees(path: Path, *options: str) -> Any:
    said = cowslice("info", "--output=json", *options, path)
    assert said.status == 0, said.err
    expected = peers.qemu_img_json("info", *options, path)
    found = said.json if isinstance(said.json, list) else [said.json]
    ours = [{key: value for key, value in one.items() if key != "cowslice"} for one in found]
    assert ours == (expected if isinstance(expected, list) else [expected])
    return said.json


@pytest.mark.parametrize("name", IMAGES)
def test_the_json_is_that_of_qemu(tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", *IMAGES[name], path, "100M")
    _assert_agrees(path)


def test_a_raw_file_is_said_to_be_guessed(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"x" * 1000)
    assert _assert_agrees(tmp_path / "disk.raw")["cowslice"]["format-guessed"]
    assert "format-guessed" not in _assert_agrees(tmp_path / "disk.raw", "-f", "raw")["cowslice"]


def test_snapshots_and_bitmaps_are_those_of_qemu(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", path, "10M")
    for name in ("first", "zweiter Ä", "x" * 200):
        peers.qemu_img("snapshot", "-c", name, path)
    peers.qemu_img("bitmap", "--add", path, "b0")
    peers.qemu_img("bitmap", "--add", "-g", "4k", "--disable", path, "b1")
    _assert_agrees(path)
    assert "zweiter Ä" in cowslice("info", path).out


def test_a_data_file_is_named_and_never_opened(tmp_path: Path) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    peers.qemu_img("create", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", path, "1M")
    data.unlink()
    _assert_agrees(path)


def test_a_backing_file_is_named_and_never_opened(tmp_path: Path) -> None:
    peers.qemu_img("create", "-f", "qcow2", "-u", "-b", "no/such.raw", "-F", "raw", tmp_path / "top.qcow2", "1M")
    _assert_agrees(tmp_path / "top.qcow2")


def test_a_backing_chain_is_told_from_top_to_bottom(tmp_path: Path) -> None:
    peers.qemu_img("create", "-f", "raw", tmp_path / "base.raw", "1M")
    peers.qemu_img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", tmp_path / "middle.qcow2")
    peers.qemu_img("create", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", tmp_path / "top.qcow2")
    assert len(_assert_agrees(tmp_path / "top.qcow2", "--backing-chain")) == 3


def test_a_chain_that_leaves_the_folder_needs_permission(tmp_path: Path) -> None:
    away, here = tmp_path / "away", tmp_path / "here"
    away.mkdir()
    here.mkdir()
    peers.qemu_img("create", "-f", "qcow2", away / "base.qcow2", "1M")
    peers.qemu_img("create", "-f", "qcow2", "-b", away / "base.qcow2", "-F", "qcow2", here / "top.qcow2")
    refused = cowslice("info", "--backing-chain", here / "top.qcow2")
    assert refused.status == 1
    assert "--allow" in refused.err
    assert cowslice("info", "--backing-chain", "--allow", away, here / "top.qcow2").status == 0
    assert cowslice("info", "--backing-chain", "--allow-any", here / "top.qcow2").status == 0


def test_every_finding_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", path, "1M")
    with path.open("r+b") as file:
        file.seek(72)
        file.write((1 << 40).to_bytes(8, "big"))  # an incompatible feature that nobody knows
        file.seek(96)
        file.write((9).to_bytes(4, "big"))  # an impossible refcount width
    said = cowslice("info", "--output=json", path)
    assert said.status == 1
    fields = {finding.get("field"): finding for finding in said.json["cowslice"]["findings"]}
    assert fields["incompatible"]["offset"] == 72
    assert fields["refcount_order"]["offset"] == 96
    assert not said.json["cowslice"]["usable"]


def test_the_cache_and_the_packed_map_are_told(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", "-o", "preallocation=metadata", path, "4G")
    ours = cowslice("info", "--output=json", path).json["cowslice"]
    assert ours["cache"]["full-coverage"] == 512 * 1024
    assert ours["map"]["l2-bytes"] == 512 * 1024
    assert 0 < ours["map"]["packed-bytes"] < 16 * 1024
    assert ours["map"]["exact"]


def test_control_characters_of_an_image_never_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", path, "1M")
    peers.qemu_img("snapshot", "-c", "\x1b[2J\nnew line", path)
    peers.qemu_img("rebase", "-u", "-b", "\x1b[31mred\n", "-F", "raw", path)
    said = cowslice("info", path)
    assert "\x1b" not in said.out
    assert "\\x1b[31mred\\n" in said.out
    assert json.loads(cowslice("info", "--output=json", path).out)["backing-filename"] == "\x1b[31mred\n"
