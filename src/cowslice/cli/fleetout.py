"""How the summary of a fleet looks in a terminal: counts, who is starved, who wastes, and how to share what there is.

It computes no figure. Disks that could not be studied are named on standard error.
"""

from __future__ import annotations

from cowslice.cli.output import complain, paint, printable, say
from cowslice.cli.tuneout import say_division, say_rows, say_wrapped
from cowslice.tune.fleetstudy import Studied
from cowslice.tune.fleetsummary import Fleet, fleet_sentences
from cowslice.tune.wording import rate
from cowslice.units import format_size

STARVED = ("disk", "today", "entries", "requests/s", "advised", "entries", "requests/s", "times")
WASTEFUL = ("disk", "today", "advised", "entries", "to spare")
MOST_ROWS = 40  # of a table: a screen or two, most useful first


def say_broken(fleet: Fleet) -> None:
    """Each disk that could not be studied, and why."""
    for disk in fleet.broken:
        named = disk.error if disk.image in disk.error else f"'{disk.image}': {disk.error}"
        complain(named, disk.hint)


def say_fleet(fleet: Fleet, source: str) -> None:
    """The summary."""
    disks = len(fleet.disks) + len(fleet.broken)
    say(paint(f"{printable(source)}: {disks} disk{'s' * (disks > 1)}", "bold"))
    for sentence in fleet_sentences(fleet):
        say_wrapped(sentence)
    if fleet.starved:
        say()
        say(paint("Starved: a larger cache, or other entries, pays most here", "bold"))
        say_rows(STARVED, [_starved_row(disk) for disk in fleet.starved], right="lrrrrrrr", most=MOST_ROWS)
    if fleet.wasteful:
        say()
        say(paint("Wasteful: this much buys nothing", "bold"))
        say_rows(WASTEFUL, [_wasteful_row(disk) for disk in fleet.wasteful], right="lrrrr", most=MOST_ROWS)
    if fleet.division is not None:
        say()
        say_division(fleet.division, paste=False, most=MOST_ROWS)
        say_wrapped("Lines to paste for each disk stand in what --json tells.")


def _starved_row(disk: Studied) -> tuple[str, ...]:
    today, advised = disk.digest.qemu_today, disk.digest.qemu
    return (printable(disk.digest.name), format_size(today.cache_bytes), format_size(today.entry_bytes),
            rate(today.rate), format_size(advised.cache_bytes), format_size(advised.entry_bytes), rate(advised.rate),
            f"{advised.rate / today.rate:.1f}")


def _wasteful_row(disk: Studied) -> tuple[str, ...]:
    today, advised = disk.digest.qemu_today, disk.digest.qemu
    return (printable(disk.digest.name), format_size(today.cache_bytes), format_size(advised.cache_bytes),
            format_size(advised.entry_bytes), format_size(today.cache_bytes - advised.cache_bytes))
