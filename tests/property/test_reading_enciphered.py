"""Encrypted images, alone and in chains, read by the compiled path and by the plain one as a model of the disk says."""

from __future__ import annotations

import copy
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cowslice
from cowslice.format.entries import Kind
from cowslice.image.layer import Layer
from cowslice.image.mapping import resolve
from cowslice.image.qcow2 import Qcow2Layer
from cowslice.image.reading import read_into
from cowslice.nbd.wire import Command, Mode
from cowslice.storage import FileStorage
from cowslice.units import SECTOR, KiB
from tests.unit.serve.rawclient import WAYS, wired

SECRET = "sesame"
LUKS = {"encryption": "luks", "iter_time": 1, "secret": SECRET}
KINDS: dict[str, dict[str, Any]] = {
    "clear": {"cluster_size": 8 * KiB},
    "aes": {"encryption": "aes", "secret": SECRET, "cluster_size": 4 * KiB},
    "xts": {**LUKS, "cluster_size": 4 * KiB},
    "xts-plain": {**LUKS, "ivgen_alg": "plain", "cluster_size": 512},
    "extended": {**LUKS, "cluster_size": 16 * KiB, "extended_l2": True},
    "essiv": {**LUKS, "cipher_alg": "aes-128", "cipher_mode": "cbc", "ivgen_alg": "essiv", "ivgen_hash_alg": "md5"},
    "ctr": {**LUKS, "cipher_mode": "ctr", "cluster_size": 2 * KiB},
    "cast5": {**LUKS, "cipher_alg": "cast5-128", "cipher_mode": "cbc", "cluster_size": 4 * KiB},
    "data file": {**LUKS, "cluster_size": 4 * KiB, "data_file": "data.bin"},
}
CHAINS = [(name,) for name in KINDS if name != "clear"] + [
    ("clear", "xts"), ("xts", "clear"), ("clear", "aes"), ("aes", "xts"), ("extended", "essiv"), ("clear", "cast5"),
    ("xts", "clear", "extended")]  # fmt: skip


Chain = tuple[cowslice.Image, bytes]


def made(names: tuple[str, ...], folder: Path) -> bytes:
    """Make the files of a chain, "0" the top one; return what the disk holds.

    Each layer is written to where the one below it shows through, ragged and in the middle of clusters.
    """
    model = bytearray(300 * KiB - 512)
    for level in reversed(range(len(names))):
        size = len(model)
        below = {"backing_file": str(level + 1), "backing_format": "qcow2", "check_backing": False}
        cowslice.create(folder / str(level), size, **KINDS[names[level]], **(below if level + 1 < len(names) else {}))
        dice = random.Random(level)
        with opened(folder / str(level), "r+") as disk:
            for _ in range(14):
                start = dice.randrange(size)
                data = dice.randbytes(min(dice.choice((1, 700, 4096, 40_000)), size - start))
                disk.write(start, data)
                model[start : start + len(data)] = data
            start, length = dice.randrange(size // SECTOR) * SECTOR, 20_480
            length = min(length, size - start)
            disk.zero(start, length)
            model[start : start + length] = bytes(length)
    return bytes(model)


def opened(path: Path, mode: str = "r", **options: Any) -> cowslice.Image:
    return cowslice.open(path, mode, secret=SECRET, **options)


@pytest.fixture(scope="module", params=CHAINS, ids="-".join)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """A chain open for reading, and what it holds."""
    folder = tmp_path_factory.mktemp("chain")
    content = made(request.param, folder)
    with opened(folder / "0") as disk:
        yield disk, content


def plain(layers: tuple[Layer, ...]) -> list[Layer]:
    """The same layers, deciphered by plain passes."""
    return [_plain_twin(layer) if isinstance(layer, Qcow2Layer) else layer for layer in layers]


def _plain_twin(layer: Qcow2Layer) -> Qcow2Layer:
    twin = copy.copy(layer)
    twin.cipher = copy.copy(layer.cipher)
    if twin.cipher is not None:
        twin.cipher.compiled = None
    return twin


@given(data=st.data())
def test_any_span_reads_as_the_model_says_on_both_paths(chain: Chain, data: st.DataObject) -> None:
    disk, content = chain
    sectors = st.integers(0, disk.size // SECTOR - 1).map(lambda number: number * SECTOR)
    start = data.draw(st.integers(0, disk.size - 1) | sectors)
    length = data.draw(st.sampled_from((1, 3, 511, 512, 513, 4096, 5000, 100_000)) | st.integers(1, 9000))
    length = min(length, disk.size - start)
    assert disk.read(start, length) == content[start : start + length]
    buffer = bytearray(length)
    read_into(plain(disk.layers), start, memoryview(buffer))
    assert buffer == content[start : start + length]


def test_the_compiled_path_does_it_alone_where_libcrypto_has_the_cipher(chain: Chain) -> None:
    disk, content = chain
    assert disk.fast_path is not None
    buffer = bytearray(disk.size)
    done = disk.fast_path.read_into(0, buffer)
    in_python = any(isinstance(layer, Qcow2Layer) and layer.cipher is not None and layer.cipher.compiled is None
                    for layer in disk.layers)
    assert (done < disk.size) == in_python
    assert buffer[:done] == content[:done]


def test_many_reads_at_once_are_the_single_reads(chain: Chain) -> None:
    disk, content = chain
    offsets = [random.Random(1).randrange(disk.size - 700) for _ in range(200)]
    out = bytearray(200 * 700)
    disk.read_many(offsets, 700, out, depth=3)
    for number, offset in enumerate(offsets):
        assert out[number * 700 : (number + 1) * 700] == content[offset : offset + 700]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", list(Mode))
def test_clients_read_plain_bytes(chain: Chain, way: str, mode: Mode) -> None:
    disk, content = chain
    dice = random.Random(2)
    spans = [(dice.randrange(disk.size), dice.choice((1, 512, 4096, 40_000, 100_000))) for _ in range(40)]
    spans += [(dice.randrange(disk.size // SECTOR) * SECTOR, dice.choice((512, 4096, 65_536))) for _ in range(40)]
    spans = [(start, min(length, disk.size - start)) for start, length in spans]
    with wired(disk, way=way) as wire:
        client = wire.client(mode=mode, contexts=())
        asked = {client.ask(Command.READ, start, length): (start, length) for start, length in spans}
        for cookie, reply in client.answers(len(asked)).items():
            start, length = asked[cookie]
            assert reply.data == content[start : start + length]


@contextmanager
def written(names: tuple[str, ...], folder: Path) -> Iterator[tuple[cowslice.Image, bytearray]]:
    """A chain open for writing, and what it holds."""
    content = made(names, folder)
    with opened(folder / "0", "r+") as disk:
        yield disk, bytearray(content)


@pytest.mark.parametrize("names", CHAINS, ids="-".join)
def test_what_stands_beside_a_write_is_copied_as_plain_bytes(names: tuple[str, ...], tmp_path: Path) -> None:
    dice = random.Random(3)
    with written(names, tmp_path) as (disk, content):
        for _ in range(60):
            start = dice.randrange(disk.size)
            data = dice.randbytes(min(dice.choice((1, 100, 512, 3000)), disk.size - start))
            disk.write(start, data)
            content[start : start + len(data)] = data
        assert disk.read(0, disk.size) == content
    with opened(tmp_path / "0") as disk:
        assert disk.read(0, disk.size) == content


@pytest.mark.parametrize("below", ["xts", "aes"])
def test_a_hole_in_enciphered_data_is_no_zeros_to_a_write_above_it(below: str, tmp_path: Path) -> None:
    """A new cluster reads as zeros by itself, but a hole deciphers to noise, which is what the disk holds."""
    with written(("clear", below), tmp_path) as (disk, _):
        assert isinstance(disk.layers[1], Qcow2Layer)
        start = next(at for at in range(0, disk.size, 8 * KiB) if _shows(disk, at, 8 * KiB))
        host = resolve(disk.layers, start, 4 * KiB)[1].host
        with FileStorage(tmp_path / "1", mode="r+", locking=False) as storage:
            storage.discard(host, 4 * KiB)
        before = bytearray(disk.read(start, 8 * KiB))
        disk.write(start + 4 * KiB, b"new")
        before[4 * KiB : 4 * KiB + 3] = b"new"
        assert disk.read(start, 8 * KiB) == before


def _shows(disk: cowslice.Image, start: int, length: int) -> bool:
    """Whether data of the lower layer answers for all of a span."""
    found = [resolve(disk.layers, at, 1) for at in range(start, start + length, SECTOR)]
    return all(depth == 1 and piece.kind is Kind.NORMAL for depth, piece in found)


@pytest.mark.parametrize("name", ["xts", "aes", "extended"])
def test_a_file_that_was_cut_short_reads_alike_on_both_paths(name: str, tmp_path: Path) -> None:
    content = made((name,), tmp_path)
    os.truncate(tmp_path / "0", (tmp_path / "0").stat().st_size - 9 * KiB - 100)
    with opened(tmp_path / "0") as disk:
        for start in (0, 511):
            buffer = bytearray(disk.size - start)
            read_into(plain(disk.layers), start, memoryview(buffer))
            assert disk.read(start, disk.size - start) == buffer
            assert buffer != content[start:]


@pytest.mark.parametrize("name", ["xts", "aes"])
def test_a_snapshot_is_deciphered_as_the_disk_was(name: str, tmp_path: Path) -> None:
    with written((name,), tmp_path) as (disk, content):
        disk.snapshot("before")
        disk.write(1000, b"after" * 3000)
    with opened(tmp_path / "0", snapshot="before") as disk:
        assert disk.read(0, disk.size) == content


@pytest.mark.parametrize("names", [("xts",), ("aes", "xts"), ("extended", "clear"), ("clear", "xts")], ids="-".join)
def test_what_others_write_beside_it_changes_nothing_in_a_read(names: tuple[str, ...], tmp_path: Path) -> None:
    """Every other 1536 bytes are written, again and again, and those between them are read meanwhile."""
    part = 3 * SECTOR
    with written(names, tmp_path) as (disk, content):
        ended = threading.Event()

        def write_on() -> None:
            try:
                dice = random.Random(5)
                for _ in range(300):
                    disk.write(dice.randrange(disk.size // part // 2) * 2 * part, dice.randbytes(part))
            finally:
                ended.set()

        writer = threading.Thread(target=write_on)
        writer.start()
        dice = random.Random(6)
        while not ended.is_set():
            start = (dice.randrange(disk.size // part // 2) * 2 + 1) * part
            length = min(dice.choice((part, 5)), disk.size - start)
            assert disk.read(start, length) == content[start : start + length]
        writer.join()


@pytest.mark.parametrize("name", ["xts", "aes"])
def test_without_its_secret_an_image_gives_no_bytes(name: str, tmp_path: Path) -> None:
    made((name,), tmp_path)
    with cowslice.open(tmp_path / "0", secret=None, metadata_only=True) as disk:
        assert disk.fast_path is None
    with pytest.raises(cowslice.CryptoError, match="secret"):
        cowslice.open(tmp_path / "0")
