"""Options: impossible values are refused by name, and one budget serves the whole chain."""

from __future__ import annotations

from typing import Any

import pytest

from cowslice.errors import BadOption
from cowslice.format.geometry import Geometry
from cowslice.image.options import ChainCache, OpenKeywords, OpenOptions, plan_chain_cache
from cowslice.units import GiB, KiB, MiB

SMALL = (1 * GiB, Geometry(16))
LARGE = (400 * GiB, Geometry(16))
BIG_CLUSTERS = (40 * GiB, Geometry(21))


@pytest.mark.parametrize("option", [
    {"format": "vmdk"}, {"backing_format": "raw"}, {"backing": None, "backing_format": "raw"}, {"warmup": "now"},
    {"policy": "fifo"}, {"cache_clean_interval": -1}, {"cache_clean_interval": 1 << 32}, {"max_depth": 0},
    {"cache_clean_interval": "soon"}, {"max_depth": None}, {"max_key_rounds": 0},
])
def test_an_impossible_value_is_refused_by_its_name(option: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match=list(option)[-1].replace("_", "[-_]")):
        OpenOptions(**option)


def test_the_keywords_that_editors_see_are_the_options_that_exist() -> None:
    fields = [name for name in OpenOptions.__dataclass_fields__ if name != "writable"]  # the mode says it
    assert list(OpenKeywords.__annotations__) == fields


def test_a_secret_is_not_shown() -> None:
    assert "horse" not in repr(OpenOptions(secret="horse"))


@pytest.mark.parametrize("disks, options, expected", [
    ([], {}, (32 * MiB, ())),
    ([SMALL], {}, (32 * MiB, (64 * KiB,))),
    ([LARGE], {}, (32 * MiB, (4 * KiB,))),
    ([SMALL, LARGE], {}, (32 * MiB, (4 * KiB, 4 * KiB))),
    ([SMALL, BIG_CLUSTERS], {}, (32 * MiB, (64 * KiB, 2 * MiB))),
    ([LARGE], {"l2_cache_size": "64M"}, (64 * MiB, (64 * KiB,))),
    ([LARGE], {"cache_size": "1M"}, (768 * KiB, (4 * KiB,))),
    ([LARGE], {"l2_cache_size": "1M", "l2_cache_entry_size": "16K"}, (1 * MiB, (16 * KiB,))),
    ([LARGE, (GiB, Geometry(12))], {"l2_cache_entry_size": "64K"}, (32 * MiB, (64 * KiB, 4 * KiB))),
])
def test_a_chain_shares_one_budget_and_reads_small_slices_unless_all_fits(
        disks: list[tuple[int, Geometry]], options: dict[str, Any], expected: tuple[int, tuple[int, ...]]) -> None:
    assert plan_chain_cache(disks, OpenOptions(**options)) == ChainCache(*expected)


def test_the_top_disk_judges_the_sizes() -> None:
    with pytest.raises(BadOption, match="l2-cache-size"):
        plan_chain_cache([LARGE], OpenOptions(l2_cache_size="4k"))
