"""A capture holds every request that threads told it, or the count of those it lost."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cowslice.errors import RequestError
from cowslice.image.capture import Capture
from cowslice.image.recorder import Recorder
from cowslice.tune.trace import open_trace


def test_requests_of_many_threads_are_all_there(tmp_path: Path) -> None:
    recorder = Recorder()
    with Capture(tmp_path / "c", recorder, size=1 << 40) as capture:
        threads = [threading.Thread(target=lambda: [recorder.note(0, n, 512) for n in range(5000)]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    trace = open_trace(tmp_path / "c")
    there = sum(len(chunk) for chunk in trace)
    assert (there + capture.lost, trace.notes) == (15000, () if not capture.lost else trace.notes)


def test_a_request_longer_than_a_record_can_say_keeps_its_length(tmp_path: Path) -> None:
    recorder = Recorder()
    with Capture(tmp_path / "c", recorder, size=1 << 40):
        recorder.note(4, 512, 1 << 39)
    assert [chunk.length.tolist() for chunk in open_trace(tmp_path / "c")] == [[1 << 39]]


def test_a_second_capture_of_a_disk_is_refused(tmp_path: Path) -> None:
    recorder = Recorder()
    with Capture(tmp_path / "c", recorder, size=1), pytest.raises(RequestError, match="under way"):
        Capture(tmp_path / "d", recorder, size=1)
