"""One memory budget among several disks: how much each gets so that all requests together wait least.

It knows only what each size would cost each disk. What must hold: the budget is never exceeded; while there are
few divisions to look at the result is the best there is, beyond that it is the greedy one on convex hulls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cowslice.errors import BadOption
from cowslice.units import format_size

MOST_DIVISIONS = 300_000  # looked at for the exact answer: about a second; a dozen disks, not hundreds


@dataclass(frozen=True, slots=True)
class Offer:
    """A size in bytes that one disk could get, and what it then costs: seconds of waiting per second, or any unit."""

    size: int
    cost: float


def share(disks: Sequence[Sequence[Offer]], budget: int) -> list[Offer]:
    """Choose one offer for each disk, in order. Raises BadOption where even the smallest offers exceed the budget."""
    fronts = [undominated(offers) for offers in disks]
    least = sum(front[0].size for front in fronts)
    if least > budget:
        raise BadOption(f"--budget is {format_size(budget)}, expected at least {format_size(least)}: what "
                        f"{len(disks)} disks need to work at all")
    return _exact(fronts, budget) or _greedy(fronts, budget)


def undominated(offers: Sequence[Offer]) -> list[Offer]:
    """By growing size, only those that cost less than every smaller one."""
    kept: list[Offer] = []
    for offer in sorted(offers, key=lambda offer: (offer.size, offer.cost)):
        if not kept or offer.cost < kept[-1].cost:
            kept.append(offer)
    return kept


def hull(front: Sequence[Offer]) -> list[Offer]:
    """The offers of a front on which a byte buys less and less: its lower convex hull."""
    kept: list[Offer] = []
    for offer in front:
        while len(kept) > 1 and _gain(kept[-1], offer) >= _gain(kept[-2], kept[-1]):
            kept.pop()
        kept.append(offer)
    return kept


def _gain(smaller: Offer, larger: Offer) -> float:
    """What a byte buys between two offers."""
    return (smaller.cost - larger.cost) / (larger.size - smaller.size)


def _exact(fronts: Sequence[Sequence[Offer]], budget: int) -> list[Offer]:
    """The best division, disk after disk over all undominated sums; [] when there are too many."""
    sums: list[tuple[int, float, tuple[Offer, ...]]] = [(0, 0.0, ())]
    rest = sum(front[0].size for front in fronts)
    looked_at = 0
    for front in fronts:
        looked_at += len(sums) * len(front)
        if looked_at > MOST_DIVISIONS:
            return []
        rest -= front[0].size
        longer = [(size + offer.size, cost + offer.cost, (*chosen, offer)) for size, cost, chosen in sums
                  for offer in front if size + offer.size + rest <= budget]
        sums = []
        for made in sorted(longer, key=lambda one: (one[0], one[1])):
            if not sums or made[1] < sums[-1][1]:
                sums.append(made)
    return list(sums[-1][2])


def _greedy(fronts: Sequence[Sequence[Offer]], budget: int) -> list[Offer]:
    """Give bytes where they buy most; then, whatever still fits, beyond the hulls too."""
    chosen = [front[0] for front in fronts]
    left = budget - sum(offer.size for offer in chosen)
    steps = [(_gain(before, after), number, after) for number, front in enumerate(fronts)
             for before, after in _pairs(hull(front))]
    for _, number, offer in sorted(steps, key=lambda step: -step[0]):
        needed = offer.size - chosen[number].size
        if 0 < needed <= left:
            chosen[number], left = offer, left - needed
    for number, front in enumerate(fronts):
        better = [offer for offer in front if chosen[number].size < offer.size <= chosen[number].size + left]
        if better:
            left -= better[-1].size - chosen[number].size
            chosen[number] = better[-1]
    return chosen


def _pairs(offers: Sequence[Offer]) -> list[tuple[Offer, Offer]]:
    return list(pairwise(offers))
