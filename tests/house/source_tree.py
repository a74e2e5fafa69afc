"""The project's own files as the house tests see them: modules, what they import, and where.

It reads text and syntax trees and imports nothing of what it looks at.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "cowslice"

_PYX_IMPORT = re.compile(
    r"^(?P<indent>[ \t]*)(?:from[ \t]+(?P<source>[\w.]+)[ \t]+)?c?import[ \t]+(?P<names>\([^)]*\)|[\w.* ,]+)", re.M
)


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module or name. `line` counts from one; `in_function` when it runs late."""

    target: str
    line: int
    in_function: bool


@dataclass(frozen=True, slots=True)
class Module:
    """One module of the package: `cowslice.format.header`, or for a package's door `cowslice.format`."""

    name: str
    path: Path

    @property
    def room(self) -> str:
        """The package on a floor that it belongs to: `format`, `errors`, or '' for the public door."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else ""

    @property
    def imports(self) -> tuple[Import, ...]:
        """What it imports, with every relative or star-free name resolved to a dotted path."""
        return imports_of(self.path)

    def __str__(self) -> str:
        return self.name


@functools.cache
def modules() -> dict[str, Module]:
    """Every module of src/cowslice by its name, compiled ones included."""
    found = [Module(_dotted(path), path) for path in sorted(PACKAGE.rglob("*.py*")) if path.suffix in (".py", ".pyx")]
    return {module.name: module for module in found}


@functools.cache
def imports_of(path: Path) -> tuple[Import, ...]:
    text = path.read_text()
    if path.suffix == ".py":
        return tuple(_python_imports(ast.parse(text), in_function=False))
    declared = path.with_suffix(".pxd")
    return tuple(_cython_imports(text + "\n" + (declared.read_text() if declared.exists() else "")))


def own_targets(module: Module) -> Iterator[tuple[Module, Import]]:
    """The modules of this project that a module imports: for `from package import name` the name, if it is a module."""
    for imported in module.imports:
        target = imported.target
        while target.startswith("cowslice") and target not in modules():
            target = target.rpartition(".")[0]
        if target.startswith("cowslice") and target != module.name:
            yield modules()[target], imported


def python_files(*folders: str) -> list[Path]:
    """Every Python and Cython source below these folders of the project."""
    below = [path for folder in folders for path in (ROOT / folder).rglob("*.py*")]
    return sorted(path for path in below if path.suffix in (".py", ".pyx", ".pxd", ".pyi"))


def text_files() -> list[Path]:
    """Everything that people read: sources, tests, scripts and pages, at any depth, hidden tools' files apart."""
    suffixes = {".py", ".pyi", ".pyx", ".pxd", ".md", ".toml", ".build", ".json", ".txt", ".cfg", ""}
    folders = [ROOT / name for name in ("src", "tests", "docs", "bench", "scripts", ".ci")]
    below = [path for folder in folders for path in folder.rglob("*")] + list(ROOT.iterdir())
    ours = [path for path in below if path.is_file() and path.name != ".git"]  # a file in a linked worktree
    kept = [path for path in ours if path.suffix in suffixes and not path.name.startswith(".cov")]
    return sorted(path for path in kept if "__pycache__" not in path.parts)


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _python_imports(node: ast.AST, *, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, in_function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: imports are written in full"
            yield from (Import(f"{child.module}.{alias.name}", child.lineno, in_function) for alias in child.names)
        late = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _python_imports(child, in_function=late)


def _cython_imports(text: str) -> Iterator[Import]:
    for match in _PYX_IMPORT.finditer(text):
        source = match["source"]
        names = [name.split(" as ")[0].strip("() \n") for name in match["names"].split(",")]
        line = text.count("\n", 0, match.start("names")) + 1
        for name in filter(None, names):
            yield Import(f"{source}.{name}" if source else name, line, bool(match["indent"]))
