"""A disk that is obviously right: bytes in memory, what was flushed of them, and what a crash may show instead.

It knows no image. A sector that was flushed holds after a crash what it held then or anything that was written to it
later; a write that failed may have reached any of its sectors.
"""

from __future__ import annotations

from dataclasses import dataclass

from cowslice.units import SECTOR


@dataclass(frozen=True, slots=True)
class _Age:
    """What a sector holds since `step`; a write that failed left it there or not."""

    step: int
    value: bytes
    certain: bool


class ModelDisk:
    """The bytes of a guest disk. `flush` returns a label; `after_crash` judges a disk by the labels that were seen."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.begin = bytes(content)
        self.step = 0
        self.past: dict[int, list[_Age]] = {}
        self.doubtful: dict[int, set[bytes]] = {}

    @property
    def size(self) -> int:
        return len(self.content)

    def write(self, offset: int, data: bytes) -> None:
        """The bytes are there. In a sector that a failure left in doubt, what is not overwritten stays so."""
        end = offset + len(data)
        for sector, values in self._doubts(offset, len(data)):
            start = sector * SECTOR
            first, last = max(offset, start), min(end, start + SECTOR)
            piece = data[first - offset : last - offset]
            self.doubtful[sector] = {value[: first - start] + piece + value[last - start :] for value in values}
        self.content[offset:end] = data
        self._remember(offset, len(data))

    def zero(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def fail(self, offset: int, data: bytes) -> None:
        """A write of whole sectors failed: each of them holds the old or the new bytes."""
        assert offset % SECTOR == len(data) % SECTOR == 0
        self.step += 1
        for at in range(0, len(data), SECTOR):
            sector, value = (offset + at) // SECTOR, data[at : at + SECTOR]
            self.doubtful.setdefault(sector, set()).add(value)
            self.past.setdefault(sector, []).append(_Age(self.step, value, False))

    def flush(self) -> str:
        """All of it is stable from now on; the label names this moment."""
        return str(self.step)

    def differs(self, offset: int, read: bytes) -> int | None:
        """Offset of the first byte that was read wrongly, or None. What was in doubt is settled by being read."""
        if self.content[offset : offset + len(read)] == read:
            return None
        for sector, values in self._doubts(offset, len(read)):
            start = sector * SECTOR
            seen = read[max(start - offset, 0) : start - offset + SECTOR]
            if seen in values and len(seen) == SECTOR:
                self.content[start : start + SECTOR] = seen
                del self.doubtful[sector]
        wanted = self.content[offset : offset + len(read)]
        wrong = (at for at, (mine, its) in enumerate(zip(wanted, read, strict=True)) if mine != its)
        return next((offset + at for at in wrong), None)

    def after_crash(self, read: bytes, marks: tuple[str, ...]) -> int | None:
        """Offset of the first sector that holds neither what was flushed at the last mark nor anything later."""
        flushed = int(marks[-1]) if marks else 0
        for start in range(0, len(read), SECTOR):
            seen = read[start : start + SECTOR]
            if seen not in self._possible(start // SECTOR, flushed):
                return start
        return None

    def _possible(self, sector: int, flushed: int) -> list[bytes]:
        begin = self.begin[sector * SECTOR : (sector + 1) * SECTOR]
        ages = [_Age(0, begin, True), *self.past.get(sector, ())]
        oldest = max(n for n, age in enumerate(ages) if age.certain and age.step <= flushed)
        return [age.value for age in ages[oldest:]]

    def _doubts(self, offset: int, length: int) -> list[tuple[int, set[bytes]]]:
        first, last = offset // SECTOR, (offset + length - 1) // SECTOR
        return [(sector, values) for sector, values in self.doubtful.items() if first <= sector <= last]

    def _remember(self, offset: int, length: int) -> None:
        self.step += 1
        for sector in range(offset // SECTOR, -(-(offset + length) // SECTOR)):
            value = bytes(self.content[sector * SECTOR : (sector + 1) * SECTOR])
            self.past.setdefault(sector, []).append(_Age(self.step, value, True))
