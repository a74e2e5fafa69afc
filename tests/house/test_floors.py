"""Imports point down only. The floors drawn in docs/architecture.md, held."""

from __future__ import annotations

import graphlib

import pytest

from tests.house.source_tree import Module, modules, own_targets

FLOORS = {
    "errors": 0,
    "units": 0,
    "processors": 0,
    "format": 1,
    "codec": 1,
    "nbd": 1,
    "storage": 2,
    "cache": 3,
    "image": 4,
    "ops": 5,
    "tune": 5,
    "serve": 6,
    "cli": 7,
    "": 8,  # the public door, cowslice/__init__.py: it opens on every floor and none knows it
    "testing": 9,
}

NEIGHBOURS = {("units", "errors")}  # the ground floor's one step: a bad size is a BadOption

# Libraries that take long to load or that only one feature needs: loaded by the function that uses them.
LOADED_LATE = {
    *("aiohttp", "asyncio", "botocore", "concurrent", "distributed", "fsspec", "importlib", "multiprocessing", "s3fs"),
    *("backports", "compression", "cryptography", "ctypes", "isal", "numpy"),
    *("gzip", "hypothesis", "matplotlib", "re", "rich", "tempfile", "urllib"),
}

# Our own modules that few runs need, for the same reason. They point down and close no cycle like any other import.
FEW_NEED = (
    "cowslice.codec.luks1",
    "cowslice.codec.sectors",
    "cowslice.format.snapshots",
    "cowslice.image.bitmaps",
    "cowslice.image.capture",
    "cowslice.image.snapshots",
    "cowslice.image.writable",
    "cowslice.ops.bitmaprefs",
    "cowslice.ops.claims",
    "cowslice.ops.mapsize",
    "cowslice.ops.repair",
    "cowslice.storage.nbd",
    "cowslice.storage.nbdtls",
    "cowslice.storage.remote",
)

# The doors, whose business is to open a room only when somebody walks in: there everything may come late.
DOORS = {"", "cli"}


@pytest.mark.parametrize("module", modules().values(), ids=str)
def test_a_module_stands_on_a_known_floor(module: Module) -> None:
    assert module.room in FLOORS, f"{module} belongs to no floor: add its room to FLOORS and docs/architecture.md"


@pytest.mark.parametrize("module", modules().values(), ids=str)
def test_imports_point_down_only(module: Module) -> None:
    upward = [
        f"{module.path.name}:{imported.line} imports {target}"
        for target, imported in own_targets(module)
        if target.room != module.room
        and FLOORS[target.room] >= FLOORS[module.room]
        and (module.room, target.room) not in NEIGHBOURS
    ]
    assert not upward


def test_no_module_imports_itself_through_others() -> None:
    graph = {module.name: {target.name for target, _ in own_targets(module)} for module in modules().values()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as cycle:
        pytest.fail(f"an import cycle: {' -> '.join(reversed(cycle.args[1]))}", pytrace=False)


@pytest.mark.parametrize("module", modules().values(), ids=str)
def test_only_what_few_runs_need_is_imported_inside_functions(module: Module) -> None:
    late = [
        f"{module.path.name}:{imported.line} imports {imported.target}"
        for imported in module.imports
        if imported.in_function and module.room not in DOORS and not _few_need(imported.target)
    ]
    assert not late


def _few_need(target: str) -> bool:
    return target.split(".")[0] in LOADED_LATE or f"{target}.".startswith(tuple(f"{name}." for name in FEW_NEED))
