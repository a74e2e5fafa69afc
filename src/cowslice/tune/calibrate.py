"""How fast the storage under an image is: random reads of 4 and 64 KiB, alone and 32 at once, by us and by QEMU.

It does not know what the constants are for. Only places that hold data are read, and where the system can, around its
page cache: a hole or a cached page would say nothing about the storage.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from cowslice.errors import BadOption, CowsliceError, StorageError
from cowslice.image.image import Image, open_image
from cowslice.storage.locate import local_path, locate
from cowslice.tune import qemuio
from cowslice.tune.curvepacked import SLICE_BYTES
from cowslice.tune.model import DEPTH, OUR_CPU, QEMU_CPU, Device
from cowslice.tune.simulatereplay import weigh
from cowslice.units import GiB, KiB, MiB

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Offsets = NDArray[np.int64]

SECONDS = 0.25  # of each measurement by us; there are five, and QEMU's take about as long
ROUNDS = 3  # of each measurement, of which the best counts
SMALL, LARGE = 4 * KiB, 64 * KiB
BATCH_BYTES = 64 * MiB  # memory that one batch of reads may fill
_QEMU_READS = 2000  # of each measurement by QEMU: on a disk of 10 ms, depth 1 then takes 20 s
_QEMU_SECONDS = 0.5  # after which no further round is begun
_MISS_WORK = 1.4  # times packing: finding room, evicting and showing a slice come with it
_MOST_PATIENCE = 4.0  # seconds of reads that a slow disk is asked for, by what we measured before
_WORDS = {"read4k": "read_4k", "read64k": "read_64k", "rate4k": "rate_4k", "rate64k": "rate_64k"}

Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The storage as each engine sees it. `direct`: around the page cache. `measured_qemu`: QEMU measured its own."""

    ours: Device
    qemu: Device
    direct: bool
    measured_qemu: bool
    given: bool = False


def parse_device(text: str) -> Calibration:
    """Constants as they are written: "read4k=177us,read64k=423us,rate4k=56700,rate64k=8090[,cpu=12.6us]".

    Times in s, ms or us; rates per second. `cpu` is QEMU's. Raises BadOption that says what is missing.
    """
    given: dict[str, str] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        given[name.strip()] = value.strip()
    unknown = given.keys() - _WORDS.keys() - {"cpu"}
    missing = _WORDS.keys() - given.keys()
    if unknown or missing:
        wrong = f"an unknown '{min(unknown)}'" if unknown else f"no {min(missing)}"
        raise BadOption(f"--device has {wrong}, expected read4k=TIME,read64k=TIME,rate4k=N,rate64k=N[,cpu=TIME]",
                        hint="for example --device read4k=177us,read64k=423us,rate4k=56700,rate64k=8090")
    numbers = {_WORDS[name]: _number(name, given[name]) for name in _WORDS}
    cpu = _number("cpu", given["cpu"]) if "cpu" in given else QEMU_CPU
    return Calibration(Device(**numbers, cpu=OUR_CPU), Device(**numbers, cpu=cpu), True, False, given=True)


def calibrate(name: str, *, seconds: float = SECONDS, seed: int = 0, on_progress: Advance | None = None) -> Calibration:
    """Measure the storage under the file `name`, a path or a URL; `seconds` per measurement.

    Raises StorageError and what opening the file raises. Without qemu-io, QEMU is taken to read as fast as we do.
    """
    size, spans = _data_spans(name)
    dice = np.random.default_rng(seed)
    places = {length: _places(spans, length, dice) for length in (SMALL, LARGE)}
    tell = on_progress or (lambda done, total: None)
    disk, direct = _opened(name)
    figures: list[float] = []
    with disk:
        for depth in (1, DEPTH):
            for length in (SMALL, LARGE):
                figures.append(rate_of(disk, places[length], length=length, depth=depth, seconds=seconds))
                tell(len(figures), 9)
    ours = Device(read_4k=1 / figures[0], read_64k=1 / figures[1], rate_4k=figures[2], rate_64k=figures[3],
                  cpu=_our_cpu(seconds), miss_cpu=_our_miss_cpu())
    tell(5, 9)
    path = local_path(name)
    if path is None or not qemuio.version():
        return Calibration(ours, replace(ours, cpu=QEMU_CPU), direct, False)
    return Calibration(ours, _by_qemu(path, ours, places, size, direct=direct, tell=tell), direct, True)


def calibrate_any(names: Sequence[str]) -> Calibration:
    """Measure the storage under the first of these files that can be measured; all lie on the same.

    Raises what the last one raises.
    """
    for name in names[:-1]:
        try:
            return calibrate(name)
        except CowsliceError:
            continue
    return calibrate(names[-1])


def storage_of(name: str) -> str:
    """A word that files share which lie on one storage: in one file system, or on one server."""
    path = local_path(name)
    if path is None:
        protocol, _, rest = name.partition("://")
        return f"{protocol}://{rest.partition('/')[0]}"
    try:
        return f"device {os.stat(path).st_dev}"
    except OSError:  # it may be there where it will be read
        return os.path.dirname(path)


def as_json(calibration: Calibration) -> dict[str, object]:
    """The constants by name: seconds, and reads per second."""
    def named(device: Device) -> dict[str, float]:
        return {field.name: getattr(device, field.name) for field in fields(device)}

    return {"cowslice": named(calibration.ours), "qemu": named(calibration.qemu), "direct": calibration.direct,
            "measured-by-qemu": calibration.measured_qemu, "given": calibration.given}


def _number(name: str, text: str) -> float:
    scale = 1.0
    for unit, factor in (("us", 1e-6), ("ms", 1e-3), ("s", 1.0)):
        if text.endswith(unit) and not name.startswith("rate"):
            text, scale = text.removesuffix(unit), factor
            break
    try:
        number = float(text) * scale
    except ValueError:
        number = -1.0
    if not 1e-9 < number < 1e9:
        raise BadOption(f"{name} of --device is '{text}', expected a positive number")
    return number


def _data_spans(name: str) -> tuple[int, list[tuple[int, int]]]:
    """(length of the file, its places that hold data); the whole file where none is known."""
    with locate(name, locking="force-share") as storage:
        size = storage.length()
        spans = [(span.offset, span.length) for span in storage.extents(0, size) if span.data]
    if size < SMALL:
        raise StorageError(f"'{name}' has {size} bytes, expected at least {SMALL} to measure its storage",
                           filename=name)
    return size, [span for span in spans if span[1] >= SMALL] or [(0, size)]


def _places(spans: list[tuple[int, int]], length: int, dice: np.random.Generator, count: int = 1 << 16) -> Offsets:
    """Random offsets of reads inside the spans, on block boundaries; a small file is read again and again."""
    fitting = [span for span in spans if span[1] >= length] or [max(spans, key=lambda span: span[1])]
    starts, lengths = np.array(fitting, dtype=np.int64).T
    chosen = dice.choice(len(fitting), count, p=lengths / lengths.sum())
    room = np.maximum(lengths[chosen] - length, 0) // SMALL
    found: Offsets = (starts[chosen] + (dice.random(count) * (room + 1)).astype(np.int64) * SMALL) // SMALL * SMALL
    return found


def _opened(name: str) -> tuple[Image, bool]:
    """The file as plain bytes, around the page cache if that can be."""
    if local_path(name) is not None:
        try:
            disk = open_image(name, format="raw", force_share=True, warmup="off", direct=True)
            disk.read(0, 512)
            return disk, True
        except (BadOption, StorageError):
            pass
    return open_image(name, format="raw", force_share=True, warmup="off"), False


def rate_of(disk: Image, places: Offsets, *, length: int, depth: int, seconds: float) -> float:
    """Reads of these places per second, for at least so many seconds: the best of ROUNDS parts of that time.

    What else the machine does makes them slower, never faster; and the first may load libraries.
    """
    return max(_rate(disk, places, length=length, depth=depth, seconds=seconds / ROUNDS) for _ in range(ROUNDS))


def _rate(disk: Image, places: Offsets, *, length: int, depth: int, seconds: float) -> float:
    """Reads per second, over and over."""
    places = np.minimum(places, max(0, (disk.size - length) // SMALL * SMALL))
    length = min(length, disk.size)
    batch, most = 4 * depth, max(depth, min(1 << 14, BATCH_BYTES // length))
    out = memoryview(bytearray(most * length))
    while True:
        done, began, took = 0, time.perf_counter(), 0.0
        while took < seconds:
            chosen = np.take(places, range(done, done + batch), mode="wrap")
            disk.read_many(chosen, length, out[: batch * length], depth=depth)
            done += batch
            took = time.perf_counter() - began
            if took < seconds / 8 and done == batch < most:
                break  # a batch that ends so soon measures its own beginning and end: take a larger one
        else:
            return done / took
        batch = min(2 * batch, most)


def _our_cpu(seconds: float) -> float:
    """Seconds of a request by the compiled path on a file that is a hole in memory."""
    handle = os.memfd_create("cowslice-calibrate")
    try:
        os.truncate(handle, 64 * MiB)
        places = np.arange(0, 64 * MiB, SMALL, dtype=np.int64)
        with open_image(f"/proc/self/fd/{handle}", format="raw", force_share=True, warmup="off") as disk:
            return 1 / rate_of(disk, places, length=SMALL, depth=DEPTH, seconds=seconds / 2)
    finally:
        os.close(handle)


def _our_miss_cpu() -> float:
    """Seconds of a miss besides its read: to pack a slice of clusters in no order, with all processors at work."""
    slices = LARGE // SLICE_BYTES
    clusters = np.random.default_rng(0).permutation(LARGE // 8).astype(">u8") << 16
    table, sizes = clusters.tobytes(), np.empty(slices, np.uint16)
    times = []
    for _ in range(50):
        began = time.perf_counter()
        weigh(table, SLICE_BYTES, 16, False, sizes)
        times.append(time.perf_counter() - began)
    return _MISS_WORK * min(times) / slices / len(os.sched_getaffinity(0))


def _by_qemu(path: str, ours: Device, places: dict[int, Offsets], size: int, *, direct: bool,
             tell: Advance) -> Device:
    """The same constants as QEMU sees them; what it spends on each command is its processor time."""
    def reads(count: int, length: int) -> list[tuple[int, int]]:
        last = max(0, (size - length) // SMALL * SMALL)
        return [(min(int(place), last), min(length, size)) for place in places[length][:count]]

    idle = qemuio.null_target(max(size, GiB))
    cpu = {depth: quickest(idle, reads(5 * _QEMU_READS, SMALL), depth) for depth in (1, DEPTH)}
    target = qemuio.raw_target(path, direct=direct)
    figures: dict[tuple[int, int], float] = {}
    for depth, length, each in ((1, SMALL, ours.read_4k), (1, LARGE, ours.read_64k),
                                (DEPTH, SMALL, 1 / ours.rate_4k), (DEPTH, LARGE, 1 / ours.rate_64k)):
        count = int(min(_QEMU_READS if depth == 1 else 5 * _QEMU_READS, max(50, _MOST_PATIENCE / each)))
        figures[depth, length] = quickest(target, reads(count, length), depth)
        tell(5 + len(figures), 9)
    return Device(read_4k=max(figures[1, SMALL] - cpu[1], 1e-7), read_64k=max(figures[1, LARGE] - cpu[1], 1e-7),
                  rate_4k=1 / figures[DEPTH, SMALL], rate_64k=1 / figures[DEPTH, LARGE], cpu=cpu[DEPTH])


def quickest(target: str, spans: list[tuple[int, int]], depth: int, *, key: qemuio.Key | None = None) -> float:
    """Seconds of a read by QEMU. What else the machine does makes it slower, never quicker."""
    patience = time.monotonic() + _QEMU_SECONDS
    best = qemuio.replay(target, spans, depth=depth, key=key).rate
    for _ in range(1, ROUNDS):
        if time.monotonic() < patience:
            best = max(best, qemuio.replay(target, spans, depth=depth, key=key).rate)
    return 1 / best
