"""`cowslice check -r` and `--undo`: what is told of a repair, and nothing of the work.

The keys of the JSON are those of qemu-img, and ours under "cowslice".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cowslice.cli import checkout, exitcodes
from cowslice.cli.output import complain, say, say_json
from cowslice.cli.progress import maybe_shown
from cowslice.errors import BadOption, NotAnImage
from cowslice.ops.repair import RepairReport, repair
from cowslice.ops.undojournal import journal_path, latest_journal, undo
from cowslice.storage.locate import local_path, locate

if TYPE_CHECKING:
    from cowslice.ops.overlay import Edit
    from cowslice.storage.file import Locking

_SHOWN = 16  # bytes of a change that a line shows


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for on the command line."""

    mode: str
    dry_run: bool
    journal: str
    workers: int
    progress: bool


def repair_image(name: str, wanted: Wanted, *, direct: bool, output: str, quiet: bool, locking: Locking) -> int:
    """Repair, tell what was done, and return the status of the check afterwards."""
    def tell(path: str) -> None:
        if output == "human" and not quiet:
            say(f"What is changed now can be taken back: the undo journal is '{path}'.")

    with locate(name, "r" if wanted.dry_run else "r+", direct=direct, locking=locking) as storage:
        try:
            with maybe_shown("repairing", wanted.progress, unit="tables") as advance:
                done = repair(storage, wanted.mode, dry_run=wanted.dry_run, workers=wanted.workers,
                              journal=None if wanted.dry_run else wanted.journal or journal_path(_path_of(name)),
                              progress=advance, when_journaled=tell)
        except NotAnImage:
            complain(f"'{name}' has format raw, which holds nothing to check", "Only qcow2 images can be checked.")
            return checkout.UNSUPPORTED
    if output == "json":
        say_json(_as_json(done, name, wanted))
    elif not quiet:
        _say_repair(done, wanted)
        return checkout.say_report(done.after, done.after.findings, done.after.untold, name=name, output=output,
                                   quiet=quiet)
    return checkout.status_of(done.after)


def undo_repair(name: str, *, journal: str | None, direct: bool, quiet: bool) -> int:
    """Take the repair back whose journal this is, or the last one."""
    path = journal or latest_journal(_path_of(name))
    with locate(name, "r+", direct=direct) as storage:
        pages = undo(storage, path)
    if not quiet:
        say(f"'{name}' is as it was before the repair ({pages} pages of 4096 bytes taken from '{path}', which may be "
            "removed now).")
    return exitcodes.OK


def _path_of(name: str) -> str:
    path = local_path(name)
    if path is None:
        raise BadOption(f"'{name}' is no local file, so the undo journal cannot lie beside it",
                        hint="Say where it is: --journal PATH.")
    return path


def _as_json(done: RepairReport, name: str, wanted: Wanted) -> dict[str, Any]:
    result = checkout.as_json(done.after, done.after.findings, done.after.untold, name=name)
    if done.leaks_fixed and not wanted.dry_run:
        result["leaks-fixed"] = done.leaks_fixed
    if done.corruptions_fixed and not wanted.dry_run:
        result["corruptions-fixed"] = done.corruptions_fixed
    ours = result.setdefault("cowslice", {})
    ours["dry-run"] = wanted.dry_run
    ours["changes"] = [{"offset": edit.offset, "old": edit.old.hex(), "new": edit.new.hex(), "why": edit.why}
                       for edit in done.edits]
    ours["changes-left-out"] = done.untold
    ours["not-repaired"] = done.left
    if done.journal:
        ours["journal"] = done.journal
    return result


def _say_repair(done: RepairReport, wanted: Wanted) -> None:
    if not done.edits:
        say("Nothing is changed.")
    elif wanted.dry_run:
        say("These changes would be made, in this order:")
        for edit in sorted(done.edits, key=lambda one: (one.stage, one.offset)):
            say(_line(edit))
    else:
        for why in dict.fromkeys(edit.why for edit in done.edits):
            say(f"repaired: {why}")
    if done.untold:
        say(f"... and {done.untold} more changes")
    for why in done.left:
        say(f"not repaired: {why}")
    if wanted.dry_run:
        say("Nothing was changed. After these changes a check would say:")
    elif done.edits:
        say(f"{done.corruptions_fixed} corruptions and {done.leaks_fixed} leaked clusters were repaired. "
            "Checked again:")
    say()


def _line(edit: Edit) -> str:
    old, new = edit.old[:_SHOWN].hex(), edit.new[:_SHOWN].hex()
    more = "..." if len(edit.new) > _SHOWN else ""
    return f"  {edit.offset:#x}: {old}{more} -> {new}{more}  {edit.why}"
