"""Single decisions of the policies, each told as a short story."""

import pytest

from cowslice.cache.policy import POLICIES, Rehearsal
from cowslice.errors import BadOption

WEIGHT = 1328


def rehearsal(slices, policy="clock2q+", **options):
    return Rehearsal(policy, slices * WEIGHT, **options)


def crowded(slices, **options):
    """A cache in which something had to leave already, so that newcomers prove themselves in the small queue."""
    cache = rehearsal(slices, **options)
    touch(cache, *range(5000, 5001 + slices))
    return cache


def touch(cache, *keys):
    return [cache.access(key, WEIGHT) for key in keys]


def test_both_policies_can_be_had():
    assert set(POLICIES) == {"clock2q+", "lru"}
    for policy in POLICIES:
        assert touch(rehearsal(10, policy), 1, 1) == [False, True]


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(BadOption, match="'arc'"):
        Rehearsal("arc", 1 << 20)


def test_a_burst_on_a_fresh_slice_does_not_make_it_hot():
    cache = rehearsal(20)
    touch(cache, *[0] * 100)
    touch(cache, *range(1, 40))
    assert 0 not in cache.resident()


def test_a_slice_that_is_asked_for_again_after_its_burst_stays():
    cache = rehearsal(40)
    touch(cache, 0, *range(1, 10), 0)
    touch(cache, *range(100, 200))
    assert 0 in cache.resident()


def test_what_came_while_there_was_room_is_not_driven_out_by_what_comes_once():
    cache = rehearsal(40)
    touch(cache, *range(40))
    touch(cache, *range(100, 200))
    assert len(cache.resident() & set(range(40))) >= 35


def test_a_slice_that_comes_back_soon_after_it_left_stays():
    cache = crowded(40)
    touch(cache, *range(10))
    assert 0 not in cache.resident()
    touch(cache, 0)
    touch(cache, *range(100, 200))
    assert 0 in cache.resident()


def test_a_slice_that_comes_back_much_later_is_as_good_as_new():
    cache = rehearsal(40)
    touch(cache, *range(400), 0)
    touch(cache, *range(500, 600))
    assert 0 not in cache.resident()


def test_cheap_slices_outlast_dear_ones_that_are_as_hot():
    cache = Rehearsal("clock2q+", 40 * 1328)
    cheap, dear = range(10), range(10, 20)
    for _ in range(2):  # the second time round they are all past the window, and marked
        for key in cheap:
            cache.access(key, 160)
        for key in dear:
            cache.access(key, 1328)
        for key in range(1000, 1010):
            cache.access(key, 1328)
    for key in range(2000, 2400):
        cache.access(key, 1328)
        cache.access(key + 10_000, 1328)
    kept = cache.resident()
    assert len(kept & set(cheap)) >= len(kept & set(dear))


def test_without_a_time_floor_the_window_is_a_matter_of_bytes_alone():
    cache = crowded(400, floor_seconds=0.0)
    touch(cache, *range(400), 399)
    touch(cache, *range(1000, 1400))
    assert 399 not in cache.resident()


def test_a_removed_slice_is_not_remembered():
    cache = crowded(40)
    touch(cache, *range(40))
    cache.remove(39)
    assert 39 not in cache.resident()
    touch(cache, 39)
    touch(cache, *range(100, 200))
    assert 39 not in cache.resident()


def test_a_slice_larger_than_the_budget_pushes_all_out_and_is_the_only_one():
    cache = rehearsal(4)
    touch(cache, *range(4))
    cache.access(9, 5 * WEIGHT)
    assert cache.resident() == {9}


def test_lru_forgets_what_was_asked_for_longest_ago():
    cache = rehearsal(3, "lru")
    touch(cache, 1, 2, 3, 1, 4)
    assert cache.resident() == {1, 3, 4}
