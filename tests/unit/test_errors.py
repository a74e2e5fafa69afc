"""Every error says whose fault it is, survives a trip to another process, and is what callers of `open` expect."""

from __future__ import annotations

import errno
import pickle
import subprocess
import sys

import pytest

from cowslice import errors
from cowslice.cli import exitcodes
from cowslice.errors import (
    BadOption,
    Closed,
    CorruptImage,
    CowsliceError,
    CryptoError,
    ImageError,
    InternalError,
    MalformedImage,
    NoSpace,
    OutOfRange,
    ProtocolError,
    RequestError,
    ShortRead,
    StorageError,
    TraceError,
    UnsupportedImage,
)

EVERY_CLASS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CowsliceError)]
FAULTS = (ImageError, TraceError, RequestError, StorageError, CryptoError, ProtocolError, InternalError)


@pytest.mark.parametrize("kind", EVERY_CLASS)
def test_every_error_is_exactly_one_party_s_fault(kind: type[CowsliceError]) -> None:
    assert kind is CowsliceError or sum(issubclass(kind, fault) for fault in FAULTS) == 1


@pytest.mark.parametrize("kind", EVERY_CLASS)
def test_every_error_is_made_from_one_sentence_and_shows_it(kind: type[CowsliceError]) -> None:
    assert str(kind("l1_size is 9, expected 1")) == "l1_size is 9, expected 1"


@pytest.mark.parametrize("kind", EVERY_CLASS)
def test_an_error_fails_a_process_and_has_no_hint_unless_given_one(kind: type[CowsliceError]) -> None:
    special = {BadOption: exitcodes.USAGE, InternalError: exitcodes.OUR_FAULT}
    assert kind("no").exit_code == special.get(kind, exitcodes.FAILED)
    assert kind("no").hint == ""


@pytest.mark.parametrize("kind", EVERY_CLASS)
def test_a_hint_stays_with_the_error_it_was_given_to(kind: type[CowsliceError]) -> None:
    assert kind("no", hint="try -U").hint == "try -U"
    assert kind.hint == ""


@pytest.mark.parametrize(
    "error",
    [
        MalformedImage("m", where="header", field="l1_size", hint="h"),
        UnsupportedImage("m", features=("bit 7", "bit 9")),
        CorruptImage("m", structure="L2 table", offset=65536),
        ShortRead("m", errno=errno.EIO, filename="/a", hint="h"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_all_it_knows_in_another_process(error: CowsliceError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    names = ("hint", "where", "field", "features", "structure", "offset", "errno", "filename")
    assert [getattr(back, name, None) for name in names] == [getattr(error, name, None) for name in names]


@pytest.mark.parametrize("kind", [OutOfRange, Closed, BadOption])
def test_a_wrong_value_is_also_a_value_error(kind: type[CowsliceError]) -> None:
    assert issubclass(kind, ValueError)


def test_a_storage_error_is_an_os_error_with_its_number_and_file() -> None:
    error = StorageError("m", errno=errno.EIO, filename="disk")
    assert isinstance(error, OSError)
    assert (error.errno, error.filename) == (errno.EIO, "disk")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_full_quota_are_no_space(number: int) -> None:
    assert type(StorageError.of(OSError(number, "x"), "write", "disk")) is NoSpace


def test_a_translated_error_says_what_was_done_to_what_and_why() -> None:
    error = StorageError.of(OSError(errno.EACCES, "x"), "open", "disk.img")
    assert type(error) is StorageError
    assert str(error) == "cannot open 'disk.img': Permission denied"
    assert (error.errno, error.filename) == (errno.EACCES, "disk.img")


def test_an_os_error_without_a_number_keeps_its_words() -> None:
    error = StorageError.of(OSError("the cable is out"), "read", "disk")
    assert str(error) == "cannot read 'disk': the cable is out"
    assert error.errno == 0


def test_an_uncaught_storage_error_shows_its_message_in_a_traceback() -> None:
    code = "from cowslice.errors import NoSpace; raise NoSpace('no room on disk', errno=28, filename='disk')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "cowslice.errors.NoSpace: no room on disk"
