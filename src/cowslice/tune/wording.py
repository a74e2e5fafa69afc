"""Advice in words: short sentences with their numbers, the most useful first; and the same as JSON.

It computes nothing that `advise` did not. A terminal, a page and a fleet's summary say the same words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cowslice.format.geometry import Geometry
from cowslice.tune.advise import CLIFF_SPAN, Advice, Choice
from cowslice.tune.calibrate import as_json as calibration_json
from cowslice.tune.paste import option_size, pastes
from cowslice.units import KiB, format_size

WORTH_SAYING = 0.01  # a gain below that is none


@dataclass(frozen=True, slots=True)
class Sentence:
    """One thing to know. `topic` says what about, in one word."""

    topic: str
    text: str


def sentences(advice: Advice) -> tuple[Sentence, ...]:
    """Everything there is to say, most useful first."""
    said = [
        Sentence("doubt", _doubt(advice)), Sentence("setting", _setting(advice)), Sentence("today", _today(advice)),
        Sentence("next", _next(advice)), Sentence("full", _full(advice)), Sentence("cliff", _cliff(advice)),
        Sentence("entry", _entries(advice)), Sentence("clusters", _clusters(advice)),
        Sentence("cowslice", _ours(advice)), Sentence("map", _map(advice)),
        Sentence("chain", _chain(advice)), Sentence("storage", _storage(advice)),
    ]  # fmt: skip
    return tuple(sentence for sentence in said if sentence.text)


def headline(advice: Advice) -> str:
    """The disk and its trace in one line."""
    e, habits = advice.evidence, advice.evidence.habits
    length = f"{format_size(habits.mean_length)} on average"
    writes = f", {percent(habits.writes / habits.requests)} writes" if habits.writes else ""
    return (f"{e.name}: {format_size(e.size)} disk, {format_size(e.curves.geometry.cluster_size)} clusters; "
            f"{habits.requests:,} requests, {length}{writes}")


def rate(value: float) -> str:
    """Requests per second as people say them: 6,477, 54k, 1.2M."""
    if value < 9_999.5:
        return f"{value:,.0f}"
    return f"{value / 1e3:.3g}k" if value < 999_500 else f"{value / 1e6:.3g}M"


def percent(share: float) -> str:
    """A share: 40 %, 3.4 %, 0.02 %."""
    if share >= 0.0995:
        return f"{share * 100:.0f} %"
    return f"{share * 100:.2g} %" if share >= 5e-5 else "0 %"


def percent_exactly(share: float) -> str:
    """A share to a hundredth of a percent, for comparing two."""
    return f"{share * 100:.2f} %"


def duration(seconds: float) -> str:
    """A time: 177 µs, 4.9 ms, 1.2 s."""
    for scale, unit in ((1e-6, "µs"), (1e-3, "ms")):
        if seconds < 999.5 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def verdict(advice: Advice) -> str:
    """"starved", "wasteful" or "right": today's setting beside the advised one."""
    if advice.qemu_today.rate < 0.9 * advice.qemu.rate:
        return "starved"
    spare = advice.qemu_today.cache_bytes - advice.qemu.cache_bytes
    return "wasteful" if spare > max(advice.qemu.cache_bytes, 256 * KiB) else "right"


def _setting(advice: Advice) -> str:
    choice = advice.qemu
    what = "the whole map" if choice.cache_bytes >= advice.evidence.today.full_coverage else "the working set"
    return (f"QEMU needs {_size(choice)} for {what}: {percent(choice.miss_ratio)} of lookups miss, "
            f"about {rate(choice.rate)} requests/s ({percent(choice.rate / advice.best_rate)} of the best possible), "
            f"p99 {duration(choice.forecast.p99)}.")


def _today(advice: Advice) -> str:
    today = advice.qemu_today
    told = f"Today's {_size(today)}: {percent(today.miss_ratio)} miss, about {rate(today.rate)} requests/s"
    state = verdict(advice)
    if state == "starved":
        return f"{told}. The advised setting is {advice.qemu.rate / today.rate:.1f} times as fast."
    if state == "wasteful":
        return f"{told}: {format_size(today.cache_bytes - advice.qemu.cache_bytes)} of it buy nothing."
    return f"{told}: about right."


def _next(advice: Advice) -> str:
    today, more = advice.qemu_today, advice.next_megabyte
    gained = more.rate / today.rate - 1
    if more.cache_bytes <= today.cache_bytes:
        return ""
    step = format_size(more.cache_bytes - today.cache_bytes)
    if gained < WORTH_SAYING:
        return f"Another {step} on top of today's would buy nothing."
    return f"Another {step} on top of today's buys {rate(more.rate - today.rate)} requests/s, {percent(gained)}."


def _full(advice: Advice) -> str:
    full, choice = advice.qemu_full, advice.qemu
    if choice.cache_bytes >= full.cache_bytes:
        return ""
    gained = full.rate / choice.rate - 1
    buys = f"buys another {percent(gained)}" if gained >= WORTH_SAYING else "buys nothing more with this workload"
    return f"To hold the whole map QEMU needs {format_size(full.cache_bytes)}; that {buys}."


def _cliff(advice: Advice) -> str:
    cliff = advice.cliff
    if cliff is None:
        return ""
    just = cliff.above <= advice.qemu.cache_bytes < CLIFF_SPAN * cliff.above
    told = "the advised size is just above it, so a little more is a margin" if just else "stay well above"
    return (f"There is a cliff: between {format_size(cliff.below)} and {format_size(cliff.above)} (entries of "
            f"{format_size(cliff.entry_bytes)}) misses fall from {percent(cliff.misses_below)} to "
            f"{percent(cliff.misses_above)}. The guest loops over a part of the disk: {told}.")


def _entries(advice: Advice) -> str:
    """What the largest entries would need for the same."""
    lines = [line for line in advice.lines if line.engine == "qemu"]
    largest = max(lines, key=lambda line: line.entry_bytes)
    if largest.entry_bytes == advice.qemu.entry_bytes or largest.knee.cache_bytes < 1.2 * advice.qemu.cache_bytes:
        return ""
    return (f"Entries of {format_size(largest.entry_bytes)} would need {format_size(largest.knee.cache_bytes)} for the "
            f"same.")


def _clusters(advice: Advice) -> str:
    """What it would need had it been made otherwise."""
    told = [f"{format_size(other.choice.cache_bytes)} with {_geometry(other.geometry)}" for other in advice.others]
    if not told:
        return ""
    return (f"Made anew with other clusters, for as good a rate QEMU would need {', '.join(told)}. Larger clusters "
            "take more space, and first writes to them copy more.")


def _geometry(geometry: Geometry) -> str:
    kind = "extended L2 entries and " if geometry.extended_l2 else ""
    return f"{kind}{format_size(geometry.cluster_size)} clusters"


def _ours(advice: Advice) -> str:
    packed, ours = advice.evidence.packed, advice.ours
    if not packed.raw_bytes:
        return "The image has no map yet: nothing is allocated."
    factor = packed.raw_bytes / max(1, packed.packed_bytes)
    return (f"The map packs {factor:.3g}x: cowslice holds all of it in {format_size(packed.packed_bytes)}, and needs "
            f"{format_size(ours.cache_bytes)} for this workload: about {rate(ours.rate)} requests/s.")


def _map(advice: Advice) -> str:
    made = advice.compaction
    if made is None:
        return ""
    return (f"The image is fragmented: written in order, its map would pack into {format_size(made.then)} instead of "
            f"{format_size(made.now)} ('qemu-img convert' writes it anew). QEMU's own cache would not gain by that.")


def _chain(advice: Advice) -> str:
    below = advice.evidence.layers - 1
    if not below:
        return ""
    return (f"{below} more file{'s' * (below > 1)} below this one: QEMU keeps a cache for each, and this is about the "
            f"top one only; cowslice shares one.")


def _doubt(advice: Advice) -> str:
    if advice.too_short:
        return (f"Take this with caution: the trace is too short to say, because {advice.too_short}. "
                f"Record a longer one.")
    error = max(curve.error for curve in advice.evidence.curves.by_entry_bytes.values())
    return f"The trace was sampled: miss ratios may be off by {percent(error)}." if error else ""


def _storage(advice: Advice) -> str:
    c = advice.evidence.calibration
    how = "as given" if c.given else "measured around the page cache" if c.direct else "measured through the page cache"
    return (f"Storage, {how}: {duration(c.ours.read_4k)} for 4 KiB and {duration(c.ours.read_64k)} for 64 KiB alone, "
            f"{rate(c.ours.rate_4k)} and {rate(c.ours.rate_64k)} a second at depth 32.")


def _size(choice: Choice) -> str:
    return f"{format_size(choice.cache_bytes)} ({format_size(choice.entry_bytes)} entries)"


def as_json(advice: Advice) -> dict[str, Any]:
    """All of it for scripts: sizes in bytes, times in seconds, rates per second, ratios from 0 to 1."""
    e = advice.evidence
    habits = e.habits
    return {
        "image": e.path, "name": e.name, "virtual-size": e.size, "cluster-size": e.curves.geometry.cluster_size,
        "layers": e.layers, "trace": e.source, "verdict": verdict(advice), "too-short": advice.too_short,
        "requests": {"count": habits.requests, "reads": habits.reads, "writes": habits.writes,
                     "mean-length": habits.mean_length, "per-second": habits.arrivals},
        "advised": choice_json(advice.qemu), "today": choice_json(advice.qemu_today),
        "full-coverage": choice_json(advice.qemu_full), "today-and-one-megabyte": choice_json(advice.next_megabyte),
        "cowslice": {"advised": choice_json(advice.ours), "at-todays-size": choice_json(advice.ours_today),
                     "whole-map": choice_json(advice.ours_full)},
        "map": {"raw-bytes": e.packed.raw_bytes, "packed-bytes": e.packed.packed_bytes,
                "in-order-bytes": advice.compaction.then if advice.compaction else None},
        "cliff": None if advice.cliff is None else {
            "entry-size": advice.cliff.entry_bytes, "below": advice.cliff.below, "above": advice.cliff.above,
            "miss-ratio-below": advice.cliff.misses_below, "miss-ratio-above": advice.cliff.misses_above},
        "other-clusters": [
            {"cluster-size": other.geometry.cluster_size, "extended-l2": other.geometry.extended_l2,
             "full-coverage": other.full_bytes, "advised": choice_json(other.choice)} for other in advice.others],
        "storage": calibration_json(e.calibration),
        "curves": [{"engine": line.engine, "entry-size": line.entry_bytes, "knee": line.knee.cache_bytes,
                    "points": [[c.cache_bytes, c.miss_ratio, c.rate] for c in line.choices]} for line in advice.lines],
        "paste": pasted(advice), "advice": [{"topic": s.topic, "text": s.text} for s in sentences(advice)],
    }  # fmt: skip


def pasted(advice: Advice) -> dict[str, str]:
    """The advised setting in each program's words."""
    e = advice.evidence
    made = pastes(e.path, e.curves.geometry, qemu=(advice.qemu.cache_bytes, advice.qemu.entry_bytes),
                  ours=advice.ours.cache_bytes, full_coverage=e.today.full_coverage)
    return {"drive": made.drive, "blockdev": made.blockdev, "libvirt": made.libvirt, "libvirt-note": made.libvirt_note,
            "cowslice": made.cowslice, "python": made.python}


def choice_json(choice: Choice) -> dict[str, Any]:
    """One setting and its forecast."""
    return {"cache-size": choice.cache_bytes, "entry-size": choice.entry_bytes, "miss-ratio": choice.miss_ratio,
            "metadata-reads-per-request": choice.misses, "requests-per-second": choice.rate,
            "p50": choice.forecast.p50, "p99": choice.forecast.p99, "limit": choice.forecast.limit,
            "option": option_size(choice.cache_bytes)}
