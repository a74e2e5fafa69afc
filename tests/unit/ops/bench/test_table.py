"""The table is measured whole, on a small disk: that it runs, and that it says what it did."""

from pathlib import Path

import pytest

from cowslice.errors import BadOption, StorageError
from cowslice.ops.bench import delay
from cowslice.ops.bench.cells import CELLS, DISK
from cowslice.ops.bench.picture import check_plot_path, draw_table
from cowslice.ops.bench.table import TableOptions, measure_table
from cowslice.ops.layout import write_populated_image
from cowslice.testing.peers import needs

GIB = 1 << 30


def tiny(directory: Path, **options: object) -> TableOptions:
    chosen = {"peer": False, "size": GIB, "rounds": 1, "requests": 200, "short": True, "directory": str(directory)}
    return TableOptions(**(chosen | options))  # type: ignore[arg-type]


def test_the_published_disk_has_maps_of_five_megabytes_and_a_quarter_of_that() -> None:
    assert {(cell.cluster_bits, cell.map_bytes(DISK)) for cell in CELLS} == {(16, 5 << 20), (18, 5 << 18)}
    assert sum(cell.covers(DISK) for cell in CELLS) == 6


def test_every_cell_is_measured_cold_and_warm(tmp_path: Path) -> None:
    table = measure_table(tiny(tmp_path, layout="random"))
    assert [(cell.cluster_bits, cell.cache_bytes) for cell in table.cells] == [
        (cell.cluster_bits, cell.cache_bytes) for cell in CELLS if cell.entry_bytes == 4096
    ]
    for cell in table.cells:
        assert min(cell.ours_cold, cell.ours_warm, cell.ceiling, cell.metadata_bytes_cold) > 0
        assert cell.metadata_bytes_warm == 0
        assert cell.hit_cold < cell.hit_warm == 1.0
        assert (cell.peer_warm, cell.ratio_warm) == (None, None)
    assert list(tmp_path.iterdir()) == []


@needs("qemu-img")
def test_the_peer_is_measured_beside_us(tmp_path: Path) -> None:
    table = measure_table(tiny(tmp_path, peer=True, cluster_bits=(16,), depth=1))
    assert table.peer.startswith("qemu-img version")
    assert all(cell.peer_cold and cell.peer_warm and cell.ratio_warm for cell in table.cells)


def test_an_image_of_the_users_is_measured_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.qcow2"
    write_populated_image(path, size=GIB, cluster_bits=18)
    before = path.read_bytes()[: 1 << 20]
    table = measure_table(tiny(tmp_path, image=str(path)))
    assert {cell.cluster_bits for cell in table.cells} == {18}
    assert path.read_bytes()[: 1 << 20] == before


def test_sequential_reads_are_measured_too(tmp_path: Path) -> None:
    table = measure_table(tiny(tmp_path, sequential=True, cluster_bits=(16,)))
    assert all(cell.stride == 256 << 10 and cell.peer_hit is None for cell in table.cells)


@pytest.mark.parametrize("options", [{"layout": "sorted"}, {"depth": 0}, {"rounds": 0}, {"requests": 1}])
def test_an_impossible_option_is_named(options: dict[str, object]) -> None:
    with pytest.raises(BadOption, match=next(iter(options))):
        TableOptions(**options)  # type: ignore[arg-type]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table = measure_table(tiny(tmp_path))
    for name in ("table.svg", "table.png"):
        draw_table(table, str(tmp_path / name))
    assert b"<svg" in (tmp_path / "table.svg").read_bytes()[:2000]
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_another_kind_is_refused_before_measuring() -> None:
    with pytest.raises(BadOption, match=r"'table\.pdf', expected a name that ends in \.png or \.svg"):
        check_plot_path("table.pdf")


def test_without_the_programs_a_delay_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(delay, "_PROGRAMS", ("no-such-program",))
    with pytest.raises(StorageError, match="needs no-such-program"), delay.delayed(str(tmp_path), 1):
        pass


def test_no_delay_is_the_file_itself(tmp_path: Path) -> None:
    with delay.delayed(str(tmp_path), 0) as shown:
        assert shown == str(tmp_path)
