"""Making metadata stable with two barriers, one commit for all who wait.

It does not know what was written, only what is dirty. The invariants that this file owns (docs/invariants.md):
  I1  an L2 entry reaches the disk only after the refcount that owns its cluster is stable (or the dirty bit is).
  I2  an L2 entry exposes only bytes that are stable.
  I3  a refcount falls on disk only after the last reference is gone from disk.
  I4  a table is complete and stable before anything points at it.
  I8  the dirty bit is stable before the first lazily counted write, and off only after the counts are stable.
  I9  after a failed sync the image takes no more writes until it is reopened.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cowslice.errors import CowsliceError, StorageError
from cowslice.format.header import Compatible, Incompatible
from cowslice.image.headerswitch import switch_header
from cowslice.image.tables import Drop, Tables

if TYPE_CHECKING:
    from cowslice.image.refcounts import RefcountStage


@dataclass(frozen=True, slots=True)
class Stage:
    """Copies of all that was dirty at one moment; offsets are host bytes."""

    counts: RefcountStage
    slices: list[tuple[int, bytes, tuple[int, int]]]
    l1: list[tuple[int, bytes]]
    l1_words: dict[int, int]
    drops: list[Drop]

    @property
    def points(self) -> bool:
        """Whether something on disk will point at other clusters than before."""
        return bool(self.slices or self.l1)


@dataclass(frozen=True, slots=True)
class _Freed:
    """Clusters without a reference, that requests which began before `stamp` may still be using."""

    stamp: int
    runs: list[Drop]


class Commits:
    """The commits of one image. `flush` may be called by many threads at once; each commit serves all who wait.

    `refused` is called when writing becomes forbidden, which compiled writers do not ask about.
    """

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.refused: Callable[[], object] = lambda: None
        self._fault: CowsliceError | None = None
        self._turn = threading.Condition()
        self._begun = 0
        self._done = 0
        self._running = False
        self._failed: dict[int, BaseException] = {}
        self._freed: deque[_Freed] = deque()
        self._alone = 0  # the thread that keeps others out

    @property
    def fault(self) -> CowsliceError | None:
        """What forbids writing until the image is opened again, None as long as nothing does."""
        return self._fault

    @fault.setter
    def fault(self, fault: CowsliceError) -> None:
        self._fault = fault
        self.refused()

    def check(self) -> None:
        """Raise what forbids writing: a sync that failed before (I9), or corruption that was found."""
        if self.fault is not None:
            raise copy(self.fault) from self.fault

    def flush(self) -> None:
        """Return when all that was written before the call is stable. Raises StorageError."""
        if self._alone == threading.get_ident():
            self._commit(counts=True)
            return
        with self._turn:
            mine = self._begun + 1
            while self._running and self._done < mine:
                self._turn.wait()
            leads = self._done < mine
            if leads:
                self._running = True
                self._begun = mine
        if leads:
            self._lead(mine)
        else:
            self._tell(mine)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the commits of others out for the block; a flush of this thread commits at once, lazy counts too."""
        with self._turn:
            while self._running:
                self._turn.wait()
            self._running = True
            self._alone = threading.get_ident()
        try:
            yield
        finally:
            with self._turn:
                self._alone = 0
                self._running = False
                self._turn.notify_all()

    def _lead(self, number: int) -> None:
        """Do the commit for everybody who came before it began."""
        failure: BaseException | None = None
        try:
            self._commit()
        except BaseException as error:
            failure = error
            raise
        finally:
            with self._turn:
                if failure is None:
                    self._failed.clear()  # it made stable what earlier ones could not; who waits for those is served
                else:
                    self._failed[number] = failure
                self._done = number
                self._running = False
                self._turn.notify_all()

    def _tell(self, number: int) -> None:
        failure = self._failed.get(number)
        if isinstance(failure, CowsliceError):
            raise copy(failure) from failure
        if failure is not None:
            raise StorageError("the commit that would have covered this flush was interrupted")

    def _commit(self, *, counts: bool = False) -> None:
        self.check()
        with self.tables.lock:
            stage = self._stage(counts=counts or not self.lazy)
        try:
            self._write(stage)
        except BaseException:
            with self.tables.lock:
                self.tables.drops[:0] = stage.drops
            raise
        with self.tables.lock:
            self._settle(stage)

    def _stage(self, *, counts: bool) -> Stage:
        tables = self.tables
        tables.allocator.withdraw()  # first: entries that are copied below then show only what is counted here (I1)
        l1 = tables.l1_writes()
        words = {index: tables.l1[index] for index in tables.changed_l1}
        staged, slices = tables.refcounts.stage(counts=counts), tables.slices.take_dirty()
        drops, tables.drops = tables.drops, []  # last: nothing can fail any more
        return Stage(staged, slices, l1, words, drops)

    def _write(self, stage: Stage) -> None:
        """The order is the whole point: nothing is written before what it relies on is stable."""
        storage = self.tables.layer.storage
        if stage.points and self.lazy:
            self.set_dirty()                                             # I8
        self._grow_counts(stage.counts)                                  # I4, I5
        for offset, content in stage.counts.blocks:
            storage.pwrite(offset, content)
        self.sync()                                                      # barrier 1: I1, I2, I4
        if not stage.points:
            return
        for offset, content, _ in stage.slices:
            storage.pwrite(offset, content)
        for offset, content in stage.l1:
            storage.pwrite(offset, content)
        self.sync()                                                      # barrier 2: now I3 lets counts fall

    def _grow_counts(self, counts: RefcountStage) -> None:
        """New refcount blocks, then what points at them."""
        storage = self.tables.layer.storage
        if not (counts.new_blocks or counts.table_writes or counts.new_table):
            return
        for offset, content in counts.new_blocks:
            storage.pwrite(offset, content)
        table = counts.new_table
        if table is not None:
            storage.pwrite(table.offset, table.content)
        self.sync()
        for offset, content in counts.table_writes:
            storage.pwrite(offset, content)
        if table is not None:
            place = {"refcount_table_offset": table.offset, "refcount_table_clusters": table.clusters}
            self.switch(lambda: switch_header(self.tables.layer, **place))

    def _settle(self, stage: Stage) -> None:
        """All of the stage is stable: what it dropped may fall, and what is drained may be used again."""
        tables = self.tables
        self._settle_counts(stage.counts)
        tables.slices.clean([token for _, _, token in stage.slices])
        tables.changed_l1 -= {index for index, word in stage.l1_words.items() if tables.l1[index] == word}
        self._lower(stage.drops)
        self.release()

    def _settle_counts(self, stage: RefcountStage) -> None:
        """The counts are stable, and so is where they are: former tables lose their reference with the next commit."""
        tables = self.tables
        tables.drops += [Drop(start, count) for start, count in tables.refcounts.settle(stage)]

    def _lower(self, drops: list[Drop]) -> None:
        """Let counts fall that nothing on disk relies on any more."""
        freed = [lowered for drop in drops for lowered in self._lowered(drop)]
        if freed:
            self._freed.append(_Freed(self.tables.passage.stamp(), freed))

    def _lowered(self, drop: Drop) -> list[Drop]:
        """What of a drop has no reference left. The commit is stable already: what fails here is not its failure."""
        tables = self.tables
        bits = tables.layer.geometry.cluster_bits
        if not drop.table and tables.fences.hit(drop.start << bits, drop.count << bits) is not None:
            return []  # only where counts were wrong: what lies there now is not what lost a reference
        try:
            runs = tables.allocator.lower([(drop.start, drop.count)])
        except StorageError:
            tables.drops.append(drop)
            return []
        except CowsliceError as error:
            self.fault = self.fault or error
            return []
        return [Drop(start, count, drop.cause, drop.table) for start, count in runs]

    def release(self) -> None:
        """Let clusters be used again that no request can know any more. The tables' lock is held."""
        tables = self.tables
        while self._freed and tables.passage.passed(self._freed[0].stamp):
            for drop in self._freed.popleft().runs:
                self._free(drop)

    def _free(self, drop: Drop) -> None:
        tables = self.tables
        bits = tables.layer.geometry.cluster_bits
        start, length = drop.start << bits, drop.count << bits
        if drop.table:
            tables.fences.remove(start, length)
        if tables.punching.covers(drop.cause):
            with suppress(StorageError):  # then it only takes space
                tables.layer.storage.discard(start, length)
        tables.allocator.free([(drop.start, drop.count)])

    @property
    def lazy(self) -> bool:
        """Whether counts are written late: the image asks for it, so they are true on disk only when it is closed."""
        header = self.tables.layer.first.header
        return bool(header.compatible & Compatible.LAZY_REFCOUNTS)

    def set_dirty(self) -> None:
        """Say on disk, stably, that counts may be stale (I8)."""
        header = self.tables.layer.first.header
        if not header.is_dirty:
            bits = header.incompatible | Incompatible.DIRTY
            self.switch(lambda: switch_header(self.tables.layer, incompatible=bits))

    def finish(self) -> None:
        """Commit what is left, counts that fall and lazy ones too, and take the dirty bit off. The last call."""
        self.flush()
        while self._write_counts():
            pass
        header = self.tables.layer.first.header
        if header.is_dirty:
            bits = header.incompatible & ~Incompatible.DIRTY
            self.switch(lambda: switch_header(self.tables.layer, incompatible=bits))

    def _write_counts(self) -> bool:
        """Make counts stable that fell since the last commit, and lazy ones; whether there were any.

        Nothing else is dirty: what is dropped is not referred to on disk.
        """
        tables = self.tables
        with tables.lock:
            drops, tables.drops = tables.drops, []
            self._lower(drops)
            self.release()
            stage = tables.refcounts.stage(counts=True)
        if not stage:
            return False
        self._grow_counts(stage)
        for offset, content in stage.blocks:
            tables.layer.storage.pwrite(offset, content)
        self.sync()
        with tables.lock:
            self._settle_counts(stage)
        return True

    def sync(self) -> None:
        """One barrier over the file and its data file. A failure poisons the image (I9)."""
        self.guarded(self._sync_all)

    def _sync_all(self) -> None:
        layer = self.tables.layer
        if layer.data is not layer.storage:
            layer.data.sync()
        layer.storage.sync()

    def guarded(self, act: Callable[[], None]) -> None:
        """Do what makes something stable. Where that fails, what was written before may be lost although later syncs
        succeed: never write again."""
        self.check()
        try:
            act()
        except CowsliceError as error:
            self._poison(error)
            raise

    def switch(self, act: Callable[[], None]) -> None:
        """Do what changes the first cluster, stably (I5). A failure poisons the image too, unless nothing has changed:
        want of room, say. A sync that fails comes after a change."""
        self.check()
        before = self.tables.layer.storage.read(0, self.tables.layer.geometry.cluster_size)
        try:
            act()
        except CowsliceError as error:
            if not self._begins_with(before):
                self._poison(error)
            raise

    def _begins_with(self, content: bytes) -> bool:
        try:
            return self.tables.layer.storage.read(0, len(content)) == content
        except CowsliceError:
            return False

    def _poison(self, error: CowsliceError) -> None:
        name = self.tables.layer.name
        self.fault = StorageError(f"'{name}' takes no more writes until it is opened again: {error}")
