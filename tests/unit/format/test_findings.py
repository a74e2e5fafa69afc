"""Findings: what they become when they are raised, and how untrusted text is shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.errors import CorruptImage, ImageError, MalformedImage, NotAnImage, UnsupportedImage
from cowslice.format.findings import Fault, Finding, escaped, overlaps, raise_first
from cowslice.format.limits import MAX_QUOTED_TEXT


@pytest.mark.parametrize(
    "fault, error",
    [
        (Fault.NOT_AN_IMAGE, NotAnImage),
        (Fault.MALFORMED, MalformedImage),
        (Fault.UNSUPPORTED, UnsupportedImage),
        (Fault.CORRUPT, CorruptImage),
    ],
)
def test_a_fatal_finding_becomes_its_error(fault: Fault, error: type[ImageError]) -> None:
    with pytest.raises(error, match="why"):
        raise_first([Finding(Fault.NOTE, "before"), Finding(fault, "why")])


@pytest.mark.parametrize("fault", [Fault.UNSAFE, Fault.UNUSABLE, Fault.NOTE])
def test_other_findings_are_not_raised(fault: Fault) -> None:
    raise_first([Finding(fault, "why")])


def test_only_some_findings_forbid_writing() -> None:
    assert [fault for fault in Fault if not Finding(fault, "").forbids_writing] == [Fault.UNUSABLE, Fault.NOTE]


@given(st.binary(max_size=2000))
def test_untrusted_text_is_one_short_printable_line(raw: bytes) -> None:
    text = escaped(raw)
    assert text.isprintable()
    assert len(text) <= MAX_QUOTED_TEXT


def test_control_characters_are_shown_as_escapes() -> None:
    assert escaped("na\u202eme\x1b[0m\n".encode()) == r"na\u202eme\x1b[0m\n"
    assert escaped(b"\xff") == r"\xff"


@given(st.lists(st.tuples(st.just("s"), st.integers(0, 50), st.integers(0, 20)), max_size=6))
def test_overlaps_are_found_exactly_when_bytes_are_shared(spans: list[tuple[str, int, int]]) -> None:
    used = [byte for _, offset, length in spans for byte in range(offset, offset + length)]
    assert bool(overlaps(spans)) == (len(used) != len(set(used)))
