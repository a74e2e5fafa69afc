"""Makes the images of the manifest with qemu-img and qemu-io, and says what a guest must find in them.

It asks cowslice nothing. The expected bytes come from a plain bytearray to which every write was also applied;
where QEMU alone decides (never written clusters of a preallocated encrypted image) nothing is claimed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cowslice.testing import peers
from cowslice.testing.fixtures import Fixture

SECTOR = 512
MiB = 1 << 20
SECRET = "correct horse"
FILL = 0x77
_CORRUPT_BYTE = 79
_KILLED = -9
_BLOCK = 4096


@dataclass(slots=True)
class Guest:
    """A disk as a bytearray. `known` is 1 where the byte is claimed, 0 where it is not."""

    content: bytearray
    known: bytearray

    @classmethod
    def empty(cls, size: int) -> Guest:
        return cls(bytearray(size), bytearray(b"\1") * size)

    def fill(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        self.known[offset : offset + len(data)] = b"\1" * len(data)

    def copy(self) -> Guest:
        return Guest(bytearray(self.content), bytearray(self.known))

    def differs(self, read: bytes) -> int | None:
        """Offset of the first claimed byte that was read otherwise, or None."""
        if len(read) != len(self.content):
            return min(len(read), len(self.content))
        for start in range(0, len(read), _BLOCK):
            span = slice(start, start + _BLOCK)
            if read[span] != self.content[span] and any(self.known[span]):
                triples = zip(self.content[span], read[span], self.known[span], strict=True)
                wrong = (at for at, (mine, its, known) in enumerate(triples) if known and mine != its)
                if (first := next(wrong, None)) is not None:
                    return start + first
        return None


@dataclass(slots=True)
class Made:
    """An image on disk: its path, how qemu names it, the guest's bytes now and at each snapshot, oldest first."""

    fixture: Fixture
    path: Path
    size: int
    guest: Guest
    snapshots: list[tuple[str, Guest]] = field(default_factory=list)

    @property
    def secret(self) -> str | None:
        return SECRET if self.fixture.encryption != "none" else None

    @property
    def qemu_source(self) -> list[str]:
        """Arguments of qemu-img that name this image, read-only and with its key."""
        if self.secret is None:
            return ["-f", "qcow2", str(self.path)]
        return [*_secret_object(), "--image-opts", _encrypted_options(self.path)]


def make(fixture: Fixture, directory: Path) -> Made:
    """Make the image, and the files it names, in an empty directory."""
    return _Kitchen(fixture, directory).cook()


def guest_size(fixture: Fixture) -> int:
    """Bytes of the guest disk: at least eleven clusters, and several L2 tables where clusters are small."""
    whole = max(3 * MiB, 11 * fixture.cluster_size)
    return whole if fixture.ending == "whole" else whole - fixture.cluster_size + 512


class _Kitchen:
    """The state while one image is made: its guest, and what the next qemu-io process will do."""

    def __init__(self, fixture: Fixture, directory: Path) -> None:
        self.fixture = fixture
        self.directory = directory
        self.path = directory / "image.qcow2"
        self.cluster = fixture.cluster_size
        self.size = guest_size(fixture)
        self.guest = Guest.empty(self.size)
        self.commands: list[str] = []

    def cook(self) -> Made:
        self._make_backing()
        self._create()
        self._write_data()
        self._write_content()
        self._write_compressed()
        self._run()
        made = Made(self.fixture, self.path, self.size, self.guest)
        self._add_snapshots(made)
        self._add_bitmaps()
        self._leave_state()
        return made

    def _create(self) -> None:
        fixture, options = self.fixture, [f"cluster_size={self.cluster}"]
        options.append(f"compat={'1.1' if fixture.version == 3 else '0.10'}")
        options += _options_of(fixture, self.directory)
        backing = [] if fixture.backing == "none" else ["-b", *_backing_name(fixture)]
        secret = _secret_object() if fixture.encryption != "none" else []
        described = [*secret, "-f", "qcow2", *backing, "-o", ",".join(options)]
        peers.qemu_img("create", "-q", *described, self.path, self.size)
        if fixture.encryption != "none" and fixture.preallocation != "off":
            self.guest.known = bytearray(self.size)

    def _make_backing(self) -> None:
        kind, size = self.fixture.backing, self.size
        if kind == "raw":
            self._raw_backing("base.raw", size)
        elif kind == "qcow2":
            self._qcow2_backing("base.qcow2", size, ["cluster_size=64k"])
        elif kind == "shorter":
            self._raw_backing("base.raw", size // 2 // SECTOR * SECTOR + 3 * SECTOR)
        elif kind == "longer":
            self._qcow2_backing("base.qcow2", size + MiB, ["cluster_size=4k"])
        elif kind == "chain":
            self._chain()

    def _raw_backing(self, name: str, size: int) -> None:
        content = bytearray(size)
        for at in range(0, size, size // 7):
            content[at : at + size // 11] = bytes([0xA0 + at % 13]) * len(content[at : at + size // 11])
        (self.directory / name).write_bytes(content)
        self.guest.fill(0, bytes(content[: self.size]))

    def _qcow2_backing(self, name: str, size: int, options: list[str], below: str | None = None) -> None:
        path = self.directory / name
        backing = [] if below is None else ["-b", below, "-F", "raw" if below.endswith(".raw") else "qcow2"]
        peers.qemu_img("create", "-q", "-f", "qcow2", *backing, "-o", ",".join(options), path, size)
        commands = []
        for number in range(1, 6):
            offset = size * number // 6 // SECTOR * SECTOR
            length = min(size // 20 // SECTOR * SECTOR, size - offset)
            commands.append(f"write -q -P {0xB0 + number + len(name)} {offset} {length}")
            shown = min(length, max(0, self.size - offset))
            self.guest.fill(offset, bytes([0xB0 + number + len(name)]) * shown)
        peers.qemu_io(path, *commands)

    def _chain(self) -> None:
        """raw, shorter than the next; qcow2 v2 of small clusters; qcow2 of large ones, longer than the image."""
        self._raw_backing("bottom.raw", self.size // 3 // SECTOR * SECTOR)
        self._qcow2_backing("middle.qcow2", self.size, ["cluster_size=2k,compat=0.10"], "bottom.raw")
        self._qcow2_backing("upper.qcow2", self.size + MiB, ["cluster_size=128k,extended_l2=on"], "middle.qcow2")

    def _write_data(self) -> None:
        """Out of guest order, so that host order differs; whole, partial, spanning, over an L2 border, to the end."""
        cluster, span = self.cluster, self._l2_span()
        self._write(3 * cluster + cluster // 2, 2 * cluster, 0x33)
        self._write(0, cluster, 0x11)
        self._write(2 * cluster + min(512, cluster - 512), 512, 0x22)
        if span < self.size:
            self._write(span - 512, 1024, 0x44)
        last = (self.size - 1) // cluster * cluster
        self._write(last, self.size - last, 0x55)

    def _write_content(self) -> None:
        cluster = self.cluster
        if self.fixture.content == "zeros":
            self._zero("-z", 4 * cluster, cluster)
            self._zero("-z -u", 5 * cluster, cluster)
            self._zero("-z", cluster // 4 // SECTOR * SECTOR, SECTOR)
            self._zero("-z", 2 * cluster + cluster // 2, cluster // 2)
            self._zero("-z", self.size // 2 // cluster * cluster, cluster + SECTOR)
        elif self.fixture.content == "discards":
            self._discard(0, cluster)
            self._discard(3 * cluster + SECTOR, 2 * cluster)
            self._discard(self.size // 2 // cluster * cluster, 3 * cluster)

    def _write_compressed(self) -> None:
        if self.fixture.compression == "none":
            return
        cluster = self.cluster
        self._compress(cluster, cluster, 0x88)
        noise = random.Random(self.fixture.name).randbytes(cluster)
        self._compress_from(7 * cluster, noise)
        if self._scarce_counts(3):
            return
        self._compress(9 * cluster, cluster, 0x99)
        self._compress_from(8 * cluster, noise[: cluster // 2] + bytes(cluster - cluster // 2))
        if self.size > 64 * cluster and not self._scarce_counts(15):
            self._compress(self.size * 5 // 8 // cluster * cluster, 2 * cluster, 0xAA)

    def _scarce_counts(self, largest: int) -> bool:
        """Streams that share a host cluster count once each in every snapshot too: too many for narrow counts."""
        return self.fixture.snapshots != "none" and (1 << self.fixture.refcount_bits) - 1 <= largest

    def _compress(self, offset: int, length: int, pattern: int) -> None:
        self._make_room(offset, length)
        self.commands.append(f"write -q -c -P {pattern} {offset} {length}")
        self.guest.fill(offset, bytes([pattern]) * length)

    def _compress_from(self, offset: int, data: bytes) -> None:
        source = self.directory / f"pattern-{offset}"
        source.write_bytes(data)
        self._make_room(offset, len(data))
        self.commands.append(f"write -q -c -s {source} {offset} {len(data)}")
        self.guest.fill(offset, data)

    def _make_room(self, offset: int, length: int) -> None:
        """A compressed write needs a cluster without space of its own."""
        if self.fixture.preallocation != "off":
            self.commands.append(f"discard -q {offset} {length}")

    def _write(self, offset: int, length: int, pattern: int) -> None:
        length = min(length, self.size - offset)
        self.commands.append(f"write -q -P {pattern} {offset} {length}")
        self.guest.fill(offset, bytes([pattern]) * length)

    def _zero(self, flags: str, offset: int, length: int) -> None:
        length = min(length, self.size - offset)
        self.commands.append(f"write -q {flags} {offset} {length}")
        self.guest.fill(offset, bytes(length))

    def _discard(self, offset: int, length: int) -> None:
        """Whole clusters read zero afterwards; version 2 over a backing file has no way to say that and keeps them."""
        self.commands.append(f"discard -q {offset} {length}")
        start, end = -(-offset // self.cluster) * self.cluster, (offset + length) // self.cluster * self.cluster
        keeps = self.fixture.version == 2 and self.fixture.backing != "none"
        if start < end and not keeps:
            self.guest.fill(start, bytes(end - start))

    def _run(self, *last: str, expect: int = 0) -> None:
        commands, self.commands = [*self.commands, *last], []
        if self.fixture.encryption == "none":
            peers.qemu_io(self.path, *commands, expect=expect)
            return
        options = [*_secret_object(), "--image-opts"]
        peers.qemu_io(
            _encrypted_options(self.path), *commands, image_format=None, options=options, expect=expect
        )

    def _add_snapshots(self, made: Made) -> None:
        count = {"none": 0, "one": 1, "several": 2 if self._scarce_counts(3) else 3}[self.fixture.snapshots]
        names = ("first", "second", "third")[:count]
        for number, name in enumerate(names):
            self._snapshot(name)
            made.snapshots.append((name, self.guest.copy()))
            self._write(number * self.cluster, self.cluster + SECTOR, 0xC1 + number)
            self._discard(4 * self.cluster, self.cluster)
            self._run()

    def _snapshot(self, name: str) -> None:
        if self.fixture.encryption == "none":
            peers.qemu_img("snapshot", "-q", "-c", name, self.path)
            return
        options = [*_secret_object(), "--image-opts", _encrypted_options(self.path)]
        peers.qemu_img("snapshot", "-q", "-c", name, *options)

    def _add_bitmaps(self) -> None:
        """An empty one, one that saw a write, and one that is switched off."""
        if self.fixture.bitmaps == "none":
            return
        for name, flags in (("seen", ["-g", "64k"]), ("off", ["--disable"]), ("dense", ["-g", "512"])):
            self._bitmap("--add", *flags, name=name)
        self._write(self.size // 2 // SECTOR * SECTOR, 3 * SECTOR, 0xD0)
        self._run()

    def _bitmap(self, *flags: str, name: str) -> None:
        if self.fixture.encryption == "none":
            peers.qemu_img("bitmap", *flags, self.path, name)
            return
        options = [*_secret_object(), "--image-opts", _encrypted_options(self.path)]
        peers.qemu_img("bitmap", *flags, *options, name)

    def _leave_state(self) -> None:
        if self.fixture.state == "dirty":
            self._write(5 * self.cluster, self.cluster, 0xE0)
            self._write(self.size * 3 // 4 // SECTOR * SECTOR, SECTOR, 0xE1)
            self._run("flush", f"sigraise {-_KILLED}", expect=_KILLED)
        elif self.fixture.state == "corrupt":
            with self.path.open("r+b") as file:
                file.seek(_CORRUPT_BYTE)
                bits = file.read(1)[0]
                file.seek(_CORRUPT_BYTE)
                file.write(bytes([bits | 2]))

    def _l2_span(self) -> int:
        return self.cluster * (self.cluster // (16 if self.fixture.l2 == "extended" else 8))


def _options_of(fixture: Fixture, directory: Path) -> list[str]:
    """What `qemu-img create -o` is told beyond cluster size and version. QEMU seeks a relative data file in the
    directory where it runs, so the name is absolute."""
    options = list(_plain_options(fixture))
    if fixture.data_file != "none":
        options += [f"data_file={directory / 'data.raw'}"] + ["data_file_raw=on"] * (fixture.data_file == "raw")
    if fixture.encryption != "none":
        options += [f"encrypt.format={fixture.encryption}", "encrypt.key-secret=key"]
    if fixture.encryption == "luks":
        options.append("encrypt.iter-time=10")
    return options


def _plain_options(fixture: Fixture) -> Iterator[str]:
    if fixture.refcount_bits != 16:
        yield f"refcount_bits={fixture.refcount_bits}"
    if fixture.compression == "zstd":
        yield "compression_type=zstd"
    if fixture.l2 == "extended":
        yield "extended_l2=on"
    if fixture.state == "dirty":
        yield "lazy_refcounts=on"
    if fixture.preallocation != "off":
        yield f"preallocation={fixture.preallocation}"


def _backing_name(fixture: Fixture) -> list[str]:
    names = {"raw": "base.raw", "shorter": "base.raw", "qcow2": "base.qcow2", "longer": "base.qcow2"}
    name = names.get(fixture.backing, "upper.qcow2")
    return [name, "-F", name.rpartition(".")[2]]


def _secret_object() -> list[str]:
    return ["--object", f"secret,id=key,data={SECRET}"]


def _encrypted_options(path: Path) -> str:
    return f"driver=qcow2,encrypt.key-secret=key,file.driver=file,file.filename={path}"
