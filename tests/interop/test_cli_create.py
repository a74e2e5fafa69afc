"""`cowslice create` makes what `qemu-img create` makes, and both promise the same sizes with `measure`."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cowslice.testing import peers
from cowslice.testing.commandline import cowslice

pytestmark = peers.needs("qemu-img", "qemu-io")

SIZES = (0, 512, 1_000_448, 20 << 20)
LAYOUTS = [
    *(f"cluster_size={cluster},preallocation={mode}" for cluster, mode in itertools.product(
        ("512", "4k", "64k", "2M"), ("off", "metadata", "falloc", "full"))),
    *(f"cluster_size={cluster},refcount_bits={bits},preallocation=metadata" for cluster, bits in (
        ("512", 1), ("512", 64), ("4k", 2), ("64k", 4), ("64k", 8), ("2M", 32))),
    "compat=0.10", "compat=v2,preallocation=metadata", "lazy_refcounts=on", "compression_type=zstd", "nocow=on",
    "extended_l2=on", "extended_l2=on,cluster_size=16k,preallocation=metadata", "extended_l2=on,preallocation=full",
]  # fmt: skip
DATA_FILES = ["", ",data_file_raw=on", ",preallocation=metadata", ",preallocation=full,extended_l2=on",
              ",data_file_raw=on,extended_l2=on,preallocation=falloc"]


def _facts(path: Path) -> dict[str, Any]:
    """What qemu-img says about a file, but for what must differ."""
    facts = peers.qemu_img_json("info", path)
    for key in ("filename", "actual-size", "full-backing-filename"):
        facts.pop(key, None)
    data = facts.get("format-specific", {}).get("data", {})
    data.pop("data-file", None)
    for key in ("uuid", "master-key-iters"):
        data.get("encrypt", {}).pop(key, None)
    for slot in data.get("encrypt", {}).get("slots", []):
        slot.pop("iters", None)
    return dict(facts)


def _make_both(folder: Path, *arguments: object, kind: str = "qcow2", options: str = "") -> tuple[Path, Path]:
    ours, theirs = folder / "ours", folder / "theirs"
    made = cowslice("create", "-f", kind, "-o", options.replace("@", f"{folder}/ours-data"), *map(str, arguments[:-1]),
                    ours, *map(str, arguments[-1:]))
    assert made.status == 0, made.err
    peers.qemu_img("create", "-q", "-f", kind, "-o", options.replace("@", f"{folder}/theirs-data"),
                   *map(str, arguments[:-1]), theirs, *map(str, arguments[-1:]))
    return ours, theirs


@pytest.mark.parametrize("options", LAYOUTS)
def test_an_image_is_as_qemu_makes_it(tmp_path: Path, options: str) -> None:
    for size in SIZES:
        ours, theirs = _make_both(tmp_path, size, options=options)
        assert "No errors" in peers.qemu_img("check", ours)
        assert _facts(ours) == _facts(theirs)
        peers.qemu_img("compare", ours, theirs)
        # QEMU ends a file of preallocated metadata where the disk ends inside the last cluster.
        assert ours.stat().st_size <= theirs.stat().st_size + -size % _facts(ours)["cluster-size"]


@pytest.mark.parametrize("options", DATA_FILES)
def test_an_image_with_a_data_file_is_as_qemu_makes_it(tmp_path: Path, options: str) -> None:
    for size in SIZES[1:]:
        (tmp_path / "ours-data").unlink(missing_ok=True)
        ours, theirs = _make_both(tmp_path, size, options=f"data_file=@{options}")
        assert "No errors" in peers.qemu_img("check", ours)
        assert _facts(ours) == _facts(theirs)
        peers.qemu_img("compare", ours, theirs)
        assert ours.stat().st_size <= theirs.stat().st_size
        assert (tmp_path / "ours-data").stat().st_size == size


@pytest.mark.parametrize("options", [
    "encrypt.format=aes", "encryption=on", "encrypt.format=luks", "encrypt.format=luks,preallocation=metadata",
    "encrypt.format=luks,compat=0.10", "encrypt.format=luks,cluster_size=512",
    "encrypt.format=luks,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv",
    "encrypt.format=luks,encrypt.cipher-alg=cast5-128,encrypt.cipher-mode=cbc,encrypt.hash-alg=sha512",
])
def test_an_encrypted_image_is_as_qemu_makes_it(tmp_path: Path, options: str) -> None:
    options += ",encrypt.key-secret=key"
    if "luks" in options:
        options += ",encrypt.iter-time=10"
    secret = "secret,id=key,data=correct horse"
    ours, theirs = _make_both(tmp_path, "--object", secret, "1M", options=options)
    described = f"driver=qcow2,encrypt.key-secret=key,file.filename={ours}"
    assert "No errors" in peers.qemu_img("check", "--object", secret, "--image-opts", described)
    assert _facts(ours) == _facts(theirs)
    assert ours.stat().st_size <= theirs.stat().st_size
    peers.qemu_io(described, "write -P 7 64k 64k", "read -P 7 64k 64k", image_format=None,
                  options=["--object", secret, "--image-opts"])


@pytest.mark.parametrize("options", ["size=3M", "extended_l2=on,preallocation=metadata", "compat=0.10,cluster_size=4k"])
def test_an_overlay_is_as_qemu_makes_it(tmp_path: Path, options: str) -> None:
    base = tmp_path / "base.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", base, "3M")
    peers.qemu_io(base, "write -P 5 1M 1M")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert cowslice("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o", options, ours).status == 0
    peers.qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o", options, theirs)
    assert _facts(ours) == _facts(theirs)
    assert "No errors" in peers.qemu_img("check", ours)
    peers.qemu_img("compare", ours, base)


@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_a_raw_image_is_as_qemu_makes_it(tmp_path: Path, mode: str) -> None:
    ours, theirs = _make_both(tmp_path, 1000, kind="raw", options=f"preallocation={mode}")
    assert ours.read_bytes() == theirs.read_bytes()


def test_what_is_made_is_said_and_quiet_says_nothing(tmp_path: Path) -> None:
    said = cowslice("create", "-f", "qcow2", tmp_path / "disk", "1M").out
    assert said.startswith("Formatting '")
    assert "fmt=qcow2 cluster_size=65536" in said
    assert said.endswith("size=1048576\n")
    assert cowslice("create", "-q", "-f", "qcow2", tmp_path / "disk", "1M").out == ""


def test_the_options_are_listed() -> None:
    for verb in (["create", "-f"], ["measure", "-O"]):
        listed = cowslice(*verb, "qcow2", "-o", "help").out
        theirs = peers.qemu_img("create", "-f", "qcow2", "-o", "help")
        named = [line.split("=")[0].strip() for line in theirs.splitlines() if line.startswith("  ")]
        assert not [name for name in named if f"  {name}=" not in listed]


@pytest.mark.parametrize("arguments", [
    ["-f", "vmdk", "disk", "1M"], ["-f", "qcow2"], ["-f", "qcow2", "disk"],
    ["-f", "qcow2", "-o", "size=1M", "disk", "1M"],
    ["-f", "qcow2", "-o", "nonsense=1", "disk", "1M"], ["-f", "raw", "-o", "cluster_size=4k", "disk", "1M"],
    ["-f", "qcow2", "-o", "encryption=on,encrypt.format=luks", "disk", "1M"],
    ["-f", "qcow2", "-o", "lazy_refcounts=perhaps", "disk", "1M"],
    ["-f", "qcow2", "-o", "refcount_bits=x", "disk", "1M"],
])
def test_a_wrong_command_line_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cowslice("create", *arguments).status == 64
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_what_was_there(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "disk").write_bytes(b"old")
    command = [sys.executable, "-m", "cowslice.cli.main", "create", "-f", "raw", "-o", "preallocation=full",
               str(tmp_path / "disk"), "8G"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while len(os.listdir(tmp_path)) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert os.listdir(tmp_path) == ["disk"]
    assert (tmp_path / "disk").read_bytes() == b"old"


MEASURED = ["", "cluster_size=512", "cluster_size=2M", "cluster_size=4k,refcount_bits=64", "refcount_bits=1",
            "extended_l2=on", "preallocation=full", "preallocation=metadata", "compat=0.10",
            "backing_file=any,backing_fmt=qcow2"]


@pytest.mark.parametrize("options", MEASURED)
def test_an_empty_disk_is_measured_as_qemu_does(options: str) -> None:
    for size in ("0", "1", "1000448", "1G", "100G"):
        arguments = ["-O", "qcow2", *(["-o", options] if options else []), "--size", size]
        assert cowslice("measure", "--output=json", *arguments).json == peers.qemu_img_json("measure", *arguments)
        assert cowslice("measure", *arguments).out == peers.qemu_img("measure", *arguments)


def test_an_encrypted_disk_is_measured_as_qemu_does() -> None:
    arguments = ["-O", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10", "--size", "1G"]
    measured = cowslice("measure", "--object", "secret,id=key,data=x", *arguments)
    assert measured.out == peers.qemu_img("measure", "--object", "secret,id=key,data=x", *arguments)


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measure") / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "21M")
    peers.qemu_io(path, "write 4k 12k", "write 70k 1k", "write -z 200k 64k", "write -c 1M 64k", "write 5M 3M")
    peers.qemu_img("snapshot", "-c", "before", path)
    peers.qemu_io(path, "write 9M 1M")
    for name, grain in (("first", "64k"), ("a second one", "512")):
        peers.qemu_img("bitmap", "--add", "-g", grain, path, name)
    return path


@pytest.mark.parametrize("options", MEASURED)
def test_a_copy_is_measured_as_qemu_does(used: Path, options: str) -> None:
    for more in ([], ["-l", "before"]):
        arguments = ["-O", "qcow2", *(["-o", options] if options else []), *more, str(used)]
        assert cowslice("measure", "--output=json", *arguments).json == peers.qemu_img_json("measure", *arguments)


def test_a_raw_disk_is_measured_as_qemu_does(used: Path) -> None:
    for arguments in (["--size", "1001"], [str(used)], ["-O", "raw", "-f", "raw", str(used)]):
        assert cowslice("measure", "--output=json", *arguments).json == json.loads(
            peers.qemu_img("measure", "--output=json", *arguments))
    assert cowslice("measure").status == cowslice("measure", "--size", "1", used).status == 64
