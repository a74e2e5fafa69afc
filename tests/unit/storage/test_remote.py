"""Remote storages: few requests, and a clear word when the server or the installation cannot do it."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cowslice.errors import BadOption, OutOfRange, ShortRead, StorageError
from cowslice.storage import FsspecStorage, WindowStorage, remote
from cowslice.testing import peers
from cowslice.testing.peers import needs

fsspec = pytest.importorskip("fsspec")

KiB, MiB = 1 << 10, 1 << 20
CONTENT = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def memory_url() -> str:
    url = "memory://remote/image"
    fsspec.filesystem("memory").pipe(url, CONTENT)
    return url


Answer = Callable[[BaseHTTPRequestHandler], None]


@contextlib.contextmanager
def server(answer: Answer) -> Iterator[tuple[str, list[str]]]:
    """Run an HTTP server of this process; the value is its URL, and the (method, range) of every request so far."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            seen.append(f"{self.command} {self.headers.get('Range', 'all')}")
            answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_address[1]}/image", seen
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def asked_range(request: BaseHTTPRequestHandler) -> tuple[int, int]:
    start, _, last = request.headers["Range"].removeprefix("bytes=").partition("-")
    return int(start), int(last) + 1


def send(request: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    if "Transfer_Encoding" not in headers:
        request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command == "GET":
        with contextlib.suppress(ConnectionError):
            request.wfile.write(body)


def honest(request: BaseHTTPRequestHandler) -> None:
    if "Range" not in request.headers:
        send(request, 200, CONTENT, Accept_Ranges="bytes")
        return
    start, end = asked_range(request)
    send(request, 206, CONTENT[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(CONTENT)}")


class TestRequests:
    def test_a_read_is_one_request_of_its_range(self) -> None:
        with server(honest) as (url, seen), FsspecStorage(url) as storage:
            seen.clear()
            assert storage.read(1000, 500) == CONTENT[1000:1500]
            assert seen == ["GET bytes=1000-1499"]

    def test_nothing_is_asked_beyond_the_end(self) -> None:
        with server(honest) as (url, seen), FsspecStorage(url) as storage:
            seen.clear()
            assert storage.read(MiB, 500) == storage.read_spans([(2 * MiB, 500), (5, 0)])[0] == bytes(500)
            assert seen == []
            storage.read(MiB - 10, 500)
            assert seen == [f"GET bytes={MiB - 10}-{MiB - 1}"]

    def test_spans_near_each_other_are_one_request(self) -> None:
        with server(honest) as (url, seen), FsspecStorage(url) as storage:
            seen.clear()
            spans = [(900 * KiB, 4096), (0, 4096), (100 * KiB, 4096), (300 * KiB, 4096), (2 * KiB, 100)]
            assert storage.read_spans(spans) == [CONTENT[at : at + length] for at, length in spans]
            assert sorted(seen) == [f"GET bytes=0-{304 * KiB - 1}", f"GET bytes={900 * KiB}-{904 * KiB - 1}"]

    def test_merged_reads_travel_side_by_side(self) -> None:
        together = threading.Barrier(4)

        def meet(request: BaseHTTPRequestHandler) -> None:
            if "Range" in request.headers and asked_range(request)[0] != MiB - 1:
                together.wait(60)
            honest(request)

        with server(meet) as (url, _), FsspecStorage(url) as storage:
            spans = [(n * 200 * KiB, 4096) for n in range(4)]
            assert storage.read_spans(spans, gap=0) == [CONTENT[at : at + 4096] for at, _ in spans]

    def test_what_is_under_way_together_is_bounded(self, memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote, "IN_FLIGHT", 100 * KiB)
        with FsspecStorage(memory_url) as storage:
            system, calls = storage._system, []
            real = system.cat_ranges

            def counted(paths: list[str], *spans: list[int], **more: Any) -> list[bytes]:
                calls.append(len(paths))
                return list(real(paths, *spans, **more))

            monkeypatch.setattr(system, "cat_ranges", counted)
            spans = [(n * 100 * KiB, 40 * KiB) for n in range(7)]
            assert storage.read_spans(spans, gap=0) == [CONTENT[at : at + length] for at, length in spans]
            assert calls == [2, 2, 2, 1]

    def test_opening_asks_for_the_length_and_one_byte(self) -> None:
        with server(honest) as (url, seen):
            FsspecStorage(url).close()
        assert seen == ["HEAD all"] * (len(seen) - 1) + [f"GET bytes={MiB - 1}-{MiB - 1}"]

    def test_a_window_of_a_remote_storage_is_one_too(self, memory_url: str) -> None:
        with WindowStorage(FsspecStorage(memory_url), offset=100, size=50) as window:
            assert window.read_spans([(0, 10), (40, 20)]) == [CONTENT[100:110], CONTENT[140:150] + bytes(10)]
            assert window.read_gap == FsspecStorage.read_gap


class TestServersThatCannot:
    @needs("nginx")
    @pytest.mark.parametrize("size", [2, 5 * MiB])
    def test_one_without_ranges_is_refused(self, tmp_path: Path, size: int) -> None:
        (tmp_path / "image").write_bytes(bytes(size))
        with peers.nginx(tmp_path, directives="max_ranges 0;") as url:
            with pytest.raises(StorageError, match="by ranges: the server does not support it") as refused:
                FsspecStorage(f"{url}/image")
            assert refused.value.errno == errno.EOPNOTSUPP
            assert "Copy the file here first" in refused.value.hint

    def test_one_that_says_it_has_no_ranges_is_believed(self) -> None:
        with server(lambda request: send(request, 200, CONTENT, Accept_Ranges="none")) as (url, seen):
            with pytest.raises(StorageError, match="it says so itself"):
                FsspecStorage(url)
            assert set(seen) == {"HEAD all"}

    def test_one_that_tells_no_length_is_refused(self) -> None:
        def endless(request: BaseHTTPRequestHandler) -> None:
            send(request, 200, b"5\r\nhello\r\n0\r\n\r\n", Transfer_Encoding="chunked")

        with server(endless) as (url, _), pytest.raises(StorageError, match="its size is not known"):
            FsspecStorage(url)

    def test_one_that_stops_answering_ranges_is_caught(self) -> None:
        def forgetful(request: BaseHTTPRequestHandler) -> None:
            if request.headers.get("Range") == "bytes=10-19":
                send(request, 200, CONTENT)
            else:
                honest(request)

        with server(forgetful) as (url, _), FsspecStorage(url) as storage:
            for read in (lambda: storage.read(10, 10), lambda: storage.read_spans([(10, 10)])):
                with pytest.raises(StorageError, match=f"{MiB} bytes came where 10 were asked at offset 10"):
                    read()

    def test_one_that_sends_too_little_is_caught(self) -> None:
        def stingy(request: BaseHTTPRequestHandler) -> None:
            if request.headers.get("Range") == "bytes=10-19":
                send(request, 206, b"abc", Content_Range=f"bytes 10-12/{MiB}")
            else:
                honest(request)

        with server(stingy) as (url, _), FsspecStorage(url) as storage:
            with pytest.raises(ShortRead, match="10 bytes expected at offset 10, 3 are there"):
                storage.read(10, 10)
            assert storage.read(20, 10) == CONTENT[20:30]

    def test_one_that_breaks_off_is_a_storage_error(self) -> None:
        def broken(request: BaseHTTPRequestHandler) -> None:
            if request.headers.get("Range") == "bytes=10-19":
                request.connection.shutdown(socket.SHUT_RDWR)
                request.close_connection = True
            else:
                honest(request)

        with server(broken) as (url, _), FsspecStorage(url) as storage:
            for read in (lambda: storage.read(10, 10), lambda: storage.read_spans([(10, 10)])):
                with pytest.raises(StorageError, match="cannot read 'http"):
                    read()

    @needs("nginx")
    def test_a_file_that_shrinks_after_opening_is_a_storage_error(self, tmp_path: Path) -> None:
        image = tmp_path / "image"
        image.write_bytes(CONTENT)
        with peers.nginx(tmp_path) as url, FsspecStorage(f"{url}/image") as storage:
            image.write_bytes(CONTENT[:1000])
            with pytest.raises(ShortRead):
                storage.read(900, 200)
            with pytest.raises(StorageError, match="cannot read"):
                storage.read(5000, 200)

    @needs("nginx")
    def test_one_that_compresses_still_sends_the_bytes_themselves(self, tmp_path: Path) -> None:
        (tmp_path / "image").write_bytes(bytes(MiB))
        zipping = peers.nginx(tmp_path, directives="gzip on; gzip_types *;")
        with zipping as url, FsspecStorage(f"{url}/image") as storage:
            assert (storage.length(), storage.read(5000, 9000)) == (MiB, bytes(9000))


class TestNothingThere:
    @needs("nginx")
    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with peers.nginx(tmp_path) as url, pytest.raises(StorageError, match=f"cannot open '{url}/gone'") as missing:
            FsspecStorage(f"{url}/gone")
        assert missing.value.errno == errno.ENOENT
        assert str(missing.value).count(url) == 1

    @needs("nginx")
    def test_a_forbidden_file_says_what_the_server_said(self, tmp_path: Path) -> None:
        with peers.nginx(tmp_path, directives="deny all;") as url, pytest.raises(StorageError, match="403") as refused:
            FsspecStorage(f"{url}/image")
        assert str(refused.value) == f"cannot open '{url}/image': the server answered 403 Forbidden"

    def test_nobody_listening_is_told_as_such(self) -> None:
        with server(honest) as (url, _):
            pass
        with pytest.raises(StorageError, match=r"cannot open 'http.*[Cc]onnect") as refused:
            FsspecStorage(url)
        assert refused.value.errno == errno.ECONNREFUSED

    def test_a_missing_object_is_named(self) -> None:
        with pytest.raises(StorageError, match="cannot open 'memory://no/such': there is no such file") as missing:
            FsspecStorage("memory://no/such")
        assert missing.value.errno == errno.ENOENT

    def test_a_folder_is_no_image(self) -> None:
        fsspec.filesystem("memory").pipe("memory://folder/file", b"x")
        with pytest.raises(StorageError, match="Is a directory"):
            FsspecStorage("memory://folder")

    def test_an_unknown_protocol_is_the_callers_fault(self) -> None:
        with pytest.raises(BadOption, match="Protocol not known: gopher"):
            FsspecStorage("gopher://host/x")


class TestInstallation:
    def test_without_fsspec_the_error_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("fsspec", "fsspec.core"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(StorageError, match=r"cannot open 's3://b/k'.*missing \(fsspec\)") as missing:
            FsspecStorage("s3://b/k")
        assert "pip install 'cowslice[remote]'" in missing.value.hint

    def test_without_the_back_end_the_error_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(*_: object, **__: object) -> None:
            raise ImportError("Install s3fs to access S3")

        monkeypatch.setattr("fsspec.core.url_to_fs", absent)
        with pytest.raises(StorageError, match="Install s3fs to access S3") as missing:
            FsspecStorage("s3://b/k")
        assert "cowslice[remote]" in missing.value.hint


def test_a_password_in_the_url_is_never_shown() -> None:
    with server(honest) as (url, _), FsspecStorage(url.replace("http://", "http://me:geheim@")) as storage:
        assert "geheim" not in repr(storage)
        assert "http://me:***@127.0.0.1" in storage.name
        storage.close()
        with pytest.raises(ValueError, match=r"me:\*\*\*@"):
            storage.read(0, 1)
    with server(honest) as (url, _):
        pass
    with pytest.raises(StorageError) as refused:
        FsspecStorage(url.replace("http://", "http://me:geheim@"))
    assert "geheim" not in str(refused.value)


@pytest.mark.parametrize(
    "fault", [OSError(errno.EACCES, "x"), KeyError("bucket"), RuntimeError(), ValueError("odd"), TimeoutError()]
)
def test_whatever_the_back_end_raises_is_a_storage_error(
    memory_url: str, fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: Any) -> None:
        raise fault

    with FsspecStorage(memory_url) as storage:
        monkeypatch.setattr(storage._system, "cat_file", fail)
        with pytest.raises(StorageError, match=f"cannot read '{memory_url}': .") as told:
            storage.read(0, 5)
    assert told.value.errno == (fault.errno or 0 if isinstance(fault, OSError) else 0)


def test_impossible_spans_reach_no_server(memory_url: str) -> None:
    with FsspecStorage(memory_url) as storage, pytest.raises(OutOfRange):
        storage.pread(-1, memoryview(bytearray(5)))
