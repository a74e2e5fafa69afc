"""How advice on a cache looks in a terminal: a curve of one line per engine, a table, sentences, lines to paste.

It computes no figure. Where the terminal cannot show a bar, digits stand for it: 0 nothing misses, 9 everything.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

from cowslice.cli.output import paint, printable, say, say_table
from cowslice.tune.advise import Advice, Choice
from cowslice.tune.sharing import Division, Part, division_sentences
from cowslice.tune.verify import Proof
from cowslice.tune.wording import duration, headline, pasted, percent, percent_exactly, rate, sentences
from cowslice.units import KiB, format_size

COLUMNS = 48  # of a curve
BARS = "▁▂▃▄▅▆▇█"
DIGITS = "123456789"
NOTHING, NOTHING_PLAIN = "·", "0"
_PLAIN = str.maketrans({"µ": "u", "–": "-"})


def say_advice(advice: Advice, assumption: str) -> None:
    """Everything about one disk."""
    _say(paint(printable(headline(advice)), "bold"))
    if assumption:
        say_wrapped(assumption)
    _say()
    _say_curves(advice)
    _say()
    _say_settings(advice)
    _say()
    for sentence in sentences(advice):
        say_wrapped(sentence.text, first="- ")
    _say()
    _say_pastes(advice)


def say_division(division: Division, *, paste: bool = True, most: int | None = None) -> None:
    """How a budget is shared; with `paste` the lines for QEMU too. Of more than `most` disks the rest is counted."""
    disks = len(division.parts)
    _say(paint(f"{format_size(division.budget)} shared among {disks} disks", "bold"))
    heads = ("disk", "QEMU today", "requests/s", "QEMU", "entries", "requests/s", "cowslice", "requests/s")
    say_rows(heads, [_part_row(part) for part in division.parts], right="lrrrrrrr", most=most)
    for sentence in division_sentences(division):
        say_wrapped(sentence)
    if paste:
        _say()
        for part in division.parts:
            _say(printable(part.pastes().drive))


def say_rows(heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: str, most: int | None = None) -> None:
    """A table of at most so many rows, with a word on how many there are more."""
    say_table(heads, [[_plain(cell) for cell in row] for row in rows[:most]], right=right)
    if most is not None and len(rows) > most:
        _say(f"and {len(rows) - most} more, which --json tells")


def say_proofs(proofs: Sequence[Proof]) -> None:
    """Forecast beside measured, at each setting."""
    if not proofs:
        return
    _say(paint(f"Verified with {proofs[0].requests:,} reads from an empty cache, first touches included", "bold"))
    heads = ("engine", "setting", "cache", "entries", "depth", "hits forecast", "measured", "rate forecast", "measured")
    say_table(heads, [_proof_row(proof) for proof in proofs], right="llrrrrrrr")
    if all(proof.engine == "cowslice" for proof in proofs):
        say_wrapped("QEMU was not asked: qemu-io is not installed.")


def _proof_row(proof: Proof) -> tuple[str, ...]:
    measured = "-" if proof.measured_hits is None else percent_exactly(proof.measured_hits)
    return (proof.engine.replace("qemu", "QEMU"), proof.role, format_size(proof.cache_bytes),
            format_size(proof.entry_bytes), str(proof.depth), percent_exactly(proof.forecast_hits), measured,
            rate(proof.forecast_rate), rate(proof.measured_rate))


def _part_row(part: Part) -> tuple[str, ...]:
    today, qemu, ours = part.disk.qemu_today, part.qemu, part.ours
    return (printable(part.disk.name), format_size(today.cache_bytes), rate(today.rate),
            format_size(qemu.cache_bytes), format_size(qemu.entry_bytes), rate(qemu.rate),
            format_size(ours.cache_bytes), rate(ours.rate))


def _say_curves(advice: Advice) -> None:
    """Misses by cache size on one logarithmic axis, and below it where today's and the advised sizes are."""
    e = advice.evidence
    least = min(16 * KiB, advice.qemu.cache_bytes, advice.qemu_today.cache_bytes, advice.ours.cache_bytes)
    most = max(advice.qemu_full.cache_bytes, advice.qemu_today.cache_bytes, advice.ours.cache_bytes, 2 * least)
    sizes = [round(least * (most / least) ** (n / (COLUMNS - 1))) for n in range(COLUMNS)]
    entries = sorted({advice.qemu.entry_bytes, advice.qemu_today.entry_bytes})
    lines = [(f"QEMU, {format_size(entry)} entries",
              [e.curves.by_entry_bytes[entry].miss_ratio(size, warm=True) for size in sizes]) for entry in entries]
    lines.append(("cowslice", [e.packed_curve.miss_ratio(size, warm=True) for size in sizes]))
    heading = "misses by cache size"
    width = max(len(heading), *(len(name) for name, _ in lines)) + 2
    ends = format_size(least).ljust(COLUMNS - len(format_size(most))) + format_size(most)
    _say(heading.ljust(width) + paint(ends, "dim"))
    for name, ratios in lines:
        _say(name.ljust(width) + bars(ratios))
    marks = _marks(sizes, {"T": advice.qemu_today, "A": advice.qemu, "C": advice.ours})
    _say(" " * width + marks + paint("  T today, A advised, C advised for cowslice", "dim"))


def bars(ratios: Sequence[float]) -> str:
    """One character for each share from 0 to 1: a bar as high, or a digit where bars cannot be shown."""
    steps, nothing = (BARS, NOTHING) if _shows(BARS + NOTHING) else (DIGITS, NOTHING_PLAIN)
    return "".join(nothing if ratio < 0.0005 else steps[min(len(steps) - 1, int(ratio * len(steps)))]
                   for ratio in ratios)


def _marks(sizes: Sequence[int], settings: dict[str, Choice]) -> str:
    """A letter below the size of each setting; where two meet, the later stands beside the first."""
    places = [" "] * (len(sizes) + len(settings))
    for letter, choice in settings.items():
        at = min(range(len(sizes)), key=lambda n: abs(sizes[n] - choice.cache_bytes))
        while places[at] != " ":
            at += 1
        places[at] = letter
    return "".join(places)


def _say_settings(advice: Advice) -> None:
    rows = {"QEMU, today": advice.qemu_today, "QEMU, advised": advice.qemu,
            "QEMU, a megabyte more": advice.next_megabyte, "QEMU, whole map": advice.qemu_full,
            "cowslice, today's size": advice.ours_today, "cowslice, advised": advice.ours,
            "cowslice, whole map": advice.ours_full}
    heads = ("setting", "cache", "entries", "misses", "requests/s", "median", "p99")
    say_table(heads, [(name, *(_plain(cell) for cell in _row(choice))) for name, choice in rows.items()],
              right="lrrrrrr")


def _row(choice: Choice) -> tuple[str, ...]:
    return (format_size(choice.cache_bytes), format_size(choice.entry_bytes), percent(choice.miss_ratio),
            rate(choice.rate), duration(choice.forecast.p50), duration(choice.forecast.p99))


def _say_pastes(advice: Advice) -> None:
    made = pasted(advice)
    for title, keys in (("For QEMU, either of", ("drive", "blockdev")), ("For libvirt, inside <disk>", ("libvirt",)),
                        ("For cowslice, either of", ("cowslice", "python"))):
        _say(paint(title, "bold"))
        for key in keys:
            for line in made[key].splitlines():
                _say("  " + printable(line))
        if "libvirt" in keys and made["libvirt-note"]:
            say_wrapped(f"({made['libvirt-note']}.)")


def say_wrapped(text: str, first: str = "") -> None:
    """A paragraph as wide as the terminal."""
    width = min(100, shutil.get_terminal_size().columns)
    _say(textwrap.fill(printable(text), max(40, width), initial_indent=first, subsequent_indent=" " * len(first),
                       break_on_hyphens=False))


def _say(text: str = "") -> None:
    say(_plain(text))


def _plain(text: str) -> str:
    """The text as the terminal can show it."""
    if _shows(text):
        return text
    encoding = sys.stdout.encoding or "utf-8"
    return text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)


def _shows(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
