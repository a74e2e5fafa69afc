"""The load of one connection against servers that answer in every legal way, and in many illegal ones."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowslice.errors import BadOption, CowsliceError, RemoteProtocolError, StorageError
from cowslice.nbd.wire import COMPACT_REQUEST, SIMPLE_REPLY, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY
from cowslice.nbd.wire import STRUCTURED_REPLY_MAGIC as CHUNK_MAGIC
from cowslice.ops.bench.nbdload import LATENCY_BUCKETS, Load, latency_floor

DISK = random.Random(1).randbytes(1 << 16)
READ, WRITE = 0, 1
NONE, DATA, HOLE, ERROR, ERROR_OFFSET = 0, 1, 2, 0x8001, 0x8002


@dataclass(frozen=True)
class Asked:
    command: int
    cookie: int
    offset: int
    length: int
    payload: bytes = b""


Answer = Callable[[Asked], bytes]


def simple(asked: Asked, error: int = 0, disk: bytes = DISK) -> bytes:
    data = disk[asked.offset : asked.offset + asked.length] if asked.command == READ and not error else b""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, asked.cookie) + data


def chunk(asked: Asked, kind: int, payload: bytes = b"", *, last: bool = True) -> bytes:
    return STRUCTURED_REPLY.pack(CHUNK_MAGIC, last, kind, asked.cookie, len(payload)) + payload


def data(asked: Asked, start: int, end: int, *, last: bool = True) -> bytes:
    at = asked.offset + start
    return chunk(asked, DATA, struct.pack(">Q", at) + DISK[at : asked.offset + end], last=last)


def hole(asked: Asked, start: int, length: int, *, last: bool = True) -> bytes:
    return chunk(asked, HOLE, struct.pack(">QI", asked.offset + start, length), last=last)


@contextlib.contextmanager
def server(answer: Answer, *, window: int = 1, pieces: Callable[[bytes], list[bytes]] | None = None) -> Iterator[int]:
    """A descriptor behind which every `window` requests are answered together, last one first, cut into `pieces`."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs, contextlib.suppress(OSError):
            file = theirs.makefile("rb")
            held: list[Asked] = []
            while (header := file.read(28)) and len(header) == 28:
                _, _, command, cookie, offset, length = COMPACT_REQUEST.unpack(header)
                held.append(Asked(command, cookie, offset, length, file.read(length) if command == WRITE else b""))
                if len(held) == window:
                    replies = b"".join(answer(asked) for asked in reversed(held))
                    held.clear()
                    for piece in pieces(replies) if pieces else [replies]:
                        theirs.sendall(piece)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield ours.fileno()
    finally:
        ours.close()
        thread.join()


def load(descriptor: int, **options: Any) -> Load:
    chosen: dict[str, Any] = {"start": 0, "span": len(DISK), "length": 512, "depth": 1, "count": 20}
    return Load(descriptor, **(chosen | options))


def outcome(answer: Answer, **options: Any) -> dict[str, Any]:
    """Counters of a load that ends well."""
    with server(answer) as descriptor:
        one = load(descriptor, **options)
        one.run()
        return one.counters()


def fault(answer: Answer, **options: Any) -> str:
    with server(answer) as descriptor, pytest.raises(RemoteProtocolError) as caught:
        load(descriptor, **options).run()
    return str(caught.value)


def in_three(asked: Asked) -> bytes:
    """Data, a hole and data, the end first."""
    third = asked.length // 3
    return (
        data(asked, 2 * third, asked.length, last=False) + hole(asked, third, third, last=False) + data(asked, 0, third)
    )  # fmt: skip


def test_every_request_is_answered_once() -> None:
    counters = outcome(simple, count=50)
    assert (counters["requests"], counters["errors"], counters["bytes"]) == (50, 0, 50 * 512)
    assert sum(counters["latencies"]) == 50
    assert 0 < counters["busy"] <= counters["elapsed"]


@pytest.mark.parametrize("depth", [2, 7, 32])
def test_replies_may_come_in_any_order(depth: int) -> None:
    with server(simple, window=depth) as descriptor:
        one = load(descriptor, depth=depth, count=depth * 5, content=DISK)
        one.run()
    assert one.counters()["requests"] == depth * 5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=8), st.booleans())
def test_replies_may_be_cut_anywhere(sizes: list[int], structured: bool) -> None:
    def pieces(replies: bytes) -> list[bytes]:
        cuts, at, turn = [], 0, 0
        while at < len(replies):
            cuts.append(replies[at : at + sizes[turn % len(sizes)]])
            at += len(cuts[-1])
            turn += 1
        return cuts

    def answer(asked: Asked) -> bytes:
        return data(asked, 0, 100, last=False) + data(asked, 100, 512) if structured else simple(asked)

    with server(answer, window=4, pieces=pieces) as descriptor:
        one = load(descriptor, depth=4, count=8, structured=structured, content=DISK)
        one.run()
    assert one.counters()["requests"] == 8


def test_a_reply_may_come_byte_by_byte() -> None:
    with server(in_three, pieces=lambda replies: [replies[n : n + 1] for n in range(len(replies))]) as descriptor:
        load(descriptor, count=3, structured=True).run()


def test_a_reply_may_end_with_an_empty_chunk() -> None:
    counters = outcome(lambda asked: data(asked, 0, 512, last=False) + chunk(asked, NONE), structured=True)
    assert counters["requests"] == 20


def test_content_is_compared() -> None:
    def lie(asked: Asked) -> bytes:
        good = simple(asked)
        return good[:-1] + bytes([good[-1] ^ 1]) if asked.offset == 1024 else good

    with server(lie) as descriptor, pytest.raises(StorageError, match="read at offset 1024"):
        load(descriptor, step=512, content=DISK).run()


@pytest.mark.parametrize("start, wrong", [(0, False), (512, True)])
def test_a_hole_must_be_expected_to_be_zero(start: int, wrong: bool) -> None:
    disk = bytes(512) + b"x" * 512
    with server(lambda asked: hole(asked, 0, 512)) as descriptor:
        one = load(descriptor, start=start, span=512, structured=True, content=disk)
        if not wrong:
            one.run()
            return
        with pytest.raises(StorageError, match="offset 512"):
            one.run()


@pytest.mark.parametrize(
    "answer, structured",
    [
        (lambda asked: simple(asked, error=5), False),
        (lambda asked: chunk(asked, ERROR, struct.pack(">IH", 5, 3) + b"why"), True),
        (lambda asked: chunk(asked, ERROR_OFFSET, struct.pack(">IHQ", 5, 0, asked.offset)), True),
        (lambda asked: chunk(asked, 0x8077, struct.pack(">IH", 5, 0)), True),
        (lambda asked: data(asked, 0, 9, last=False) + chunk(asked, ERROR, struct.pack(">IH", 5, 0)), True),
    ],
    ids=["simple", "structured", "with an offset", "unknown", "after data"],
)
def test_error_replies_are_counted_and_the_load_goes_on(answer: Answer, structured: bool) -> None:
    counters = outcome(answer, structured=structured, count=5)
    assert (counters["requests"], counters["errors"], counters["first_error"], counters["bytes"]) == (5, 5, 5, 0)


GARBAGE = {
    "no magic": (lambda asked: b"garbage!" * 100, "begins"),
    "a chunk where none was agreed": (lambda asked: data(asked, 0, 512), "begins"),
    "another cookie": (lambda asked: simple(Asked(READ, asked.cookie + 1, 0, 512)), "not under way"),
    "a cookie of before": (lambda asked: simple(Asked(READ, asked.cookie - (1 << 16), 0, 512)), "not under way"),
    "a huge cookie": (lambda asked: simple(Asked(READ, (1 << 64) - 1, 0, 512)), "not under way"),
    "two answers": (lambda asked: simple(asked) * 2, "not under way"),
}
BAD_CHUNKS = {
    "a simple reply": (simple, "simple reply"),
    "too few bytes": (lambda asked: data(asked, 0, 511), "ended before"),
    "nothing": (lambda asked: chunk(asked, NONE), "ended before"),
    "too many bytes": (lambda asked: data(asked, 0, 512, last=False) + data(asked, 0, 1), "outside"),
    "bytes behind": (lambda asked: data(asked, 500, 513), "outside"),
    "bytes before": (lambda asked: chunk(asked, DATA, struct.pack(">Q", asked.offset - 1) + b"x"), "outside"),
    "far away": (lambda asked: chunk(asked, DATA, struct.pack(">Q", 1 << 63) + b"x"), "outside"),
    "no bytes": (lambda asked: chunk(asked, DATA, struct.pack(">Q", asked.offset)), "brings nothing"),
    "a huge hole": (lambda asked: hole(asked, 0, (1 << 32) - 1), "outside"),
    "an empty hole": (lambda asked: hole(asked, 0, 0), "brings nothing"),
    "a long hole": (lambda asked: chunk(asked, HOLE, bytes(13)), "impossible size"),
    "half an offset": (lambda asked: chunk(asked, DATA, b"xxx"), "impossible size"),
    "an error of none": (lambda asked: chunk(asked, ERROR, struct.pack(">IH", 0, 0)), "without an error"),
    "a long error": (lambda asked: chunk(asked, ERROR, struct.pack(">IH", 5, 0) + bytes(9000)), "too long"),
    "a status": (lambda asked: chunk(asked, 5, bytes(12)), "nothing that was asked"),
    "payload in an end": (lambda asked: chunk(asked, NONE, b"x"), "impossible size"),
}


@pytest.mark.parametrize("answer, word", GARBAGE.values(), ids=GARBAGE)
def test_garbage_ends_a_simple_session(answer: Answer, word: str) -> None:
    assert word in fault(answer, start=512, span=512)


@pytest.mark.parametrize("answer, word", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_garbage_ends_a_structured_session(answer: Answer, word: str) -> None:
    assert word in fault(answer, start=512, span=512, structured=True)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.booleans(), st.integers(0, 200))
def test_no_bytes_do_harm(noise: bytes, structured: bool, at: int) -> None:
    """A sound reply, spoiled from some byte on, and then the connection ends."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        one = load(ours.fileno(), count=1, structured=structured, content=DISK, span=64, length=64)
        asked = Asked(READ, 1 << 16, 0, 64)
        sound = data(asked, 0, 64) if structured else simple(asked)
        theirs.sendall(sound[:at] + noise)
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(CowsliceError):
            one.run()
        assert one.counters()["requests"] <= 1


def test_a_server_that_leaves_is_told() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        with pytest.raises(StorageError, match="closed the connection with 1 requests unanswered"):
            load(ours.fileno()).run()


def test_a_walk_goes_by_its_step_and_round() -> None:
    places: list[int] = []

    def answer(asked: Asked) -> bytes:
        places.append(asked.offset)
        return simple(asked)

    outcome(answer, start=1024, span=4 * 512 + 100, step=3 * 512, first=512, count=6)
    assert places == [1024 + n * 512 for n in (1, 0, 3, 2, 1, 0)]


def test_a_step_of_the_whole_span_stays_where_it_is() -> None:
    places: set[int] = set()
    outcome(lambda asked: (places.add(asked.offset), simple(asked))[1], step=len(DISK), count=5)
    assert places == {0}


def test_random_places_are_whole_requests_all_over_the_span_and_the_same_for_a_seed() -> None:
    runs: list[list[int]] = []
    for seed in (3, 3, 4):
        places: list[int] = []
        outcome(lambda asked, p=places: (p.append(asked.offset), simple(asked))[1], seed=seed, count=600)  # type: ignore[misc]
        runs.append(places)
    assert runs[0] == runs[1] != runs[2]
    assert all(place % 512 == 0 for place in runs[0])
    assert {place // 512 for place in runs[0]} > set(range(10))
    assert max(runs[0]) < len(DISK)
    assert len(set(runs[0])) > 100  # of 128


def test_a_part_of_the_requests_write_what_the_disk_should_hold() -> None:
    seen: list[Asked] = []
    counters = outcome(
        lambda asked: (seen.append(asked), simple(asked))[1], count=400, write_percent=30, content=DISK
    )  # fmt: skip
    writes = [asked for asked in seen if asked.command == WRITE]
    assert len(writes) == counters["writes"]
    assert 60 < len(writes) < 180
    assert all(asked.payload == DISK[asked.offset : asked.offset + 512] for asked in writes)


def test_large_writes_do_not_lock_up_with_a_server_that_answers_meanwhile() -> None:
    """Reads and writes of more than the sockets hold, both ways at once."""
    size = 1 << 20
    disk = bytes(size)

    def answer(asked: Asked) -> bytes:
        return simple(asked, disk=disk)

    counters = outcome(answer, span=size, length=size, depth=8, count=24, write_percent=50)
    assert counters["requests"] == 24


def test_time_ends_a_load() -> None:
    counters = outcome(simple, count=0, seconds=0.05)
    assert counters["requests"] > 0
    assert counters["elapsed"] >= 50_000_000


def test_a_load_can_be_stopped_while_nobody_answers() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        one = load(ours.fileno())
        timer = threading.Timer(0.05, one.stop)
        timer.start()
        one.run()
        timer.join()
    assert one.counters()["requests"] == 0


@pytest.mark.parametrize(
    "options",
    [{"depth": 0}, {"depth": 5000}, {"length": 0}, {"span": 100}, {"write_percent": 101}, {"count": 0},
     {"content": DISK[:100]}],
)  # fmt: skip
def test_an_impossible_load_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        load(0, **options)


@given(st.integers(0, LATENCY_BUCKETS - 2))
def test_a_bucket_is_at_most_three_per_cent_wide(bucket: int) -> None:
    low, high = latency_floor(bucket), latency_floor(bucket + 1)
    assert low < high
    assert high - low <= max(1, low / 31)
