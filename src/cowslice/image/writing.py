"""Writing guest bytes to one qcow2 image: in place where a cluster is ours alone, else to new clusters.

It does not know how metadata becomes stable (commit.py). The lock is held to plan and to publish, never while bytes are
copied; guest clusters under way are claimed. What must hold: bytes are in their new place before an entry shows them
(with the first barrier this is I2), and a new cluster that is never shown is given back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from cowslice.errors import CorruptImage, CowsliceError, RequestError
from cowslice.format.entries import Kind
from cowslice.format.header import CryptMethod, Incompatible
from cowslice.image.claims import Claims
from cowslice.image.commit import Commits
from cowslice.image.compressed import run_together
from cowslice.image.headerswitch import switch_header
from cowslice.image.layer import Layer
from cowslice.image.mapping import resolve
from cowslice.image.plan import Keep, Planner, Rewrite
from cowslice.image.reading import read_into
from cowslice.image.structures import Structure
from cowslice.image.tables import Tables
from cowslice.units import SECTOR, MiB, round_up

if TYPE_CHECKING:
    from cowslice.image.qcow2 import Qcow2Layer

MOST_AT_ONCE = 4 * MiB     # guest bytes that one plan covers
SUPPLIED = 32 * MiB        # host bytes that compiled writers find ready
MOST_SUPPLIED = 2048       # clusters of them: a commit takes them back one by one
SHARED_WRITE = 256 * 1024  # of one long write, what one thread copies
ZEROS_TO_WRITE = 64 * 1024  # longer zeros are left to the file system
_ZEROS = memoryview(bytes(ZEROS_TO_WRITE))


class Writer:
    """Writes to the top layer of `layers`, which `tables` belong to. Any number of threads may write at once.

    `track`, where set, is told (offset, length) of every change, before it is made; `resizing` is told another size of
    the disk before it changes, and may refuse it, `resized` the size that it has then; both while nobody is inside.
    `dirty_bytes` bounds the L2 slices that wait for a commit.
    """

    def __init__(self, layers: Sequence[Layer], tables: Tables, commits: Commits, *, dirty_bytes: int) -> None:
        self.layers = layers
        self.layer: Qcow2Layer = tables.layer
        self.tables = tables
        self.commits = commits
        self.track: Callable[[int, int], None] | None = None
        self.resizing: Callable[[int], object] = lambda size: None
        self.resized: Callable[[int], object] = lambda size: None
        self.claims = Claims()
        header = self.layer.first.header
        self.planner = Planner(header.geometry, version=header.version, data_file=header.has_data_file)
        self._dirty_bytes = dirty_bytes
        self._bits = header.cluster_bits
        self._size = 1 << self._bits
        self._entry = header.geometry.l2_entry_size
        self._encrypted = header.crypt_method != CryptMethod.NONE
        self._most = max(MOST_AT_ONCE >> self._bits, 1) << self._bits
        self._below = layers[1].size if len(layers) > 1 else 0

    def write(self, offset: int, view: memoryview) -> None:
        """Write all of `view`, a view of bytes, at guest byte `offset`. The span lies inside the disk."""
        self.commits.check()
        if self.track is not None:
            self.track(offset, len(view))
        done = 0
        while done < len(view):
            end = min(offset + len(view), (offset + done) // self._size * self._size + self._most)
            part = view[done : end - offset]
            self._write_part(offset + done, part)
            done += len(part)
            self.relieve()

    def covered(self, cluster: int) -> bool:
        """Whether a lower layer may show where this guest cluster is unallocated."""
        return cluster << self._bits < self._below

    def relieve(self) -> None:
        """Commit when much waits for it: memory is bounded, and so is the space that drops hold back."""
        tables = self.tables
        if tables.slices.dirty_bytes > self._dirty_bytes or len(tables.drops) > 8192:
            self.commits.flush()

    def provide(self, cluster: int) -> None:
        """Make ready what compiled writes to a guest cluster rely on: its table, its slice, and clusters to take.

        Raises NoSpace, StorageError, CorruptImage, and what forbids writing.
        """
        self.relieve()
        with self.tables.lock:
            self.commits.check()
            self.commits.release()
            self.own_table(cluster)
            self.tables.slices.keep(cluster)
            self.tables.allocator.stock(min(SUPPLIED >> self._bits, MOST_SUPPLIED))

    def entries(self, first: int, count: int) -> list[tuple[int, int]]:
        """The (word, bitmap) of guest clusters from `first`."""
        raw = self.tables.slices.entries(first, count)
        step = self._entry
        if step == 8:
            return [(int.from_bytes(raw[at : at + 8], "big"), 0) for at in range(0, len(raw), 8)]
        return [(int.from_bytes(raw[at : at + 8], "big"), int.from_bytes(raw[at + 8 : at + 16], "big"))
                for at in range(0, len(raw), 16)]

    def packed(self, words: Sequence[tuple[int, int]]) -> bytes:
        """The bytes of entries, as they stand in a table."""
        if self._entry == 8:
            return b"".join([word.to_bytes(8, "big") for word, _ in words])
        return b"".join([word.to_bytes(8, "big") + bitmap.to_bytes(8, "big") for word, bitmap in words])

    def _write_part(self, offset: int, view: memoryview) -> None:
        first, end = offset >> self._bits, (offset + len(view) - 1 >> self._bits) + 1
        with self.claims.on(first, end):
            if self._encrypted:
                offset, view = self._whole_sectors(offset, view)
            with self.tables.lock:
                plans, hosts, fresh = self._plan(first, end, offset, len(view))
            try:
                self._move(plans, hosts, fresh, offset, view)
            except BaseException:
                self._give_back(plans, hosts)
                raise
            with self.tables.lock:
                self._publish(plans, hosts)

    def _whole_sectors(self, offset: int, view: memoryview) -> tuple[int, memoryview]:
        """What is enciphered is enciphered by whole sectors."""
        begin, end = offset // SECTOR * SECTOR, round_up(offset + len(view), SECTOR)
        if (begin, end) == (offset, offset + len(view)):
            return offset, view
        whole = bytearray(end - begin)
        read_into(self.layers, begin, memoryview(whole))
        whole[offset - begin : offset - begin + len(view)] = view
        return begin, memoryview(whole)

    # -- planning, under the lock -----------------------------------------------------------------------------------

    def _plan(self, first: int, end: int, offset: int, length: int) -> tuple[list[Rewrite], list[int], list[bool]]:
        """How each cluster takes its bytes, its host byte offset, and whether that reads as zeros by itself."""
        self.commits.check()
        planner, size = self.planner, self._size
        whole = not planner.data_file and not planner.geometry.extended_l2
        plans = []
        for cluster, (word, bitmap) in enumerate(self.entries(first, end - first), first):
            start = cluster << self._bits
            if not word and not bitmap and whole and offset <= start and start + size <= offset + length:
                plans.append(Rewrite(cluster, -1))
                continue
            entry = self.layer.checked(planner.decode(word, bitmap), cluster)
            plans.append(planner.write(cluster, entry, max(offset - start, 0), min(offset + length - start, size),
                                       covered=start < self._below))
        for plan in plans:
            if plan.host >= 0:
                self.check_fence(plan.host, size)
            if plan.dropped is not None:
                self.check_fence(*plan.dropped)
            if plan.changed:
                self.own_table(plan.cluster)
        hosts, fresh = self._take([plan.host for plan in plans])
        return plans, hosts, fresh

    def _take(self, hosts: list[int]) -> tuple[list[int], list[bool]]:
        """Replace -1 by host clusters of our own, neighbours next to each other where possible."""
        fresh = [False] * len(hosts)
        wanted = hosts.count(-1)
        if not wanted:
            return hosts, fresh
        self.commits.release()
        index, taken = 0, []
        try:
            while wanted:
                fresh_from = self.tables.allocator.fresh_from
                start, got = self.tables.allocator.take(wanted)
                taken.append((start, got))
                for cluster in range(start, start + got):
                    index = hosts.index(-1, index)
                    hosts[index], fresh[index] = cluster << self._bits, start >= fresh_from
                wanted -= got
        except BaseException as error:
            for start, got in taken:
                self.tables.give_back(start, got)
            if isinstance(error, CorruptImage):
                self.mark_corrupt(error)
            raise
        return hosts, fresh

    def own_table(self, cluster: int) -> None:
        """Make sure that a guest cluster has an L2 table of its own. The lock is held. Raises as Tables.own_table."""
        try:
            self.tables.own_table(cluster)
        except CorruptImage as fault:
            self.mark_corrupt(fault)
            raise

    def check_fence(self, host: int, length: int) -> None:
        """Never write guest bytes over metadata, nor give its space away, whatever an entry says. The lock is held."""
        if self.planner.data_file:
            return
        found = self.tables.fences.hit(host, length)
        if found is not None:
            fault = CorruptImage(
                f"an L2 entry of '{self.layer.name}' points at {host:#x}, where {Structure(found[2]).label} lies: "
                "nothing was written there", structure=Structure(found[2]).label, offset=host)
            self.mark_corrupt(fault)
            raise fault

    def mark_corrupt(self, fault: CowsliceError) -> None:
        """Say on disk that the image is corrupt, and write no more."""
        header = self.layer.first.header
        sound, self.commits.fault = self.commits.fault is None, self.commits.fault or fault
        if sound and header.version >= 3:
            switch_header(self.layer, incompatible=header.incompatible | Incompatible.CORRUPT)

    def _publish(self, plans: Sequence[Rewrite], hosts: Sequence[int]) -> None:
        """Show the new clusters: runs of changed entries go to the map together. What is not shown is given back."""
        shown = 0
        try:
            self.commits.check()
            for first, end in _changed_runs(plans):
                words = [self.planner.words(plans[n], hosts[n]) for n in range(first, end)]
                self.tables.slices.store(plans[first].cluster, self.packed(words))
                shown = end
        except BaseException:
            self._give_back(plans[shown:], hosts[shown:])
            plans = plans[:shown]
            raise
        finally:
            for plan in plans:
                if plan.dropped is not None:
                    self.tables.drop(plan.dropped[0], count=plan.dropped[1] >> self._bits)

    def _give_back(self, plans: Sequence[Rewrite], hosts: Sequence[int]) -> None:
        if self.planner.data_file:
            return
        with self.tables.lock:
            for plan, host in zip(plans, hosts, strict=True):
                if plan.host < 0:
                    self.tables.give_back(host >> self._bits)

    # -- moving bytes, without the lock -----------------------------------------------------------------------------

    def _move(self, plans: Sequence[Rewrite], hosts: Sequence[int], fresh: Sequence[bool], offset: int,
              view: memoryview) -> None:
        """Put the new bytes where they belong: host neighbours in one write, clusters with old bytes one by one."""
        end, start = offset + len(view), offset
        for index, plan in enumerate(plans):
            stop = min((plan.cluster + 1) << self._bits, end)
            if plan.keeps:
                begin = max(plan.cluster << self._bits, offset)
                self._put_run(hosts[index - 1], start, begin, view, offset)
                self._merge(plan, hosts[index], fresh[index], begin, view[begin - offset : stop - offset])
                start = stop
            elif stop == end or hosts[index + 1] != hosts[index] + self._size:
                self._put_run(hosts[index], start, stop, view, offset)
                start = stop

    def _put_run(self, host: int, start: int, stop: int, view: memoryview, offset: int) -> None:
        """Write guest bytes [start, stop), of which the last lie in the cluster at `host` and the others before it."""
        if start < stop:
            last = (stop - 1) & ~(self._size - 1)
            self._put(host + start - last, start, view[start - offset : stop - offset])

    def _merge(self, plan: Rewrite, host: int, fresh: bool, start: int, data: memoryview) -> None:
        """Write the new bytes of a cluster and what must stand beside them; in one write where they touch."""
        base = plan.cluster << self._bits
        pieces = [(start - base, data)]
        for keep in plan.keeps:
            old = self._old(base, keep, fresh)
            if old is not None:
                pieces.append((keep.within, old))
            elif not fresh:
                self._put_zeros(host + keep.within, keep.length)
        pieces.sort(key=lambda piece: piece[0])
        for within, joined in _joined(pieces):
            self._put(host + within, base + within, joined)

    def _old(self, base: int, keep: Keep, fresh: bool) -> memoryview | None:
        """The old bytes to be kept, None where zeros do that need not be enciphered."""
        guest = base + keep.within
        inside = min(keep.length, max(self.layer.size - guest, 0))  # nothing is behind the end of the disk
        plain = not self._encrypted
        if plain and (keep.zero or not inside or (fresh and self._reads_as_zeros(guest, inside))):
            return None
        old = memoryview(bytearray(keep.length))
        if not keep.zero:
            read_into(self.layers, guest, old[:inside])
        return old

    def _reads_as_zeros(self, guest: int, length: int) -> bool:
        """Whether that is known of all bytes without reading them: a hole of the backing file, say."""
        depth, piece = resolve(self.layers, guest, length)
        if piece.length < length or piece.kind is Kind.COMPRESSED:
            return False
        layer = self.layers[depth]
        return piece.kind is not Kind.NORMAL or (layer.shows_offsets and layer.data.is_hole(piece.host, length))

    def _put(self, host: int, guest: int, view: memoryview) -> None:
        cipher = self.layer.cipher
        if not self._encrypted:
            self._put_plain(host, view)
            return
        if cipher is None:
            raise RequestError(f"'{self.layer.name}' is encrypted and was opened without its secret")
        self.layer.data.pwrite(host, cipher.encrypt(self.layer.sector_number(host, guest), view))

    def _put_plain(self, host: int, view: memoryview) -> None:
        """Long runs are copied on all cores: the kernel's copy is what they cost."""
        data = self.layer.data
        if len(view) < 2 * SHARED_WRITE or data.fileno() < 0:
            data.pwrite(host, view)
            return
        faults: list[BaseException] = []

        def put(at: int) -> None:
            try:
                data.pwrite(host + at, view[at : at + SHARED_WRITE])
            except BaseException as fault:
                faults.append(fault)

        run_together(range(0, len(view), SHARED_WRITE), put)
        if faults:
            raise faults[0]

    def _put_zeros(self, host: int, length: int) -> None:
        if length > ZEROS_TO_WRITE:
            self.layer.data.zero(host, length)
        else:
            self.layer.data.pwrite(host, _ZEROS[:length])


def _joined(pieces: Sequence[tuple[int, memoryview]]) -> Iterator[tuple[int, memoryview]]:
    """Neighbours that touch as one."""
    first, parts, end = pieces[0][0], [pieces[0][1]], pieces[0][0] + len(pieces[0][1])
    for within, part in pieces[1:]:
        if within != end:
            yield first, parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
            first, parts = within, []
        parts.append(part)
        end = within + len(part)
    yield first, parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


def _changed_runs(plans: Sequence[Rewrite]) -> Iterator[tuple[int, int]]:
    """Cut plans into (first, end) of neighbours whose entries change."""
    first = 0
    for index, plan in enumerate(plans):
        if not plan.changed:
            if first < index:
                yield first, index
            first = index + 1
    if first < len(plans):
        yield first, len(plans)
