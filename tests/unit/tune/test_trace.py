"""Every trace format reads back what was written in it, and says where a trace breaks it."""

from __future__ import annotations

import contextlib
import gzip
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cowslice.errors import BadOption, CowsliceError, MalformedTrace
from cowslice.testing.traces import READ, WRITE, WRITERS, Asked, asked_lists, capture_bytes, msr_lines, rows
from cowslice.tune.requests import MOST_IN_CHUNK
from cowslice.tune.trace import FORMATS, open_trace

TWO = [Asked(0, READ, 4096, 4096), Asked(10, WRITE, 512, 1024)]


def _file(content: bytes) -> Path:
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(content)
    return Path(file.name)


def _read(content: bytes, **options: object) -> list[tuple[float, int, int, int]]:
    path = _file(content)
    try:
        return rows(open_trace(path, **options))
    finally:
        path.unlink()


def _expected(asked: list[Asked]) -> list[tuple[float, int, int, int]]:
    return [(one.time / 1e6, one.operation, one.offset, one.length) for one in asked]


@pytest.mark.parametrize("form", WRITERS)
@given(data=st.data())
def test_what_is_written_in_a_format_is_read_back(form: str, data: st.DataObject) -> None:
    write, operations, unit, tick = WRITERS[form]
    asked = data.draw(asked_lists(operations=operations, unit=unit, tick=tick or 1))
    found = _read(write(asked).encode())
    assert [row[1:] for row in found] == [row[1:] for row in _expected(asked)]
    if tick:
        assert [row[0] for row in found] == [one.time / 1e6 for one in asked]


@given(asked=asked_lists(), ended=st.booleans())
def test_a_capture_is_read_back(asked: list[Asked], ended: bool) -> None:
    assert _read(capture_bytes(asked, ended=ended)) == _expected(asked)


@pytest.mark.parametrize("form", [name for name in FORMATS if name != "capture"])
@given(text=st.binary(max_size=300) | st.text("0123456789,.-+ RWrD@:x\n\t", max_size=300).map(str.encode))
@example(text=b"\n")
def test_whatever_a_trace_holds_only_our_errors_come_out(form: str, text: bytes) -> None:
    try:
        _read(text, format=form)
    except CowsliceError as error:
        assert isinstance(error, (MalformedTrace, BadOption))


@given(noise=st.binary(max_size=200), at=st.integers(0, 120), skip_bad=st.booleans())
def test_whatever_a_capture_holds_only_our_errors_come_out(noise: bytes, at: int, skip_bad: bool) -> None:
    sound = capture_bytes(TWO)
    with contextlib.suppress(MalformedTrace):
        _read(sound[:at] + noise + sound[at:], format="capture", skip_bad=skip_bad)


@pytest.mark.parametrize("bad", ["1,hm,0,Read,x,4096,1", "1,hm,0,Erase,0,4096,1", "1,hm,0,Read,0,4096", "junk"])
def test_a_malformed_line_is_named_by_file_and_line(bad: str) -> None:
    with pytest.raises(MalformedTrace, match=r"line 3: .* expected") as caught:
        _read((msr_lines(TWO) + bad + "\n").encode())
    assert caught.value.line == 3


def test_malformed_lines_are_counted_where_that_is_wanted() -> None:
    path = _file((msr_lines(TWO) + "junk\n" + msr_lines(TWO)).encode())
    trace = open_trace(path, skip_bad=True)
    assert (len(rows(trace)), trace.skipped) == (4, 1)
    assert (len(rows(trace)), trace.skipped) == (4, 1)
    path.unlink()


def test_of_several_disks_one_must_be_picked_and_they_are_named() -> None:
    both = (msr_lines(TWO, "hm_0") + msr_lines(TWO, "usr_1")).encode()
    with pytest.raises(BadOption, match=r"'hm_0', 'usr_1'"):
        _read(both)
    assert len(_read(both, disk="usr_1")) == 2
    with pytest.raises(BadOption, match=r"'hm_0', 'usr_1'"):
        _read(both, disk="mds_0")


def test_a_compressed_trace_is_read_and_one_that_breaks_off_is_named() -> None:
    packed = gzip.compress(msr_lines(TWO * 1000).encode())
    assert len(_read(packed)) == 2000
    with pytest.raises(MalformedTrace, match="damaged"):
        _read(packed[:-20])


def test_chunks_are_bounded() -> None:
    path = _file(msr_lines(TWO * 50_000).encode())
    assert [len(chunk) for chunk in open_trace(path)] == [MOST_IN_CHUNK, 100_000 - MOST_IN_CHUNK]
    path.unlink()


def test_a_capture_that_was_not_closed_or_lost_requests_says_so() -> None:
    path = _file(capture_bytes(TWO, ended=False, lost=7))
    trace = open_trace(path)
    assert len(rows(trace)) == 2
    assert "7 requests" in trace.notes[0]
    assert "not closed" in trace.notes[1]
    path.unlink()


def test_a_file_that_is_no_trace_is_refused_with_the_formats_that_are_known() -> None:
    with pytest.raises(MalformedTrace, match="MSR Cambridge"):
        _read(b"hello\n")
