"""`cowslice commit` leaves the bytes that `qemu-img commit` leaves, in the base and in the overlay."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

import cowslice as library
from cowslice.errors import NoSpace
from cowslice.image.image import Image
from cowslice.testing import peers
from cowslice.testing.commandline import cowslice

pytestmark = peers.needs("qemu-img", "qemu-io")

MiB = 1 << 20
LAYOUTS = [
    ("cluster_size=64k", "cluster_size=64k"), ("compat=0.10", "compat=0.10,cluster_size=4k"),
    ("extended_l2=on", "extended_l2=on,cluster_size=16k"), ("cluster_size=512", "cluster_size=2M"),
    (None, "cluster_size=4k"), ("lazy_refcounts=on,refcount_bits=1", "lazy_refcounts=on"),
]  # fmt: skip


def cowslice_open(path: Path) -> Image:
    return library.open(path, "r+", secret="words")


def scribble(path: Path, seed: int, size: int, *, image_format: str = "qcow2") -> None:
    """Writes, zeros and, where there can be, compressed clusters at random."""
    chosen = random.Random(seed)
    commands = []
    for number in range(8):
        offset = chosen.randrange(size // 512) * 512
        length = min(chosen.choice([512, 4096, 70 * 1024, 300 * 1024]), size - offset)
        commands.append(f"{'write -z' if number % 4 == 3 else f'write -P {seed * 16 + number}'} {offset} {length}")
    if image_format == "qcow2":
        cluster = peers.qemu_img_json("info", path)["cluster-size"]
        if cluster < size:  # refused where the cluster is there already
            peers.qemu_io(path, f"write -c -P 99 {size // cluster // 2 * cluster} {cluster}", expect=(0, 1))
    peers.qemu_io(path, *commands, image_format=image_format)


def overlay(path: Path, base: Path, base_format: str, options: str, size: int | None = None) -> None:
    peers.qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", base_format, "-o", options, path,
                   *([size] if size else []))


def make_chain(folder: Path, base_options: str | None, options: str, *, size: int = 5 * MiB + 512) -> list[Path]:
    folder.mkdir()
    base, middle, top = folder / "base", folder / "middle", folder / "top"
    kind = "qcow2" if base_options else "raw"
    peers.qemu_img("create", "-q", "-f", kind, *(["-o", base_options] if base_options else []), base, size)
    scribble(base, 1, size, image_format=kind)
    overlay(middle, base, kind, options)
    scribble(middle, 2, size)
    overlay(top, middle, "qcow2", options)
    scribble(top, 3, size)
    return [base, middle, top]


def same(one: Path, other: Path) -> None:
    peers.qemu_img("compare", one, other)


def sound(path: Path) -> None:
    if peers.qemu_img_json("info", path)["format"] == "qcow2":
        assert "No errors" in peers.qemu_img("check", path)


@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
@pytest.mark.parametrize("flags", [[], ["-d"], ["-b", "base"], ["-b", "middle"]], ids=" ".join)
def test_base_and_overlay_read_as_after_qemus_commit(
    tmp_path: Path, layouts: tuple[str | None, str], flags: list[str]
) -> None:
    files = make_chain(tmp_path / "ours", *layouts)
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    before = tmp_path / "before"
    peers.qemu_img("convert", "-O", "raw", files[2], before)
    chosen = [str(tmp_path / "ours" / flag) if flag in ("base", "middle") else flag for flag in flags]
    said = cowslice("commit", *chosen, files[2])
    assert (said.status, said.out, said.err) == (0, "Image committed.\n", "")
    theirs = [str(tmp_path / "theirs" / flag) if flag in ("base", "middle") else flag for flag in flags]
    peers.qemu_img("commit", *theirs, tmp_path / "theirs" / "top")
    for path in files:
        sound(path)
        same(path, tmp_path / "theirs" / path.name)
    peers.qemu_img("compare", "-F", "raw", files[2], before)
    own = [extent for extent in peers.qemu_img_json("map", files[2]) if extent["depth"] == 0 and extent["present"]]
    assert bool(own) == bool(flags)


def test_an_overlay_that_was_emptied_takes_writes_and_commits_again(tmp_path: Path) -> None:
    _, middle, top = make_chain(tmp_path / "ours", "cluster_size=64k", "cluster_size=4k")
    assert cowslice("commit", "-q", top).out == ""
    scribble(top, 5, 5 * MiB)
    peers.qemu_img("convert", "-O", "raw", top, tmp_path / "before")
    assert cowslice("commit", "-q", "-p", top).status == 0
    sound(top)
    sound(middle)
    peers.qemu_img("compare", "-F", "raw", middle, tmp_path / "before")


def test_snapshots_of_the_overlay_keep_what_they_hold(tmp_path: Path) -> None:
    _, _, top = make_chain(tmp_path / "ours", "cluster_size=64k", "cluster_size=64k")
    peers.qemu_img("snapshot", "-c", "one", top)
    scribble(top, 6, 5 * MiB)
    peers.qemu_img("convert", "-O", "raw", top, tmp_path / "before")
    assert cowslice("commit", top).status == 0
    sound(top)
    same(top, tmp_path / "before")
    peers.qemu_img("snapshot", "-a", "one", top)
    sound(top)


def test_a_raw_base_grows_to_the_size_of_the_overlay(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(b"\5" * 70_144)
    overlay(top, base, "raw", "cluster_size=64k", 3 * MiB)
    scribble(top, 7, 3 * MiB)
    peers.qemu_img("convert", "-O", "raw", top, tmp_path / "before")
    assert cowslice("commit", top).status == 0
    assert base.read_bytes() == (tmp_path / "before").read_bytes()


def test_a_qcow2_base_grows_and_shows_nothing_of_what_lies_below_it(tmp_path: Path) -> None:
    lowest, base, top = tmp_path / "lowest", tmp_path / "base", tmp_path / "top"
    lowest.write_bytes(b"\5" * 3 * MiB)
    overlay(base, lowest, "raw", "cluster_size=64k", MiB + 512)
    overlay(top, base, "qcow2", "cluster_size=4k", 4 * MiB)
    scribble(top, 7, 4 * MiB)
    peers.qemu_img("convert", "-O", "raw", top, tmp_path / "before")
    assert cowslice("commit", top).status == 0
    sound(base)
    for path in (base, top):
        peers.qemu_img("compare", "-F", "raw", path, tmp_path / "before")
    assert peers.qemu_img_json("info", base)["virtual-size"] == 4 * MiB


def test_what_lies_behind_the_end_of_a_layer_between_is_zeros_in_the_base(tmp_path: Path) -> None:
    base, middle, top = tmp_path / "base", tmp_path / "middle", tmp_path / "top"
    base.write_bytes(b"\5" * 2 * MiB)
    overlay(middle, base, "raw", "cluster_size=64k", MiB)
    overlay(top, middle, "qcow2", "cluster_size=64k", 2 * MiB)
    peers.qemu_img("convert", "-O", "raw", top, tmp_path / "before")
    assert cowslice("commit", "-b", base, top).status == 0
    assert base.read_bytes() == (tmp_path / "before").read_bytes() == b"\5" * MiB + bytes(MiB)


def test_images_without_such_a_base_are_refused_and_stay_as_they_are(tmp_path: Path) -> None:
    base, _, top = make_chain(tmp_path / "ours", "cluster_size=64k", "cluster_size=64k")
    before = top.read_bytes()
    refused = cowslice("commit", "-b", tmp_path / "other", top)
    assert refused.status == 1
    assert "not in the backing chain" in refused.err
    assert cowslice("commit", base).status == 1
    assert cowslice("commit", top, "more").status == 64
    assert top.read_bytes() == before


def test_a_base_outside_the_folder_needs_permission(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    base, top = tmp_path / "base", tmp_path / "inner" / "top"
    peers.qemu_img("create", "-q", "-f", "raw", base, MiB)
    peers.qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
    peers.qemu_io(top, "write -P 3 0 64k")
    refused = cowslice("commit", top)
    assert refused.status == 1
    assert "--allow" in refused.err
    assert base.read_bytes() == bytes(MiB)
    assert cowslice("commit", "--allow", tmp_path, top).status == 0
    assert base.read_bytes() == b"\3" * 65536 + bytes(MiB - 65536)


def test_an_encrypted_overlay_and_base_stay_encrypted(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    secret = ["--object", "secret,id=key,data=words"]
    luks = ["-f", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"]
    assert cowslice("create", *secret, *luks, base, 2 * MiB).status == 0
    assert cowslice("create", *secret, *luks, "-u", "-b", "base", "-F", "qcow2", top, 2 * MiB).status == 0
    with cowslice_open(top) as disk:
        disk.write(70_000, b"secret words" * 10_000)
        wanted = disk.read(0, 2 * MiB)
    said = cowslice("commit", *secret, "--image-opts", f"driver=qcow2,file.filename={top},encrypt.key-secret=key")
    assert said.status == 0, said.err
    for path in (base, top):
        assert cowslice("check", path).status == 0
        with cowslice_open(path) as disk:
            assert disk.read(0, 2 * MiB) == wanted
        assert b"secret words" not in path.read_bytes()


def test_an_overlay_whose_data_lies_in_another_file_is_emptied_too(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(b"\5" * 2 * MiB)
    overlay(top, base, "raw", f"data_file={tmp_path / 'data'}")
    peers.qemu_io(top, "write -P 3 70k 300k", "write -z 1M 64k")
    peers.qemu_img("convert", "-O", "raw", top, tmp_path / "before")
    assert cowslice("commit", top).status == 0
    sound(top)
    assert base.read_bytes() == (tmp_path / "before").read_bytes()
    peers.qemu_img("compare", "-F", "raw", top, tmp_path / "before")
    assert not any(extent["depth"] == 0 for extent in peers.qemu_img_json("map", top))


def test_when_the_base_fills_up_the_overlay_still_holds_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, top = make_chain(tmp_path / "ours", "cluster_size=64k", "cluster_size=64k")
    peers.qemu_img("convert", "-O", "raw", top, tmp_path / "before")
    before = top.read_bytes()

    def full(image: Image) -> None:
        raise NoSpace("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Image, "flush", full)
        assert cowslice("commit", top).status == 1
    assert top.read_bytes() == before
    peers.qemu_img("compare", "-F", "raw", top, tmp_path / "before")
    assert cowslice("commit", top).status == 0
    peers.qemu_img("compare", "-F", "raw", top, tmp_path / "before")
    sound(base)
