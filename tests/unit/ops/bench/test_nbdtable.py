"""The table over NBD, whole and tiny: every server is asked, medians are those of pairs, nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from cowslice.cli.bench import table
from cowslice.errors import BadOption, StorageError
from cowslice.ops.bench import nbdclients, nbdtable
from cowslice.ops.bench.cells import CELLS
from cowslice.ops.bench.nbdbench import LoadOptions, run_load
from cowslice.ops.bench.nbdcontent import write_compressed
from cowslice.ops.bench.nbdfigures import Figure, NbdMeasured, NbdTable, Summary, figures_of
from cowslice.ops.bench.nbdserver import Served, ceiling_server, our_server, raw_options
from cowslice.ops.bench.nbdtable import NbdTableOptions, measure_nbd_table
from cowslice.ops.layout import Layout
from cowslice.testing.peers import needs, qemu_img_json

GIB = 1 << 30
TINY = {"size": GIB, "rounds": 1, "seconds": 0.02, "content": 1 << 20, "short": True}


@pytest.fixture
def one_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbdtable, "short_cells", lambda: CELLS[:1])


def names(measured: NbdMeasured) -> list[str]:
    return [figure.name for figure in measured.figures]


@needs("qemu-nbd", "qemu-img", "fio", "nbdcopy")
def test_everything_is_measured_beside_qemu(one_cell: None, tmp_path: Path) -> None:
    told: list[str] = []
    found = measure_nbd_table(
        NbdTableOptions(directory=str(tmp_path), **TINY), lambda done, of, what: told.append(f"{done}/{of} {what}")
    )
    cell, shuffled, plain, deflate = found.measured
    assert found.peer.startswith("qemu-nbd")
    assert found.missing == ()
    assert names(cell) == ["generator, depth 32", "CPU for a million", "fio, depth 32", "fio, depth 1"]
    assert names(plain) == ["nbdcopy, 256 KiB"]
    assert names(deflate) == ["generator, depth 32", "CPU for a million", "nbdcopy, 256 KiB"]
    assert all(one.aio in nbdtable.WAYS for one in found.measured)
    assert (cell.layout, shuffled.layout) == ("sequential", "random")
    assert names(shuffled) == names(cell)
    assert all(figure.ours >= 0 and figure.ratio and figure.share for figure in cell.figures)
    assert [figure.bound is None for figure in cell.figures] == [False, True, False, False]
    assert cell.figures[0].ours > 0
    assert told == [
        "0/4 64 KiB clusters, 4 KiB slices, 1 MiB cache, sequential",
        "1/4 64 KiB clusters, 4 KiB slices, 1 MiB cache, random",
        "2/4 a plain image",
        "3/4 a deflate image",
    ]
    assert list(tmp_path.iterdir()) == []


def test_without_the_peers_our_own_server_is_measured(
    one_cell: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbdtable.shutil, "which", lambda name: None)
    monkeypatch.setattr(nbdtable, "has_fio", lambda: False)
    monkeypatch.setattr(nbdtable, "has_nbdcopy", lambda: False)
    found = measure_nbd_table(NbdTableOptions(directory=str(tmp_path), layouts=("random",), **TINY))
    assert (found.peer, found.missing) == ("", ("qemu-nbd", "fio", "nbdcopy", "qemu-img"))
    (cell,) = found.measured
    assert names(cell) == ["generator, depth 32", "CPU for a million"]
    assert [(figure.peer, figure.ratio) for figure in cell.figures] == [(None, None)] * 2
    assert found.losses == ()


def test_ratios_are_medians_of_pairs_and_above_one_is_always_better_for_us() -> None:
    rounds = [
        {"ours": {"r": 10.0, "CPU": 1.0}, "peer": {"r": 5.0, "CPU": 3.0}, "nothing": {"r": 20.0, "CPU": 9.0}},
        {"ours": {"r": 100.0, "CPU": 1.0}, "peer": {"r": 100.0, "CPU": 2.0}, "nothing": {"r": 100.0, "CPU": 9.0}},
        {"ours": {"r": 20.0, "CPU": 1.0}, "peer": {"r": 5.0, "CPU": 1.0}, "nothing": {"r": 15.0, "CPU": 9.0}},
    ]
    rate, cpu = figures_of(rounds)
    assert rate == Figure("r", "reads/s", 20.0, 5.0, None, 2.0, None, 20.0, 3.0)
    assert cpu == Figure("CPU", "s", 1.0, 2.0, None, 2.0, None)


def test_the_table_says_where_the_peer_is_ahead_worst_first() -> None:
    figures = tuple(Figure(f"f{ratio}", "reads/s", 1, 1, None, ratio, None) for ratio in (2.0, 0.9, 0.5))
    cell = NbdMeasured("a cell", 16, 0, 0, 1, True, "threads", figures, "random")
    found = NbdTable({}, "", "qemu-nbd", (), (cell, NbdMeasured("a copy", 16, 0, 0, 0, True, "threads", figures[1:2])))
    assert found.losses == (
        ("a cell, random", "f0.5", 0.5), ("a cell, random", "f0.9", 0.9), ("a copy", "f0.9", 0.9))
    assert found.as_json()["losses"] == found.losses


def test_the_summary_tells_layouts_and_partial_from_whole_maps_and_leaves_out_what_is_no_cell() -> None:
    def cell(covered: bool, ratio: float | None, published: int = 1, layout: Layout = "sequential") -> NbdMeasured:
        figure = Figure("f", "reads/s", 1, 1, 1, ratio, 0.5, 3, 6.0)
        return NbdMeasured("", 16, 0, 0, published, covered, "", (figure,), layout)

    cells = (cell(False, 4.0), cell(False, 2.0), cell(False, 9.0), cell(True, None), cell(True, 1.0, published=0),
             cell(False, 1.0, layout="random"))  # fmt: skip
    found = NbdTable({}, "", "", (), cells)
    assert found.summary == (
        Summary("f", False, 2.0, 4.0, 0.5, 0.5, 6.0),
        Summary("f", True, None, None, 0.5, 0.5, 6.0),
        Summary("f", False, 1.0, 1.0, 0.5, 0.5, 6.0, "random"),
    )
    assert len(found.as_json()["summary"]) == 3


def test_servers_take_turns_at_beginning() -> None:
    asked: list[str] = []
    servers = {"ours": "o", "peer": "p"}
    for number in range(2):
        nbdtable._round(servers, [lambda served, _: (asked.append(served), {"x": 1.0})[1]] * 2, number)  # type: ignore[arg-type,func-returns-value]
    assert "".join(asked) == "opop" + "popo"


@pytest.mark.parametrize(
    "options", [{"layouts": ("sorted",)}, {"aio": "native"}, {"rounds": 0}, {"seconds": 0.0}, {"content": 1}]
)
def test_an_impossible_option_is_named(options: dict[str, object]) -> None:
    with pytest.raises(BadOption, match=next(iter(options))):
        NbdTableOptions(**options)  # type: ignore[arg-type]


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"), our_server(raw_options(str(tmp_path / "none"))):
        pass


def test_a_server_is_gone_afterwards_and_had_used_time(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(1 << 20))
    with our_server(raw_options(str(tmp_path / "raw"))) as served:
        assert served.cpu_seconds() > 0
        rate, cpu = nbdclients.load_rate(served, depth=32, seconds=0.05, seed=1)
        assert rate > 0
        assert cpu > 0
    with pytest.raises(ProcessLookupError):
        os.kill(served.pid, 0)


@pytest.mark.parametrize("structured", [False, True])
def test_a_server_that_does_nothing_answers_every_read_until_the_client_leaves(structured: bool) -> None:
    with ceiling_server(1 << 20) as served:
        for _ in range(2):
            result = run_load(served.uri, LoadOptions(depth=4, length=4096, count=500, structured=structured))
            assert (result.requests, result.errors) == (500, 0)


@needs("qemu-img")
def test_the_deflate_image_is_compressed(tmp_path: Path) -> None:
    path = tmp_path / "image"
    write_compressed(str(path), 3 << 20, 1)
    shown = qemu_img_json("map", path)
    assert all(extent.get("compressed", True) and extent["data"] for extent in shown)
    assert path.stat().st_size < (3 << 20) * 0.8
    assert list(tmp_path.iterdir()) == [path]


def test_a_client_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        nbdclients.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, stdout="", stderr="no server")
    )
    with pytest.raises(StorageError, match="nbdcopy failed: no server"):
        nbdclients.copy_rate(Served("nbd://nowhere", 0), 1)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[NbdTableOptions]:
    """What the command asks for, answered at once."""
    asked: list[NbdTableOptions] = []
    figures = (
        Figure("generator, depth 32", "reads/s", 500_000.0, 1_000_000.0, 600_000.0, 0.5, 0.83, 2_000_000.0, 2.0),
        Figure("CPU for a million", "s", 1.5, 4.5, None, 3.0, None),
    )
    cell = NbdMeasured("a cell", 16, 4096, 1 << 20, 6545, False, "io_uring", figures)

    def answer(options: NbdTableOptions, told: object) -> NbdTable:
        asked.append(options)
        shown = {"layouts": options.layouts, "size": options.size, "rounds": options.rounds, "seconds": options.seconds}
        return NbdTable(shown, "a machine", "qemu-nbd version 7", ("fio",), (cell,))

    monkeypatch.setattr(nbdtable, "measure_nbd_table", answer)
    return asked


def test_the_command_hands_its_words_on(measured: list[NbdTableOptions]) -> None:
    words = ["--over=nbd", "--short", "--layout=random", "--cluster-size=256k", "--seconds=0.5", "--no-peer"]
    done = CliRunner().invoke(table, [*words, "--output=json"], standalone_mode=False)
    assert done.return_value == 0
    assert json.loads(done.stdout)["losses"] == [["a cell, sequential", "generator, depth 32", 0.5]]
    assert measured == [
        NbdTableOptions(layouts=("random",), cluster_bits=(18,), rounds=3, seconds=0.5, short=True, peer=False)
    ]


def test_the_command_tells_people_what_is_faster(measured: list[NbdTableOptions]) -> None:
    done = CliRunner().invoke(table, ["--over=nbd"], standalone_mode=False)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "a cell, sequential, part of the map, published 6,545, qemu-nbd --aio=io_uring" in lines
    assert "generator, depth 32 1,000,000 500,000 0.50x 2,000,000 2.00x 600,000 83%" in lines
    assert "CPU for a million 4.50 s 1.50 s 3.00x - - - -" in lines
    assert "generator, depth 32, sequential, part of the map 0.50x 0.50x 2.00x 83% 83%" in lines
    assert "a cell, sequential: generator, depth 32, 0.50x" in lines
    assert "fio is not installed" in done.stderr


@pytest.mark.parametrize("words", [["-d", "1"], ["--sequential"], ["--plot=x.svg"], ["--storage-latency=1"]])
def test_the_command_refuses_what_only_goes_within_the_process(words: list[str], measured: list[object]) -> None:
    done = CliRunner().invoke(table, ["--over=nbd", *words], standalone_mode=False)
    assert isinstance(done.exception, BadOption)
    assert not measured


def test_the_best_way_is_only_chosen_over_nbd() -> None:
    done = CliRunner().invoke(table, ["--aio=best"], standalone_mode=False)
    assert isinstance(done.exception, BadOption)
