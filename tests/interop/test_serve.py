"""Real NBD clients, none of them ours, on disks that cowslice serves: they see what QEMU's tools see in the file."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cowslice
from cowslice.serve.exports import Export
from cowslice.serve.listeners import listen_unix
from cowslice.serve.server import Server, serve
from cowslice.testing import peers

K, MiB = 1 << 10, 1 << 20
SIZE = 96 * MiB

pytestmark = peers.needs("qemu-img", "qemu-io")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay with data, zeros, compressed clusters, a hole onto its backing file, a snapshot and two bitmaps."""
    place = tmp_path_factory.mktemp("disks")
    base, top = place / "base.qcow2", place / "top.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", base, 64 * MiB)
    peers.qemu_io(base, "write -P 0x11 0 3M", "write -P 0x12 40M 1M", "write -z 50M 1M")
    peers.qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top, SIZE)
    peers.qemu_img("bitmap", "--add", top, "day")
    peers.qemu_io(top, "write -P 0x21 1M 64k", "write -c -P 0x22 10M 640k", "write -z 2M 128k", "write -P 0x23 90M 2M")
    peers.qemu_img("bitmap", "--add", "-g", MiB, top, "week")
    peers.qemu_img("snapshot", "-c", "before", top)
    peers.qemu_io(top, "write -P 0x24 10M 64k", "write -P 0x25 70M 300k")
    return top


@pytest.fixture(params=["compiled", "python"])
def uri(request: pytest.FixtureRequest, image: Path) -> Iterator[str]:
    place = f"/tmp/cowslice-interop-{os.getpid()}"
    with cowslice.open(image) as disk:
        export = Export(disk, description="for tests", allocation_depth=True, bitmaps=["day", "week"])
        with Server([export], [listen_unix(place)], compiled=request.param == "compiled") as server:
            yield server.uri


def test_qemu_img_finds_the_same_disk(uri: str, image: Path) -> None:
    assert "identical" in peers.qemu_img("compare", "-f", "raw", "-F", "qcow2", uri, image)


def test_qemu_img_converts_it(uri: str, image: Path, tmp_path: Path) -> None:
    peers.qemu_img("convert", "-f", "raw", "-O", "raw", uri, tmp_path / "through.raw")
    peers.qemu_img("convert", "-f", "qcow2", "-O", "raw", image, tmp_path / "straight.raw")
    assert (tmp_path / "through.raw").read_bytes() == (tmp_path / "straight.raw").read_bytes()


def test_qemu_img_maps_it_as_it_maps_the_file(uri: str, image: Path) -> None:
    def shape(extents: list[dict[str, Any]]) -> list[tuple[int, int, bool, bool]]:
        joined: list[tuple[int, int, bool, bool]] = []
        for one in extents:
            start, length, zero, data = one["start"], one["length"], one["zero"], one["data"]
            if joined and joined[-1][2:] == (zero, data):
                start, length = joined[-1][0], joined.pop()[1] + length
            joined.append((start, length, zero, data))
        return joined

    through = shape(peers.qemu_img_json("map", "-f", "raw", uri))
    assert through == shape(peers.qemu_img_json("map", "-f", "qcow2", image))
    assert len(through) > 5


def test_qemu_img_knows_its_size(uri: str) -> None:
    assert peers.qemu_img_json("info", "-f", "raw", uri)["virtual-size"] == SIZE


def test_qemu_io_reads_its_patterns_and_cannot_write(uri: str) -> None:
    peers.qemu_io(uri, "read -P 0x11 0 1M", "read -P 0x21 1M 64k", "read -P 0 2M 128k", "read -P 0x24 10M 64k",
                  "read -P 0x22 10304k 500k", "read -P 0 60M 10M", "read -P 0x23 91M 1M", image_format="raw",
                  options=["-r"])
    assert "can't open" in peers.run("qemu-io", "-f", "raw", "-c", "write 0 512", uri, expect=1).stderr.decode()


@peers.needs("nbdinfo")
def test_nbdinfo_sees_what_qemu_nbd_shows(uri: str, image: Path) -> None:
    with peers.qemu_nbd(image, "-r", "-A", "-B", "day", "-B", "week", "-D", "for tests") as theirs:
        (expected,) = peers.nbdinfo_json(theirs)["exports"]
    (found,) = peers.nbdinfo_json(uri)["exports"]
    for said in (expected, found):
        said.pop("uri")
        said.pop("export-name", None)
        said["contexts"].sort()  # their order means nothing
    assert found == expected


@peers.needs("nbdinfo")
@pytest.mark.parametrize("context", [
    "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:day", "qemu:dirty-bitmap:week"])
def test_nbdinfo_maps_it_as_qemu_nbd_lets_it(uri: str, image: Path, context: str) -> None:
    with peers.qemu_nbd(image, "-r", "-A", "-B", "day", "-B", "week") as theirs:
        expected = _map(theirs, context)
    assert _map(uri, context) == expected
    assert len(expected) > 2


@peers.needs("nbdinfo")
def test_nbdinfo_lists_every_disk_of_a_server(image: Path) -> None:
    with cowslice.open(image) as disk, cowslice.open(image, snapshot="before") as before:
        exports = {"now": disk, "now@before": before}
        with serve(exports, unix=f"/tmp/cowslice-interop-list-{os.getpid()}") as server:
            address = f"nbd+unix:///?{server.uri.partition('?')[2]}"
            listed = peers.nbdinfo_json(address, "--list")["exports"]
            assert [one["export-name"] for one in listed] == ["now", "now@before"]
            peers.qemu_io(server.uris[1].replace("%40", "@"), "read -P 0x22 10M 64k", "read -P 0 70M 300k",
                          image_format="raw", options=["-r"])


@peers.needs("nbdcopy")
@pytest.mark.parametrize("flags", [[], ["--connections=4", "--requests=32"], ["--synchronous"], ["--no-extents"],
                                   ["--request-size=4096"]])
def test_nbdcopy_copies_it(uri: str, image: Path, tmp_path: Path, flags: list[str]) -> None:
    peers.nbdcopy(*flags, uri, tmp_path / "copy.raw")
    assert "identical" in peers.qemu_img("compare", "-f", "raw", "-F", "qcow2", tmp_path / "copy.raw", image)


@peers.needs("fio")
def test_fio_reads_it(uri: str) -> None:
    (job,) = peers.fio_json("--name=read", "--ioengine=nbd", f"--uri={uri}", "--rw=randread", "--bs=4k",
                            "--iodepth=32", "--number_ios=2000", f"--size={SIZE}")["jobs"]
    assert (job["error"], job["read"]["total_ios"]) == (0, 2000)


LIBNBD = """
import json, nbd, sys
uri, modes = sys.argv[1], []
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:allocation-depth")
h.connect_uri(uri)
found = {}
def note(name, offset, entries, error):
    found.setdefault(name, []).extend(entries)
h.block_status(h.get_size(), 0, note)
# Everything at once, out of order, in the replies' own time.
buffers, cookies = {}, set()
for n in range(64):
    buffer = nbd.Buffer(65536)
    buffers[n] = buffer
    cookies.add(h.aio_pread(buffer, n * 1000003 % (h.get_size() - 65536)))
while cookies:
    h.poll(-1)
    cookies -= {cookie for cookie in list(cookies) if h.aio_command_completed(cookie)}
import hashlib
digest = hashlib.sha256(b"".join(bytes(buffers[n].to_bytearray()) for n in range(64))).hexdigest()
errors = []
for attempt in (lambda: h.pread(512, h.get_size()), lambda: h.pwrite(b"x" * 512, 0), lambda: h.zero(512, 0)):
    h.set_strict_mode(0)
    try:
        attempt()
        errors.append(None)
    except nbd.Error as error:
        errors.append(error.errno)
h.cache(65536, 0)
h.flush()
again = h.pread(10, 0)
h.shutdown()
print(json.dumps([found["base:allocation"][:4], digest, errors, len(again)]))
"""


def _system_python() -> str:
    """A Python that has Debian's binding of libnbd."""
    python = "/usr/bin/python3"
    if os.path.exists(python) and not subprocess.run([python, "-c", "import nbd"], capture_output=True).returncode:
        return python
    reason = peers.MISSING + "python3-libnbd (package python3-libnbd)"
    if os.environ.get("COWSLICE_REQUIRE_PEERS") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def test_libnbd_reads_it_in_any_order(uri: str, image: Path) -> None:
    done = subprocess.run([_system_python(), "-c", LIBNBD, uri], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    extents, digest, errors, again = json.loads(done.stdout)
    with cowslice.open(image) as disk:
        expected = b"".join(disk.read(n * 1000003 % (SIZE - 65536), 65536) for n in range(64))
    assert digest == hashlib.sha256(expected).hexdigest()
    assert errors == ["EINVAL", "EPERM", "EPERM"]
    assert extents[:2] == [2 * MiB, 0]
    assert again == 10


@peers.needs("nbdcopy")
@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_a_compressed_disk_is_served(tmp_path: Path, compression: str) -> None:
    """Nothing in it can be read by the compiled path alone."""
    raw, packed = tmp_path / "raw", tmp_path / "packed.qcow2"
    raw.write_bytes(b"".join(bytes([n % 251]) * 4096 for n in range(2000)))
    peers.qemu_img("convert", "-f", "raw", "-O", "qcow2", "-c", "-o", f"compression_type={compression}", raw, packed)
    with cowslice.open(packed) as disk, serve(disk, unix=f"/tmp/cowslice-odd-{os.getpid()}") as server:
        peers.nbdcopy("--connections=2", server.uri, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == raw.read_bytes()


def _map(uri: str, context: str) -> list[tuple[int, int, int]]:
    printed = peers.run("nbdinfo", "--json", f"--map={context}", uri).stdout
    joined: list[tuple[int, int, int]] = []
    for one in json.loads(printed):
        start, length, kind = one["offset"], one["length"], one["type"]
        if joined and joined[-1][2] == kind:
            start, length = joined[-1][0], joined.pop()[1] + length
        joined.append((start, length, kind))
    return joined
