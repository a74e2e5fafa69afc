"""One memory budget for several disks: from the advice on each to the settings that `budget` picks, in both engines.

It knows no terminal. A cost is seconds of work that a disk's requests cause; where all traces know their times, busier
disks weigh more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cowslice.cache.sizes import MIN_L2_ENTRIES
from cowslice.tune.advise import Advice, Choice
from cowslice.tune.budget import Offer, share
from cowslice.tune.paste import Pastes, pastes
from cowslice.tune.wording import choice_json
from cowslice.units import KiB, round_up


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one disk gets of the budget, if QEMU runs it and if cowslice does. `weight` is its share of all requests."""

    advice: Advice
    weight: float
    qemu: Choice
    ours: Choice

    def pastes(self) -> Pastes:
        """The part in each program's words."""
        e = self.advice.evidence
        return pastes(e.path, e.curves.geometry, qemu=(self.qemu.cache_bytes, self.qemu.entry_bytes),
                      ours=self.ours.cache_bytes, full_coverage=e.today.full_coverage)


@dataclass(frozen=True, slots=True, eq=False)
class Division:
    """All parts, in the order of the disks. `weighted` says whether busier disks weigh more."""

    budget: int
    parts: tuple[Part, ...]
    weighted: bool

    def mean_seconds(self, choice: Callable[[Part], Choice]) -> float:
        """Seconds of work that a request causes, on average over all disks, at that choice of each."""
        return sum(part.weight / choice(part).rate for part in self.parts)


def divide(advices: Sequence[Advice], budget: int) -> Division:
    """Share `budget` bytes among disks. Raises BadOption where it is less than what they need to work at all."""
    arrivals = [advice.evidence.habits.arrivals for advice in advices]
    known = [rate for rate in arrivals if rate is not None]
    weighted = len(known) == len(arrivals)
    weights = [rate / sum(known) for rate in known] if weighted else [1 / len(advices)] * len(advices)
    qemu = _shared([_qemu_choices(advice) for advice in advices], weights, budget)
    ours = _shared([_our_choices(advice) for advice in advices], weights, budget)
    parts = tuple(Part(*each) for each in zip(advices, weights, qemu, ours, strict=True))
    return Division(budget, parts, weighted)


def division_json(division: Division) -> dict[str, Any]:
    """The division for scripts: bytes, rates per second, seconds of work per request."""
    return {
        "bytes": division.budget, "busier-disks-weigh-more": division.weighted,
        "seconds-per-request": {"today": division.mean_seconds(lambda part: part.advice.qemu_today),
                                "qemu": division.mean_seconds(lambda part: part.qemu),
                                "cowslice": division.mean_seconds(lambda part: part.ours)},
        "disks": [{"image": part.advice.evidence.path, "weight": part.weight, "qemu": choice_json(part.qemu),
                   "cowslice": choice_json(part.ours),
                   "paste": {"drive": part.pastes().drive, "cowslice": part.pastes().cowslice}}
                  for part in division.parts],
    }  # fmt: skip


def _shared(disks: Sequence[Iterable[Choice]], weights: Sequence[float], budget: int) -> list[Choice]:
    found: list[dict[Offer, Choice]] = []
    for choices, weight in zip(disks, weights, strict=True):
        offers: dict[Offer, Choice] = {}
        for choice in choices:
            offers.setdefault(Offer(choice.cache_bytes, weight / choice.rate), choice)
        found.append(offers)
    chosen = share([list(offers) for offers in found], budget)
    return [offers[offer] for offers, offer in zip(found, chosen, strict=True)]


def _qemu_choices(advice: Advice) -> Iterable[Choice]:
    """Settings of all entry sizes, at the whole number of entries that QEMU makes of each."""
    for line in advice.lines:
        for choice in line.choices if line.engine == "qemu" else ():
            entries = max(MIN_L2_ENTRIES, choice.cache_bytes // choice.entry_bytes)
            yield replace(choice, cache_bytes=entries * choice.entry_bytes)


def _our_choices(advice: Advice) -> Iterable[Choice]:
    for line in advice.lines:
        for choice in line.choices if line.engine == "cowslice" else ():
            yield replace(choice, cache_bytes=round_up(choice.cache_bytes, KiB))
