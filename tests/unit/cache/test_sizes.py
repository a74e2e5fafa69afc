"""Cache sizes: QEMU's worked examples hold exactly, and our engine refuses what QEMU quietly raises."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.cache.sizes import plan_cache_sizes
from cowslice.errors import BadOption
from cowslice.format.geometry import Geometry
from cowslice.units import GiB, KiB, MiB, TiB

PLAIN = {bits: Geometry(bits) for bits in range(9, 22)}

# guest, geometry, options, full coverage, entry, L2 entries, guest covered, refcount entries
WORKED = [
    (40 * GiB, PLAIN[16], {}, 5 * MiB, 64 * KiB, 80, 40 * GiB, 4),
    (40 * GiB, PLAIN[18], {}, 1280 * KiB, 256 * KiB, 5, 40 * GiB, 4),
    (40 * GiB, PLAIN[21], {}, 2 * MiB, 2 * MiB, 2, 40 * GiB, 4),
    (40 * GiB, Geometry(16, extended_l2=True), {}, 10 * MiB, 64 * KiB, 160, 40 * GiB, 4),
    (40 * GiB, PLAIN[16], {"cache_size": "1M"}, 5 * MiB, 4 * KiB, 192, 6 * GiB, 4),
    (40 * GiB, PLAIN[18], {"cache_size": "1M"}, 1280 * KiB, 4 * KiB, 2, 256 * MiB, 4),
    (40 * GiB, PLAIN[21], {"cache_size": "1M"}, 2 * MiB, 4 * KiB, 2, 2 * GiB, 4),
    (40 * GiB, PLAIN[16], {"l2_cache_size": "1M"}, 5 * MiB, 4 * KiB, 256, 8 * GiB, 4),
    (40 * GiB, PLAIN[18], {"l2_cache_size": "1M"}, 1280 * KiB, 4 * KiB, 256, 32 * GiB, 4),
    (40 * GiB, PLAIN[16], {"cache_size": "8M"}, 5 * MiB, 64 * KiB, 80, 40 * GiB, 48),
    (40 * GiB, PLAIN[16], {"cache_size": "256K"}, 5 * MiB, 4 * KiB, 2, 64 * MiB, 4),
    (40 * GiB, PLAIN[16], {"cache_size": "1M", "refcount_cache_size": "512K"}, 5 * MiB, 4 * KiB, 128, 4 * GiB, 8),
    (40 * GiB, PLAIN[16], {"l2_cache_size": 0}, 5 * MiB, 4 * KiB, 2, 64 * MiB, 4),
    (40 * GiB, PLAIN[12], {}, 80 * MiB, 4 * KiB, 8192, 16 * GiB, 4),
    (40 * GiB, PLAIN[9], {}, 640 * MiB, 512, 65536, 2 * GiB, 4),
    (256 * GiB, PLAIN[16], {}, 32 * MiB, 64 * KiB, 512, 256 * GiB, 4),
    (257 * GiB, PLAIN[16], {}, 32 * MiB + 128 * KiB, 4 * KiB, 8192, 256 * GiB, 4),
    (1 * TiB, PLAIN[18], {}, 32 * MiB, 256 * KiB, 128, 1 * TiB, 4),
    (64 * MiB, PLAIN[16], {"cache_size": "1M", "l2_cache_size": "1M"}, 64 * KiB, 64 * KiB, 2, 64 * MiB, 15),
]


@pytest.mark.parametrize("size,geometry,options,need,entry,l2_entries,covered,refcount_entries", WORKED)
def test_worked_examples_give_the_effective_numbers_of_qemu(
        size, geometry, options, need, entry, l2_entries, covered, refcount_entries):
    plan = plan_cache_sizes(size, geometry, qemu=True, **options)
    assert (plan.full_coverage, plan.l2_cache_entry_size, plan.l2_entries, plan.covered, plan.refcount_entries) == \
        (need, entry, l2_entries, covered, refcount_entries)
    assert plan.l2_cache_size == plan.l2_entries * entry
    assert plan.refcount_cache_size == refcount_entries * geometry.cluster_size


@pytest.mark.parametrize("size,geometry,options", [row[:3] for row in WORKED if row[2] == {}])
def test_the_defaults_work_for_every_worked_example(size, geometry, options):
    plan = plan_cache_sizes(size, geometry)
    assert plan.l2_cache_size == min(plan.full_coverage, 32 * MiB)


@pytest.mark.parametrize("geometry,options,names", [
    (PLAIN[18], {"cache_size": "1M"}, ["cache-size is 1 MiB", "1 MiB", "0 B for L2 slices", "2 of 4 KiB"]),
    (PLAIN[21], {"cache_size": "1M"}, ["cache-size is 1 MiB", "refcount blocks", "4 clusters, 8 MiB"]),
    (PLAIN[16], {"cache_size": "256K"}, ["cache-size is 256 KiB", "0 B for L2 slices"]),
    (PLAIN[16], {"cache_size": "1M", "l2_cache_size": "1M"}, ["leaves 0 B for refcount blocks", "256 KiB"]),
    (PLAIN[16], {"cache_size": "1M", "refcount_cache_size": "1M"}, ["leave 0 B for L2 slices"]),
    (PLAIN[16], {"refcount_cache_size": "128K"}, ["refcount-cache-size is 128 KiB", "4 clusters, 256 KiB"]),
    (PLAIN[16], {"l2_cache_size": 0}, ["l2-cache-size is 0 B", "2 entries of 4 KiB"]),
    (PLAIN[16], {"l2_cache_size": "64K", "l2_cache_entry_size": "64K"}, ["l2-cache-size is 64 KiB", "of 64 KiB"]),
])
def test_a_budget_that_qemu_would_overrun_is_refused_with_a_sentence(geometry, options, names):
    with pytest.raises(BadOption) as refusal:
        plan_cache_sizes(40 * GiB, geometry, **options)
    assert all(name in str(refusal.value) for name in names), str(refusal.value)


@pytest.mark.parametrize("qemu", [False, True])
@pytest.mark.parametrize("options,name", [
    ({"l2_cache_entry_size": 256}, "l2-cache-entry-size is 256"),
    ({"l2_cache_entry_size": "128K"}, "l2-cache-entry-size is 131072"),
    ({"l2_cache_entry_size": 5000}, "l2-cache-entry-size is 5000"),
    ({"l2_cache_entry_size": 0}, "l2-cache-entry-size is 0"),
    ({"cache_size": "4M", "l2_cache_size": "1M", "refcount_cache_size": "1M"}, "all given"),
    ({"cache_size": "1M", "l2_cache_size": "2M"}, "l2-cache-size is 2097152"),
    ({"cache_size": "1M", "refcount_cache_size": "2M"}, "refcount-cache-size is 2097152"),
    ({"cache_size": "lots"}, "cache-size is 'lots'"),
    ({"l2_cache_size": -1}, "l2-cache-size is -1"),
    ({"refcount_cache_size": 1 << 60}, "too large"),
])
def test_contradictions_are_refused_in_both_modes(options, name, qemu):
    with pytest.raises(BadOption, match=name):
        plan_cache_sizes(40 * GiB, PLAIN[16], qemu=qemu, **options)


def test_slices_are_small_exactly_when_the_cache_does_not_cover_the_disk():
    covering = plan_cache_sizes(40 * GiB, PLAIN[16], l2_cache_size="5M")
    partial = plan_cache_sizes(40 * GiB, PLAIN[16], l2_cache_size=5 * MiB - 1)
    assert (covering.l2_cache_entry_size, covering.covers_disk) == (64 * KiB, True)
    assert (partial.l2_cache_entry_size, partial.covers_disk) == (4 * KiB, False)


def test_a_given_entry_size_wins_over_the_default():
    assert plan_cache_sizes(40 * GiB, PLAIN[16], l2_cache_size="1M", l2_cache_entry_size="16K").l2_entries == 64


def test_an_empty_disk_needs_no_l2_cache():
    plan = plan_cache_sizes(0, PLAIN[16])
    assert (plan.full_coverage, plan.covered, plan.covers_disk) == (0, 0, True)


sizes = st.integers(0, 1 << 44)
budgets = st.none() | st.integers(0, 1 << 28)


@given(size=sizes, bits=st.integers(9, 21), total=budgets, l2=budgets, refcount=budgets,
       entry=st.none() | st.integers(6, 24).map(lambda power: 1 << power))
def test_an_accepted_plan_never_exceeds_what_was_asked(size, bits, total, l2, refcount, entry):
    asked = {"cache_size": total, "l2_cache_size": l2, "refcount_cache_size": refcount, "l2_cache_entry_size": entry}
    try:
        plan = plan_cache_sizes(size, PLAIN[bits], **asked)
    except BadOption:
        return
    assert total is None or plan.total <= total
    assert l2 is None or plan.l2_cache_size <= l2
    assert not refcount or plan.refcount_cache_size <= refcount
    assert 0 <= plan.covered <= size
    assert plan.covers_disk == (plan.l2_cache_size >= plan.full_coverage)
    assert (plan.covered == size) or not plan.covers_disk


@given(size=sizes, bits=st.integers(9, 21))
def test_the_defaults_are_never_refused(size, bits):
    plan_cache_sizes(size, PLAIN[bits])
