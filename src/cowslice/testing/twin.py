"""An image open for writing beside a model of its disk: each operation is done to both, and both must agree.

It knows the operations of a guest and how to have QEMU judge the outcome, nothing of what an image is made of.
"""

from __future__ import annotations

import functools
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cowslice
from cowslice.testing import peers
from cowslice.testing.modeldisk import ModelDisk
from cowslice.units import SECTOR, KiB

SECRET = "correct horse"
CLUSTER_SIZES = (512, 1024, 4096, 16 * KiB, 64 * KiB)
_KEY = ("--object", f"secret,id=key,data={SECRET}")


@dataclass(frozen=True, slots=True)
class Shape:
    """What an image is to be. `backing`: "none", "raw", "short" (raw, ends inside the disk), "qcow2" (two files deep);
    `data_file`: "none", "mapped", "raw"; `encryption`: "none", "aes", "luks"."""

    cluster_size: int = 64 * KiB
    version: int = 3
    refcount_bits: int = 16
    extended_l2: bool = False
    compression: str = "zlib"
    lazy: bool = False
    backing: str = "none"
    data_file: str = "none"
    encryption: str = "none"
    guest_bytes: int = 0

    @property
    def size(self) -> int:
        """`guest_bytes`, or dozens of clusters, several L2 tables where they are small, an end inside a cluster."""
        return self.guest_bytes or max(200 * KiB, 21 * self.cluster_size) - (self.cluster_size // 2 // SECTOR * SECTOR)

    @property
    def secret(self) -> str | None:
        return SECRET if self.encryption != "none" else None

    @property
    def backing_bytes(self) -> int:
        """How much of the disk the backing file covers."""
        whole = {"none": 0, "short": self.size * 2 // 3 // SECTOR * SECTOR}
        return whole.get(self.backing, self.size)

    @property
    def compresses(self) -> bool:
        return self.data_file == "none" and self.encryption == "none"


def shape_by_chance(chooser: random.Random) -> Shape:
    """Any shape that can exist, without LUKS, whose key costs QEMU a second.

    A raw data file is preallocated, and what was never written there deciphers to nobody knows what.
    """
    version = 2 if chooser.random() < 0.15 else 3
    if version == 2:
        backing = chooser.choice(("none", "raw", "short", "qcow2"))
        return Shape(chooser.choice(CLUSTER_SIZES), 2, backing=backing)
    cluster = chooser.choice(CLUSTER_SIZES)
    data_file = chooser.choice(("none",) * 5 + ("mapped", "raw"))
    return Shape(
        cluster,
        refcount_bits=chooser.choice((16, 16, 16, 1, 2, 4, 8, 32, 64)),
        extended_l2=cluster >= 16 * KiB and chooser.random() < 0.5,
        compression=chooser.choice(("zlib", "zstd")) if data_file == "none" else "zlib",
        lazy=chooser.random() < 0.2,
        backing="none" if data_file == "raw" else chooser.choice(("none", "none", "raw", "short", "qcow2")),
        data_file=data_file,
        encryption="aes" if data_file != "raw" and chooser.random() < 0.1 else "none",
    )


@dataclass(slots=True)
class Files:
    """The files of one image, in a directory of their own. `image` is the top one."""

    shape: Shape
    directory: Path
    content: bytes = field(repr=False)

    @property
    def image(self) -> Path:
        return self.directory / "image"

    @property
    def source(self) -> list[str]:
        """Arguments that name the image to qemu-img and qemu-io, with its key."""
        if self.shape.secret is None:
            return ["-f", "qcow2", str(self.image)]
        return [*_KEY, "--image-opts", f"driver=qcow2,encrypt.key-secret=key,file.filename={self.image}"]

    def open(self, mode: str = "r+", **options: object) -> cowslice.Image:
        return cowslice.open(self.image, mode, secret=self.shape.secret, **options)  # type: ignore[arg-type]

    def check(self, *, leaks: bool = False) -> None:
        """Let qemu-img look for faults: AssertionError. Leaked clusters are one, unless `leaks` permits them."""
        said = json.loads(peers.qemu_img("check", "--output=json", *self.source, expect=(0, 3)))
        found = {name: said[name] for name in ("corruptions", "leaks", "check-errors") if said.get(name)}
        assert not found or (leaks and set(found) == {"leaks"}), f"qemu-img check of {self.shape} found {found}"

    def qemu_reads(self) -> bytes:
        """The whole disk as QEMU reads it."""
        raw = self.directory / "read.raw"
        peers.qemu_img("convert", "-S", "0", *self.source, "-O", "raw", raw)
        content = raw.read_bytes()
        raw.unlink()
        return content


def make_files(shape: Shape, directory: Path) -> Files:
    """Make an empty image, and the files below it with content of theirs, in an empty directory."""
    if shape.data_file != "none":
        _make(shape, directory)  # the image names its data file by the whole path, so no other can be copied
    else:
        for name, content in _recipe(shape).items():
            (directory / name).write_bytes(content)
    return Files(shape, directory, bytes(_below(shape)))


@functools.cache
def _recipe(shape: Shape) -> dict[str, bytes]:
    """The files by name, made once: qemu-img takes longer to start than most examples take to run."""
    with tempfile.TemporaryDirectory(prefix="cowslice-") as scratch:
        _make(shape, Path(scratch))
        return {path.name: path.read_bytes() for path in Path(scratch).iterdir()}


def _make(shape: Shape, place: Path) -> None:
    key = _KEY if shape.secret else ()
    options = ",".join(_create_options(shape, place))
    described = [*key, "-q", "-f", "qcow2", *_make_backing(shape, place), "-o", options]
    peers.qemu_img("create", *described, place / "image", shape.size)


def _create_options(shape: Shape, place: Path) -> list[str]:
    options = [f"cluster_size={shape.cluster_size}", f"compat={'1.1' if shape.version == 3 else '0.10'}"]
    if shape.version == 3:
        options += [f"refcount_bits={shape.refcount_bits}", f"lazy_refcounts={'on' if shape.lazy else 'off'}"]
        options += [f"extended_l2={'on' if shape.extended_l2 else 'off'}", f"compression_type={shape.compression}"]
    if shape.data_file != "none":
        options += [f"data_file={place / 'data'}", f"data_file_raw={'on' if shape.data_file == 'raw' else 'off'}"]
    if shape.encryption != "none":
        options += [f"encrypt.format={shape.encryption}", "encrypt.key-secret=key"]
    if shape.encryption == "luks":
        options.append("encrypt.iter-time=10")
    return options


def _below(shape: Shape) -> bytearray:
    """What the disk holds before its first write: the bytes of the backing file."""
    content = bytearray(shape.size)
    if shape.backing != "none":
        end = shape.backing_bytes
        content[:end] = random.Random(7).randbytes(end)
        hole = slice(shape.size // 4 // SECTOR * SECTOR, shape.size // 3 // SECTOR * SECTOR)
        content[hole] = bytes(hole.stop - hole.start)
    return content


def _make_backing(shape: Shape, place: Path) -> list[str]:
    """Make what lies below; returns how the image names it."""
    if shape.backing == "none":
        return []
    content = _below(shape)
    (place / "base").write_bytes(content[: shape.backing_bytes])
    if shape.backing != "qcow2":
        return ["-b", "base", "-F", "raw"]
    overlay = ["-q", "-f", "qcow2", "-b", "base", "-F", "raw", "-o", "cluster_size=8k"]
    peers.qemu_img("create", *overlay, place / "middle")
    return ["-b", "middle", "-F", "qcow2"]


class Twin:
    """An open image and its model. Every method does the same to both; a wrong byte is an AssertionError."""

    def __init__(self, shape: Shape, model: ModelDisk, opened: Callable[[], cowslice.Image]) -> None:
        self.shape = shape
        self.model = model
        self.opened = opened
        self.disk = opened()
        self.flushed: Callable[[str], object] = lambda label: None

    def write(self, offset: int, data: bytes) -> None:
        self.disk.write(offset, data)
        self.model.write(offset, data)

    def write_many(self, offsets: list[int], length: int, data: bytes, *, depth: int = 1) -> None:
        """The offsets are apart from each other, for nobody says which of two that meet comes last."""
        self.disk.write_many(offsets, length, data, depth=depth)
        for number, offset in enumerate(offsets):
            self.model.write(offset, data[number * length : (number + 1) * length])

    def write_compressed(self, cluster: int, data: bytes) -> None:
        """`data` is a whole cluster, or what the disk has of its last one."""
        self.disk.write_compressed(cluster * self.shape.cluster_size, data)
        self.model.write(cluster * self.shape.cluster_size, data)

    def zero(self, offset: int, length: int, *, keep: bool = False) -> None:
        self.disk.zero(offset, length, keep=keep)
        self.model.zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """Whole clusters read as zeros afterwards; all else stays.

        Version 2 keeps what it cannot forget: where a span begins with a cluster that a backing file covers, all of it.
        """
        self.disk.discard(offset, length)
        start, end = self.whole_clusters(offset, length)
        if start < end and (self.shape.version == 3 or start >= self.shape.backing_bytes):
            self.model.zero(start, end - start)

    def whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        """The part of a span that is whole clusters, the last one of the disk as far as it goes, as (start, end)."""
        size = self.shape.cluster_size
        end = offset + length
        return -(-offset // size) * size, end if end == self.model.size else end // size * size

    def flush(self) -> None:
        """Tells `flushed` the label of the model, which says what is stable now."""
        label = self.model.flush()
        self.disk.flush()
        self.flushed(label)

    def reopen(self) -> None:
        self.disk.close()
        self.disk = self.opened()

    def read(self, offset: int, length: int) -> None:
        """Hold what is read against the model."""
        wrong = self.model.differs(offset, self.disk.read(offset, length))
        assert wrong is None, f"byte {wrong} of {self.shape} is wrong"

    def read_all(self) -> None:
        self.read(0, self.model.size)

    def close(self) -> None:
        self.disk.close()


def judge(files: Files, model: ModelDisk, *, leaks: bool = False) -> None:
    """After the image was closed: QEMU finds no fault and reads the model's bytes; a raw data file has them too."""
    files.check(leaks=leaks)
    wrong = model.differs(0, files.qemu_reads())
    assert wrong is None, f"QEMU reads byte {wrong} of {files.shape} otherwise"
    if files.shape.data_file == "raw":
        data = (files.directory / "data").read_bytes()  # QEMU makes it whole clusters long
        wrong = model.differs(0, data[: model.size].ljust(model.size, b"\0"))
        assert wrong is None, f"the raw data file of {files.shape} has another byte {wrong}"

