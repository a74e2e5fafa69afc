"""Repair a qcow2 file: plan, journal, write in a safe order, check again.

It does not know how anything is counted (check.py) or planned (mending.py). What must hold: cut off at any write, the
disk reads the same bytes; the journal that takes all back is stable before the first write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cowslice.errors import BadOption, ReadOnly, UnsupportedImage
from cowslice.format.header import Incompatible
from cowslice.ops.check import MAX_CLUSTERS, WINDOW, CheckReport, Progress, check
from cowslice.ops.mendbitmaps import mend_bitmaps
from cowslice.ops.mending import Counting, Flagging, Survey, mend_snapshots
from cowslice.ops.newcounts import NewCounts
from cowslice.ops.overlay import Edit, Overlay, Stage
from cowslice.ops.references import load_tables, read_first_cluster
from cowslice.ops.undojournal import journal_path, write_journal
from cowslice.storage.base import Storage

MODES = ("leaks", "all")
_INCOMPATIBLE = 72  # where the header keeps the incompatible feature bits (spec: Header)
_MOST_ROUNDS = 8


@dataclass(slots=True)
class RepairReport:
    """What a repair found, did or would do, and what is left.

    `after` is the check of what was written, or for a dry run of what would be; `before` itself if nothing changed.
    `edits` are the first changes with at most 64 bytes each, `untold` how many more there are. `left` are sentences on
    what could not be repaired. `journal` is the path of the undo journal, '' for none.
    """

    before: CheckReport
    after: CheckReport
    edits: list[Edit] = field(default_factory=list)
    untold: int = 0
    left: list[str] = field(default_factory=list)
    journal: str = ""
    rebuilt: bool = False
    bits_cleared: bool = False

    @property
    def leaks_fixed(self) -> int:
        return max(0, self.before.leaks - self.after.leaks)

    @property
    def corruptions_fixed(self) -> int:
        return max(0, self.before.corruptions - self.after.corruptions)


def repair(
    storage: Storage, mode: str = "all", *, dry_run: bool = False, journal: str | None = "", workers: int = 2,
    window: int = WINDOW, progress: Progress | None = None, when_journaled: Callable[[str], None] | None = None,
) -> RepairReport:
    """Repair "leaks" or "all" of a file that is open for writing, and which nobody else uses.

    `journal`: where the undo journal goes, '' for a new file beside the image, None for none; `when_journaled` is told
    its path before the first change. `dry_run` changes nothing and needs no writable storage.
    Raises BadOption, ReadOnly, ImageError where the header does not allow it, StorageError.
    """
    if mode not in MODES:
        raise BadOption(f"repair is '{mode}', expected leaks or all")
    if not (storage.writable or dry_run):
        raise ReadOnly(f"cannot repair '{storage.name}': it was opened for reading only")
    work = _Work(storage, mode, workers=workers, window=window, progress=progress)
    try:
        report = work.plan()
        if dry_run or not len(work.overlay):
            return report
        if journal is not None:
            report.journal = journal or journal_path(storage.name)
            write_journal(report.journal, work.overlay)
            if when_journaled:
                when_journaled(report.journal)
        write_out(work.overlay, storage)
        report.after = check(storage, workers=workers, window=window, progress=progress)
        return report
    finally:
        work.overlay.close()


def write_out(overlay: Overlay, storage: Storage) -> None:
    """Write all that is planned, stage for stage, each stable before the next."""
    if overlay.length() > storage.length():
        storage.truncate(overlay.length())
        storage.sync()
    for stage in Stage:
        written = False
        for offset, data in overlay.writes(stage):
            storage.pwrite(offset, data)
            written = True
        if written:
            storage.sync()


class _Work:
    """Planning, in rounds: each begins anew with what the one before learned."""

    def __init__(self, storage: Storage, mode: str, *, workers: int, window: int, progress: Progress | None) -> None:
        self.storage = storage
        self.all = mode == "all"
        self.workers, self.window, self.progress = workers, window, progress
        self.overlay = Overlay(storage)
        self.left: list[str] = []
        self._entries: dict[int, bytes] = {}
        self._damaged_bitmaps = False

    def plan(self) -> RepairReport:
        """Fill the overlay, and say what its image would be."""
        survey = self._count(fresh=False)
        before, rebuilt = survey.report, False
        if survey.unread:
            return self._nothing(before, f"{survey.unread} things could not be read, so nothing is repaired: what they "
                                         "refer to would be taken for leaked")
        if survey.must_rebuild and not self.all:
            before.check_errors += 1
            return self._nothing(before, f"the refcount structures must be rebuilt ({survey.must_rebuild}), which "
                                         "only -r all does")
        if self.all:
            survey = self._mend_entries(self._mend_bitmaps(survey))
            if mend_snapshots(self.overlay) and not survey.must_rebuild:
                survey.must_rebuild = "a new snapshot table needs counts"
            if survey.must_rebuild:
                rebuilt = self._rebuild(survey)
        after = self._flags()
        cleared = self._clear_bits(after)
        self._explain(after)
        return RepairReport(before, after if len(self.overlay) else before, self.overlay.edits, self.overlay.untold,
                            self.left, rebuilt=rebuilt, bits_cleared=cleared)

    def _count(self, *, fresh: bool) -> Survey:
        tables = load_tables(self.overlay if len(self.overlay) else self.storage)
        if tables.clusters > MAX_CLUSTERS:
            raise UnsupportedImage(f"'{self.storage.name}' has {tables.clusters} host clusters, more than the "
                                   f"{MAX_CLUSTERS} that can be repaired", features=("huge file",))
        run = Counting(tables, self.overlay, lower_only=not self.all,
                       fresh=NewCounts(tables, self.overlay) if fresh else None, workers=self.workers,
                       window=self.window, progress=self.progress)
        run.everything()
        return run.survey

    def _mend_bitmaps(self, survey: Survey) -> Survey:
        """Let damaged bitmaps go, and count again without them."""
        self._damaged_bitmaps = mend_bitmaps(self.overlay, self.left)
        if not self._damaged_bitmaps:
            return survey
        self._restart()
        return self._count(fresh=False)

    def _mend_entries(self, survey: Survey) -> Survey:
        """Turn impossible entries into zeros, and count again, until there are no more."""
        for _ in range(_MOST_ROUNDS):
            if not survey.entries:
                break
            self._entries.update(survey.entries)
            self._restart()
            survey = self._count(fresh=False)
        return survey

    def _restart(self) -> None:
        """Forget all but the bitmaps that go and the entries that become zeros."""
        self.overlay.close()
        self.overlay = Overlay(self.storage)
        if self._damaged_bitmaps:
            mend_bitmaps(self.overlay, [])
        for offset, new in self._entries.items():
            self.overlay.change(Stage.MEND, offset, new, "an unaligned cluster of zeros owns space")

    def _rebuild(self, survey: Survey) -> bool:
        """Plan new refcount structures instead of the counts in place."""
        self._restart()
        if survey.dangling:
            self.left.append(f"the refcount structures must be rebuilt ({survey.must_rebuild}), but entries point "
                             "behind the end of the file, where the new ones would lie")
            return False
        mend_snapshots(self.overlay)
        self._count(fresh=True)
        return True

    def _flags(self) -> CheckReport:
        """Plan copied flags; with "leaks" only if nothing else is left then, as qemu-img does."""
        flagging = Flagging(self.overlay, window=self.window)
        edits = len(self.overlay)
        flagging.everything()
        after = self._predict()
        if not self.all and len(self.overlay) > edits and (after.corruptions or after.check_errors):
            self._restart()
            self._count(fresh=False)
            return self._predict()
        self.left.extend(flagging.refused[:16])
        return after

    def _predict(self) -> CheckReport:
        return check(self.overlay if len(self.overlay) else self.storage, workers=self.workers, window=self.window,
                     progress=self.progress)

    def _clear_bits(self, after: CheckReport) -> bool:
        """The image is called sound where nothing but leaks is left."""
        header = read_first_cluster(self.overlay).header
        if after.corruptions or after.check_errors or not (header.is_dirty or header.is_corrupt):
            return False
        sound = header.incompatible & ~(Incompatible.DIRTY | Incompatible.CORRUPT)
        self.overlay.change(Stage.CLEAR, _INCOMPATIBLE, int(sound).to_bytes(8, "big"),
                            "the image is sound: neither dirty nor corrupt")
        return True

    def _nothing(self, before: CheckReport, why: str) -> RepairReport:
        self._restart()
        return RepairReport(before, before, left=[why])

    def _explain(self, after: CheckReport) -> None:
        if after.corruptions and self.all:
            self.left.extend(told.message for told in after.findings[:16] if told.kind == "corruption")

