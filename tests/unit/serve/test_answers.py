"""What a request is answered with, whatever happens meanwhile."""

from __future__ import annotations

import pytest

import cowslice
from cowslice.errors import Closed, CorruptImage, CowsliceError, CryptoError, StorageError
from cowslice.nbd.events import BadRequest, Context, Request, Session
from cowslice.nbd.wire import BASE_ALLOCATION, ERROR, STRUCTURED_REPLY, Command, ExportFlag, Mode, NbdError
from cowslice.serve import answers
from cowslice.serve.answers import MOST_TOLD, Answers
from cowslice.serve.exports import Export
from tests.unit.serve.rawclient import in_memory, model

K = 1 << 16
READ = Request(Command.READ, 0, 1, 0, 4096)


class BrokenDisk:
    """A disk whose every read fails in one way."""

    fast_path = None
    size = 1 << 20

    def __init__(self, fault: BaseException) -> None:
        self.fault = fault

    def read_into(self, offset: int, buffer: object, *, noted: bool = False) -> None:
        raise self.fault


def answering(disk: object, reports: list[str] | None = None) -> Answers:
    session = Session("", 1 << 20, ExportFlag.HAS_FLAGS, Mode.STRUCTURED, contexts=(Context(0, BASE_ALLOCATION),))
    return Answers(Export(disk), session, (reports if reports is not None else []).append)  # type: ignore[arg-type]


@pytest.mark.parametrize("fault, error", [
    (StorageError("/secret/disk: no", errno=28, filename="/secret/disk"), NbdError.ENOSPC),
    (StorageError("/secret/disk: no", errno=121), NbdError.EIO),
    (CorruptImage("/secret/disk is damaged"), NbdError.EIO),
    (CryptoError("/secret/disk has no key"), NbdError.EPERM),
    (Closed("/secret/disk is closed"), NbdError.ESHUTDOWN),
    (CowsliceError("/secret/disk"), NbdError.EIO),
    (ZeroDivisionError("/secret/disk"), NbdError.EIO),
    (MemoryError(), NbdError.ENOMEM),
])
def test_every_fault_becomes_an_error_without_names(fault: Exception, error: NbdError) -> None:
    reports: list[str] = []
    parts, failed = answering(BrokenDisk(fault), reports).answer(READ)
    said = b"".join(bytes(part) for part in parts)
    assert failed
    assert ERROR.unpack_from(said, STRUCTURED_REPLY.size)[0] == error
    assert b"secret" not in said
    assert isinstance(fault, MemoryError) or "/secret/disk" in reports[0]


def test_a_client_cannot_fill_the_log() -> None:
    reports: list[str] = []
    broken = answering(BrokenDisk(CorruptImage("damaged")), reports)
    for _ in range(3 * MOST_TOLD):
        broken.answer(READ)
    assert len(reports) == MOST_TOLD
    assert "not told" in reports[-1]


def test_a_bad_request_is_answered_with_its_reason() -> None:
    parts, failed = answering(BrokenDisk(Closed("x"))).answer(BadRequest(READ, NbdError.EINVAL, "because"))
    assert failed
    assert b"because" in bytes(parts[0])


def test_a_short_run_of_zeros_is_sent_as_data() -> None:
    image = model("N" * 200 + "ZN" + "Z" * 20 + "N" * 100, cluster_bits=9)
    with cowslice.open(in_memory(image)) as disk:
        parts, failed = answering(disk).answer(Request(Command.READ, 0, 1, 0, disk.size))
    # Two chunks of data about one hole: the lone zero cluster is not worth a chunk.
    assert (len(parts), failed) == (5, False)


def test_reading_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MOST_CACHED", 3 * K)
    read: list[int] = []

    class Disk(BrokenDisk):
        def read_into(self, offset: int, buffer: object, *, noted: bool = False) -> None:
            read.append(len(memoryview(buffer)))  # type: ignore[arg-type]

    parts, failed = answering(Disk(Closed(""))).answer(Request(Command.CACHE, 0, 1, 0, 1 << 40))
    assert (sum(read), failed, len(parts)) == (3 * K, False, 1)
