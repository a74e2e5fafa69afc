"""docs/errors.md says of every error what the source says."""

from __future__ import annotations

import pytest

from cowslice import errors
from cowslice.errors import CowsliceError
from tests.house.errors_page import PATH, page

EVERY_CLASS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CowsliceError)]


def test_the_page_is_what_the_source_says() -> None:
    assert PATH.read_text() == page(), "write it anew: python -m tests.house.errors_page"


@pytest.mark.parametrize("kind", EVERY_CLASS, ids=lambda kind: kind.__name__)
def test_every_error_has_a_section_with_its_words_and_its_exit_status(kind: type[CowsliceError]) -> None:
    section = page().partition(f"# {kind.__name__}\n")[2].partition("\n#")[0]
    assert str(kind.__doc__) in section
    assert f"Exit status {kind.exit_code}." in section


@pytest.mark.parametrize("kind, hint", [
    ("CorruptImage", "Repair it with `cowslice check -r all`."),
    ("CryptoError", "Raise the limit to ... rounds"),
    ("Locked", "Close the program that has it open"),
], ids=["as it stands", "with a number in it", "from a table"])
def test_a_hint_is_listed_with_its_error_however_it_is_given(kind: str, hint: str) -> None:
    assert f"- {hint}" in page().partition(f"# {kind}\n")[2].partition("\n#")[0]
