"""What an image says about itself, read from that one file: nothing that it names is opened, nothing is changed.

It does not stop at the first thing that is wrong: every finding is kept, and whatever can still be read is. Names and
other text from the image are untrusted; they are passed on as they are for JSON, and escaped by whoever prints them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cowslice.cache.sizes import CacheSizes, plan_cache_sizes
from cowslice.errors import CowsliceError, ImageError
from cowslice.format.findings import Fault, Finding
from cowslice.format.first_cluster import PREFIX_LENGTH, FirstCluster, first_cluster_length, inspect_first_cluster
from cowslice.format.geometry import Geometry
from cowslice.format.header import MAGIC, CryptMethod, Header
from cowslice.storage.base import Storage
from cowslice.units import SECTOR, round_up

if TYPE_CHECKING:
    from cowslice.codec.luks1 import LuksHeader
    from cowslice.format.bitmaps import Bitmap
    from cowslice.format.snapshots import Snapshot
    from cowslice.ops.mapsize import MapSize


@dataclass(slots=True)
class ImageFacts:
    """What one file says. `first` is None for a raw file, or for one whose header cannot be understood.

    `virtual_size` and `actual_size` (None: nobody knows) are bytes; `guessed` says that raw was not asked for.
    """

    filename: str
    format: str
    virtual_size: int
    file_length: int
    actual_size: int | None
    guessed: bool = False
    first: FirstCluster | None = None
    snapshots: Sequence[Snapshot] = ()
    bitmaps: Sequence[Bitmap] = ()
    luks: LuksHeader | None = None
    cache: CacheSizes | None = None
    map_size: MapSize | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def header(self) -> Header | None:
        return self.first.header if self.first else None

    @property
    def geometry(self) -> Geometry | None:
        return self.header.geometry if self.header else None

    @property
    def fatal(self) -> bool:
        """Whether the image cannot be opened."""
        return any(finding.fatal for finding in self.findings)

    @property
    def encrypted(self) -> bool:
        return self.header is not None and self.header.crypt_method != CryptMethod.NONE

    @property
    def backing_name(self) -> str | None:
        """The name as it stands in the image, untrusted."""
        raw = self.first.backing_name if self.first else None
        return os.fsdecode(raw) if raw else None

    @property
    def full_backing_name(self) -> str | None:
        """The backing name seen from here: beside the image when it is relative."""
        name = self.backing_name
        if name is None or os.path.isabs(name) or ":" in name.split("/", 1)[0]:
            return name
        folder = os.path.dirname(self.filename)
        return os.path.join(folder, name) if folder else name


def inspect(storage: Storage, *, format_name: str | None = None, measure_map: bool = True) -> ImageFacts:
    """Look at one file. `measure_map`: read L2 tables, within a budget, to tell how small the map packs.

    Raises StorageError when the file itself cannot be read; whatever is wrong inside becomes a finding.
    """
    length = storage.length()
    prefix = storage.read(0, min(PREFIX_LENGTH, length))
    if format_name == "raw" or (format_name is None and prefix[: len(MAGIC)] != MAGIC):
        size = round_up(length, SECTOR)
        return ImageFacts(storage.name, "raw", size, length, storage.allocated(), guessed=format_name is None)
    whole = storage.read(0, min(first_cluster_length(prefix), length))
    first, findings = inspect_first_cluster(whole, file_length=length)
    size = first.header.size // SECTOR * SECTOR if first else 0
    facts = ImageFacts(storage.name, "qcow2", size, length, storage.allocated(), first=first, findings=findings)
    if first is not None and not facts.fatal:
        _look_further(storage, facts, first, measure_map=measure_map)
    return facts


def _look_further(storage: Storage, facts: ImageFacts, first: FirstCluster, *, measure_map: bool) -> None:
    """Read the optional structures; one that is broken does not hide the others."""
    facts.cache = plan_cache_sizes(facts.virtual_size, first.header.geometry)
    if first.header.snapshot_count:
        _take_snapshots(storage, facts, first.header)
    if first.bitmaps:
        _take_bitmaps(storage, facts, first)
    if first.crypto:
        _take_luks(storage, facts, first)
    if measure_map:
        from cowslice.ops.mapsize import measure_map_size

        try:
            facts.map_size = measure_map_size(storage, first.header)
        except CowsliceError as error:
            facts.findings.append(Finding(Fault.UNUSABLE, f"the map cannot be measured: {error}", "L1 table"))


def _take_snapshots(storage: Storage, facts: ImageFacts, header: Header) -> None:
    from cowslice.format.snapshots import snapshot_findings
    from cowslice.image.snapshots import load_snapshots

    try:
        facts.snapshots = load_snapshots(storage, header)
    except ImageError as error:
        facts.findings.append(Finding(Fault.UNUSABLE, str(error), "snapshot table", "", header.snapshots_offset))
    for snapshot in facts.snapshots:
        facts.findings.extend(snapshot_findings(snapshot, header.geometry, version=header.version))


def _take_bitmaps(storage: Storage, facts: ImageFacts, first: FirstCluster) -> None:
    from cowslice.image.bitmaps import load_bitmaps

    facts.bitmaps = load_bitmaps(storage, first)
    for bitmap in facts.bitmaps:
        if bitmap.fault:
            facts.findings.append(Finding(Fault.UNUSABLE, f"a bitmap is unusable: {bitmap.fault}", "bitmap directory"))


def _take_luks(storage: Storage, facts: ImageFacts, first: FirstCluster) -> None:
    from cowslice.codec.luks1 import decode_luks1

    if first.crypto is None:
        return
    length = min(first.crypto.length, 592, max(0, facts.file_length - first.crypto.offset))
    try:
        facts.luks = decode_luks1(storage.read(first.crypto.offset, length))
    except CowsliceError as error:
        facts.findings.append(Finding(Fault.UNUSABLE, str(error), "encryption header", "", first.crypto.offset))
