"""One memory budget for several disks: from what each could get to the settings that `budget` picks, in both engines.

It knows no terminal. A cost is seconds of work that a disk's requests cause; where all traces know their times, busier
disks weigh more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cowslice.cache.sizes import MIN_L2_ENTRIES
from cowslice.tune.advise import Choice
from cowslice.tune.budget import Offer, share
from cowslice.tune.digest import Digest
from cowslice.tune.paste import Pastes, pastes
from cowslice.tune.wording import choice_json, duration
from cowslice.units import KiB, format_size, round_up


@dataclass(frozen=True, slots=True)
class Part:
    """What one disk gets of the budget, if QEMU runs it and if cowslice does. `weight` is its share of all requests."""

    disk: Digest
    weight: float
    qemu: Choice
    ours: Choice

    def pastes(self) -> Pastes:
        """The part in each program's words."""
        return pastes(self.disk.path, self.disk.geometry, qemu=(self.qemu.cache_bytes, self.qemu.entry_bytes),
                      ours=self.ours.cache_bytes, full_coverage=self.disk.full_coverage)


@dataclass(frozen=True, slots=True)
class Division:
    """All parts, in the order of the disks. `weighted` says whether busier disks weigh more."""

    budget: int
    parts: tuple[Part, ...]
    weighted: bool

    def mean_seconds(self, choice: Callable[[Part], Choice]) -> float:
        """Seconds of work that a request causes, on average over all disks, at that choice of each."""
        return sum(part.weight / choice(part).rate for part in self.parts)


def divide(disks: Sequence[Digest], budget: int) -> Division:
    """Share `budget` bytes among disks. Raises BadOption where it is less than what they need to work at all."""
    shares, weighted = weights(disks)
    qemu = _shared([_qemu_choices(disk) for disk in disks], shares, budget)
    ours = _shared([_our_choices(disk) for disk in disks], shares, budget)
    parts = tuple(Part(*each) for each in zip(disks, shares, qemu, ours, strict=True))
    return Division(budget, parts, weighted)


def weights(disks: Sequence[Digest]) -> tuple[list[float], bool]:
    """The share of all requests that each disk has, and whether that is known; else all weigh the same."""
    known = [disk.arrivals for disk in disks if disk.arrivals is not None]
    if len(known) < len(disks):
        return [1 / len(disks)] * len(disks), False
    return [rate / sum(known) for rate in known], True


def division_json(division: Division) -> dict[str, Any]:
    """The division for scripts: bytes, rates per second, seconds of work per request."""
    return {
        "bytes": division.budget, "busier-disks-weigh-more": division.weighted,
        "seconds-per-request": {"today": division.mean_seconds(lambda part: part.disk.qemu_today),
                                "qemu": division.mean_seconds(lambda part: part.qemu),
                                "cowslice": division.mean_seconds(lambda part: part.ours)},
        "disks": [{"image": part.disk.path, "weight": part.weight, "qemu": choice_json(part.qemu),
                   "cowslice": choice_json(part.ours),
                   "paste": {"drive": part.pastes().drive, "cowslice": part.pastes().cowslice}}
                  for part in division.parts],
    }  # fmt: skip


def division_sentences(division: Division) -> tuple[str, ...]:
    """What sharing gives: seconds of work per request with each engine, beside today's."""
    today = duration(division.mean_seconds(lambda part: part.disk.qemu_today))
    spent = format_size(sum(part.disk.qemu_today.cache_bytes for part in division.parts))
    told = ", ".join(f"{duration(division.mean_seconds(at))} with {name} "
                     f"({format_size(sum(at(part).cache_bytes for part in division.parts))} used)"
                     for name, at in _ENGINES)
    said = [f"A request takes {told} on average, of all disks; today {today} with {spent}."]
    if not division.weighted:
        said.append("Not every trace knows its times, so all disks weigh the same.")
    return tuple(said)


_ENGINES: tuple[tuple[str, Callable[[Part], Choice]], ...] = (
    ("QEMU", lambda part: part.qemu), ("cowslice", lambda part: part.ours))


def _shared(disks: Sequence[Iterable[Choice]], shares: Sequence[float], budget: int) -> list[Choice]:
    found: list[dict[Offer, Choice]] = []
    for choices, weight in zip(disks, shares, strict=True):
        offers: dict[Offer, Choice] = {}
        for choice in choices:
            offers.setdefault(Offer(choice.cache_bytes, weight / choice.rate), choice)
        found.append(offers)
    chosen = share([list(offers) for offers in found], budget)
    return [offers[offer] for offers, offer in zip(found, chosen, strict=True)]


def _qemu_choices(disk: Digest) -> Iterable[Choice]:
    """Settings of all entry sizes, at the whole number of entries that QEMU makes of each."""
    for line in disk.lines:
        for choice in line.choices if line.engine == "qemu" else ():
            entries = max(MIN_L2_ENTRIES, choice.cache_bytes // choice.entry_bytes)
            yield replace(choice, cache_bytes=entries * choice.entry_bytes)


def _our_choices(disk: Digest) -> Iterable[Choice]:
    for line in disk.lines:
        for choice in line.choices if line.engine == "cowslice" else ():
            yield replace(choice, cache_bytes=round_up(choice.cache_bytes, KiB))
