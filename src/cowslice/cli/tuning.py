"""What each image, trace and storage that `cowslice tune` was given becomes before advice is given.

It does not know how advice looks. Progress goes to standard error; whatever can be refused is, before anything long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cowslice.cli.images import open_image
from cowslice.cli.options import Given, name_image, secret_of
from cowslice.cli.output import warn
from cowslice.cli.progress import maybe_shown

if TYPE_CHECKING:
    from cowslice.image.image import Image
    from cowslice.tune.advise import Advice
    from cowslice.tune.calibrate import Calibration
    from cowslice.tune.guest import Guest
    from cowslice.tune.qemuio import Key
    from cowslice.tune.trace import RequestSource
    from cowslice.tune.verify import Proof


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line asks of every image."""

    given: Given
    traces: tuple[str, ...]
    trace_format: str | None
    disks: tuple[str, ...]
    skip_bad: bool
    workload: str | None
    sizes: dict[str, str | None]
    depth: int
    device: str
    shows_progress: bool
    verifies: bool


@dataclass(frozen=True, slots=True)
class Tuned:
    """The advice on one image, and what it assumes where no trace was given, or ''."""

    advice: Advice
    assumption: str
    skipped: int
    notes: tuple[str, ...]
    proofs: tuple[Proof, ...] | None

    def as_json(self) -> dict[str, Any]:
        from cowslice.tune.wording import as_json

        return {**as_json(self.advice), "assumption": self.assumption or None, "trace-lines-skipped": self.skipped,
                "trace-notes": list(self.notes),
                "verified": None if self.proofs is None else [proof.as_json() for proof in self.proofs]}


def tuned(number: int, image: str, asked: Asked, calibrations: dict[str, Calibration]) -> Tuned:
    """Study one image. Whatever can be refused is, before the storage is measured."""
    from cowslice.tune.advise import advise
    from cowslice.tune.ciphered import deciphering, key_of
    from cowslice.tune.study import Setting, gather

    today = Setting(**_todays_sizes(image, asked))
    with open_image(image, asked.given, warmup="off") as disk:
        today.sizes(disk)
        guest = _guest(number, asked)
        source = guest.requests(disk.size)
        key = key_of(disk, _secret(image, asked))
        calibration = deciphering(_calibration(disk, asked, calibrations), disk, key)
        with maybe_shown("reading the map and the requests", asked.shows_progress, unit="steps") as advance:
            advice = advise(gather(disk, source, calibration=calibration, source=source.name, name=disk.path,
                                   today=today, depth=asked.depth, on_progress=advance))
    proofs = _verified(image, asked, advice, source, key) if asked.verifies else None
    if source.skipped:
        warn(f"'{source.name}': {source.skipped} malformed lines were passed over")
    for note in source.notes:
        warn(f"'{source.name}': {note}")
    return Tuned(advice, guest.assumption, source.skipped, source.notes, proofs)


def _secret(image: str, asked: Asked) -> bytes | None:
    """The passphrase that the command line gives for an image."""
    name = name_image(image, asked.given).options.get("encrypt.key-secret")
    return None if name is None else secret_of(name, asked.given.objects)


def _verified(
    image: str, asked: Asked, advice: Advice, source: RequestSource, key: Key | None
) -> tuple[Proof, ...]:
    from cowslice.tune.verify import verify

    def opener(cache: int, entry: int, direct: bool) -> Image:
        return open_image(image, asked.given, warmup="off", backing=None, direct=direct, cache_size=None,
                          l2_cache_size=cache, l2_cache_entry_size=entry)

    with maybe_shown("replaying", asked.shows_progress, unit="steps") as advance:
        return tuple(verify(advice, source, opener, key=key, on_progress=advance))


def _todays_sizes(image: str, asked: Asked) -> dict[str, Any]:
    """Sizes given as options, else those that stand in --image-opts."""
    named = name_image(image, asked.given).options
    return {name: size if size is not None else named.get(name.replace("_", "-")) for name, size in asked.sizes.items()}


def _guest(number: int, asked: Asked) -> Guest:
    """The trace of that image, or what stands for it."""
    from cowslice.tune.guest import Guest

    trace = asked.traces[number if len(asked.traces) > 1 else 0] if asked.traces else None
    disk = asked.disks[number if len(asked.disks) > 1 else 0] if asked.disks else None
    return Guest(trace=trace, trace_format=asked.trace_format, disk=disk, skip_bad=asked.skip_bad,
                 workload=asked.workload)


def _calibration(disk: Image, asked: Asked, known: dict[str, Calibration]) -> Calibration:
    """The constants that were given, or measured: once for all images on one storage."""
    from cowslice.tune.calibrate import calibrate, parse_device, storage_of

    if asked.device != "calibrate":
        return parse_device(asked.device)
    storage = storage_of(disk.path)
    if storage not in known:
        with maybe_shown("measuring the storage", asked.shows_progress, unit="steps") as advance:
            known[storage] = calibrate(disk.path, on_progress=advance)
            if advance is not None:
                advance(1, 1)  # without QEMU it ends before all steps
    return known[storage]
