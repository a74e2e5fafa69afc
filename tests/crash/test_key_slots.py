"""Power is lost while key slots change: some passphrase opens the image at every moment, and never an erased one."""

from __future__ import annotations

import functools

import pytest

from cowslice.codec.luks1 import decode_luks1, slots_of
from cowslice.format.extensions import CryptoPointer
from cowslice.image import keyslots
from cowslice.image.keymaking import KeyChoices, NewKeys, make_keys
from cowslice.image.keyslots import KeyChange, KeySlots
from cowslice.storage import MemoryStorage, Storage
from cowslice.testing.crash import CrashRecord, CrashState, crash_states
from cowslice.units import SECTOR

OLD, NEW = b"old", b"new"


@pytest.fixture(autouse=True)
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyslots, "ERASE_PASSES", 2)


@functools.cache
def keys() -> NewKeys:
    return make_keys(OLD, KeyChoices(cipher_alg="aes-128", cipher_mode="cbc", iter_time=1))


def begun() -> MemoryStorage:
    """A LUKS header that OLD opens through slot 0, and nothing else."""
    storage = MemoryStorage(bytes(keys().length))
    for offset, content in keys().pieces:
        storage.pwrite(offset, content)
    return storage


def slots(storage: Storage) -> KeySlots:
    return KeySlots(storage, CryptoPointer(0, keys().length))


def opened_by(storage: Storage, passphrase: bytes) -> list[int]:
    return slots_of(decode_luks1(storage.read(0, 2 * SECTOR)), passphrase, storage.read)


def states(change: KeyChange, secret: bytes, image: MemoryStorage) -> list[CrashState]:
    record = CrashRecord()
    slots(record.storage(image.read(0, image.length()))).change(change, secret)
    record.mark("done")
    return list(crash_states(record, limit=6))


def adding(number: int | None, *, force: bool = False) -> KeyChange:
    return KeyChange(active=True, keyslot=number, new_secret=NEW, iter_time=1, force=force)


@pytest.mark.parametrize("number", [1, 6, 7])
def test_the_old_passphrase_stays_while_another_slot_is_written(number: int) -> None:
    for state in states(adding(number), OLD, begun()):
        assert opened_by(state.storage(), OLD) == [0], state.name
        assert opened_by(state.storage(), NEW) == [number] or "done" not in state.marks, state.name


def test_the_only_slot_can_be_overwritten_and_one_opens_at_every_moment() -> None:
    for state in states(adding(0, force=True), OLD, begun()):
        image = state.storage()
        assert opened_by(image, OLD) or opened_by(image, NEW), state.name
        if "done" in state.marks:
            assert (opened_by(image, OLD), opened_by(image, NEW)) == ([], [0]), state.name


@pytest.mark.parametrize("number", [1, 6])
def test_the_other_passphrase_stays_while_a_slot_is_erased(number: int) -> None:
    image = begun()
    slots(image).change(adding(number), OLD)
    material = image.read(decoded := slots(image).header.slots[number].key_offset * SECTOR, SECTOR)
    for state in states(KeyChange(active=False, old_secret=NEW), OLD, image):
        left = state.storage()
        assert opened_by(left, OLD) == [0], state.name
        if "done" in state.marks:
            assert opened_by(left, NEW) == [], state.name
            assert left.read(decoded, SECTOR) != material, state.name
