"""The storages of this machine keep the contract: files through and around the page cache, memory, wrappers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cowslice.storage import CountingStorage, FileStorage, LimitedStorage, MemoryStorage, Storage, WindowStorage
from cowslice.testing.contracts import Make, ReadOnlyStorageContract, WritableStorageContract, numbered_paths
from cowslice.testing.faults import FaultyStorage, HeldStorage, SlowStorage

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def file_maker(folder: Path, *, direct: bool, writable: bool, before: bytes = b"") -> Make:
    paths = numbered_paths(folder)

    def make(content: bytes) -> Storage:
        path = Path(next(paths))
        with path.open("wb") as file:
            file.write(before + content[: 64 << 10])
            file.seek(len(before) + (192 << 10))
            file.write(content[192 << 10 :])
            file.truncate(len(before + content))
        return FileStorage(path, "r+" if writable else "r", direct=direct)

    return make


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
class TestFile(WritableStorageContract):
    @pytest.fixture
    def make(self, tmp_path: Path, direct: bool) -> Make:
        return file_maker(tmp_path, direct=direct, writable=True)


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
class TestFileForReading(ReadOnlyStorageContract):
    @pytest.fixture
    def make(self, tmp_path: Path, direct: bool) -> Make:
        return file_maker(tmp_path, direct=direct, writable=False)


class TestMemory(WritableStorageContract):
    @pytest.fixture
    def make(self) -> Make:
        return lambda content: MemoryStorage(content)


class TestMemoryForReading(ReadOnlyStorageContract):
    @pytest.fixture
    def make(self) -> Make:
        return lambda content: MemoryStorage(content, writable=False)


class TestOpenWindow(WritableStorageContract):
    @pytest.fixture
    def make(self) -> Make:
        return lambda content: WindowStorage(MemoryStorage(b"\xee" * 777 + content), offset=777)


class TestClosedWindow(ReadOnlyStorageContract):
    @pytest.fixture
    def make(self) -> Make:
        def make(content: bytes) -> Storage:
            whole = MemoryStorage(b"\xee" * 777 + content + b"\xee" * 9000, writable=False)
            return WindowStorage(whole, offset=777, size=len(content))

        return make


class TestWindowOfADirectFile(WritableStorageContract):
    @pytest.fixture
    def make(self, tmp_path: Path) -> Make:
        inner = file_maker(tmp_path, direct=True, writable=True, before=b"\xee" * 512)
        return lambda content: WindowStorage(inner(content), offset=512)


class TestStackOfWrappers(WritableStorageContract):
    @pytest.fixture
    def make(self) -> Make:
        return lambda content: CountingStorage(
            LimitedStorage(FaultyStorage(SlowStorage(MemoryStorage(content))), limit=1 << 40)
        )


class TestReleased(WritableStorageContract):
    @pytest.fixture
    def make(self) -> Make:
        def make(content: bytes) -> Storage:
            held = HeldStorage(MemoryStorage(content))
            held.release()
            return held

        return make


class Minimal(Storage):
    """Only what the contract demands of a driver: all else is the shared default."""

    name = "minimal"
    writable = True

    def __init__(self, content: bytes) -> None:
        self._below = MemoryStorage(content, name=self.name)

    def pread(self, offset: int, buffer: memoryview) -> int:
        return self._below.pread(offset, buffer)

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        self._below.pwrite(offset, data)

    def length(self) -> int:
        return self._below.length()

    def truncate(self, length: int) -> None:
        self._below.truncate(length)

    def sync(self) -> None:
        self._below.sync()

    def close(self) -> None:
        self._below.close()


class TestMinimalDriver(WritableStorageContract):
    @pytest.fixture
    def make(self) -> Make:
        return Minimal
