"""Layouts, errors and words of the protocol."""

from __future__ import annotations

import errno

import pytest

from cowslice.nbd import wire
from cowslice.nbd.buffer import Inbox
from cowslice.nbd.wire import NbdError


@pytest.mark.parametrize(
    "layout, size",
    [(wire.GREETING, 18), (wire.OPTION, 16), (wire.OPTION_REPLY, 20), (wire.COMPACT_REQUEST, 28), (wire.OLD_EXPORT, 10),
     (wire.EXTENDED_REQUEST, 32), (wire.SIMPLE_REPLY, 16), (wire.STRUCTURED_REPLY, 20), (wire.EXTENDED_REPLY, 32)],
)  # fmt: skip
def test_headers_have_the_sizes_of_the_specification(layout: object, size: int) -> None:
    assert layout.size == size  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "number, error",
    [(errno.EROFS, NbdError.EPERM), (errno.EFBIG, NbdError.ENOSPC), (errno.EDQUOT, NbdError.ENOSPC),
     (errno.EOPNOTSUPP, NbdError.ENOTSUP), (errno.ENOENT, NbdError.EIO), (0, NbdError.EIO)],
)  # fmt: skip
def test_errors_of_the_system_become_those_of_the_protocol(number: int, error: NbdError) -> None:
    assert wire.error_from_errno(number) is error


@pytest.mark.parametrize("error", NbdError)
def test_errors_of_the_protocol_survive_the_way_through_the_system(error: NbdError) -> None:
    assert wire.error_from_errno(wire.errno_from_error(error)) is error
    assert wire.error_from_wire(int(error)) is error


def test_an_error_that_is_in_no_specification_is_einval() -> None:
    assert wire.error_from_wire(2) is NbdError.EINVAL


@pytest.mark.parametrize("text, length, left", [("abc", 2, b"ab"), ("a\u00e9", 2, b"a"), ("\ud800", 9, b"?")])
def test_a_text_is_cut_between_characters(text: str, length: int, left: bytes) -> None:
    assert wire.cut(text, length) == left


def test_a_name_from_outside_is_shown_short_and_harmless() -> None:
    assert wire.shown("a\x1b[31m\n") == "a?[31m?"
    assert wire.shown("n" * 4096) == "n" * 77 + "..."


def test_numbers_without_a_name_are_shown_as_numbers() -> None:
    assert (wire.word(7, wire.Option), wire.word(77, wire.Option)) == ("GO", "77")


def test_skipped_bytes_are_never_kept() -> None:
    inbox = Inbox(b"abc")
    inbox.skip(5)
    inbox.put(b"d")
    assert (len(inbox), inbox.skipping) == (0, True)
    inbox.put(b"ef")
    assert (inbox.take_all(), inbox.skipping) == (b"f", False)
