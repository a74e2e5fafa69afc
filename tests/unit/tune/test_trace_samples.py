"""A few lines of each trace format as people have them, and the requests that they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from backports import zstd

from cowslice.errors import MalformedTrace
from cowslice.testing.traces import DISCARD, FLUSH, READ, WRITE, ZERO, rows
from cowslice.tune.trace import open_trace

SAMPLES = {
    "fio2": (
        """fio version 2 iolog
/dev/vda add
/dev/vda open
/dev/vda read 8421376 4096
/dev/vda wait 1500 0
/dev/vda write 0 65536
/dev/vda sync 0 0
/dev/vda trim 1048576 1048576
/dev/vda close
""",
        [(0.0, READ, 8421376, 4096), (0.0015, WRITE, 0, 65536), (0.0015, FLUSH, 0, 0),
         (0.0015, DISCARD, 1048576, 1048576)],
    ),
    "fio3": (
        """fio version 3 iolog
20 /mnt/a file.raw add
149 /mnt/a file.raw open
158 /mnt/a file.raw read 249856 4096
181 /mnt/a file.raw write 3104768 8192
1000181 /mnt/a file.raw sync 0 0
1000191 /mnt/a file.raw close
""".replace("/mnt/a file.raw", "/mnt/file.raw"),
        [(158e-6, READ, 249856, 4096), (181e-6, WRITE, 3104768, 8192), (1.000181, FLUSH, 0, 0)],
    ),
    "blkparse": (
        """Input file vda.blktrace.0 added
Input file vda.blktrace.1 added
254,0    1        1     0.000000000   697  A   W 223490 + 8 <- (254,1) 221442
254,0    1        2     0.000001829   697  Q   W 223490 + 8 [kjournald]
254,0    1        3     0.000002197   697  G   W 223490 + 8 [kjournald]
254,0    1        4     0.000004419   697  P   N [kjournald]
254,0    1        5     0.000007000   697  I   W 223490 + 8 [kjournald]
254,0    1        6     0.000009350   697  U   N [kjournald] 1
254,0    1        7     0.000011000   697  D   W 223490 + 8 [kjournald]
254,0    0        1     0.000512300     0  C   W 223490 + 8 [0]
254,0    1        8     0.250000000  1201  D  RA 16 + 256 [cat]
254,0    1        9     0.250100000  1201  D  FN [kworker/1:1H]
254,0    1       10     0.250200000  1201  D   D 2048 + 2048 [fstrim]
CPU0 (254,0):
 Reads Queued:           0,        0KiB\t Writes Queued:           1,        4KiB
 Read Dispatches:        1,      128KiB\t Write Dispatches:        1,        4KiB

Total (254,0):
 Reads Queued:           0,        0KiB\t Writes Queued:           1,        4KiB

Throughput (R/W): 512KiB/s / 16KiB/s
Events (254,0): 11 entries
Skips: 0 forward (0 -   0.0%)
""",
        [(11e-6, WRITE, 223490 * 512, 4096), (0.25, READ, 8192, 131072), (0.2501, FLUSH, 0, 0),
         (0.2502, DISCARD, 1 << 20, 1 << 20)],
    ),
    "qemu": (
        """15434@1606650000.123456:blk_co_preadv blk 0x55d6c5c3b5a0 bs 0x55d6c5c3c0 offset 1048576 bytes 4096 flags 0x0
15434@1606650000.123500:blk_co_pwritev blk 0x55d6c5c3b5a0 bs 0x55d6c5c3c0 offset 0 bytes 512 flags 0x0
15434@1606650001.123456:blk_co_pwritev blk 0x55d6c5c3b5a0 bs 0x55d6c5c3c0 offset 65536 bytes 65536 flags 0x6
""",
        [(0.0, READ, 1048576, 4096), (44e-6, WRITE, 0, 512), (1.0, ZERO, 65536, 65536)],
    ),
    "qemu, a guest's virtio": (
        """virtio_blk_handle_read vdev 0x557d8f8e6340 req 0x7f3bd8005d40 sector 2048 nsectors 8
virtio_blk_handle_write vdev 0x557d8f8e6340 req 0x7f3bd8005d40 sector 0 nsectors 1
virtio_blk_rw_complete vdev 0x557d8f8e6340 req 0x7f3bd8005d40 ret 0
""",
        [(None, READ, 1048576, 4096), (None, WRITE, 0, 512)],
    ),
    "msr": (
        """128166372003061629,hm,1,Read,383496192,32768,413
128166372016382155,hm,1,Write,310983680,16384,1853
""",
        [(0.0, READ, 383496192, 32768), (1.3320526, WRITE, 310983680, 16384)],
    ),
    "alibaba": (
        """419,W,8792731648,16384,1577808144360767
419,R,8792747008,4096,1577808144360967
""",
        [(0.0, WRITE, 8792731648, 16384), (0.0002, READ, 8792747008, 4096)],
    ),
    "tencent": (
        """1538323200,12910952,128,0,1063
1538323201,6213958,8,1,1063
""",
        [(0.0, READ, 12910952 * 512, 65536), (1.0, WRITE, 6213958 * 512, 4096)],
    ),
}  # fmt: skip


@pytest.fixture(params=SAMPLES)
def sample(request: pytest.FixtureRequest) -> tuple[str, str, list[tuple[float | None, int, int, int]]]:
    text, expected = SAMPLES[request.param]
    return request.param.partition(",")[0], text, expected


def test_a_sample_is_recognised_and_read(sample: tuple[str, str, list[tuple[float | None, int, int, int]]],
                                         tmp_path: Path) -> None:
    form, text, expected = sample
    (tmp_path / "trace").write_text(text)
    trace = open_trace(tmp_path / "trace")
    found = rows(trace)
    assert trace.format == form
    assert [row[1:] for row in found] == [row[1:] for row in expected]
    if expected[0][0] is not None:
        assert [row[0] for row in found] == [pytest.approx(row[0], abs=1e-9) for row in expected]


def test_a_sample_in_zstd_is_read_and_one_that_breaks_off_is_named(
    sample: tuple[str, str, list[tuple[float | None, int, int, int]]], tmp_path: Path
) -> None:
    _, text, expected = sample
    path, packed = tmp_path / "trace.zst", zstd.compress(text.encode())
    path.write_bytes(packed)
    assert [row[1:] for row in rows(open_trace(path))] == [row[1:] for row in expected]
    path.write_bytes(packed[:-5])
    with pytest.raises(MalformedTrace, match=r"damaged|no format"):
        rows(open_trace(path))


def test_a_broken_line_of_a_sample_is_passed_over_where_that_is_wanted(
    sample: tuple[str, str, list[tuple[float | None, int, int, int]]], tmp_path: Path
) -> None:
    form, text, expected = sample
    lines = text.splitlines()
    at = len(lines) // 3 + 1  # behind what tells the format
    broken = "blk_co_preadv blk 0x55d6c5c3b5a0 bs 0x55 offset ten" if form == "qemu" else "what, is, this"
    (tmp_path / "trace").write_text("\n".join([*lines[:at], broken, *lines[at:], ""]))
    with pytest.raises(MalformedTrace, match=f"line {at + 1}:") as caught:
        rows(open_trace(tmp_path / "trace"))
    assert "expected" in str(caught.value)
    trace = open_trace(tmp_path / "trace", skip_bad=True)
    assert [row[1:] for row in rows(trace)] == [row[1:] for row in expected]
    assert trace.skipped == 1
