"""Advice on one disk or several as a PNG: misses and forecast rates by cache size, today's and advised sizes marked.

It computes no figure that the terminal does not know. What must hold: every line and every mark is told apart without
colour, and has its name beside it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from cowslice.errors import BadOption
from cowslice.tune.advise import Advice, Choice, Line
from cowslice.tune.wording import duration, headline, percent, rate
from cowslice.units import format_size

WIDTH, HEIGHT = 13.0, 5.4  # inches, of one disk
DOTS = 130  # an inch
MOST_DISKS = 24  # on one picture: no viewer shows more than some 16,000 dots of height
MOST_TICKS = 7
HEADROOM = 1.28  # of the highest point: above it stand the names of the marks
QEMU_COLOUR, OUR_COLOUR, INK, DIM, GRID = "#0072b2", "#b5480b", "#1d1c1a", "#6a6760", "#e4e1da"
_DASHES = ((7, 2), (2, 1.5), (9, 2, 2, 2), (4, 2), (12, 3), (1, 1.5), (6, 2, 1, 2, 1, 2), (14, 2, 4, 2), (3, 4))
_MARKERS = "os^Dv<>ph"
_STYLE: Any = {  # matplotlib types each name of a setting
    "font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.labelcolor": DIM, "axes.edgecolor": GRID,
    "xtick.color": DIM, "ytick.color": DIM, "axes.spines.top": False, "axes.spines.right": False,
    "axes.facecolor": "#ffffff", "figure.facecolor": "#fbfaf7", "text.parse_math": False,
}  # fmt: skip


def check_can_draw(disks: int) -> None:
    """Raise BadOption now rather than after a long study: without matplotlib, or for more than MOST_DISKS."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadOption("--png needs matplotlib", hint="Install it with: pip install 'cowslice[report]'") from None
    if disks > MOST_DISKS:
        raise BadOption(f"--png is asked for {disks} disks, expected at most {MOST_DISKS} on one picture")


def picture(advices: Sequence[Advice]) -> bytes:
    """Draw these disks below one another; the bytes of a PNG. Raises BadOption without matplotlib, or for too many."""
    check_can_draw(len(advices))
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT * len(advices)), dpi=DOTS, layout="constrained")
        FigureCanvasAgg(figure)
        figures = figure.subfigures(len(advices), 1, squeeze=False, hspace=0.03)[:, 0]
        for part, advice in zip(figures, advices, strict=True):
            _draw_disk(part, advice)
        target = io.BytesIO()
        figure.savefig(target, format="png", metadata={"Software": "cowslice"})
    return target.getvalue()


def _draw_disk(figure: Any, advice: Advice) -> None:
    figure.suptitle(f"{_shown(headline(advice))}\n{_summary(advice)}", fontsize=11, x=0.01, ha="left")
    misses, rates = figure.subplots(1, 2, sharex=True)
    qemu = [line for line in advice.lines if line.engine == "qemu"]
    ours = next(line for line in advice.lines if line.engine == "cowslice")
    told = {advice.qemu.entry_bytes, advice.qemu_today.entry_bytes}
    kept = [(number, line) for number, line in enumerate(qemu) if line.entry_bytes in told]
    _draw_lines(misses, advice, list(enumerate(qemu)), ours, lambda choice: choice.miss_ratio)
    _draw_lines(rates, advice, kept, ours, lambda choice: choice.rate)
    _name_axes(misses, "Lookups that miss", percent)
    _name_axes(rates, "Requests per second, forecast", rate)
    figure.legend(*misses.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8.5, frameon=False,
                  handlelength=4.5, title="T today   A advised for QEMU (knee)   F full coverage   "
                  "C advised for cowslice", title_fontsize=9)


def _draw_lines(axes: Any, advice: Advice, qemu: Sequence[tuple[int, Line]], ours: Line,
                value: Callable[[Choice], float]) -> None:
    axes.set_xscale("log", base=2)
    axes.margins(x=0.03)
    for number, line in qemu:
        advised = line.entry_bytes == advice.qemu.entry_bytes
        axes.plot(*_points(line, value), color=QEMU_COLOUR, alpha=1.0 if advised else 0.55, dashes=_DASHES[number],
                  linewidth=2.2 if advised else 1.3, marker=_MARKERS[number], markersize=4,
                  markevery=(number % 4, max(5, len(line.choices) // 6)),
                  label=f"QEMU, {format_size(line.entry_bytes)} entries")
    axes.plot(*_points(ours, value), color=OUR_COLOUR, linewidth=3.2, label="cowslice, packed map")
    top = max([value(c) for line in (ours, *(line for _, line in qemu)) for c in line.choices] + [0.01])
    axes.set_ylim(0, HEADROOM * top)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 1.01 * top])
    _mark(axes, advice, value)


def _points(line: Line, value: Callable[[Choice], float]) -> tuple[list[int], list[float]]:
    return [choice.cache_bytes for choice in line.choices], [value(choice) for choice in line.choices]


def _mark(axes: Any, advice: Advice, value: Callable[[Choice], float]) -> None:
    """A vertical line with letters and a size for each setting, a ring where its curve passes."""
    marked = {"T": advice.qemu_today, "A": advice.qemu, "F": advice.qemu_full, "C": advice.ours}
    sizes = sorted({choice.cache_bytes for choice in marked.values()})
    least, most = (math.log2(limit) for limit in axes.get_xlim())
    for place, size in enumerate(sizes):
        letters = " ".join(letter for letter, choice in marked.items() if choice.cache_bytes == size)
        height = 0.985 - 0.055 * place
        leftward = math.log2(size) > least + 0.8 * (most - least)
        axes.axvline(size, ymax=height, color=INK, linewidth=0.9, dashes=_DASHES[place + 1])
        axes.text(size, height, f" {letters}: {format_size(size)} ", transform=axes.get_xaxis_transform(), fontsize=9,
                  fontweight="bold", va="top", ha="right" if leftward else "left", zorder=4,
                  bbox={"facecolor": "#ffffff", "edgecolor": "none", "pad": 0.4})
    for choice in marked.values():
        axes.plot([choice.cache_bytes], [value(choice)], marker="o", markersize=7, markerfacecolor="#ffffff",
                  markeredgecolor=INK, markeredgewidth=1.5, zorder=5, clip_on=False)


def _name_axes(axes: Any, what: str, words: Callable[[float], str]) -> None:
    least, most = axes.get_xlim()
    powers = range(math.ceil(math.log2(least)), math.floor(math.log2(most)) + 1)
    shown = powers[:: max(1, math.ceil(len(powers) / MOST_TICKS))]
    axes.set_xticks([2.0**power for power in shown], [format_size(2**power) for power in shown])
    axes.minorticks_off()
    axes.set_xlabel("cache size")
    axes.set_title(what, loc="left", fontsize=10.5, fontweight="bold")
    axes.yaxis.set_major_formatter(lambda number, _: words(number))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _summary(advice: Advice) -> str:
    """Today's setting and the advised one, in a line each program's user understands."""
    def told(choice: Choice) -> str:
        return (f"{format_size(choice.cache_bytes)} with {format_size(choice.entry_bytes)} entries, "
                f"{rate(choice.rate)} requests/s, p99 {duration(choice.forecast.p99)}")

    return f"today {told(advice.qemu_today)}  →  advised {told(advice.qemu)}"


def _shown(text: str) -> str:
    """Text from outside that a font can draw; what is no character is shown as its code."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
