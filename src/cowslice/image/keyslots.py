"""The key slots of a LUKS image that is there: a passphrase more, or one less.

It does not know guest data, and the master key stays as it is. What must hold: a slot counts as active only while its
key material is whole and stable, and a slot that opens the image is there at every moment unless erasing was forced.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cowslice.codec.luks1 import (
    DEFAULT_ROUNDS,
    HEADER_BYTES,
    SLOTS,
    KeySlot,
    LuksHeader,
    decode_luks1,
    encode_luks1,
    slots_of,
    unlock,
)
from cowslice.errors import BadOption, CryptoError, MalformedImage
from cowslice.image.keymaking import DEFAULT_ITER_TIME, SALT_BYTES, fill_slot
from cowslice.units import SECTOR

if TYPE_CHECKING:
    from cowslice.format.extensions import CryptoPointer
    from cowslice.storage.base import Storage

ERASE_PASSES = 40  # as LUKS tools overwrite key material: one pass may leave traces on a magnetic disk


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyChange:
    """What becomes of key slots: `active` gives one to `new_secret`, otherwise those that are named are erased.

    `keyslot` names one; where it is missing the first free one is taken, or those that `old_secret` opens are erased.
    `iter_time` is milliseconds. `force` permits what can lose data. Raises BadOption for what does not go together.
    """

    active: bool
    keyslot: int | None = None
    new_secret: bytes | None = field(default=None, repr=False)
    old_secret: bytes | None = field(default=None, repr=False)
    iter_time: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.keyslot is not None and not 0 <= self.keyslot < SLOTS:
            raise BadOption(f"keyslot is {self.keyslot}, expected 0 to {SLOTS - 1}")
        if self.iter_time is not None and self.iter_time < 1:
            raise BadOption(f"iter-time is {self.iter_time}, expected at least 1 millisecond")
        if self.active and self.new_secret is None:
            raise BadOption("a key slot becomes active, but there is no new-secret, expected the passphrase it is for")
        if self.active:
            return
        if self.new_secret is not None or self.iter_time is not None:
            raise BadOption("new-secret or iter-time is given, expected neither where key slots become inactive")
        if self.keyslot is None and self.old_secret is None:
            raise BadOption("which key slot becomes inactive is not said, expected keyslot or old-secret")


class KeySlots:
    """The slots of the LUKS header at `pointer`. Raises MalformedImage, StorageError."""

    def __init__(self, storage: Storage, pointer: CryptoPointer, *, max_rounds: int | None = None) -> None:
        self._storage = storage
        self._pointer = pointer
        self._rounds = DEFAULT_ROUNDS if max_rounds is None else max_rounds
        self.header = decode_luks1(storage.read(pointer.offset, min(pointer.length, HEADER_BYTES)))
        if self.header.payload_offset * SECTOR > pointer.length:
            raise MalformedImage(f"the LUKS header ends at byte {self.header.payload_offset * SECTOR}, expected an end "
                                 f"within its {pointer.length} bytes", where="LUKS header", field="payload offset")

    @property
    def active(self) -> set[int]:
        """The numbers of the slots that are in use."""
        return {number for number, slot in enumerate(self.header.slots) if slot.active}

    def check(self, change: KeyChange) -> None:
        """Raise BadOption for what cannot be, as far as that shows without a key."""
        if change.active:
            self._slot_for(change)
        elif change.keyslot is not None and not change.force:
            if change.keyslot not in self.active:
                raise BadOption(f"keyslot is {change.keyslot}, which is inactive already",
                                hint="--force overwrites its key material once more.")
            self._check_left({change.keyslot}, change)

    def change(self, change: KeyChange, secret: bytes) -> None:
        """Do it, stably. `secret` opens the image. Raises BadOption, CryptoError, StorageError."""
        self.check(change)
        if change.active:
            self._add(change, secret)
            return
        for number in sorted(self._erased_by(change)):
            self._erase(number)

    def _add(self, change: KeyChange, secret: bytes) -> None:
        number = self._slot_for(change)
        known = secret if change.old_secret is None else change.old_secret
        key = unlock(self.header, known, self._read, max_rounds=self._rounds)
        if self.active != {number}:
            self._activate(number, change, key)
            return
        spare = (number + 1) % SLOTS  # so that there is a key while the only one is replaced
        self._activate(spare, change, key)
        self._activate(number, change, key)
        self._erase(spare)

    def _slot_for(self, change: KeyChange) -> int:
        if change.keyslot is None:
            free = set(range(SLOTS)) - self.active
            if not free:
                raise BadOption(f"all {SLOTS} key slots are active, expected a free one or the keyslot to overwrite")
            return min(free)
        if change.keyslot in self.active and not change.force:
            raise BadOption(f"keyslot is {change.keyslot}, which is active, expected a free one: erase it first",
                            hint="--force overwrites it.")
        return change.keyslot

    def _erased_by(self, change: KeyChange) -> set[int]:
        if change.old_secret is None:
            assert change.keyslot is not None
            return {change.keyslot}
        opened = set(slots_of(self.header, change.old_secret, self._read, max_rounds=self._rounds))
        if change.keyslot is not None and change.keyslot not in opened:
            raise CryptoError(f"old-secret does not open key slot {change.keyslot}, expected the passphrase it is for")
        if not opened:
            raise CryptoError("old-secret opens no key slot, expected the passphrase of those to erase")
        wanted = opened if change.keyslot is None else {change.keyslot}
        self._check_left(wanted, change)
        return wanted

    def _check_left(self, erased: set[int], change: KeyChange) -> None:
        if self.active <= erased and not change.force:
            raise BadOption("no key slot would be left, expected another active one: without it all data is lost",
                            hint="Add another passphrase first; --force erases the last one.")

    def _activate(self, number: int, change: KeyChange, key: bytes) -> None:
        """Let a slot open with the new secret: material, then all but its state, then that, each stable in turn."""
        assert change.new_secret is not None
        if number in self.active:
            self._store(_with_slot(self.header, number, active=False))
        milliseconds = DEFAULT_ITER_TIME if change.iter_time is None else change.iter_time
        header, material = fill_slot(self.header, number, change.new_secret, key, iter_time=milliseconds)
        self._write(header.slots[number].key_offset * SECTOR, material)
        self._store(_with_slot(header, number, active=False))
        self._store(header)

    def _erase(self, number: int) -> None:
        """Let a slot open with nothing, and its key material be nowhere."""
        self._store(_with_slot(self.header, number, active=False))
        for _ in range(ERASE_PASSES):
            self._write(self.header.slots[number].key_offset * SECTOR, os.urandom(self.header.slot_sectors * SECTOR))
        self._store(_with_slot(self.header, number, active=False, iterations=0, salt=bytes(SALT_BYTES)))

    def _store(self, header: LuksHeader) -> None:
        """Replace the sectors of the header that change. The state of a slot lies within one."""
        old, new = encode_luks1(self.header), encode_luks1(header)
        for at in range(0, len(new), SECTOR):
            if old[at : at + SECTOR] != new[at : at + SECTOR]:
                self._write(at, new[at : at + SECTOR])
        self.header = header

    def _write(self, at: int, content: bytes) -> None:
        self._storage.pwrite(self._pointer.offset + at, content)
        self._storage.sync()

    def _read(self, at: int, length: int) -> bytes:
        return self._storage.read(self._pointer.offset + at, length)


def _with_slot(header: LuksHeader, number: int, **fields: object) -> LuksHeader:
    slots: list[KeySlot] = list(header.slots)
    slots[number] = replace(slots[number], **fields)  # type: ignore[arg-type]
    return replace(header, slots=tuple(slots))
