"""The picture: a PNG of each disk, harmless names, told without colour; and a clear word where it cannot be drawn."""

from __future__ import annotations

import io
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cowslice.errors import BadOption
from cowslice.testing.commandline import cowslice
from cowslice.tune import picture as drawing
from cowslice.tune.advise import Advice, advise
from cowslice.tune.picture import MOST_DISKS, check_can_draw, picture
from cowslice.units import format_size
from tests.unit.tune.evidence import SEED, gathered, loop


@pytest.fixture(scope="module")
def advice(tmp_path_factory: pytest.TempPathFactory) -> Advice:
    folder = tmp_path_factory.mktemp("picture")
    return advise(gathered(folder, loop(0.5), layout="random", l2_cache_size="256k"))


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xae\x42\x60\x82")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_each_disk_has_its_place(advice: Advice) -> None:
    width, height = size_of(picture([advice]))
    assert size_of(picture([advice, advice])) == (width, 2 * height)


def test_curves_marks_and_units_are_named(advice: Advice) -> None:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    drawing._draw_disk(figure, advice)
    said = {text.get_text().strip() for text in figure.findobj(match=lambda part: hasattr(part, "get_text"))}
    assert {"Lookups that miss", "Requests per second, forecast", "cache size", "cowslice, packed map"} <= said
    assert {f"QEMU, {size} entries" for size in ("512 B", "4 KiB", "64 KiB")} <= said
    assert {"T: 256 KiB", "F: 1 MiB"} <= said
    dashes = [str(line._dash_pattern) for line in figure.axes[0].lines if str(line.get_label()).startswith("QEMU")]
    assert len(set(dashes)) == len(dashes) == len(advice.evidence.curves.by_entry_bytes)


def test_every_line_passes_through_the_settings_it_stands_for_and_each_advised_one_is_ringed(advice: Advice) -> None:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    drawing._draw_disk(figure, advice)
    misses, rates = figure.axes
    for axes, value in ((misses, lambda choice: choice.miss_ratio), (rates, lambda choice: choice.rate)):
        drawn = {str(line.get_label()): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
        for line in advice.lines:
            ours = line.engine == "cowslice"
            name = "cowslice, packed map" if ours else f"QEMU, {format_size(line.entry_bytes)} entries"
            if name in drawn:
                assert drawn[name] == [(choice.cache_bytes, value(choice)) for choice in line.choices]
        rings = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_markersize() == 7]
        told = (advice.qemu_today, advice.qemu, advice.qemu_full, advice.ours)
        assert rings == [(choice.cache_bytes, value(choice)) for choice in told]


def test_both_engines_are_drawn_in_ink(advice: Advice) -> None:
    from PIL import Image

    with Image.open(io.BytesIO(picture([advice]))) as drawn:
        colours = {f"#{red:02x}{green:02x}{blue:02x}" for _, (red, green, blue) in
                   drawn.convert("RGB").getcolors(maxcolors=1 << 24)}
    assert {drawing.QEMU_COLOUR, drawing.OUR_COLOUR, drawing.INK} <= colours


def test_a_name_from_outside_is_drawn_as_text(advice: Advice) -> None:
    odd = replace(advice.evidence, name="$\\frac{1}{$ \x1b\udcff")
    size_of(picture([replace(advice, evidence=odd)]))


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BadOption, match="needs matplotlib") as caught:
        check_can_draw(1)
    assert "cowslice[report]" in caught.value.hint


def test_more_disks_than_a_picture_holds_are_refused() -> None:
    with pytest.raises(BadOption, match="expected at most"):
        check_can_draw(MOST_DISKS + 1)


def test_the_command_draws_it_beside_its_result(advice: Advice, tmp_path: Path) -> None:
    target = tmp_path / "advice.png"
    said = cowslice("tune", advice.evidence.path, "--device", SEED, "--workload", "zipf:requests=5000", "--png", target)
    assert (said.status, said.err) == (0, "")
    assert "QEMU needs" in said.out
    size_of(target.read_bytes())
    assert list(tmp_path.iterdir()) == [target]
