"""The NBD storage keeps the contract over qemu-nbd and nbdkit: blocks of one byte and larger, plain and structured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cowslice.errors import NoSpace
from cowslice.storage import NbdStorage, Storage, WindowStorage, WrappedStorage
from cowslice.storage.base import check_span
from cowslice.testing import peers
from cowslice.testing.contracts import CONTENT, Make, ReadOnlyStorageContract, WritableStorageContract
from cowslice.testing.peers import needs

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from cowslice.storage import Span

ROOM = 4 << 20  # what a disk of a contract test can grow to
BLOCK = 4096

Serve = Callable[[Path], AbstractContextManager[str]]


def qemu_nbd(path: Path) -> AbstractContextManager[str]:
    return peers.qemu_nbd(path, image_format="raw")


def nbdkit(path: Path) -> AbstractContextManager[str]:
    return peers.nbdkit("file", path)


def nbdkit_in_blocks(path: Path) -> AbstractContextManager[str]:
    """One that answers requests with EINVAL unless they are whole blocks."""
    return peers.nbdkit("--filter=blocksize-policy", "file", path, f"blocksize-minimum={BLOCK}",
                        "blocksize-preferred=65536", "blocksize-maximum=131072", "blocksize-error-policy=error")


def nbdkit_plain(path: Path) -> AbstractContextManager[str]:
    """One without structured replies, and so without block status."""
    return peers.nbdkit("--no-sr", "file", path)


def write_sparse(path: Path, content: bytes, length: int) -> None:
    with path.open("wb") as file:
        file.write(content[: 64 << 10])
        file.seek(192 << 10)
        file.write(content[192 << 10 :])
        file.truncate(length)


class Disks:
    """Servers of the same content are started once and shared by the storages of a class."""

    def __init__(self, serve: Serve, folder: Path, stack: ExitStack) -> None:
        self._serve, self._folder, self._stack = serve, folder, stack
        self._served: dict[bytes, str] = {}

    def uri(self, content: bytes) -> str:
        if content not in self._served:
            path = self._folder / f"disk{len(self._served)}"
            write_sparse(path, content, len(content))
            self._served[content] = self._stack.enter_context(self._serve(path))
        return self._served[content]


def disks_of(serve: Serve, folder: Path) -> Iterator[Disks]:
    with ExitStack() as stack:
        yield Disks(serve, folder, stack)


@pytest.fixture(scope="module", params=[nbdkit, nbdkit_plain], ids=["structured", "simple"])
def on_nbdkit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disks]:
    yield from disks_of(request.param, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def on_qemu_nbd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disks]:
    yield from disks_of(qemu_nbd, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def in_blocks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disks]:
    yield from disks_of(nbdkit_in_blocks, tmp_path_factory.mktemp("served"))


@needs("nbdkit")
class TestNbdkit(ReadOnlyStorageContract):
    @pytest.fixture
    def make(self, on_nbdkit: Disks) -> Make:
        return lambda content: NbdStorage(on_nbdkit.uri(content))


@needs("qemu-nbd")
class TestQemuNbd(ReadOnlyStorageContract):
    """QEMU rounds a disk up to whole sectors, so only a window of it is as long as its content."""

    @pytest.fixture
    def make(self, on_qemu_nbd: Disks) -> Make:
        return lambda content: WindowStorage(NbdStorage(on_qemu_nbd.uri(content)), size=len(content))


@needs("nbdkit")
class TestWholeBlocks(ReadOnlyStorageContract):
    @pytest.fixture
    def make(self, in_blocks: Disks) -> Make:
        def make(content: bytes) -> Storage:
            whole = content.ljust(-(-len(content) // BLOCK) * BLOCK, b"\0")
            return WindowStorage(NbdStorage(in_blocks.uri(whole)), size=len(content))

        return make


class Growing(WrappedStorage):
    """The beginning of an export as a storage that grows into the rest of it, which is zeros."""

    def __init__(self, inner: Storage, length: int) -> None:
        super().__init__(inner)
        self._length = length

    def length(self) -> int:
        self.inner.length()
        return self._length

    def pread(self, offset: int, buffer: memoryview) -> int:
        check_span(offset, len(buffer))
        length = min(len(buffer), max(self.length() - offset, 0))
        return self.inner.pread(offset, buffer[:length])

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        self.inner.pwrite(offset, data)
        self._grow(offset, memoryview(data).nbytes)

    def zero(self, offset: int, length: int) -> None:
        self.inner.zero(offset, length)
        self._grow(offset, length)

    def allocate(self, offset: int, length: int) -> None:
        self.inner.allocate(offset, length)
        self._grow(offset, length)

    def truncate(self, length: int) -> None:
        check_span(0, length)
        if length < self.length():
            self.inner.zero(length, self._length - length)
        self._length = length

    def extents(self, offset: int, length: int) -> Iterator[Span]:
        return Storage.extents(self, offset, length)

    def _grow(self, offset: int, length: int) -> None:
        if length:
            self._length = max(self._length, offset + length)


@pytest.mark.parametrize("serve", [qemu_nbd, nbdkit, nbdkit_in_blocks])
@needs("qemu-nbd", "nbdkit")
class TestWritable(WritableStorageContract):
    """One export, emptied before each use: an export does not grow, so the test gives it room."""

    @pytest.fixture
    def make(self, serve: Serve, tmp_path: Path) -> Iterator[Make]:
        path = tmp_path / "disk"
        with path.open("wb") as file:
            file.truncate(ROOM)
        with serve(path) as uri, contextlib.ExitStack() as stack:
            def make(content: bytes) -> Storage:
                inner = NbdStorage(uri, "r+")
                stack.callback(inner.close)
                inner.zero(0, ROOM)
                inner.pwrite(0, content)
                return Growing(inner, len(content))

            yield make

    def test_what_was_synced_is_in_the_file(self, make: Make, tmp_path: Path) -> None:
        with make(CONTENT) as storage:
            storage.pwrite(5000, b"changed")
            storage.sync()
        assert (tmp_path / "disk").read_bytes()[:10_000] == CONTENT[:5000] + b"changed" + CONTENT[5007:10_000]

    def test_an_export_does_not_grow(self, make: Make) -> None:
        with make(b"") as storage:
            for change in (lambda: storage.pwrite(ROOM - 3, b"12345"), lambda: storage.zero(ROOM, 1)):
                with pytest.raises(NoSpace, match=str(ROOM)):
                    change()
