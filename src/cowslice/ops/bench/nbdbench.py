"""How fast an NBD server answers: a load on one export over several connections, and what came of it.

It knows neither terminals nor who serves. What must hold: the generator is never the narrow place, and where it could
be (`busy` near 1) the result says so.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from cowslice.errors import BadOption, CowsliceError, InternalError, StorageError
from cowslice.nbd import Session
from cowslice.nbd.wire import ExportFlag, Mode
from cowslice.ops.bench.nbdconnect import connect, disconnect
from cowslice.ops.bench.nbdload import LATENCY_BUCKETS, MOST_DEPTH, Load, latency_floor

MOST_CONNECTIONS = 256
PERCENTILES = (50.0, 90.0, 99.0, 99.9, 99.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Requests of `length` bytes, `depth` under way on each connection, for `seconds` or until `count` are answered.

    At random, or `step` bytes apart, in `span` bytes (0: to the end) from `offset`. `writes` per cent of them write.
    `content` names a raw file that holds what the disk should hold: answers are compared with it, and it is written.
    """

    connections: int = 1
    depth: int = 32
    length: int = 4096
    step: int = 0
    offset: int = 0
    span: int = 0
    writes: int = 0
    count: int = 0
    seconds: float = 0.0
    seed: int = 0
    structured: bool = True
    content: str | None = None

    def __post_init__(self) -> None:
        most = {"connections": MOST_CONNECTIONS, "depth": MOST_DEPTH, "length": 1 << 25, "writes": 100}
        for name in ("connections", "depth", "length", "step", "offset", "span", "writes", "count", "seconds"):
            value, least = getattr(self, name), name in ("connections", "depth", "length")
            if not least <= value <= most.get(name, 1 << 62):
                raise BadOption(f"{name} is {value}, expected {int(least)} to {most.get(name, 1 << 62)}")
        if not self.count and not self.seconds:
            raise BadOption("neither count nor seconds is given, expected one of them to end the load")


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What all connections together did in `seconds`. `busy` is the part of them that the busiest thread computed.

    `latencies` counts requests by bucket; `latency_floor` of nbdload says where each begins.
    """

    seconds: float
    requests: int
    writes: int
    errors: int
    first_error: int
    bytes: int
    busy: float
    mode: str
    latencies: tuple[int, ...]

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds

    def percentile(self, percent: float) -> float:
        """The latency in seconds that so many per cent of the requests did not exceed, within 3 %; 0 without any."""
        wanted = percent / 100 * self.requests
        for bucket, seen in enumerate(accumulate(self.latencies)):
            if seen and seen >= wanted:
                return (latency_floor(bucket) + latency_floor(bucket + 1)) / 2e9
        return 0.0

    def as_json(self) -> dict[str, Any]:
        shown = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "latencies"}
        latency = {f"p{percent:g}": self.percentile(percent) for percent in PERCENTILES}
        return {**shown, "rate": self.rate, "latency": latency}


def run_load(uri: str, options: LoadOptions) -> LoadResult:
    """Connect, run the load to its end, disconnect. Raises BadOption, StorageError, RemoteProtocolError."""
    with ExitStack() as stack:
        content = _mapped(options.content) if options.content else None
        loads = []
        connections = min(options.connections, options.count or options.connections)
        for number in range(connections):
            channel, session = connect(uri, structured=options.structured)
            stack.callback(disconnect, channel)
            check_against(session, options)
            loads.append(_load(channel.fileno(), session, options, number, connections, content))
        _run_together(loads)
        return _sum([load.counters() for load in loads], session.mode)


def check_against(session: Session, options: LoadOptions) -> None:
    """Raise BadOption where the export cannot take such requests."""
    least, most = session.block_sizes.minimum, session.block_sizes.maximum
    for name in ("length", "step", "offset"):
        value = getattr(options, name)
        if value % least:
            raise BadOption(f"{name} is {value}, expected a multiple of {least}, the export's block size")
    if options.length > most:
        raise BadOption(f"length is {options.length}, expected up to {most}, the export's largest request")
    if options.offset + max(options.span, options.length) > session.size:
        raise BadOption(
            f"requests of {options.length} bytes in {options.span} from {options.offset} reach past the end of the "
            f"export of {session.size} bytes"
        )
    if options.writes and session.flags & ExportFlag.READ_ONLY:
        raise BadOption(f"{options.writes}% writes are wanted, but the export is read-only")


def _load(
    descriptor: int, session: Session, options: LoadOptions, number: int, connections: int, content: mmap.mmap | None
) -> Load:
    """Connection `number` of `connections`. Walks take turns: together they are one walk."""
    share, rest = divmod(options.count, connections)
    return Load(
        descriptor,
        start=options.offset,
        span=options.span or session.size - options.offset,
        length=options.length,
        depth=options.depth,
        first=number * options.step,
        step=connections * options.step,
        seed=(options.seed << 16) + number,
        write_percent=options.writes,
        count=share + (number < rest) if options.count else 0,
        seconds=options.seconds,
        structured=session.mode is not Mode.SIMPLE,
        content=content,
    )


def _mapped(path: str) -> mmap.mmap:
    """The bytes of a file. They are not closed: the loads look at them until they are gone themselves."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read '{path}' to compare with: {error}", filename=path) from error


def _run_together(loads: Sequence[Load]) -> None:
    """A thread for each. The first failure, or an interrupt, ends all."""
    faults: list[BaseException] = []

    def work(load: Load) -> None:
        try:
            load.run()
        except BaseException as fault:
            faults.append(fault)
            for other in loads:
                other.stop()

    threads = [threading.Thread(target=work, args=(load,), name="cowslice-load") for load in loads]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        for load in loads:
            load.stop()
        for thread in threads:  # before anybody closes the sockets
            if thread.ident is not None:
                thread.join()
        raise
    if faults:
        raise faults[0] if isinstance(faults[0], CowsliceError) else InternalError(f"a load ended: {faults[0]!r}")


def _sum(counters: Sequence[dict[str, Any]], mode: Mode) -> LoadResult:
    latencies = [0] * LATENCY_BUCKETS
    for one in counters:
        for bucket, value in enumerate(one["latencies"]):
            latencies[bucket] += value
    total = {name: sum(one[name] for one in counters) for name in ("requests", "writes", "errors", "bytes")}
    return LoadResult(
        seconds=max(max(one["elapsed"] for one in counters), 1) / 1e9,
        first_error=next((one["first_error"] for one in counters if one["first_error"]), 0),
        busy=max(one["busy"] / max(one["elapsed"], 1) for one in counters),
        mode=mode.name.lower(),
        latencies=tuple(latencies),
        **total,
    )
