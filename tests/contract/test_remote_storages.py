"""The remote storage keeps the contract over fsspec's memory, a real nginx and a local S3 server, on loopback only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cowslice.storage import FsspecStorage
from cowslice.testing import peers
from cowslice.testing.contracts import Make, ReadOnlyStorageContract
from cowslice.testing.peers import needs

fsspec = pytest.importorskip("fsspec")

BUCKET = "images"
_numbers = itertools.count()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("served")
    with peers.nginx(folder) as url:
        yield folder, url


@pytest.fixture(scope="module")
def s3_options() -> Iterator[dict[str, Any]]:
    """Start an S3 server of this process on the loopback address, with one empty bucket."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    fsspec.filesystem("s3", **options).mkdir(BUCKET)
    yield options
    server.stop()


class TestFsspecMemory(ReadOnlyStorageContract):
    @pytest.fixture
    def make(self) -> Make:
        def make(content: bytes) -> FsspecStorage:
            url = f"memory://contract/{next(_numbers)}"
            fsspec.filesystem("memory").pipe(url, content)
            return FsspecStorage(url)

        return make


@needs("nginx")
class TestHttp(ReadOnlyStorageContract):
    @pytest.fixture
    def make(self, served: tuple[Path, str]) -> Make:
        folder, url = served

        def make(content: bytes) -> FsspecStorage:
            name = f"{next(_numbers)}.img"
            (folder / name).write_bytes(content)
            return FsspecStorage(f"{url}/{name}")

        return make


class TestS3(ReadOnlyStorageContract):
    @pytest.fixture
    def make(self, s3_options: dict[str, Any]) -> Make:
        def make(content: bytes) -> FsspecStorage:
            url = f"s3://{BUCKET}/{next(_numbers)}.img"
            fsspec.filesystem("s3", **s3_options).pipe(url, content)
            return FsspecStorage(url, options=s3_options)

        return make
