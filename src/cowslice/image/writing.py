"""Writing guest bytes to one qcow2 image: in place where a cluster is ours alone, else to new clusters.

It does not know how metadata becomes stable (commit.py). The lock is held to plan and to publish, never while bytes are
copied; guest clusters under way are claimed. What must hold: bytes are in their new place before an entry shows them
(with the first barrier this is I2), and a new cluster that is never shown is given back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cowslice.errors import CorruptImage, CowsliceError, RequestError
from cowslice.format.header import CryptMethod, Incompatible
from cowslice.image.claims import Claims
from cowslice.image.commit import Commits
from cowslice.image.headerswitch import switch_header
from cowslice.image.layer import Layer
from cowslice.image.plan import Keep, Planner, Rewrite
from cowslice.image.reading import read_into
from cowslice.image.structures import Structure
from cowslice.image.tables import Tables
from cowslice.units import SECTOR, MiB, round_up

if TYPE_CHECKING:
    from cowslice.image.qcow2 import Qcow2Layer

MOST_AT_ONCE = 4 * MiB     # guest bytes that one plan covers
ZEROS_TO_WRITE = 64 * 1024  # longer zeros are left to the file system
_ZEROS = memoryview(bytes(ZEROS_TO_WRITE))


class Writer:
    """Writes to the top layer of `layers`, which `tables` belong to. Any number of threads may write at once.

    `track`, where set, is told (offset, length) of every change, before it is made. `dirty_bytes` bounds the L2 slices
    that wait for a commit.
    """

    def __init__(self, layers: Sequence[Layer], tables: Tables, commits: Commits, *, dirty_bytes: int) -> None:
        self.layers = layers
        self.layer: Qcow2Layer = tables.layer
        self.tables = tables
        self.commits = commits
        self.track: Callable[[int, int], None] | None = None
        self.claims = Claims(tables.lock)
        header = self.layer.first.header
        self.planner = Planner(header.geometry, version=header.version, data_file=header.has_data_file)
        self._dirty_bytes = dirty_bytes
        self._bits = header.cluster_bits
        self._size = 1 << self._bits
        self._entry = header.geometry.l2_entry_size
        self._encrypted = header.crypt_method != CryptMethod.NONE
        self._most = max(MOST_AT_ONCE >> self._bits, 1) << self._bits
        self._below = layers[1].size if len(layers) > 1 else 0
        length = self.layer.storage.length()
        self._fresh_from = round_up(length, self._size) >> self._bits

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
        plans = []
        for cluster, (word, bitmap) in enumerate(self.entries(first, end - first), first):
            start = cluster << self._bits
            entry = self.layer.checked(planner.decode(word, bitmap), cluster)
            plans.append(planner.write(cluster, entry, max(offset - start, 0), min(offset + length - start, size),
                                       covered=start < self._below))
        for plan in plans:
            if plan.changed:
                self.tables.own_table(plan.cluster)
            if plan.host >= 0:
                self._check_fence(plan.host)
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
                start, got = self.tables.allocator.take(wanted)
                taken.append((start, got))
                new = start >= self._fresh_from  # behind the end of the file
                self._fresh_from = max(self._fresh_from, start + got)
                for cluster in range(start, start + got):
                    index = hosts.index(-1, index)
                    hosts[index], fresh[index] = cluster << self._bits, new
                wanted -= got
        except BaseException as error:
            for start, got in taken:
                self.tables.allocator.give_back(start, got)
            if isinstance(error, CorruptImage):
                self.mark_corrupt(error)
            raise
        return hosts, fresh

    def _check_fence(self, host: int) -> None:
        """Never write guest bytes over metadata, whatever an entry says."""
        if self.planner.data_file:
            return
        found = self.tables.fences.hit(host, self._size)
        if found is not None:
            fault = CorruptImage(
                f"an L2 entry of '{self.layer.name}' points at {host:#x}, where {Structure(found[2]).label} lies: "
                "nothing was written there", structure=Structure(found[2]).label, offset=host)
            self.mark_corrupt(fault)
            raise fault

    def mark_corrupt(self, fault: CowsliceError) -> None:
        """Say on disk that the image is corrupt, and write no more."""
        header = self.layer.first.header
        if self.commits.fault is None and header.version >= 3:
            switch_header(self.layer, incompatible=header.incompatible | Incompatible.CORRUPT)
        self.commits.fault = self.commits.fault or fault

    def _publish(self, plans: Sequence[Rewrite], hosts: Sequence[int]) -> None:
        """Show the new clusters: runs of changed entries go to the map together."""
        self.commits.check()
        words: list[tuple[int, int]] = []
        for plan, host in zip(plans, hosts, strict=True):
            if plan.changed:
                words.append(self.planner.words(plan, host))
            elif words:
                self._store(plan.cluster - len(words), words)
                words = []
        if words:
            self._store(plans[-1].cluster + 1 - len(words), words)
        for plan in plans:
            if plan.dropped is not None:
                self.tables.drop(plan.dropped[0], count=plan.dropped[1] >> self._bits)

    def _store(self, cluster: int, words: Sequence[tuple[int, int]]) -> None:
        self.tables.slices.store(cluster, self.packed(words))

    def _give_back(self, plans: Sequence[Rewrite], hosts: Sequence[int]) -> None:
        if self.planner.data_file:
            return
        with self.tables.lock:
            for plan, host in zip(plans, hosts, strict=True):
                if plan.host < 0:
                    self.tables.allocator.give_back(host >> self._bits, 1)

    # -- moving bytes, without the lock -----------------------------------------------------------------------------

    def _move(self, plans: Sequence[Rewrite], hosts: Sequence[int], fresh: Sequence[bool], offset: int,
              view: memoryview) -> None:
        """Put the old bytes to be kept and the new ones where they belong; host neighbours in one write."""
        end = offset + len(view)
        start, host_start = offset, hosts[0] + (offset & self._size - 1)
        for index, plan in enumerate(plans):
            if plan.keeps:
                self._keep(plan, hosts[index], fresh[index])
            stop = min((plan.cluster + 1) << self._bits, end)
            if stop == end or hosts[index + 1] != hosts[index] + self._size:
                self._put(host_start, start, view[start - offset : stop - offset])
                if stop < end:
                    start, host_start = stop, hosts[index + 1]

    def _keep(self, plan: Rewrite, host: int, fresh: bool) -> None:
        for keep in plan.keeps:
            guest = (plan.cluster << self._bits) + keep.within
            length = keep.length
            if self.planner.data_file:
                length = min(length, self.layer.size - guest)  # a raw data file is as long as the disk
            if length <= 0:
                continue
            if keep.zero and not self._encrypted:
                if not fresh:
                    self._put_zeros(host + keep.within, length)
                continue
            old = bytearray(length)
            if not keep.zero:
                self._read_old(guest, keep, memoryview(old))
            self._put(host + keep.within, guest, memoryview(old))

    def _read_old(self, guest: int, keep: Keep, buffer: memoryview) -> None:
        """The old view; a cluster may reach beyond the end of the disk, where there is nothing."""
        inside = min(keep.length, max(self.layer.size - guest, 0))
        read_into(self.layers, guest, buffer[:inside])

    def _put(self, host: int, guest: int, view: memoryview) -> None:
        cipher = self.layer.cipher
        if not self._encrypted:
            self.layer.data.pwrite(host, view)
            return
        if cipher is None:
            raise RequestError(f"'{self.layer.name}' is encrypted and was opened without its secret")
        luks = self.layer.first.header.crypt_method == CryptMethod.LUKS
        self.layer.data.pwrite(host, cipher.encrypt((host if luks else guest) // SECTOR, view))

    def _put_zeros(self, host: int, length: int) -> None:
        if length > ZEROS_TO_WRITE:
            self.layer.data.zero(host, length)
        else:
            self.layer.data.pwrite(host, _ZEROS[:length])
