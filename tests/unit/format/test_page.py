"""docs/format.md says what the code does: fields, bits, masks, types and limits are read from the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cowslice.format import bitmaps, entries, extensions, header, limits, snapshots
from cowslice.format.findings import Fault, Finding

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "format.md").read_text()


def rows(heading: str, *, table: int = 0) -> list[list[str]]:
    """The cells of a table below a heading, without its first two lines."""
    section = re.split(rf"^#+ {re.escape(heading)}$", PAGE, flags=re.M)[1]
    section = re.split(r"^#+ ", section, flags=re.M)[0]
    found = re.findall(r"(?:^\|.*\n)+", section, flags=re.M)[table]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()[2:]]


def test_the_header_fields_lie_where_the_page_says() -> None:
    assert {row[3].split(" ")[0]: int(row[0]) for row in rows("Header")} == dict(header.FIELD_OFFSETS)


@pytest.mark.parametrize(
    "heading, fixed",
    [("Snapshots", snapshots.FIXED_LENGTH), ("Bitmaps", bitmaps.FIXED_LENGTH), ("Header", limits.HEADER_LENGTH_V3 + 1)],
)
def test_the_fields_of_a_record_leave_no_gap(heading: str, fixed: int) -> None:
    end = 0
    for offset, size, kind, *_ in rows(heading):
        if size == "–":
            break
        assert int(offset) == end
        assert kind in (f"u{int(size) * 8}", "bytes")
        end += int(size)
    assert end == fixed


def test_the_feature_bits_are_those_of_the_page() -> None:
    said = {(row[0], row[2], 1 << int(row[1])) for row in rows("Feature bits")}
    flags = (header.Incompatible, header.Compatible, header.Autoclear)
    assert said == {(kind.__name__, flag.name, int(flag)) for kind in flags for flag in kind}


def test_the_extension_types_are_those_of_the_page() -> None:
    said = {(row[1], int(row[0], 16)) for row in rows("Header extensions")}
    assert said == {(kind.name, int(kind)) for kind in extensions.ExtensionType}


def test_the_masks_are_those_of_the_page() -> None:
    for _, mask, meaning in rows("L1 and L2"):
        assert getattr(entries, re.split(r"[: ]", meaning)[0]) == int(mask, 16)


def test_the_kinds_of_entries_are_those_of_the_page() -> None:
    assert {row[0] for row in rows("L1 and L2", table=1)} == {kind.name for kind in entries.Kind}


def test_the_limits_are_those_of_the_page() -> None:
    for name, value in rows("Limits"):
        assert getattr(limits, name) == int(value)


def test_the_faults_are_those_of_the_page() -> None:
    for name, opens, error in rows("Findings"):
        finding = Finding(Fault[name], "why")
        assert finding.fatal == (opens == "fails")
        assert not finding.fatal or type(finding.error()).__name__ == error
    assert {row[0] for row in rows("Findings")} == {fault.name for fault in Fault}
