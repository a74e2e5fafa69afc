"""Traces as the programs themselves write them, read to the request."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from cowslice.testing import peers
from cowslice.testing.traces import READ, WRITE, rows
from cowslice.tune.trace import open_trace
from cowslice.units import MiB


def asked(path: Path, **options: str) -> list[tuple[int, int, int]]:
    """(operation, offset, length) of each request."""
    return [row[1:] for row in rows(open_trace(path, **options))]


@peers.needs("fio")
def test_the_log_that_fio_writes_holds_what_fio_counted(tmp_path: Path) -> None:
    log = tmp_path / "io.log"
    done = peers.run("fio", "--name=a", f"--filename={tmp_path / 'disk.raw'}", "--size=4m", "--ioengine=psync",
                     "--bs=4k,8k", "--rw=randrw", "--number_ios=40", f"--write_iolog={log}", "--output-format=json")
    found = asked(log)
    assert open_trace(log).format == "fio3"
    counted = json.loads(done.stdout[done.stdout.index(b"{"):])["jobs"][0]
    for name, operation, length in (("read", READ, 4096), ("write", WRITE, 8192)):
        assert [one[2] for one in found if one[0] == operation] == [length] * counted[name]["total_ios"]
    assert len(found) >= 40
    assert all(offset + length <= 4 * MiB for _, offset, length in found)


@peers.needs("qemu-io")
@pytest.mark.parametrize("packed", [False, True])
def test_the_events_that_qemu_logs_are_read(tmp_path: Path, packed: bool) -> None:
    disk, log = tmp_path / "disk.raw", tmp_path / "events.log"
    disk.write_bytes(bytes(MiB))
    commands = b"read -q 4096 8192\nwrite -q 65536 512\naio_write -q -z 131072 65536\naio_flush\nread -q 0 512\n"
    events = [word for name in ("blk_co_preadv", "blk_co_pwritev", "blk_root_attach") for word in ("-T", name)]
    done = peers.run("qemu-io", *events, "-f", "raw", disk, stdin=commands)
    log.write_bytes(gzip.compress(done.stderr) if packed else done.stderr)
    found = asked(log)
    assert open_trace(log).format == "qemu"
    assert [(offset, length) for _, offset, length in found] == [
        (4096, 8192), (65536, 512), (131072, 65536), (0, 512)]
    assert [operation == READ for operation, *_ in found] == [True, False, False, True]
