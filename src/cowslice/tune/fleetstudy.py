"""One disk of a fleet studied, wherever that runs: a job goes in, a small record comes out, and nothing is raised.

It reads the image's map only: no backing file, no data file and no key is opened, whatever the image names. What must
hold: jobs and outcomes can be sent to another process or machine, and the same job has the same outcome everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from cowslice.errors import CowsliceError, InternalError
from cowslice.image.image import open_image
from cowslice.tune.advise import advise
from cowslice.tune.calibrate import Calibration
from cowslice.tune.digest import Digest, digest
from cowslice.tune.fleetlist import Broken, Member
from cowslice.tune.guest import Guest
from cowslice.tune.model import DEPTH
from cowslice.tune.study import Setting, gather
from cowslice.tune.wording import as_json

LEFT_OUT = ("curves", "layers")  # of what is told of one disk: too long for hundreds, and not known from a map alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What holds for every disk of a fleet.

    `guest` says how traces are read, and what is done where there is none. `today` are cache options of all disks;
    those that a member has of its own stand above them.
    """

    guest: Guest = field(default_factory=Guest)
    today: Setting = field(default_factory=Setting)
    depth: int = DEPTH
    force_share: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """One disk, and all that it is studied by."""

    member: Member
    terms: Terms
    calibration: Calibration


@dataclass(frozen=True, slots=True)
class Studied:
    """What there is to know about one disk. `told` is the advice as JSON without its curves."""

    digest: Digest
    told: dict[str, Any]
    assumption: str
    skipped: int
    notes: tuple[str, ...]

    @property
    def image(self) -> str:
        """The path or URL of the image."""
        return self.digest.path

    def as_json(self) -> dict[str, Any]:
        """All of it for scripts."""
        return {**self.told, "assumption": self.assumption or None, "trace-lines-skipped": self.skipped,
                "trace-notes": list(self.notes)}


def study(job: Job) -> Studied | Broken:
    """Study one disk; Broken says why that was not possible."""
    try:
        return _studied(job)
    except CowsliceError as error:
        return broken(job.member, error)
    except Exception as error:  # one disk's misfortune is not that of the others
        return broken(job.member, InternalError(f"our own fault, please report it: {error!r}"))


def broken(member: Member, error: CowsliceError) -> Broken:
    """The record of a disk that could not be studied."""
    return Broken(member.image, str(error), error.hint, type(error).__name__)


def _studied(job: Job) -> Studied:
    member, terms = job.member, job.terms
    guest = terms.guest
    if member.trace is not None:
        guest = replace(guest, trace=member.trace, disk=member.disk, workload=None)
    notes: list[str] = []
    with open_image(member.image, format="qcow2", metadata_only=True, warmup="off", force_share=terms.force_share,
                    on_warning=notes.append) as disk:
        source = guest.requests(disk.size)
        advice = advise(gather(disk, source, calibration=job.calibration, source=source.name, name=member.image,
                               today=_today(member, terms), depth=terms.depth))
    told = {key: value for key, value in as_json(advice).items() if key not in LEFT_OUT}
    return Studied(digest(advice), told, guest.assumption, source.skipped, (*notes, *source.notes))


def _today(member: Member, terms: Terms) -> Setting:
    """The cache options of one disk: its own, or where it has none at all those of all disks."""
    own = any(getattr(member.today, option.name) is not None for option in fields(Setting))
    return member.today if own else terms.today
