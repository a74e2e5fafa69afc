"""The size and the look of a file: short, opened by what it is, and free of words that do not belong here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.source_tree import PACKAGE, ROOT, Module, modules, python_files, shown, text_files

LONGEST_FILE = 500
LONGEST_FUNCTION = 60

SOURCES = python_files("src", "tests", "bench")

# Written with one-letter classes, so that this file does not contain them.
FORBIDDEN = re.compile(
    r"/w[o]rk/|/r[o]ot/|/h[o]me/\w|py[e]nv|pypi\.[o]rg|pythonh[o]sted|deb\.deb[i]an|npmj[s]|"
    r"\bT[O]DO\b|\bF[I]XME\b|\bX[X]X\b|NotImplement[e]dError|\bfarm-[a-z]"
)
VAGUE_NAMES = {"common", "data", "helper", "helpers", "info", "manager", "misc", "util", "utils"}
VERBS_ON_IMAGES = {"cowslice.ops.info", "cowslice.cli.info"}  # named for `qemu-img info`

_CYTHON_FUNCTION = re.compile(r"^(\s*)(?:def|cpdef|cdef)\b(?!\s+(?:class|struct|enum|extern))[^=\n]*\(")


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_a_file_is_short(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= LONGEST_FILE


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_a_function_is_short(path: Path) -> None:
    lengths = _cython_functions(path) if path.suffix in (".pyx", ".pxd") else _python_functions(path)
    assert not [f"{path.name}:{line} has {length} lines" for line, length in lengths if length > LONGEST_FUNCTION]


@pytest.mark.parametrize("module", modules().values(), ids=str)
def test_a_module_opens_by_saying_what_it_is(module: Module) -> None:
    opening = re.sub(r"\A(#.*\n)+", "", module.path.read_text())[:100]
    assert re.match(r'r?"""\S', opening)


@pytest.mark.parametrize("module", modules().values(), ids=str)
def test_a_module_is_named_by_a_noun_of_the_field(module: Module) -> None:
    assert module.name in VERBS_ON_IMAGES or not VAGUE_NAMES & set(re.split(r"[._]", module.name))


@pytest.mark.parametrize("path", text_files(), ids=shown)
def test_nothing_speaks_of_one_machine_or_of_unfinished_work(path: Path) -> None:
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        pytest.skip("not text")
    found = [f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]}" for match in FORBIDDEN.finditer(text)]
    assert not found


def test_every_folder_is_a_package() -> None:
    folders = {module.path.parent for module in modules().values()}
    assert not [shown(folder) for folder in folders if not (folder / "__init__.py").exists()]


@pytest.mark.parametrize("module", [m for m in modules().values() if m.path.suffix == ".pyx"], ids=str)
def test_a_compiled_module_has_its_types_beside_it(module: Module) -> None:
    assert module.path.with_suffix(".pyi").exists()


def test_the_build_compiles_exactly_the_tree() -> None:
    listed = re.search(r"^compiled = \[(.*?)^\]", (ROOT / "meson.build").read_text(), re.M | re.S)
    assert listed
    inside = [str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.pyx")]
    assert re.findall(r"'([^']+)'", listed[1]) == sorted(inside)


def _python_functions(path: Path) -> Iterator[tuple[int, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1


def _cython_functions(path: Path) -> Iterator[tuple[int, int]]:
    """First line and length, by indentation: a function ends before the next line that is not deeper than its `def`."""
    lines = path.read_text().splitlines()
    for first, line in enumerate(lines):
        header = _CYTHON_FUNCTION.match(line)
        if not header:
            continue
        body = _end_of_signature(lines, first) + 1
        last = body
        while last < len(lines) and (not lines[last].strip() or _indent(lines[last]) > len(header[1])):
            last += 1
        yield first + 1, len("\n".join(lines[first:last]).rstrip().splitlines())


def _end_of_signature(lines: list[str], first: int) -> int:
    depth = 0
    for number in range(first, len(lines)):
        depth += lines[number].count("(") - lines[number].count(")")
        if depth <= 0:
            return number
    return first


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
