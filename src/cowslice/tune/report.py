"""One page on one disk or several: advice, curves, forecast, heat map and packing, self-contained and without script.

It computes no figure that the terminal does not know. Everything from outside is escaped, nothing is loaded from
anywhere, and no line or mark is told by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from cowslice.tune.advise import Advice, Choice, Line
from cowslice.tune.paste import option_size
from cowslice.tune.verify import Proof
from cowslice.tune.wording import duration, headline, pasted, percent, percent_exactly, rate, sentences, verdict
from cowslice.units import format_size

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 292, 72, 50  # of a chart, in its own units
TOP, RIGHT = 22, 24
NAME_WIDTH = 46  # of the longest entry size where letters are largest
REGIONS = 96  # of the disk, in the picture of how the map packs
DASHES = ("", "7 4", "2 3", "10 3 2 3", "4 2", "12 5", "1 4", "6 2 2 2 2 2", "14 2 2 2")
_STYLE = """
:root{--ground:#fbfaf7;--card:#fff;--ink:#1d1c1a;--dim:#6a6760;--line:#e4e1da;--a:#0072b2;--b:#b5480b;--hot:#0072b2}
@media(prefers-color-scheme:dark){:root{--ground:#161614;--card:#201f1d;--ink:#eceae4;--dim:#a09c93;--line:#35332f;
--a:#56b4e9;--b:#ffa860;--hot:#56b4e9}}
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,sans-serif;
font-variant-numeric:tabular-nums}main{max-width:1120px;margin:0 auto;padding:14px 16px}h1{font-size:19px;margin:4px 0;
overflow-wrap:anywhere}h2{font-size:15px;margin:0 0 6px}.card{background:var(--card);border:1px solid var(--line);
border-radius:10px;padding:12px 14px;min-width:0;margin:0}.grid{display:grid;gap:12px;margin:12px 0;
grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}.dim{color:var(--dim);font-size:13px}
ul{margin:0;padding-left:18px}li{margin:3px 0}svg{display:block;width:100%;height:auto}.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13px}td,th{padding:3px 5px;text-align:right;white-space:nowrap;
border-top:1px solid var(--line)}th{font-weight:600;border-top:0}td:first-child,th:first-child{text-align:left;
padding-left:0;white-space:normal}pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--ground);border-radius:6px;padding:8px;
margin:4px 0;font-size:13px}text{fill:var(--dim);font-size:12px}.mark{stroke:var(--ink);fill:var(--ink)}
text.mark,.name{paint-order:stroke;stroke:var(--card);stroke-width:4px}text.mark{font-weight:700}
.axis{stroke:var(--line)}svg.map{border:1px solid var(--line)}path{fill:none;
stroke-width:2}.q{stroke:var(--a)}.c{stroke:var(--b)}.key{font-size:13px}
.key svg{display:inline-block;width:34px;height:10px;vertical-align:middle}.key span{margin-right:14px;
white-space:nowrap}@media(max-width:500px){text{font-size:22px}
main{padding:8px}.card{padding:10px}table{font-size:11px}td,th{padding:3px 2px}}
"""


@dataclass(frozen=True, slots=True)
class Told:
    """One disk on the page: its advice, what that assumes or '', and forecasts held against replays where there are."""

    advice: Advice
    assumption: str = ""
    proofs: Sequence[Proof] = ()


def page(disks: Sequence[Told]) -> str:
    """The page on these disks."""
    title = "Cache advice: " + ", ".join(disk.advice.evidence.name for disk in disks)
    body = "".join(_section(disk) for disk in disks)
    return (f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="viewport" content="width='
            f'device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n<link rel="icon" '
            f'href="data:,">\n<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n<main>{body}</main>\n</html>\n')


def _section(disk: Told) -> str:
    advice = disk.advice
    said = "".join(f"<li>{_text(sentence.text)}</li>" for sentence in sentences(advice))
    assumed = f'<p class="dim">{_text(disk.assumption)}</p>' if disk.assumption else ""
    lines = [line for line in advice.lines if line.engine == "qemu"]
    ours = next(line for line in advice.lines if line.engine == "cowslice")
    best = next(line for line in lines if line.entry_bytes == advice.qemu.entry_bytes)
    misses = _chart(advice, [*lines, ours], lambda choice: choice.miss_ratio, _shares,
                    ("share of lookups that miss", percent))
    rates = _chart(advice, [best, ours], lambda choice: choice.rate, _decades,
                   ("requests per second, forecast, logarithmic", rate))
    marks = '<p class="dim">Marks: T today, A advised (knee), F full coverage; C advised for cowslice.</p>'
    return (f'<section data-verdict="{verdict(advice)}"><h1>{_text(headline(advice))}</h1>{assumed}'
            f'<div class="card"><h2>Advice</h2><ul>{said}</ul></div>'
            f'<div class="grid">{_card("Misses by cache size", misses + marks + _key([*lines, ours]))}'
            f'{_card("Rate by cache size", rates + marks + _key([best, ours]))}'
            f'{_card("Where the guest went", _heat(advice))}{_card("How the map packs, by region", _packing(advice))}'
            f'{_card("Settings", _table(advice))}{_card("To paste", _pastes(advice))}</div>'
            f'{_card("Verified", _verified(disk.proofs)) if disk.proofs else ""}</section>')


def _card(title: str, content: str) -> str:
    return f'<figure class="card"><h2>{title}</h2>{content}</figure>'


@dataclass(frozen=True, slots=True)
class _Axis:
    """Upwards in a chart: from `least` to `most`, by the value itself or by its logarithm, with a rule at each tick."""

    least: float
    most: float
    ticks: tuple[float, ...]
    logarithmic: bool

    def y(self, value: float) -> float:
        """Where a value stands, from the top."""
        share = (math.log(max(value, self.least) / self.least) / math.log(self.most / self.least) if self.logarithmic
                 else (value - self.least) / (self.most - self.least))
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)


def _shares(values: Sequence[float]) -> _Axis:
    """From nothing to the highest."""
    most = max(*values, 1e-9)
    return _Axis(0.0, most, (0.0, most / 2, most), False)


def _decades(values: Sequence[float]) -> _Axis:
    """Whole powers of ten around all values; few of them are parted once more."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    steps = (1, 2, 5) if high - low == 1 else (1,)
    ticks = [step * 10.0**power for power in range(low, high) for step in steps]
    return _Axis(10.0**low, 10.0**high, (*ticks, 10.0**high), True)


def _chart(advice: Advice, lines: Sequence[Line], value: Callable[[Choice], float], axis: Callable[..., _Axis],
           told: tuple[str, Callable[[float], str]]) -> str:
    """Steps of one line per engine and entry size over the logarithm of the cache size."""
    what, words = told
    marked = {"T": advice.qemu_today, "A": advice.qemu, "F": advice.qemu_full, "C": advice.ours}
    sizes = [choice.cache_bytes for line in lines for choice in line.choices]
    sizes += [choice.cache_bytes for choice in marked.values()]
    least, most = max(1, min(sizes)), max(max(sizes), 2 * min(sizes))
    upwards = axis([value(choice) for line in lines for choice in line.choices])

    def x(size: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(max(size, 1) / least) / math.log(most / least)

    parts = [_grid(x, (least, most), upwards, words)]
    for number, line in enumerate(lines):
        points = " ".join(f"{'L' if at else 'M'}{x(c.cache_bytes):.1f},{upwards.y(value(c)):.1f}"
                          for at, c in enumerate(line.choices))
        parts.append(f'<path class="{line.engine[0]}" d="{points}"{_dash(number, line)}/>')
    parts += _names(lines, x, lambda choice: upwards.y(value(choice)))
    for place, (letter, choice) in enumerate(marked.items()):
        at = x(choice.cache_bytes)
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
                     f'stroke-dasharray="{DASHES[1 + place]}"/><text class="mark" x="{at:.1f}" '
                     f'y="{TOP + 14 + 20 * place}" dx="3">{letter}</text>')
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{what} by cache size">{"".join(parts)}</svg>'
            f'<p class="dim">{what}, by bytes of cache</p>')


def _names(lines: Sequence[Line], x: Callable[[int], float], y: Callable[[Choice], float]) -> list[str]:
    """QEMU's entry sizes where their lines begin; one that would stand upon its neighbour is left to the key."""
    named: list[str] = []
    free = 0.0
    for line in lines:
        first = line.choices[0]
        at = x(first.cache_bytes)
        if line.engine == "qemu" and at >= free:
            named.append(f'<text class="name" x="{at:.1f}" y="{y(first) - 5:.1f}">'
                         f'{option_size(line.entry_bytes)}</text>')
            free = at + NAME_WIDTH
    return named


def _grid(x: Callable[[int], float], ends: tuple[int, int], axis: _Axis, words: Callable[[float], str]) -> str:
    least, most = ends
    parts = []
    for tick in axis.ticks:
        at = axis.y(tick)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/><text '
                     f'x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{words(tick)}</text>')
    powers = range(math.ceil(math.log2(least)), math.floor(math.log2(most)) + 1)
    shown = powers[:: max(1, -(-len(powers) // 5))]
    return "".join(parts) + "".join(f'<text x="{x(1 << power):.1f}" y="{HEIGHT - 14}" text-anchor="middle">'
                                    f'{format_size(1 << power)}</text>' for power in shown)


def _dash(number: int, line: Line) -> str:
    """QEMU's lines are told apart by their dashes; ours is whole and thick."""
    if line.engine == "cowslice":
        return ' style="stroke-width:4"'
    dash = DASHES[1 + number % (len(DASHES) - 1)]
    return f' stroke-dasharray="{dash}"'


def _stroke(number: int, line: Line) -> str:
    return f'<path class="{line.engine[0]}" d="M0,5 L34,5"{_dash(number, line)}/>'


def _key(lines: Sequence[Line]) -> str:
    named = [(f"{line.engine.replace('qemu', 'QEMU')}, {format_size(line.entry_bytes)} entries",
              '<svg viewBox="0 0 34 10" aria-hidden="true">' + _stroke(number, line) + "</svg>")
             for number, line in enumerate(lines)]
    return '<p class="key">' + " ".join(f"<span>{drawn} {name}</span>" for name, drawn in named) + "</p>"


def _heat(advice: Advice) -> str:
    """Time to the right, the disk from its start at the top down; darker is more, and the ends are told in words."""
    heat = advice.evidence.habits.heat
    rows, columns = heat.shape
    if not columns or not heat.max():
        return '<p class="dim">Nothing to show.</p>'
    shades = np.ceil(np.sqrt(heat / heat.max()) * 10).astype(int)
    cells = "".join(f'<rect x="{column}" y="{row}" width="1" height="1" '
                    f'opacity="{shades[row, column] / 10:.1f}"/>'
                    for row, column in zip(*np.nonzero(shades), strict=True))
    return (f'<svg class="map" viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" style="height:220px" '
            f'role="img" aria-label="requests by place and time" shape-rendering="crispEdges"><g fill="var(--hot)">'
            f'{cells}</g></svg>'
            '<p class="dim">Time goes '
            f'to the right, {advice.evidence.habits.per_column:,} requests a column; the disk from 0 at the top to '
            f'{format_size(advice.evidence.size)} at the bottom. The fullest cell has {int(heat.max()):,}.</p>')


def _packing(advice: Advice) -> str:
    """A bar for each region: bytes in memory as a share of bytes on disk."""
    packed = advice.evidence.packed
    groups = np.array_split(np.arange(len(packed.sizes)), min(REGIONS, max(1, len(packed.sizes))))
    bars = []
    for number, group in enumerate(groups):
        raw = int(packed.mapped[group].sum()) * packed.slice_bytes
        taken = int(packed.sizes[group].sum(dtype=np.int64))
        if raw:
            height = max(1.5, 100 * min(1.0, taken / raw))
            bars.append(f'<rect x="{number}" y="{100 - height:.1f}" width=".8" height="{height:.1f}"/>')
    return (f'<svg class="map" viewBox="0 0 {len(groups)} 100" preserveAspectRatio="none" style="height:160px" '
            f'role="img" aria-label="packed size by region"><g fill="var(--b)">{"".join(bars)}</g></svg>'
            '<p class="dim">The disk from left to right; '
            'a bar as high as the card is a part of the map that does not pack at all, no bar one '
            f'that has no map. {format_size(packed.raw_bytes)} on disk, {format_size(packed.packed_bytes)} in memory.'
            '</p>')


def _table(advice: Advice) -> str:
    rows = {"QEMU, today": advice.qemu_today, "QEMU, advised": advice.qemu, "QEMU, whole map": advice.qemu_full,
            "cowslice, today's size": advice.ours_today, "cowslice, advised": advice.ours,
            "cowslice, whole map": advice.ours_full}
    return _tabled(("", "cache", "entries", "misses", "requests/s", "p99"), (
        (name, format_size(c.cache_bytes), format_size(c.entry_bytes), percent(c.miss_ratio), rate(c.rate),
         duration(c.forecast.p99)) for name, c in rows.items()))


def _verified(proofs: Sequence[Proof]) -> str:
    """Forecast beside measured, as in the terminal."""
    heads = ("", "cache", "entries", "depth", "hits forecast", "measured", "rate forecast", "measured")
    rows = ((f"{proof.engine.replace('qemu', 'QEMU')}, {proof.role}", format_size(proof.cache_bytes),
             format_size(proof.entry_bytes), str(proof.depth), percent_exactly(proof.forecast_hits),
             "\u2013" if proof.measured_hits is None else percent_exactly(proof.measured_hits),
             rate(proof.forecast_rate), rate(proof.measured_rate)) for proof in proofs)
    return (f'<p class="dim">Replayed {proofs[0].requests:,} reads from an empty cache, first touches included.</p>'
            + _tabled(heads, rows))


def _tabled(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{head}</th>" for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><tr>{head}</tr>{body}</table></div>'


def _pastes(advice: Advice) -> str:
    made = pasted(advice)
    note = f'<p class="dim">{_text(made["libvirt-note"])}.</p>' if made["libvirt-note"] else ""
    named = (("QEMU", "drive"), ("QEMU, or", "blockdev"), ("libvirt", "libvirt"), ("cowslice", "python"))
    return "".join(f'<div class="dim">{title}</div><pre>{_text(made[key])}</pre>' for title, key in named) + note


def _text(text: str) -> str:
    """Text from outside, harmless in HTML; what is no character is shown as its code."""
    return escape("".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode()
                          for c in text))
