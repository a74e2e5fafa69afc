"""Workloads for people without a trace: what a disk would be asked, made from a name, a few numbers and a seed.

It does not know who replays them. A description and a size always give the same requests, and each chunk is made from
the seed and its own place alone, so that any number of them streams in the memory of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray

from cowslice.errors import BadOption
from cowslice.tune.requests import MOST_IN_CHUNK, Operation, Requests
from cowslice.tune.trace import RequestSource
from cowslice.units import SECTOR, GiB, KiB, parse_size

Places = NDArray[np.uint64]
Value = int | float

EXACT_RANKS = 1 << 16  # of a Zipf distribution; behind them its sum is that of an integral to ten digits
BOOT_LENGTHS = np.array([4, 4, 4, 8, 16, 16, 32, 64, 128], np.uint64) * np.uint64(KiB)
BOOT_RUN = 6  # requests in a run, on average: a file that is read from one end to the other
BOOT_AREAS = 64  # of the disk in which what a boot needs lies together
BOOT_SLOT = 64 * KiB  # between the starts of files
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing

__all__ = ["SHAPES", "synthetic"]


def synthetic(description: str, *, size: int) -> RequestSource:
    """Return the workload that `description` names, for a disk of `size` bytes.

    "zipf", or "zipf:theta=0.99,requests=1000000,seed=7,length=4k,write=0.3": a name of SHAPES, then what differs from
    its defaults. Requests lie inside the disk at multiples of their length (boot: of 4 KiB); nobody knows their times.
    Raises BadOption that lists what there is.
    """
    name, _, rest = description.partition(":")
    shape = SHAPES.get(name.strip())
    if shape is None:
        raise BadOption(f"workload is '{name}', expected one of {', '.join(SHAPES)}")
    values = {key: _KEYS[key].default for key in shape.keys} | shape.defaults
    given: set[str] = set()
    for part in rest.split(",") if rest.strip() else ():
        key, equals, text = (word.strip() for word in part.partition("="))
        if key not in shape.keys or not equals:
            raise BadOption(f"workload '{description}' has '{part.strip()}', expected {_offered(shape)}")
        if key in given:
            raise BadOption(f"workload '{description}' has '{key}' twice, expected it once")
        given.add(key)
        values[key] = _KEYS[key].parsed(text, f"{key} of workload '{description}'")
    least = int(values.get("length", BOOT_LENGTHS[-1]))
    if size < least:
        raise BadOption(f"the disk has {size} bytes, expected at least {least} for workload '{description}'")
    return Synthetic(description, shape, _Setting(size, values))


@dataclass(frozen=True, slots=True)
class _Key:
    """One number of a description."""

    default: Value
    meaning: str
    least: Value
    most: Value
    kind: str = "number"  # or "fraction", "size"

    def parsed(self, text: str, name: str) -> Value:
        """The value, in bytes for a size. Raises BadOption."""
        value = self._read(text, name)
        if value is None or not self.least <= value <= self.most:
            raise BadOption(f"{name} is '{text}', expected {self.expected}")
        if self.kind == "size" and value % SECTOR:
            raise BadOption(f"{name} is '{text}', expected a multiple of {SECTOR} bytes")
        return value

    @property
    def expected(self) -> str:
        kind = {"number": "a whole number", "fraction": "a number", "size": "a size"}[self.kind]
        return f"{kind} from {self.least} to {self.most}: {self.meaning}"

    def _read(self, text: str, name: str) -> Value | None:
        if self.kind == "size":
            return parse_size(text, name)
        try:
            return int(text) if self.kind == "number" else float(text)
        except ValueError:
            return None


_KEYS = {
    "requests": _Key(1_000_000, "how many", 1, 1 << 40),
    "seed": _Key(1, "another one gives another workload", 0, (1 << 64) - 1),
    "length": _Key(4 * KiB, "bytes of each request", SECTOR, GiB, "size"),
    "write": _Key(0.0, "the share of writes", 0, 1, "fraction"),
    "theta": _Key(0.99, "how uneven, 0 is uniform", 0, 10, "fraction"),
    "streams": _Key(1, "readers that go through a part of the disk each", 1, 1 << 16),
    "sequential": _Key(0.5, "the share of requests that go through the disk in order", 0, 1, "fraction"),
    "phases": _Key(4, "how often the working set moves, and once more", 1, 1 << 16),
    "share": _Key(0.1, "the part of the disk that is used", 1e-9, 1, "fraction"),
}


@dataclass(frozen=True)
class _Setting:
    """What a shape has to go by: the disk and the numbers of the description."""

    size: int
    values: Mapping[str, Value]

    @property
    def requests(self) -> int:
        return int(self.values["requests"])

    @property
    def length(self) -> int:
        return int(self.values["length"])

    @property
    def places(self) -> int:
        """How many requests lie side by side on the disk."""
        return self.size // self.length

    @cached_property
    def ranks(self) -> _Ranks:
        return _Ranks(self.places, self.values["theta"])

    @cached_property
    def files(self) -> _Ranks:
        """Where a boot begins to read."""
        return _Ranks(max(int(self.size * self.values["share"]) // BOOT_SLOT, 1), self.values["theta"])

    def seeded(self, *purpose: int) -> Generator:
        """A generator for one purpose; all of them are independent of each other."""
        return Generator(PCG64(SeedSequence([int(self.values["seed"]), *purpose])))


class Synthetic:
    """A workload that is made while it is read. Every pass yields the same chunks."""

    format = "synthetic"
    skipped = 0
    notes: tuple[str, ...] = ()

    def __init__(self, name: str, shape: _Shape, setting: _Setting) -> None:
        self.name = name
        self._shape = shape
        self._setting = setting

    def __iter__(self) -> Iterator[Requests]:
        """Yield chunks of MOST_IN_CHUNK requests, the last one shorter."""
        for first in range(0, self._setting.requests, MOST_IN_CHUNK):
            count = min(MOST_IN_CHUNK, self._setting.requests - first)
            random = self._setting.seeded(0, first // MOST_IN_CHUNK)
            offset, length = self._shape.made(self._setting, random, first, count)
            written = random.random(count) < self._setting.values["write"]
            operation = np.where(written, np.uint8(Operation.WRITE), np.uint8(Operation.READ))
            yield Requests(np.full(count, np.nan), operation, offset, length)


class _Ranks:
    """The numbers from 0 to `count` - 1, each as likely as 1 / (its place in a hidden order) ** theta.

    The first ranks are drawn exactly; behind them the sum is taken for the integral that it follows.
    """

    def __init__(self, count: int, theta: float) -> None:
        self.count = count
        self._theta = theta
        self._heads = np.cumsum(np.arange(1, min(count, EXACT_RANKS) + 1, dtype=np.float64) ** -theta)
        self._from = len(self._heads) + 0.5
        self._head = float(self._heads[-1])
        self._total = self._head + self._integral(count + 0.5)

    def draw(self, random: Generator, count: int) -> Places:
        """Return so many of the numbers."""
        drawn = random.random(count) * self._total
        ranks = np.searchsorted(self._heads, drawn, side="right").astype(np.uint64)
        beyond = drawn >= self._head
        ranks[beyond] = np.rint(self._inverse(drawn[beyond] - self._head)).astype(np.uint64) - np.uint64(1)
        return shuffled(np.minimum(ranks, np.uint64(self.count - 1)), self.count)

    def _integral(self, end: float) -> float:
        if self._theta == 1:
            return math.log(end / self._from)
        power = 1 - self._theta
        return float((end**power - self._from**power) / power)

    def _inverse(self, area: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where the integral from behind the exact ranks has that value."""
        if self._theta == 1:
            return self._from * np.exp(area)
        power = 1 - self._theta
        return np.asarray((area * power + self._from**power) ** (1 / power))


def shuffled(numbers: Places, count: int) -> Places:
    """Return for each of 0 to `count` - 1 another one, as if in no order, and each for one only.

    A mix of the least power of two that holds them all is walked until it is inside.
    """
    bits = max((count - 1).bit_length(), 2)
    mask, half = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)
    result = numbers.copy()
    outside = np.ones(len(numbers), bool)
    while outside.any():
        walked = result[outside]
        for _ in range(2):
            walked = (walked * MIX) & mask
            walked ^= walked >> half
        result[outside] = walked
        outside = result >= count
    return result


# -- shapes: (setting, random, first, count) to where the requests from number `first` on are


def _uniform(setting: _Setting, random: Generator, first: int, count: int) -> Places:
    return random.integers(0, setting.places, count, dtype=np.uint64)


def _zipf(setting: _Setting, random: Generator, first: int, count: int) -> Places:
    return setting.ranks.draw(random, count)


def _sequential(setting: _Setting, random: Generator, first: int, count: int) -> Places:
    """The streams take turns; each begins again when it has gone through its part."""
    streams = min(int(setting.values["streams"]), setting.places)
    number = np.arange(first, first + count, dtype=np.uint64)
    part = np.uint64(setting.places // streams)
    return number % np.uint64(streams) * part + number // np.uint64(streams) % part


def _mixed(setting: _Setting, random: Generator, first: int, count: int) -> Places:
    """One reader in order, which the others let in evenly, so that no chunk needs to know how far it came before."""
    share = setting.values["sequential"]
    passed = np.floor(np.arange(first, first + count + 1) * share).astype(np.uint64)
    ordered = passed[1:] > passed[:-1]
    return np.where(ordered, passed[:-1] % np.uint64(setting.places), setting.ranks.draw(random, count))


def _phases(setting: _Setting, random: Generator, first: int, count: int) -> Places:
    """A window in which every place is as likely, and which jumps between phases of equal length."""
    phases = min(int(setting.values["phases"]), setting.requests)
    window = max(int(setting.places * setting.values["share"]), 1)
    starts = setting.seeded(1).integers(0, setting.places - window + 1, phases, dtype=np.uint64)
    phase = np.arange(first, first + count) * phases // setting.requests
    return starts[phase] + random.integers(0, window, count, dtype=np.uint64)


def _boot(setting: _Setting, random: Generator, first: int, count: int) -> tuple[Places, Places]:
    """Runs through files of several areas of the disk, some files again and again; requests grow along a run."""
    begins = random.random(count) < 1 / BOOT_RUN
    begins[0] = True
    run = np.cumsum(begins) - 1
    length = random.choice(BOOT_LENGTHS, count)
    before = np.cumsum(length, dtype=np.uint64) - length
    within = before - before[begins][run]
    slots = setting.files.draw(random, int(run[-1]) + 1)
    in_area = -(-setting.files.count // BOOT_AREAS)
    area, slot = slots // np.uint64(in_area), slots % np.uint64(in_area)
    room = max(setting.size - in_area * BOOT_SLOT, 0) // BOOT_SLOT
    areas = np.sort(setting.seeded(1).integers(0, room + 1, BOOT_AREAS, dtype=np.uint64))
    start = (areas[area] + slot) * np.uint64(BOOT_SLOT)
    last = (np.uint64(setting.size) - length) // np.uint64(4 * KiB) * np.uint64(4 * KiB)
    return np.minimum(start[run] + within, last), length


def _of_one_length(
    places: Callable[[_Setting, Generator, int, int], Places],
) -> Callable[[_Setting, Generator, int, int], tuple[Places, Places]]:
    def made(setting: _Setting, random: Generator, first: int, count: int) -> tuple[Places, Places]:
        length = np.uint64(setting.length)
        return places(setting, random, first, count) * length, np.full(count, length)

    return made


@dataclass(frozen=True, slots=True)
class _Shape:
    """A kind of workload: the keys that it takes, which defaults are its own, and what makes its requests."""

    meaning: str
    keys: tuple[str, ...]
    defaults: dict[str, Any]
    made: Callable[[_Setting, Generator, int, int], tuple[Places, Places]]


_COMMON = ("requests", "seed", "length", "write")
SHAPES: dict[str, _Shape] = {
    "uniform": _Shape("every place is as likely", _COMMON, {}, _of_one_length(_uniform)),
    "zipf": _Shape("some places are asked far more often", (*_COMMON, "theta"), {}, _of_one_length(_zipf)),
    "sequential": _Shape("in order, again and again", (*_COMMON, "streams"), {}, _of_one_length(_sequential)),
    "mixed": _Shape("zipf, and a reader in order between", (*_COMMON, "theta", "sequential"), {"write": 0.3},
                    _of_one_length(_mixed)),
    "phases": _Shape("a working set that moves", (*_COMMON, "phases", "share"), {}, _of_one_length(_phases)),
    "boot": _Shape("runs through files, 4 KiB to 128 KiB at once", ("requests", "seed", "write", "theta", "share"),
                   {"requests": 50_000, "write": 0.05, "theta": 0.6, "share": 0.05}, _boot),
}


def _offered(shape: _Shape) -> str:
    return "KEY=VALUE with one of " + ", ".join(f"{key} ({_KEYS[key].meaning})" for key in shape.keys)
