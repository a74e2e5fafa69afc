"""Writes `docs/errors.md` from the error classes and from the hints that the source gives with them.

Run as `python -m tests.house.errors_page` it puts the page in its place. It finds hints in syntax trees and imports
only `cowslice.errors`; a test holds the page equal to what is written here.
"""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator

from cowslice import errors
from cowslice.errors import CowsliceError
from tests.house.source_tree import ROOT, modules

PATH = ROOT / "docs" / "errors.md"

HEAD = """# Errors

Only errors of `cowslice.errors` come out of the library, and each says whose fault it is: its place in the tree below.
All derive from `CowsliceError`. A message names the offending value, what was expected, and where; `hint` is one
sentence on what to do, or empty. The command line writes `cowslice: MESSAGE` and the hint to standard error and ends
with the exit status.

This page is written from the source: `python -m tests.house.errors_page` writes it anew.
"""


def page() -> str:
    """The whole text of the page."""
    return HEAD + "".join(_section(kind) for kind in _in_order(CowsliceError))


def _in_order(kind: type[CowsliceError]) -> Iterator[type[CowsliceError]]:
    """The class and all below it, a branch at a time, as the source has them."""
    yield kind
    for each in vars(errors).values():
        if isinstance(each, type) and each.__bases__[0] is kind:
            yield from _in_order(each)


def _section(kind: type[CowsliceError]) -> str:
    level = "##" if kind is CowsliceError or kind.__bases__[0] is CowsliceError else "###"
    above = ", ".join(f"`{base.__name__}`" for base in kind.__bases__)
    status = f"Kind of {above}. Exit status {kind.exit_code}."
    lines = ["", f"{level} {kind.__name__}", "", str(kind.__doc__), "", status]
    hints = sorted(_hints()[kind.__name__])
    if hints:
        lines += ["", "Hints that come with it:", "", *(f"- {hint}" for hint in hints)]
    return "\n".join([*lines, ""])


@functools.cache
def _hints() -> dict[str, set[str]]:
    """Every hint that the source gives with an error, by the name of its class."""
    found: dict[str, set[str]] = defaultdict(set)
    for module in modules().values():
        if module.path.suffix != ".py":
            continue
        tree = ast.parse(module.path.read_text())
        constants = _constants(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _class_named(node):
                given = (word.value for word in node.keywords if word.arg == "hint")
                found[_class_named(node)].update(text for value in given for text in _texts(value, constants))
    return found


def _class_named(call: ast.Call) -> str:
    """The error class that a call makes one of, or ''."""
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    kind = getattr(errors, name, None) if name else None
    return name if isinstance(kind, type) and issubclass(kind, CowsliceError) else ""


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    """What names are given at the top of a module."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and node.value]
    targets = [(node.targets[0] if isinstance(node, ast.Assign) else node.target, node.value) for node in assigned]
    return {target.id: value for target, value in targets if isinstance(target, ast.Name)}


def _texts(value: ast.expr, constants: dict[str, ast.expr]) -> Iterator[str]:
    """Every sentence that an expression can stand for; what is filled in later shows as three dots."""
    match value:
        case ast.Constant(value=str(text)) if text:
            yield text
        case ast.JoinedStr(values=parts):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts)
        case ast.Name(id=name) if name in constants:
            yield from _texts(constants[name], constants)
        case ast.Subscript(value=table) | ast.Call(func=ast.Attribute(value=table)):
            yield from _texts(table, constants)
        case ast.Dict(values=several) | ast.Tuple(elts=several):
            for each in several:
                yield from _texts(each, constants)
        case ast.IfExp(body=one, orelse=other):
            yield from _texts(one, constants)
            yield from _texts(other, constants)


if __name__ == "__main__":
    PATH.write_text(page())
