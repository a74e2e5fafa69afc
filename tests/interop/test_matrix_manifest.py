"""The manifest is whole: no empty cell, no impossible row, and what it calls impossible really is."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowslice.testing import peers, recipes
from cowslice.testing.fixtures import (
    ORDINARY,
    RULES,
    Fixture,
    Rule,
    cells_of,
    chosen_by,
    cover,
    declared_cells,
    forbidden,
    is_slow,
    load_manifest,
    sample,
)

ROWS = load_manifest(Path(__file__).with_name("matrix.tsv"))


def _covered(rows: list[Fixture]) -> set[object]:
    return {cell for row in rows for cell in cells_of(row)}


def test_no_cell_of_the_declared_matrix_is_empty() -> None:
    covered = _covered(ROWS)
    assert [sorted(cell, key=str) for cell in declared_cells() if cell not in covered] == []


def test_every_run_covers_all_cells_but_those_of_slow_keys() -> None:
    covered = _covered([row for row in ROWS if row.tier == "quick"])
    assert [sorted(cell, key=str) for cell in declared_cells() if cell not in covered and not is_slow(cell)] == []


def test_every_run_reads_luks_with_small_usual_and_large_clusters() -> None:
    quick = {row.cluster_size for row in ROWS if row.tier == "quick" and row.encryption == "luks"}
    assert quick == {512, 65536, 2 << 20}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_no_row_is_impossible(row: Fixture) -> None:
    assert forbidden(chosen_by(row)) is None


def test_no_row_stands_twice() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_rows_that_are_chosen_anew_cover_everything_too() -> None:
    covered = _covered(cover(seed=5))
    assert all(cell in covered for cell in declared_cells())


def test_a_sample_is_possible_and_repeatable() -> None:
    rows = sample(50, seed=3)
    assert rows == sample(50, seed=3)
    assert all(forbidden(chosen_by(row)) is None for row in rows)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.refused], ids=lambda rule: rule.reason)
@peers.needs("qemu-img", "qemu-io")
def test_qemu_refuses_what_the_manifest_calls_impossible(rule: Rule, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="expected"):
        recipes.make(_breaking(rule), tmp_path)


def _breaking(rule: Rule) -> Fixture:
    """An ordinary image but for the values that the rule forbids together."""
    chosen = chosen_by(ORDINARY) | {axis: min(values, key=str) for axis, values in rule.conditions}
    return Fixture(tier="quick", **chosen)  # type: ignore[arg-type]
