"""`cowslice amend` leaves images that qemu-img finds as it would have left them, and sound."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cowslice.format.snapshots import decode_snapshot_table, encode_snapshot_table
from cowslice.testing import peers
from cowslice.testing.commandline import Said, cowslice

pytestmark = peers.needs("qemu-img", "qemu-io")

MiB = 1 << 20


def made(path: Path, options: str, *more: str) -> Path:
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", options, *more, path, 3 * MiB)
    peers.qemu_io(path, "write -P 5 70k 200k", "write -c -P 6 2M 64k")
    return path


def facts(path: Path) -> Any:
    known = peers.qemu_img_json("info", path)
    return {name: known[name] for name in known if name not in ("filename", "actual-size", "full-backing-filename")}


@pytest.mark.parametrize("options,change", [
    ("compat=0.10", "compat=1.1"), ("compat=0.10,cluster_size=512", "compat=v3"), ("compat=1.1", "compat=0.10"),
    ("compat=0.10", "compat=1.1,lazy_refcounts=on"), ("lazy_refcounts=on", "lazy_refcounts=off"),
    ("lazy_refcounts=on", "compat=0.10"), ("cluster_size=64k", "size=5M"), ("compat=0.10", "compat=1.1,size=900M"),
    ("cluster_size=64k", "lazy_refcounts=on,compat=1.1,refcount_bits=16"), ("cluster_size=4k", "size=3M"),
    ("cluster_size=64k", "refcount_bits=64"), ("cluster_size=512", "refcount_bits=64,size=9M"),
    ("refcount_bits=64,cluster_size=4k", "refcount_bits=8"), ("refcount_bits=8", "refcount_bits=16,compat=0.10"),
    ("compat=0.10", "refcount_bits=32,compat=1.1,lazy_refcounts=on"), ("cluster_size=512", "refcount_bits=8"),
])  # fmt: skip
def test_the_image_is_what_qemu_makes_of_it(tmp_path: Path, options: str, change: str) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "base").write_bytes(b"\7" * 3 * MiB)
    image = tmp_path / "ours" / "image"
    made(image, options, "-b", "base", "-F", "raw")
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    said = cowslice("amend", "-o", change, image)
    assert (said.status, said.out, said.err) == (0, "", "")
    peers.qemu_img("amend", "-o", change, tmp_path / "theirs" / "image")
    assert facts(image) == facts(tmp_path / "theirs" / "image")
    assert "No errors" in peers.qemu_img("check", image)
    peers.qemu_img("compare", image, tmp_path / "theirs" / "image")
    peers.qemu_io(image, "write -P 9 1M 100k")
    assert "No errors" in peers.qemu_img("check", image)


def test_the_data_file_can_be_named_otherwise_and_be_raw_no_more(tmp_path: Path) -> None:
    image, data = tmp_path / "image", tmp_path / "data"
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", image, MiB)
    peers.qemu_io(image, "write -P 5 70k 200k")
    shutil.copy(data, tmp_path / "moved")
    assert cowslice("amend", "-o", f"data_file={tmp_path / 'moved'},data_file_raw=off", image).status == 0
    data.unlink()
    specific = peers.qemu_img_json("info", image)["format-specific"]["data"]
    assert specific["data-file"] == str(tmp_path / "moved")
    assert specific["data-file-raw"] is False
    peers.qemu_io(image, "read -P 5 70k 200k")
    assert cowslice("amend", "-o", "data_file_raw=on", image).status == 64
    assert cowslice("amend", "-o", "compat=0.10", image).status == 1


@pytest.mark.parametrize("change", [
    "data_file=DIR/data", "data_file=", "data_file=DIR/moved", "data_file_raw=off", "data_file=,data_file_raw=off",
    "data_file=DIR/moved,size=3M", "data_file=DIR/moved,lazy_refcounts=on",
    f"data_file=DIR/{'long/../' * 90}moved",
], ids=lambda change: change[:40])  # fmt: skip
@pytest.mark.parametrize("raw", ["on", "off"])
def test_a_data_file_is_named_as_qemu_names_it(tmp_path: Path, raw: str, change: str) -> None:
    told = []
    for name in ("ours", "theirs"):
        folder = tmp_path / name
        (folder / "long").mkdir(parents=True)
        image, words = folder / "image", ["amend", "-o", change.replace("DIR", str(folder))]
        peers.qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={folder / 'data'},data_file_raw={raw}",
                       image, 2 * MiB)
        peers.qemu_io(image, "write -P 5 70k 200k")
        shutil.copy(folder / "data", folder / "moved")
        if name == "ours":
            said = cowslice(*words, image)
            assert said.status == 0, said.err
        else:
            peers.qemu_img(*words, image)
        told.append(str(facts(image)).replace(str(folder), "DIR"))
        if change.startswith(("data_file=DIR", "data_file_raw")):
            assert "No errors" in peers.qemu_img("check", image)
            peers.qemu_io(image, "read -P 5 70k 200k")
    assert told[0] == told[1]


def test_an_image_that_names_no_data_file_is_opened_with_one_that_is_given(tmp_path: Path) -> None:
    image, data = tmp_path / "image", tmp_path / "data"
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data}", image, MiB)
    assert cowslice("amend", "-o", "data_file=", image).status == 0
    assert cowslice("amend", "-o", "size=2M", image).status != 0
    opts = f"driver=qcow2,file.filename={image},data-file.filename={data}"
    said = cowslice("amend", "--image-opts", "-o", f"data_file={data},size=2M", opts)
    assert said.status == 0, said.err
    assert peers.qemu_img_json("info", image)["format-specific"]["data"]["data-file"] == str(data)
    assert "No errors" in peers.qemu_img("check", image)


@pytest.mark.parametrize("change", ["backing_file=base", "backing_fmt=qcow2", "backing_fmt=raw", "backing_file="])
def test_a_backing_file_is_left_to_rebase_as_by_qemu(tmp_path: Path, change: str) -> None:
    (tmp_path / "base").write_bytes(bytes(MiB))
    for backed in ([], ["-b", "base", "-F", "raw"]):
        image = made(tmp_path / "image", "cluster_size=64k", *backed)
        before = image.read_bytes()
        said = cowslice("amend", "-o", change, image)
        assert said.status == 64
        assert "rebase" in said.err
        peers.qemu_img("amend", "-o", change, image, expect=1)
        assert image.read_bytes() == before


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    image = made(tmp_path / "image", "cluster_size=4k")
    for change in ("refcount_bits=64", "refcount_bits=16,compat=0.10"):
        said = cowslice("amend", "-p", "-o", change, image)
        assert said.status == 0
        assert said.err.splitlines()[-1] == "amending: 100.0%"
        assert cowslice("amend", "-p", "-q", "-o", "compat=1.1", image).err == ""


@pytest.mark.parametrize("options,change,status", [
    ("cluster_size=64k", "backing_file=x", 64), ("cluster_size=64k", "cluster_size=4k", 64),
    ("cluster_size=64k", "refcount_bits=12", 64), ("cluster_size=64k", "size=1M", 64),
    ("cluster_size=64k", "refcount_bits=8,compat=0.10", 1), ("compat=0.10", "refcount_bits=8", 64),
    ("cluster_size=64k", "data_file=x", 64), ("cluster_size=64k", "nonsense=1", 64), ("compat=0.10", "compat=2.0", 64),
    ("compat=0.10", "lazy_refcounts=on", 64), ("refcount_bits=8", "compat=0.10", 1),
    ("extended_l2=on", "compat=0.10", 1), ("compression_type=zstd", "compat=0.10", 1),
])  # fmt: skip
def test_what_is_refused_changes_nothing(tmp_path: Path, options: str, change: str, status: int) -> None:
    image = made(tmp_path / "image", options)
    before = image.read_bytes()
    assert cowslice("amend", "-o", change, image).status == status
    assert image.read_bytes() == before


@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("cluster_size", ["512", "64k"])
def test_zeros_are_written_out_for_version_2_in_snapshots_too(
    tmp_path: Path, cluster_size: str, backing: bool
) -> None:
    (tmp_path / "base").write_bytes(b"\7" * 3 * MiB)
    more = ("-b", tmp_path / "base", "-F", "raw") if backing else ()
    image = made(tmp_path / "image", f"compat=1.1,cluster_size={cluster_size}", *map(str, more))
    peers.qemu_io(image, "write -z 64k 128k", "write -z -u 1M 256k")
    peers.qemu_img("snapshot", "-c", "one", image)
    peers.qemu_io(image, "write -P 8 1M 64k", "write -z 200k 1k", "write -P 4 1536k 10k")
    peers.qemu_img("snapshot", "-c", "two", image)
    peers.qemu_io(image, "write -z 1536k 64k", "discard 64k 64k")
    shutil.copy(image, tmp_path / "before")
    assert cowslice("amend", "-o", "compat=0.10", image).status == 0
    assert facts(image)["format-specific"]["data"]["compat"] == "0.10"
    assert "No errors" in peers.qemu_img("check", image)
    peers.qemu_img("compare", image, tmp_path / "before")
    for name in ("one", "two"):
        for file in (image, tmp_path / "before"):
            peers.qemu_img("convert", "-l", name, "-O", "raw", file, f"{file}.{name}")
        assert Path(f"{image}.{name}").read_bytes() == (tmp_path / f"before.{name}").read_bytes()
    peers.qemu_img("snapshot", "-a", "one", image)
    peers.qemu_io(image, "write -P 9 0 3M")
    peers.qemu_img("snapshot", "-d", "one", image)
    assert "No errors" in peers.qemu_img("check", image)


def test_a_cluster_of_zeros_that_a_snapshot_still_reads_as_data_keeps_that_data(tmp_path: Path) -> None:
    image = made(tmp_path / "image", "compat=1.1", "-b", str(made(tmp_path / "base", "compat=1.1")), "-F", "qcow2")
    peers.qemu_img("snapshot", "-c", "one", image)
    peers.qemu_io(image, "write -z 128k 64k")
    assert cowslice("amend", "-o", "compat=0.10", image).status == 0
    peers.qemu_io(image, "read -P 0 128k 64k")
    peers.qemu_img("snapshot", "-a", "one", image)
    peers.qemu_io(image, "read -P 5 128k 64k")
    assert "No errors" in peers.qemu_img("check", image)


@pytest.mark.parametrize("reason,commands", [
    ("another size", [("snapshot", "-c", "one"), ("resize", "4M")]), ("bitmaps", [("bitmap", "--add", "b0")]),
])  # fmt: skip
def test_what_version_2_cannot_say_stays_version_3(
    tmp_path: Path, reason: str, commands: list[tuple[str, ...]]
) -> None:
    image = made(tmp_path / "image", "compat=1.1")
    for verb, *words in commands:
        if verb == "snapshot":
            peers.qemu_img(verb, *words, image)
        elif verb == "resize":
            peers.qemu_img(verb, image, *words)
        else:
            peers.qemu_img(verb, words[0], image, *words[1:])
    before = image.read_bytes()
    refused = cowslice("amend", "-o", "compat=0.10", image)
    assert refused.status == 1
    assert reason in refused.err
    assert image.read_bytes() == before


def test_a_width_too_narrow_for_a_count_is_refused_with_the_cluster(tmp_path: Path) -> None:
    image = made(tmp_path / "image", "compat=1.1")
    for name in ("one", "two", "three"):
        peers.qemu_img("snapshot", "-c", name, image)
    before = image.read_bytes()
    refused = cowslice("amend", "-o", "refcount_bits=2", image)
    assert refused.status == 1
    assert "has 4 references, expected at most 3" in refused.err
    assert image.read_bytes() == before
    assert cowslice("amend", "-o", "refcount_bits=4", image).status == 0
    assert "No errors" in peers.qemu_img("check", image)


def test_bitmaps_stay_as_they_are(tmp_path: Path) -> None:
    image = made(tmp_path / "image", "compat=1.1")
    peers.qemu_img("bitmap", "--add", image, "b0")
    peers.qemu_io(image, "write -P 6 1M 64k")
    before = facts(image)["format-specific"]["data"]["bitmaps"]
    assert cowslice("amend", "-o", "refcount_bits=64,lazy_refcounts=on,size=4M", image).status == 0
    assert facts(image)["format-specific"]["data"]["bitmaps"] == before
    assert "No errors" in peers.qemu_img("check", image)


def test_a_version_2_snapshot_without_its_disk_size_gets_one(tmp_path: Path) -> None:
    image = made(tmp_path / "image", "compat=0.10")
    peers.qemu_img("snapshot", "-c", "one", image)
    strip_extra(image)
    assert cowslice("amend", "-o", "compat=1.1", image).status == 0
    assert "No errors" in peers.qemu_img("check", image)
    peers.qemu_io(image, "write -P 8 0 3M")
    peers.qemu_img("snapshot", "-a", "one", image)
    peers.qemu_io(image, "read -P 5 70k 200k")


def strip_extra(image: Path) -> None:
    """Let the records of its snapshots be as old programs of version 2 wrote them."""
    raw = bytearray(image.read_bytes())
    count, at = (int.from_bytes(raw[start:end], "big") for start, end in ((60, 64), (64, 72)))
    bare = [replace(one, extra=b"") for one in decode_snapshot_table(bytes(raw[at:]), count)]
    table = encode_snapshot_table(bare)
    raw[at : at + len(table)] = table
    image.write_bytes(raw)


def encrypted(path: Path) -> Path:
    make_luks(path, "old", MiB)
    with_secret(path, "old", "write -P 5 70k 200k")
    return path


def make_luks(path: Path, secret: str, size: int) -> None:
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,encrypt.cipher-alg=aes-128"
    peers.qemu_img("create", "-q", "--object", f"secret,id=s,data={secret}", "-f", "qcow2", "-o", options, path, size)


def opened(path: Path, secret: str) -> list[str]:
    return ["--object", f"secret,id=s,data={secret}", "--image-opts",
            f"driver=qcow2,file.driver=file,file.filename={path},encrypt.key-secret=s"]


def with_secret(path: Path, secret: str, *commands: str, expect: int = 0) -> str:
    *options, name = opened(path, secret)
    return peers.qemu_io(name, *commands, image_format=None, options=options, expect=expect)


def amended(path: Path, secret: str, change: str, *flags: str) -> Said:
    return cowslice("amend", "--object", "secret,id=n,data=new", "--object", "secret,id=o,data=old", "-o", change,
                    *flags, *opened(path, secret))


def slots(path: Path) -> list[bool]:
    known = peers.qemu_img_json("info", path)["format-specific"]["data"]["encrypt"]["slots"]
    return [bool(slot["active"]) for slot in known]


@pytest.mark.parametrize("number", [1, 6, 7])
def test_another_passphrase_opens_the_image_and_an_erased_one_does_not(tmp_path: Path, number: int) -> None:
    image = encrypted(tmp_path / "image")
    said = amended(image, "old", f"encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot={number},"
                                 "encrypt.iter-time=10")
    assert (said.status, said.err) == (0, "")
    with_secret(image, "old", "read -P 5 70k 200k")
    with_secret(image, "new", "read -P 5 70k 200k")
    assert slots(image)[number]
    said = amended(image, "new", "encrypt.state=inactive,encrypt.old-secret=o")
    assert (said.status, said.err) == (0, "")
    with_secret(image, "new", "read -P 5 70k 200k")
    with_secret(image, "old", "read 0 512", expect=1)
    assert sum(slots(image)) == 1
    assert "No errors" in peers.qemu_img("check", *opened(image, "new"))


def test_qemu_changes_the_slots_that_we_made_further(tmp_path: Path) -> None:
    image = encrypted(tmp_path / "image")
    assert amended(image, "old", "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10").status == 0
    peers.qemu_img("amend", "-o", "encrypt.state=inactive,encrypt.keyslot=0", *opened(image, "new"))
    said = amended(image, "new", "encrypt.state=active,encrypt.new-secret=o,encrypt.keyslot=0,encrypt.iter-time=10")
    assert (said.status, said.err) == (0, "")
    with_secret(image, "old", "read -P 5 70k 200k")


def test_what_would_lose_a_key_needs_force(tmp_path: Path) -> None:
    image = encrypted(tmp_path / "image")
    before = image.read_bytes()
    for change in ("encrypt.state=inactive,encrypt.keyslot=0", "encrypt.state=inactive,encrypt.old-secret=o",
                   "encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=0",
                   "encrypt.state=inactive,encrypt.keyslot=3", "encrypt.state=inactive", "encrypt.state=active",
                   "encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=8", "encrypt.keyslot=1",
                   "encrypt.state=inactive,encrypt.keyslot=0,encrypt.new-secret=n"):
        assert amended(image, "old", change).status == 64, change
    assert amended(image, "old", "encrypt.state=inactive,encrypt.keyslot=0,encrypt.old-secret=n", "--force").status == 1
    assert image.read_bytes() == before
    assert amended(image, "old", "encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=0,encrypt.iter-time=10",
                   "--force").status == 0
    with_secret(image, "new", "read -P 5 70k 200k")
    assert sum(slots(image)) == 1
    assert amended(image, "new", "encrypt.state=inactive,encrypt.keyslot=0", "--force").status == 0
    assert sum(slots(image)) == 0


def test_an_image_without_luks_has_no_key_slots(tmp_path: Path) -> None:
    image = made(tmp_path / "image", "compat=1.1")
    said = cowslice("amend", "--object", "secret,id=n,data=new", "-o", "encrypt.state=active,encrypt.new-secret=n",
                    image)
    assert said.status == 64
    assert "has key slots" in said.err


def test_help_lists_what_can_be_changed(tmp_path: Path) -> None:
    listed = cowslice("amend", "-o", "help")
    assert listed.status == 0
    assert "lazy_refcounts" in listed.out
    assert "cluster_size" not in listed.out
