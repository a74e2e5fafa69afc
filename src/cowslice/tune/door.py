"""What `cowslice.tune` exports as functions: each does in one call what a verb of the command line does.

It computes nothing itself. A `trace` is a path, a URL, or requests that can be iterated again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, TypedDict, Unpack

from cowslice.cache.sizes import MIN_ENTRY_SIZE, PARTIAL_ENTRY_SIZE, Size
from cowslice.errors import BadOption, CowsliceError
from cowslice.format.geometry import Geometry
from cowslice.image.image import Image, open_image
from cowslice.tune.advise import Advice, advise
from cowslice.tune.calibrate import Calibration, calibrate, calibrate_any, parse_device, storage_of
from cowslice.tune.curve import Curves, slice_curves
from cowslice.tune.curvepacked import packed_map
from cowslice.tune.fleetcluster import ClusterCrew
from cowslice.tune.fleetlist import Broken, Member, members
from cowslice.tune.fleetlocal import LocalCrew
from cowslice.tune.fleetstudy import Job, Studied, Terms, broken
from cowslice.tune.fleetsummary import Fleet, summarise
from cowslice.tune.guest import Guest
from cowslice.tune.model import DEPTH
from cowslice.tune.requests import Requests
from cowslice.tune.simulate import MapSetting, QemuSetting, Replayed, simulate
from cowslice.tune.study import Setting, gather
from cowslice.units import is_power_of_two, parse_size

ImageSource = str | os.PathLike[str] | Image
TraceSource = str | os.PathLike[str] | Iterable[Requests]
Device = str | Calibration
Advance = Callable[[int, int], None]


class Today(TypedDict, total=False):
    """Cache options as QEMU is given them today, in bytes or as "1M"."""

    cache_size: Size
    l2_cache_size: Size
    refcount_cache_size: Size
    l2_cache_entry_size: Size


def curves(image: ImageSource, *, trace: TraceSource | None = None, workload: str | None = None) -> Curves:
    """Return how often a cache of each size would miss under a trace, for every size of an entry, LRU, exactly.

    Without a trace `workload` is followed, such as "zipf:theta=1.1"; without both, uniform reads.
    Raises BadOption for a raw disk, OutOfRange for a trace of a larger one, and what reading both raises.
    """
    with _opened(image) as disk:
        return slice_curves(_requests(trace, workload, disk.size), _geometry(disk), disk_size=disk.size)


def replay(
    image: ImageSource, cache_sizes: Sequence[int | str], *, engine: Literal["qemu", "cowslice"] = "cowslice",
    entry_size: int | str | None = None, trace: TraceSource | None = None, workload: str | None = None,
) -> list[Replayed]:
    """Replay a trace through a cache of each size, empty at first, and return hits and misses in their order.

    `engine` "qemu" is QEMU's LRU of whole entries, "cowslice" our policy over the packed map of the image itself.
    `entry_size` is the unit of a metadata read: by default 4 KiB, or a cluster where that is smaller.
    Raises BadOption, OutOfRange, and what reading image and trace raises.
    """
    if engine not in ("qemu", "cowslice"):
        raise BadOption(f"engine is '{engine}', expected qemu or cowslice")
    sizes = [parse_size(size, "cache size") for size in cache_sizes]
    with _opened(image) as disk:
        geometry = _geometry(disk)
        entry = _entry_bytes(entry_size, geometry.cluster_size)
        settings: list[QemuSetting | MapSetting] = []
        if engine == "qemu":
            settings += [QemuSetting(size, entry) for size in sizes]
        else:
            packed = packed_map(disk, entry_bytes=entry)
            settings += [MapSetting(size, packed) for size in sizes]
        return simulate(_requests(trace, workload, disk.size), settings, geometry, disk_size=disk.size)


def advice(
    image: ImageSource, *, trace: TraceSource | None = None, workload: str | None = None, device: Device | None = None,
    depth: int = DEPTH, on_progress: Advance | None = None, **today: Unpack[Today],
) -> Advice:
    """Return which cache an image needs: the advised settings, today's, those that hold all, and their forecasts.

    `device` says how fast the storage is, as in --device; by default it is measured, which takes seconds. `depth` is
    how many requests the guest has under way; what deciphering costs is left out. `today` are the cache
    options that QEMU is given now.
    `sentences` says the result in words. Raises as `curves` does, and StorageError where nothing can be measured.
    """
    setting = _setting(today)
    with _opened(image) as disk:
        setting.sizes(disk)
        requests = _requests(trace, workload, disk.size)
        calibration = calibrate(disk.path) if device is None else _calibration(device)
        name = getattr(requests, "name", "")
        return advise(gather(disk, requests, calibration=calibration, source=name, today=setting, depth=depth,
                             on_progress=on_progress))


def fleet(
    source: str | os.PathLike[str] | Iterable[Member], *, workload: str | None = None, trace_format: str | None = None,
    skip_bad: bool = False, device: Device | None = None, depth: int = DEPTH, force_share: bool = False,
    budget: int | str | None = None, scheduler: str | None = None, on_progress: Advance | None = None,
    **today: Unpack[Today],
) -> Fleet:
    """Study all disks of a folder or a list in parallel, and return who is starved, who wastes, and how to share.

    A folder is searched for qcow2 images, each with a trace of its name beside it; `docs/tuning.md` says what a list
    looks like. A disk that cannot be studied is in `broken` and stops nobody. `workload` is for disks without a trace.
    `budget` is memory to share, by default as much as the caches take today. `device` is the storage under all of them;
    by default each file system or server is measured once. `scheduler` is the address of a dask.distributed cluster
    that does the work; by default processes of this machine do, so that a script calls this below
    `if __name__ == "__main__":`. `on_progress` is told (steps done, all steps).
    Raises BadOption, StorageError where the source or the cluster cannot be reached.
    """
    terms = Terms(guest=Guest(trace_format=trace_format, skip_bad=skip_bad, workload=workload), today=_setting(today),
                  depth=depth, force_share=force_share)
    terms.guest.check()
    limit = None if budget is None else parse_size(budget, "budget")
    calibration = None if device is None else _calibration(device)
    found = members(source) if isinstance(source, (str, os.PathLike)) else tuple(source)
    with ExitStack() as stack:
        crew = LocalCrew() if scheduler is None else stack.enter_context(ClusterCrew(scheduler))
        return summarise(_studied(found, terms, calibration, crew, on_progress or (lambda done, total: None)), limit)


def _studied(found: Sequence[Member | Broken], terms: Terms, given: Calibration | None, crew: LocalCrew | ClusterCrew,
             tell: Advance) -> list[Studied | Broken]:
    """Measure each storage, then study all disks upon them; outcomes stand in the order of `found`."""
    outcomes: dict[int, Studied | Broken] = {n: one for n, one in enumerate(found) if isinstance(one, Broken)}
    groups: dict[str, list[int]] = {}
    for number, member in enumerate(found):
        if isinstance(member, Member):
            groups.setdefault(storage_of(member.image) if given is None else "", []).append(number)
    steps = len(found) + len(groups)
    jobs: dict[int, Job] = {}
    for done, numbers in enumerate(groups.values()):
        tell(done, steps)
        mine = {number: member for number in numbers if isinstance(member := found[number], Member)}
        try:
            calibration = given or crew.measure(calibrate_any, [member.image for member in mine.values()])
        except CowsliceError as error:
            outcomes |= {number: broken(member, error) for number, member in mine.items()}
            continue
        jobs |= {number: Job(member, terms, calibration) for number, member in mine.items()}
    before = len(groups) + len(outcomes)
    tell(before, steps)
    outcomes |= dict(zip(jobs, crew.run(list(jobs.values()), lambda done: tell(before + done, steps)), strict=True))
    return [outcomes[number] for number in range(len(found))]


@contextmanager
def _opened(image: ImageSource) -> Iterator[Image]:
    """The image, open; one that came open stays open."""
    if isinstance(image, Image):
        yield image
        return
    with open_image(image, warmup="off") as disk:
        yield disk


def _requests(trace: TraceSource | None, workload: str | None, size: int) -> Iterable[Requests]:
    if trace is None:
        return Guest(workload=workload).requests(size)
    if workload is not None:
        raise BadOption("trace and workload are both given, expected one of them")
    return Guest(trace=os.fspath(trace)).requests(size) if isinstance(trace, (str, os.PathLike)) else trace


def _geometry(disk: Image) -> Geometry:
    if disk.geometry is None:
        raise BadOption(f"'{disk.path}' is a raw disk: it has no map, so no cache can help it")
    return disk.geometry


def _entry_bytes(size: int | str | None, cluster_size: int) -> int:
    entry = min(PARTIAL_ENTRY_SIZE, cluster_size) if size is None else parse_size(size, "entry size")
    if not MIN_ENTRY_SIZE <= entry <= cluster_size or not is_power_of_two(entry):
        raise BadOption(f"entry size is {entry}, expected a power of two from {MIN_ENTRY_SIZE} to {cluster_size}")
    return entry


def _calibration(device: Device) -> Calibration:
    return parse_device(device) if isinstance(device, str) else device


def _setting(today: Today) -> Setting:
    if unknown := today.keys() - Today.__annotations__.keys():
        raise BadOption(f"unknown option {', '.join(sorted(unknown))}, expected one of "
                        f"{', '.join(Today.__annotations__)}")
    return Setting(**today)
