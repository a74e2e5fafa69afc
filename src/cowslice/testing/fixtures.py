"""The manifest of real images: which features exist, which meet in one image, which can never meet and why.

It knows names only; `recipes` makes the images. A manifest is whole when every pair of values of two axes
is in one of its rows or is forbidden by a rule that gives its reason.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

KiB = 1 << 10


@dataclass(frozen=True, slots=True)
class Fixture:
    """One row of the manifest. `tier` is "quick" (every run) or "long"; every other field is one axis."""

    tier: str
    cluster_size: int
    version: int
    refcount_bits: int
    compression: str
    l2: str
    backing: str
    data_file: str
    snapshots: str
    bitmaps: str
    encryption: str
    ending: str
    state: str
    preallocation: str
    content: str

    @property
    def name(self) -> str:
        """What is not ordinary about it, for test names and files."""
        said = [f"v{self.version}", f"{self.cluster_size}", f"rc{self.refcount_bits}"]
        said += [f"{axis}_{self.value(axis)}" for axis in _NAMED if self.value(axis) != AXES[axis][0]]
        return "-".join(said)

    def value(self, axis: str) -> str | int:
        value: str | int = getattr(self, axis)
        return value


AXES: Mapping[str, tuple[str | int, ...]] = {
    "cluster_size": tuple(1 << bits for bits in range(9, 22)),
    "version": (3, 2),
    "refcount_bits": (16, 1, 2, 4, 8, 32, 64),
    "compression": ("none", "zlib", "zstd"),
    "l2": ("standard", "extended"),
    "backing": ("none", "raw", "qcow2", "shorter", "longer", "chain"),
    "data_file": ("none", "mapped", "raw"),
    "snapshots": ("none", "one", "several"),
    "bitmaps": ("none", "several"),
    "encryption": ("none", "aes", "luks"),
    "ending": ("whole", "partial"),
    "state": ("clean", "dirty", "corrupt"),
    "preallocation": ("off", "metadata", "falloc", "full"),
    "content": ("data", "zeros", "discards"),
}
_NAMED = tuple(axis for axis in AXES if axis not in ("cluster_size", "version", "refcount_bits"))

ORDINARY = Fixture(
    tier="quick",
    cluster_size=64 * KiB,
    version=3,
    refcount_bits=16,
    compression="none",
    l2="standard",
    backing="none",
    data_file="none",
    snapshots="none",
    bitmaps="none",
    encryption="none",
    ending="whole",
    state="clean",
    preallocation="off",
    content="data",
)

Cell = frozenset[tuple[str, str | int]]


@dataclass(frozen=True, slots=True)
class Rule:
    """Values that can never stand in one image. `refused` says that qemu-img itself refuses to make it."""

    reason: str
    refused: bool
    conditions: tuple[tuple[str, frozenset[str | int]], ...]

    def forbids(self, chosen: Mapping[str, str | int]) -> bool:
        """Whether every condition is met; an axis without a value yet meets none."""
        return all(axis in chosen and chosen[axis] in values for axis, values in self.conditions)


def _rule(reason: str, *, refused: bool = True, **conditions: Iterable[str | int]) -> Rule:
    return Rule(reason, refused, tuple((axis, frozenset(values)) for axis, values in conditions.items()))


def _others(axis: str) -> frozenset[str | int]:
    """Every value of an axis but its ordinary one, which stands first."""
    return frozenset(AXES[axis][1:])


RULES: tuple[Rule, ...] = (
    _rule("version 2 counts references in 16 bits", version=[2], refcount_bits=_others("refcount_bits")),
    _rule("version 2 has no field for the compression type", version=[2], compression=["zstd"]),
    _rule("version 2 has no incompatible feature bits", version=[2], l2=["extended"]),
    _rule("version 2 has no data file bit", version=[2], data_file=_others("data_file")),
    _rule("version 2 has no autoclear bit to keep bitmaps true", version=[2], bitmaps=["several"]),
    _rule("version 2 has no dirty bit", version=[2], state=["dirty"]),
    _rule("version 2 has no corrupt bit", refused=False, version=[2], state=["corrupt"]),
    _rule(
        "32 subclusters of at least a sector need 16 KiB",
        l2=["extended"],
        cluster_size=[size for size in AXES["cluster_size"] if int(size) < 16 * KiB],
    ),
    _rule("a data file holds no compressed clusters", data_file=_others("data_file"), compression=["zlib", "zstd"]),
    _rule("internal snapshots need their data in the image", data_file=_others("data_file"), snapshots=["one"]),
    _rule("internal snapshots need their data in the image", data_file=_others("data_file"), snapshots=["several"]),
    _rule("a raw data file cannot say 'look in the backing file'", data_file=["raw"], backing=_others("backing")),
    _rule("a raw data file is always preallocated", refused=False, data_file=["raw"], preallocation=["off"]),
    _rule("a one-bit count cannot say 'shared'", refcount_bits=[1], snapshots=["one", "several"]),
    _rule(
        "compressed clusters of an encrypted image would be stored in clear",
        refused=False,
        encryption=["aes", "luks"],
        compression=["zlib", "zstd"],
    ),
    _rule(
        "only subclusters can be preallocated without hiding the backing file",
        preallocation=_others("preallocation"),
        backing=_others("backing"),
        l2=["standard"],
    ),
    _rule("a guest disk is made of 512-byte sectors", refused=False, cluster_size=[512], ending=["partial"]),
)


def forbidden(chosen: Mapping[str, str | int]) -> Rule | None:
    """The first rule that these values break, or None."""
    return next((rule for rule in RULES if rule.forbids(chosen)), None)


def chosen_by(fixture: Fixture) -> dict[str, str | int]:
    """The value of every axis."""
    return {axis: fixture.value(axis) for axis in AXES}


def cells_of(fixture: Fixture) -> Iterator[Cell]:
    """Every pair of values that this image covers."""
    return _pairs(chosen_by(fixture))


def declared_cells() -> list[Cell]:
    """Every pair of values of two axes that no rule forbids."""
    cells = []
    for first, second in itertools.combinations(AXES, 2):
        for one, other in itertools.product(AXES[first], AXES[second]):
            if forbidden({first: one, second: other}) is None:
                cells.append(frozenset({(first, one), (second, other)}))
    return cells


def is_slow(cell: Cell) -> bool:
    """Whether only the long tier owes this cell: qemu-img spends seconds on the key of every LUKS image."""
    return ("encryption", "luks") in cell


def load_manifest(path: Path) -> list[Fixture]:
    """Read a manifest: tab-separated, the axes named in the first line."""
    header, *lines = path.read_text().splitlines()
    names = tuple(field.name for field in fields(Fixture))
    if tuple(header.split("\t")) != names:
        raise ValueError(f"{path}: the columns are '{header}', expected {names}")
    return [_parse(dict(zip(names, line.split("\t"), strict=True))) for line in lines]


def store_manifest(path: Path, rows: Iterable[Fixture]) -> None:
    """Write a manifest that `load_manifest` reads."""
    lines = ["\t".join(field.name for field in fields(Fixture))]
    lines += ["\t".join(str(value) for value in astuple(row)) for row in rows]
    path.write_text("\n".join(lines) + "\n")


def cover(seed: int = 0) -> list[Fixture]:
    """Choose rows greedily until every declared cell is covered; the same seed gives the same rows."""
    chooser = random.Random(seed)
    cells = declared_cells()
    quick = _cover({cell for cell in cells if not is_slow(cell)}, chooser, tier="quick", without=("luks",))
    slow = _cover({cell for cell in cells if is_slow(cell)}, chooser, tier="long")
    return quick + slow


def sample(count: int, seed: int) -> list[Fixture]:
    """Draw this many possible images at random from the whole product of the axes, without LUKS (see `is_slow`)."""
    chooser = random.Random(seed)
    return [_fixture(_completed({}, set(), chooser, without=("luks",)), "long") for _ in range(count)]


def _pairs(chosen: Mapping[str, str | int]) -> Iterator[Cell]:
    return (frozenset(pair) for pair in itertools.combinations(chosen.items(), 2))


def _parse(row: Mapping[str, str]) -> Fixture:
    chosen = {axis: int(row[axis]) if isinstance(AXES[axis][0], int) else row[axis] for axis in AXES}
    return _fixture(chosen, row["tier"])


def _fixture(chosen: Mapping[str, str | int], tier: str) -> Fixture:
    return Fixture(tier=tier, **chosen)  # type: ignore[arg-type]


def _cover(missing: set[Cell], chooser: random.Random, *, tier: str, without: tuple[str, ...] = ()) -> list[Fixture]:
    rows = []
    while missing:
        start = dict(chooser.choice(sorted(map(sorted, missing), key=str)))
        best = max(
            (_completed(start, missing, chooser, without=without) for _ in range(12)),
            key=lambda chosen: sum(pair in missing for pair in _pairs(chosen)),
        )
        missing = missing.difference(_pairs(best))
        rows.append(_fixture(best, tier))
    return rows


def _completed(
    start: Mapping[str, str | int], missing: set[Cell], chooser: random.Random, *, without: tuple[str, ...]
) -> dict[str, str | int]:
    """Give every axis a value. Rules of three values can leave a last axis none: then begin again in another order."""
    while True:
        chosen = dict(start)
        axes = [axis for axis in AXES if axis not in chosen]
        chooser.shuffle(axes)
        if all(_choose(chosen, axis, missing, chooser, without=without) for axis in axes):
            return chosen


def _choose(
    chosen: dict[str, str | int], axis: str, missing: set[Cell], chooser: random.Random, *, without: tuple[str, ...]
) -> bool:
    """Give the axis, of the values that no rule forbids, one that covers the most missing cells; False without any."""
    possible = [v for v in AXES[axis] if v not in without and forbidden({**chosen, axis: v}) is None]
    if not possible:
        return False
    chooser.shuffle(possible)
    chosen[axis] = max(possible, key=lambda value: _gain(chosen, axis, value, missing))
    return True


def _gain(chosen: Mapping[str, str | int], axis: str, value: str | int, missing: set[Cell]) -> int:
    return sum(frozenset({pair, (axis, value)}) in missing for pair in chosen.items())
