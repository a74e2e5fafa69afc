"""docs/architecture.md draws today's tree: the same rooms and files, each said in a few words, on the same floors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.house.source_tree import PACKAGE, ROOT, modules, shown
from tests.house.test_floors import FLOORS

PAGE = (ROOT / "docs" / "architecture.md").read_text()


def _drawing(heading: str) -> list[str]:
    """Lines of the first fenced block below a heading."""
    found = re.search(rf"^## {heading}\n.*?^```\n(.*?)^```", PAGE, re.M | re.S)
    assert found, f"docs/architecture.md has no drawing under '{heading}'"
    return found[1].splitlines()


def _drawn_files() -> dict[str, str]:
    """What each drawn file is said to be, by its path below the package."""
    files: dict[str, str] = {}
    rooms = [""]
    for line in _drawing("Rooms")[1:]:
        indent, name, words = re.fullmatch(r"( +)(\S+) *(.*)", line).groups()
        depth = len(indent) // 2
        path = rooms[depth - 1] + name
        rooms[depth:] = [path]
        files[path] = words
    return files


def _files() -> set[str]:
    paths = {module.path.relative_to(PACKAGE) for module in modules().values()}
    rooms = {f"{parent}/" for path in paths for parent in path.parents if parent.name}
    return {str(path) for path in paths if path.name != "__init__.py"} | rooms


def test_the_page_names_exactly_the_files_of_the_tree() -> None:
    drawn = set(_drawn_files()) - {"__init__.py"}
    assert (sorted(_files() - drawn), sorted(drawn - _files())) == ([], []), "(not drawn, drawn but not there)"


def test_every_file_is_said_in_a_few_words() -> None:
    assert not [name for name, words in _drawn_files().items() if not words]


def test_the_floors_are_drawn_as_they_are_held() -> None:
    drawn = {}
    for line in _drawing("Floors"):
        floor, rooms = re.match(r"(\d) +((?:\w+ )+)", line).groups()
        drawn |= dict.fromkeys(rooms.split(), int(floor))
    rooms_here = {module.room for module in modules().values()}
    held = {room: floor for room, floor in FLOORS.items() if room in rooms_here - {"", "testing"}}
    assert drawn == held


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=shown)
def test_a_page_names_only_files_that_are_there(page: Path) -> None:
    named = re.findall(r"`((?:[\w-]+/)+[\w.-]+\.\w+)`", page.read_text())
    bases = (ROOT, ROOT / "src", PACKAGE, page.parent)
    assert not [name for name in named if not any((base / name).exists() for base in bases)]
