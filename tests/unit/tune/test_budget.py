"""A budget goes where it helps most, and is never exceeded."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.errors import BadOption
from cowslice.tune import budget
from cowslice.tune.budget import Offer, hull, share, undominated

OFFERS = st.lists(st.builds(Offer, st.integers(1, 50), st.floats(0, 100)), min_size=1, max_size=5)


def best(disks: list[list[Offer]], most: int) -> float:
    sums = [sum(o.cost for o in chosen) for chosen in itertools.product(*disks) if sum(o.size for o in chosen) <= most]
    return min(sums)


@given(st.lists(OFFERS, min_size=1, max_size=4), st.integers(0, 150))
def test_few_disks_are_shared_among_in_the_best_way(disks: list[list[Offer]], extra: int) -> None:
    most = sum(min(offer.size for offer in offers) for offers in disks) + extra
    chosen = share(disks, most)
    assert sum(offer.size for offer in chosen) <= most
    assert all(offer in offers for offer, offers in zip(chosen, disks, strict=True))
    assert sum(offer.cost for offer in chosen) == pytest.approx(best(disks, most))


@given(st.lists(OFFERS, min_size=1, max_size=4), st.integers(0, 150))
def test_the_greedy_way_keeps_the_budget_and_buys_nothing_dear(disks: list[list[Offer]], extra: int) -> None:
    fronts = [undominated(offers) for offers in disks]
    most = sum(front[0].size for front in fronts) + extra
    chosen = budget._greedy(fronts, most)
    assert sum(offer.size for offer in chosen) <= most
    assert sum(offer.cost for offer in chosen) <= sum(front[0].cost for front in fronts) + 1e-9


@given(OFFERS)
def test_on_a_hull_each_byte_buys_less_than_the_one_before(offers: list[Offer]) -> None:
    found = hull(undominated(offers))
    gains = [budget._gain(a, b) for a, b in itertools.pairwise(found)]
    assert gains == sorted(gains, reverse=True)


def test_hundreds_of_disks_are_shared_among_too() -> None:
    disks = [[Offer(size, 1000 / (size + number)) for size in range(1, 60)] for number in range(300)]
    chosen = share(disks, 6000)
    assert sum(offer.size for offer in chosen) <= 6000
    assert chosen[0].size > chosen[-1].size


def test_a_budget_below_what_all_need_is_refused() -> None:
    with pytest.raises(BadOption, match="--budget is 3 B, expected at least 4 B"):
        share([[Offer(2, 1.0)], [Offer(2, 1.0)]], 3)
