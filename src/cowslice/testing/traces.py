"""Lists of requests written as each trace format has them, in a few obvious lines.

It knows nothing of readers: tests hold them to what is written here. Times are microseconds from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from cowslice.image.capture import END, HEADER, KIND_BITS, LONG, LOST, MAGIC, MARK, RECORD, TIME, VERSION
from cowslice.tune.requests import Operation, Requests

READ, WRITE, FLUSH, DISCARD, ZERO = Operation
EPOCH = 1_577_808_000  # when traces with absolute times begin, in seconds since 1970


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: `time` in microseconds, `offset` and `length` in bytes."""

    time: int
    operation: Operation
    offset: int
    length: int


def rows(chunks: Iterable[Requests]) -> list[tuple[float, int, int, int]]:
    """All requests of a trace as (seconds, operation, offset, length)."""
    return [
        row for chunk in chunks
        for row in zip(chunk.time.tolist(), chunk.operation.tolist(), chunk.offset.tolist(), chunk.length.tolist(),
                       strict=True)
    ]  # fmt: skip


@st.composite
def asked_lists(
    draw: st.DrawFn, *, operations: Sequence[Operation] = tuple(Operation), unit: int = 1, tick: int = 1
) -> list[Asked]:
    """Requests in order of time, which begins at 0; offsets and lengths are multiples of `unit`, times of `tick`."""
    steps = draw(st.lists(st.integers(0, 5_000_000), min_size=1, max_size=40))
    asked, now = [], 0
    for number, step in enumerate(steps):
        now += step // tick * tick if number else 0
        operation = draw(st.sampled_from(operations))
        length = 0 if operation is FLUSH else unit * draw(st.integers(1, (1 << 40) // unit))
        most = ((1 << 61) - length) // unit
        offset = 0 if operation is FLUSH else unit * draw(st.integers(0, most) | st.integers(0, min(most, 1 << 20)))
        asked.append(Asked(now, operation, offset, length))
    return asked


def fio_lines(asked: Iterable[Asked], version: int, file: str = "disk.img") -> str:
    names = {READ: "read", WRITE: "write", FLUSH: "sync", DISCARD: "trim"}
    lines = [f"fio version {version} iolog"]
    lines += [f"{'0 ' if version == 3 else ''}{file} {action}" for action in ("add", "open")]
    now = 0
    for one in asked:
        if version == 2:
            lines.append(f"{file} wait {one.time - now} 0")
            now = one.time
        stamp = f"{one.time} " if version == 3 else ""
        lines.append(f"{stamp}{file} {names[one.operation]} {one.offset} {one.length}")
    return "\n".join([*lines, f"{f'{now} ' if version == 3 else ''}{file} close", ""])


def msr_lines(asked: Iterable[Asked], disk: str = "hm_0") -> str:
    host, number = disk.split("_")
    names = {READ: "Read", WRITE: "Write"}
    begun = (EPOCH + 11_644_473_600) * 10_000_000
    return "".join(
        f"{begun + one.time * 10},{host},{number},{names[one.operation]},{one.offset},{one.length},1331\n"
        for one in asked)


def alibaba_lines(asked: Iterable[Asked], disk: str = "419") -> str:
    names = {READ: "R", WRITE: "W"}
    return "".join(
        f"{disk},{names[one.operation]},{one.offset},{one.length},{EPOCH * 1_000_000 + one.time}\n" for one in asked)


def tencent_lines(asked: Iterable[Asked], disk: str = "1063") -> str:
    return "".join(
        f"{EPOCH + one.time // 1_000_000},{one.offset // 512},{one.length // 512},{one.operation:d},{disk}\n"
        for one in asked)


def blkparse_lines(asked: Iterable[Asked], disk: str = "8,0", action: str = "D") -> str:
    """With the other events of each request, and with the counts at the end."""
    letters = {READ: "RS", WRITE: "WS", FLUSH: "FN", DISCARD: "D"}
    lines = ["Input file sda.blktrace.0 added"]
    for number, one in enumerate(asked):
        where = "[kworker/0:1H]" if one.operation is FLUSH else f"{one.offset // 512} + {one.length // 512} [fio]"
        now = f"{one.time // 1_000_000:5}.{one.time % 1_000_000 * 1000:09}"
        events = ("Q", "G", action, "C") if action == "D" else (action, "C")
        lines += [f"{disk:>5} {3:2} {number + 1:8} {now} {697:5} {event:>2} {letters[one.operation]:>3} {where}"
                  for event in events]
        lines.append(f"{disk:>5} {3:2} {0:8} {now} {0:5}  m   N cfq x")
    return "\n".join([*lines, f"CPU0 ({disk}):", " Reads Queued:           1,        4KiB", f"Total ({disk}):",
                      "Throughput (R/W): 1KiB/s / 0KiB/s", f"Events ({disk}): 7 entries", "Skips: 0 forward (0)", ""])


def qemu_lines(asked: Iterable[Asked], *, stamped: bool = True, virtio: bool = False, disk: str = "0x55d0c0de") -> str:
    lines = ["char device redirected to /dev/pts/1 (label serial0)"]
    for one in asked:
        word = "read" if one.operation is READ else "write"
        stamp = f"71@{EPOCH + one.time // 1_000_000}.{one.time % 1_000_000:06}:" if stamped else ""
        if virtio:
            lines.append(f"{stamp}virtio_blk_handle_{word} vdev {disk} req 0x7f sector {one.offset // 512} "
                         f"nsectors {one.length // 512}")
        else:
            call = "preadv" if one.operation is READ else "pwritev"
            lines.append(f"{stamp}blk_co_{call} blk {disk} bs 0x55d0beef offset {one.offset} bytes {one.length} "
                         f"flags {'0x6' if one.operation is ZERO else '0x0'}")
        lines.append(f"{stamp}blk_root_attach child 0x1 blk {disk} bs 0x55d0beef")
    return "\n".join([*lines, ""])


def capture_bytes(asked: Iterable[Asked], *, ended: bool = True, lost: int = 0) -> bytes:
    """The binary capture, from its description."""
    out = [HEADER.pack(MAGIC, VERSION, HEADER.size, 1 << 40, EPOCH * 1_000_000)]
    before = count = 0
    if lost:
        out.append(_record(lost, MARK, LOST, 0))
    for one in asked:
        if abs(one.time - before) >= 1 << 31:
            out.append(_record(one.time, TIME, 0, one.time))
        if one.length >> 32:
            out.append(_record(one.length >> 32, LONG, 0, one.time))
        out.append(_record(one.offset, one.operation, one.length & 0xFFFFFFFF, one.time))
        before = one.time
        count += 1
    return b"".join([*out, _record(count, MARK, END, before)] if ended else out)


def _record(value: int, kind: int, length: int, time: int) -> bytes:
    return RECORD.pack(value << KIND_BITS | kind, length, time & 0xFFFFFFFF)


# How each text format writes requests; what it can say: operations, unit of bytes, unit of time (None: it has none).
WRITERS: dict[str, tuple[Callable[[list[Asked]], str], Sequence[Operation], int, int | None]] = {
    "fio2": (lambda asked: fio_lines(asked, 2), (READ, WRITE, FLUSH, DISCARD), 1, 1),
    "fio3": (lambda asked: fio_lines(asked, 3), (READ, WRITE, FLUSH, DISCARD), 1, 1),
    "msr": (msr_lines, (READ, WRITE), 1, 1),
    "alibaba": (alibaba_lines, (READ, WRITE), 1, 1),
    "tencent": (tencent_lines, (READ, WRITE), 512, 1_000_000),
    "blkparse": (blkparse_lines, (READ, WRITE, FLUSH, DISCARD), 512, 1),
    "qemu": (qemu_lines, (READ, WRITE, ZERO), 1, 1),
    "qemu without times": (lambda asked: qemu_lines(asked, stamped=False), (READ, WRITE, ZERO), 1, None),
    "qemu virtio": (lambda asked: qemu_lines(asked, virtio=True), (READ, WRITE), 512, 1),
}
