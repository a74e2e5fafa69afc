"""What stands at the metrics address: for programs, for people, and for visitors who mean no good."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cowslice
from cowslice.errors import BadOption, StorageError
from cowslice.ops.layout import write_populated_image
from cowslice.serve import page
from cowslice.serve.metrics import HEAT, Counters, Metrics
from cowslice.serve.page import MetricsServer, parse_address
from cowslice.testing.peers import needs, run

GIB = 1 << 30


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[cowslice.Image]:
    write_populated_image(tmp_path / "disk.qcow2", size=4 * GIB, layout="random")
    with cowslice.open(tmp_path / "disk.qcow2", l2_cache_size="1M", l2_cache_entry_size="4k", warmup="off") as opened:
        yield opened


@pytest.fixture
def metrics(disk: cowslice.Image) -> Metrics:
    """One export that has been read once, in its middle."""
    made = Metrics()
    counters = Counters(disk.size)
    made.add_export("vm", disk.size, disk).attach(counters)
    disk.read(disk.size // 2, 4096)
    counters.note("read", disk.size // 2, 4096, 3_000)
    return made


@pytest.fixture
def server(metrics: Metrics) -> Iterator[MetricsServer]:
    with MetricsServer("0", metrics) as running:
        yield running


def place(server: MetricsServer) -> tuple[str, int]:
    return parse_address(server.url.removeprefix("http://").rstrip("/"))


def get(server: MetricsServer, path: str, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(*place(server), timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path)
        response = connection.getresponse()
        return response, response.read()


def say(server: MetricsServer, words: bytes) -> bytes:
    """All that comes back when these bytes are said, and no more."""
    with socket.create_connection(place(server), 10) as visitor:
        with contextlib.suppress(OSError):
            visitor.sendall(words)
            visitor.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while got := visitor.recv(65536):
                answer += got
        return answer


@pytest.mark.parametrize(
    "text, address",
    [("9100", ("127.0.0.1", 9100)), (":9100", ("127.0.0.1", 9100)), ("0.0.0.0:0", ("0.0.0.0", 0)),
     ("host.name:80", ("host.name", 80)), ("[::1]:9100", ("::1", 9100))],
)  # fmt: skip
def test_an_address_is_host_and_port(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "host", "host:", "::1:80", "1:2:3", "host:99999", "host:-1", "[::1]", "9100 "])
def test_another_address_is_refused(text: str) -> None:
    with pytest.raises(BadOption, match="address for metrics"):
        parse_address(text)


def test_an_address_in_use_is_told(server: MetricsServer) -> None:
    with pytest.raises(StorageError, match="cannot show metrics at"):
        MetricsServer(str(place(server)[1]), Metrics())


def test_prometheus_gets_text(server: MetricsServer) -> None:
    response, body = get(server, "/metrics")
    assert (response.status, response.getheader("Content-Type")) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert b'cowslice_requests_total{export="vm",command="read"} 1\n' in body


def test_the_page_gets_its_state(server: MetricsServer, disk: cowslice.Image) -> None:
    response, body = get(server, "/state.json?x=1")
    told = json.loads(body)
    (export,) = told["exports"]
    assert response.getheader("Content-Type") == "application/json"
    assert told["started"] <= told["now"]
    assert (export["name"], export["size"], export["connections"], export["requests"]["read"]) == ("vm", 4 * GIB, 1, 1)
    assert export["heat"].index(1) == HEAT // 2
    assert export["resident"][HEAT // 2] == 255
    assert export["map"]["budget"] == disk.cache.statistics()["budget"]


class Outside(HTMLParser):
    """Everything that a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "action", "srcset")]


def test_the_page_needs_nothing_from_outside(server: MetricsServer) -> None:
    response, body = get(server, "/")
    outside = Outside()
    outside.feed(body.decode())
    assert response.getheader("Content-Type") == "text/html; charset=utf-8"
    assert set(outside.found) <= {"metrics", "data:,"}
    assert not re.search(rb"https?://|@import|url\(", body)
    assert (response.getheader("Content-Security-Policy") or "").startswith("default-src 'none'")


@pytest.mark.parametrize("path", ["/", "/metrics", "/state.json"])
def test_nothing_is_kept_by_caches(server: MetricsServer, path: str) -> None:
    assert get(server, path)[0].getheader("Cache-Control") == "no-store"


@pytest.mark.parametrize("path", ["/x", "/metrics/", "//", "/../etc/passwd", "/%2e%2e/"])
def test_there_is_nothing_else(server: MetricsServer, path: str) -> None:
    assert get(server, path)[0].status == 404


@pytest.mark.parametrize("method", ["POST", "HEAD", "PUT", "OPTIONS"])
def test_only_get_is_answered(server: MetricsServer, method: str) -> None:
    response, _ = get(server, "/", method)
    assert (response.status, response.getheader("Allow")) == (405, "GET")


@pytest.mark.parametrize(
    "words", [b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/2\r\n\r\n", b"get / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00",
              b"GET " + b"/" * 8188, b"GET / /x HTTP/1.1\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n"],
)  # fmt: skip
def test_garbage_is_refused(server: MetricsServer, words: bytes) -> None:
    assert say(server, words).startswith(b"HTTP/1.1 400 ")


def test_a_flood_is_cut_off_and_the_next_visitor_answered(server: MetricsServer) -> None:
    assert len(say(server, b"GET /" + b"x" * (1 << 22))) < 1000
    assert get(server, "/metrics")[0].status == 200


@given(st.binary(max_size=300))
def test_no_request_raises(head: bytes) -> None:
    status, _, body = page.answer(Metrics(), head)
    assert status in page._STATUS
    assert body


@given(st.from_regex(rb"\A(GET|POST) /[ -~]{0,50} HTTP/1\.1\r\n\Z"))
def test_every_line_of_http_is_answered_for_its_path_alone(line: bytes) -> None:
    status, _, _ = page.answer(Metrics(), line + b"Host: evil.example\r\n\r\n")
    assert status == page.answer(Metrics(), line + b"\r\n")[0]


def test_a_visitor_who_says_nothing_is_sent_away(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PATIENCE", 0.1)
    with socket.create_connection(place(server), 10) as visitor:
        assert visitor.recv(1) == b""


def test_a_visitor_who_drips_is_sent_away_too(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PATIENCE", 0.2)
    with socket.create_connection(place(server), 10) as visitor:
        visitor.settimeout(0.02)
        end = time.monotonic() + 20
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                visitor.sendall(b"G")
                with contextlib.suppress(TimeoutError):
                    assert visitor.recv(1) == b""
                    return
    assert time.monotonic() < end


def test_a_crowd_that_only_stands_there_is_bounded(server: MetricsServer) -> None:
    with contextlib.ExitStack() as stack:
        crowd = [
            stack.enter_context(socket.create_connection(place(server), 10)) for _ in range(page.MOST_VISITORS + 8)
        ]  # fmt: skip
        crowd[-1].settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert crowd[-1].recv(1) == b""
        working = [t for t in threading.enumerate() if "process_request_thread" in t.name]
        assert len(working) <= page.MOST_VISITORS


def test_closing_leaves_no_thread_and_no_descriptor_behind(metrics: Metrics) -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with MetricsServer("127.0.0.1:0", metrics) as running, socket.create_connection(place(running)) as stalled:
        stalled.sendall(b"GET")
        get(running, "/")
        running.close()
        running.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_it_listens_on_ipv6_too(metrics: Metrics) -> None:
    try:
        running = MetricsServer("[::1]:0", metrics)
    except StorageError:
        pytest.skip("no IPv6 here")
    with running:
        assert running.url.startswith("http://[::1]:")
        assert get(running, "/metrics")[0].status == 200


# -- in a browser ------------------------------------------------------------------------------------------------------


class Busy:
    """A source that has always done more than when it was last asked."""

    def __init__(self, size: int) -> None:
        self.counters_of = Counters(size)
        self.size = size

    def counters(self) -> Any:
        for n in range(50):
            self.counters_of.note("read", n * self.size // 100, 4096, 20_000)
        return self.counters_of.counters()


def browse(url: str, *options: str) -> bytes:
    """The page as Chromium leaves it after some virtual seconds."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=6000")
    return run("chromium", *flags, *options, url, timeout=100).stdout


def part(text: str, name: str) -> str:
    found = re.search(rf'data-{name}=""[^>]*>([^<]*)<', text)
    assert found, name
    return found[1]


@needs("chromium")
def test_a_browser_shows_live_figures(disk: cowslice.Image, tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.add_export("<b>vm</b>", disk.size, disk).attach(Busy(disk.size))
    disk.read(0, 4096)
    with MetricsServer("0", metrics) as server:
        shown = browse(server.url, f"--user-data-dir={tmp_path}", "--dump-dom").decode()
    text = shown[shown.index("<main") : shown.index("<template")]
    assert part(text, "name") == "&lt;b&gt;vm&lt;/b&gt;"
    assert part(text, "about") == "4 GiB, 1 client"
    assert part(text, "rate") not in ("–", "0")
    assert part(text, "p50").startswith("≈ ")
    assert part(text, "used").endswith(" of 1 MiB")
    assert part(text, "hits") == "0 %"
    assert part(text, "forms") == "1 line slices"
    assert "9.77 % of the disk was touched" in text  # 50 cells of 512
    assert re.search(r'id="state"[^>]*>live<', shown)


def first_pixel(picture: bytes) -> tuple[int, ...]:
    """Red, green, blue of the upper left corner of a PNG: there every filter leaves the value itself."""
    content, at = b"", 8
    while at < len(picture):
        length, kind = struct.unpack(">I4s", picture[at : at + 8])
        content += picture[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    return tuple(zlib.decompress(content)[1:4])


@needs("chromium")
@pytest.mark.parametrize("scheme, width, ground", [(0, 390, (0x16, 0x16, 0x14)), (1, 1100, (0xFB, 0xFA, 0xF7))])
def test_a_browser_draws_it_dark_or_light_as_is_wanted(
    disk: cowslice.Image, tmp_path: Path, scheme: int, width: int, ground: tuple[int, ...]
) -> None:
    metrics = Metrics()
    metrics.add_export("vm", disk.size, disk).attach(Busy(disk.size))
    picture = tmp_path / "page.png"
    with MetricsServer("0", metrics) as server:
        browse(
            server.url, f"--user-data-dir={tmp_path}", f"--blink-settings=preferredColorScheme={scheme}",
            f"--window-size={width},900", f"--screenshot={picture}",
        )  # fmt: skip
    assert first_pixel(picture.read_bytes()) == ground


Box = tuple[int, int, int, int]  # top, left, height, width


def patches(picture: Any, colour: tuple[int, int, int]) -> list[Box]:
    """Where pixels of exactly this colour hang together, from the top left on."""
    width = picture.width
    left = {at for at, pixel in enumerate(zip(*[iter(picture.tobytes())] * 3, strict=True)) if pixel == colour}
    found = []
    while left:
        patch, edge = [], [left.pop()]
        while edge:
            at = edge.pop()
            patch.append(at)
            near = {at - 1, at + 1, at - width, at + width} & left
            left -= near
            edge += near
        rows, columns = {at // width for at in patch}, {at % width for at in patch}
        found.append((min(rows), min(columns), len(rows), len(columns)))
    return sorted(found)


def numbers(cells: list[Box], height: float, width: float) -> set[int]:
    """Which cells of a disk are painted, where the first one is, and the distance of two is known."""
    top, left = cells[0][:2]
    return {round((cell[0] - top) / height) * 64 + round((cell[1] - left) / width) for cell in cells}


@needs("chromium")
def test_a_browser_draws_where_the_disk_is_read_and_where_its_map_is_in_memory(
    disk: cowslice.Image, tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    metrics = Metrics()
    meter = metrics.add_export("vm", disk.size, disk)
    meter.attach(Busy(disk.size))
    for part in (0, 5, 200, 511):
        disk.read(part * disk.size // HEAT, 512)
    with MetricsServer("0", metrics) as server:
        browse(server.url, f"--user-data-dir={tmp_path}", "--blink-settings=preferredColorScheme=1",
               "--window-size=1100,1500", f"--screenshot={tmp_path / 'page.png'}")  # fmt: skip
    picture = image.open(tmp_path / "page.png").convert("RGB")
    hot = patches(picture, (0xB5, 0x48, 0x0B))
    read = [n * HEAT // 100 for n in range(50)]
    row = [one for one in hot if one[0] == hot[0][0]]
    width = (row[-1][1] - row[0][1]) / read[len(row) - 1]
    height = (hot[-1][0] - hot[0][0]) / (read[-1] // 64)
    assert numbers(hot, height, width) == set(read)
    # Text and curves have the same blue, but not the size of a cell.
    blue = [one for one in patches(picture, (0x00, 0x72, 0xB2))
            if abs(one[2] - hot[0][2]) < 2 and abs(one[3] - hot[0][3]) < 2]
    assert numbers(blue, height, width) == {cell for cell, share in enumerate(meter.reading().resident) if share == 255}
