"""The table as a picture: one group of bars per cell, rates on a logarithmic scale. PNG or SVG by the file's ending."""

from __future__ import annotations

from pathlib import Path

from cowslice.errors import BadOption
from cowslice.ops.bench.table import Measured, Table
from cowslice.units import format_size

_ENDINGS = (".png", ".svg")
# Told apart in grey as well: light, middle, dark, and a line.
_COLOURS = {"published": "#c9c9c9", "peer": "#e69f00", "cold": "#56b4e9", "warm": "#0072b2"}


def check_plot_path(path: str) -> None:
    """Raise BadOption now rather than after minutes of measuring."""
    if Path(path).suffix.lower() not in _ENDINGS:
        raise BadOption(f"--plot is '{path}', expected a name that ends in .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadOption("--plot needs matplotlib", hint="Install it with: pip install 'cowslice[report]'") from None


def draw_table(table: Table, path: str) -> None:
    """Write the picture of `table` to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bits = sorted({cell.cluster_bits for cell in table.cells})
    figure, rows = pyplot.subplots(len(bits), 1, figsize=(11, 4.2 * len(bits)), squeeze=False, layout="constrained")
    for axes, cluster_bits in zip((row[0] for row in rows), bits, strict=True):
        _draw_cells(axes, [cell for cell in table.cells if cell.cluster_bits == cluster_bits])
        axes.set_title(
            f"{format_size(1 << cluster_bits)} clusters, {table.options['layout']} layout, "
            f"depth {table.options['depth']}"
        )
    rows[0][0].legend(loc="upper left", ncols=5, fontsize=8)
    figure.suptitle(f"Reads per second by slice and cache size\n{table.machine}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_cells(axes: object, cells: list[Measured]) -> None:
    series = {
        "published": ("QEMU 4.0, published", [float(cell.published) for cell in cells]),
        "peer": ("QEMU here, warm", [cell.peer_warm or 0.0 for cell in cells]),
        "cold": ("cowslice, cold", [cell.ours_cold for cell in cells]),
        "warm": ("cowslice, warm", [cell.ours_warm for cell in cells]),
    }
    shown = {key: value for key, value in series.items() if any(value[1])}
    width = 0.8 / len(shown)
    for number, (key, (label, rates)) in enumerate(shown.items()):
        places = [n - 0.4 + (number + 0.5) * width for n in range(len(cells))]
        axes.bar(places, rates, width, label=label, color=_COLOURS[key])  # type: ignore[attr-defined]
    ceilings = [cell.ceiling for cell in cells]
    axes.plot(range(len(cells)), ceilings, "k_", markersize=30, label="plain reads")  # type: ignore[attr-defined]
    axes.set_yscale("log")  # type: ignore[attr-defined]
    axes.set_ylabel("reads per second")  # type: ignore[attr-defined]
    names = [f"{format_size(c.entry_bytes)} slice\n{format_size(c.cache_bytes)} cache" for c in cells]
    axes.set_xticks(range(len(cells)), names, fontsize=8)  # type: ignore[attr-defined]
