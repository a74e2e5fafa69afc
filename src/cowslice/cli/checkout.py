"""How the result of a check is told, and the exit status it gives: for the full check and for the quick one alike.

It imports nothing heavy: most checks end here after a few milliseconds. The keys of the JSON are those of qemu-img.
"""

from __future__ import annotations

from cowslice.cli.output import paint, say, say_json
from cowslice.units import format_size

TYPE_CHECKING = False  # typing itself takes longer to import than a check
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from cowslice.ops.check import CheckFinding, CheckReport
    from cowslice.ops.quickcheck import QuickTotals

    Totals = CheckReport | QuickTotals

CLEAN, FAILED, CORRUPT, LEAKS, UNSUPPORTED = 0, 1, 2, 3, 63
_OPTIONAL = ("corruptions", "leaks", "image_end_offset", "total_clusters", "allocated_clusters", "fragmented_clusters",
             "compressed_clusters")


def status_of(totals: Totals) -> int:
    """0 clean, 1 something could not be checked, 2 corrupt, 3 leaks only."""
    if totals.check_errors:
        return FAILED
    if totals.corruptions:
        return CORRUPT
    return LEAKS if totals.leaks else CLEAN


def say_report(
    totals: Totals, findings: Sequence[CheckFinding], untold: int, *, name: str, output: str, quiet: bool
) -> int:
    """Print the result and return the exit status."""
    if output == "json":
        say_json(as_json(totals, findings, untold, name=name))
    elif not quiet:
        _say_findings(findings, untold, totals.cluster_size)
        _say_verdict(totals)
        _say_numbers(totals)
    return status_of(totals)


def as_json(totals: Totals, findings: Sequence[CheckFinding], untold: int, *, name: str) -> dict[str, Any]:
    """The result with qemu-img's keys (counts only where they are not zero), and ours under "cowslice"."""
    result: dict[str, Any] = {"filename": name, "format": "qcow2", "check-errors": totals.check_errors}
    for field in _OPTIONAL:
        if value := getattr(totals, field):
            result[field.replace("_", "-")] = value
    if findings:
        result["cowslice"] = {"findings": [_finding_json(told) for told in findings], "findings-left-out": untold}
    return result


def _finding_json(told: CheckFinding) -> dict[str, Any]:
    shown: dict[str, Any] = {"kind": told.kind, "message": told.message, "count": told.count}
    if told.cluster >= 0:
        shown["host-cluster"] = told.cluster
    if told.clusters:
        shown["clusters"] = told.clusters
        shown["claims"] = list(told.claims)
    return shown


def _say_findings(findings: Sequence[CheckFinding], untold: int, cluster_size: int) -> None:
    colours = {"leak": "yellow", "corruption": "red", "error": "red"}
    for told in findings:
        at = f" host {told.cluster * cluster_size:#x}" if told.clusters else ""
        say(f"{paint(told.kind, colours[told.kind])}{at}: {told.message}")
        for claim in told.claims:
            say(f"    claimed by {claim}")
    if untold:
        say(f"... and {untold} more findings of these kinds")
    if findings:
        say()


def _say_verdict(totals: Totals) -> None:
    if totals.check_errors:
        say(paint(f"{_many(totals.check_errors, 'thing')} could not be checked.", "red"))
    if totals.corruptions:
        found = _many(totals.corruptions, "corruption")
        say(paint(f"{found}: reading may give wrong data, writing may destroy more.", "red"))
    if totals.leaks:
        wasted = format_size(totals.leaks * totals.cluster_size)
        say(paint(f"{_many(totals.leaks, 'leaked cluster')}: {wasted} wasted, no data is wrong.", "yellow"))
    if not (totals.check_errors or totals.corruptions or totals.leaks):
        say(paint("No errors were found.", "green"))


def _say_numbers(totals: Totals) -> None:
    total, allocated = totals.total_clusters, totals.allocated_clusters
    if total and allocated:
        say(f"{allocated} of {total} clusters allocated ({allocated / total:.2%}), "
            f"{totals.fragmented_clusters / allocated:.2%} of them fragmented, "
            f"{totals.compressed_clusters / allocated:.2%} compressed")
    say(f"The image ends at {totals.image_end_offset} ({format_size(totals.image_end_offset)})")


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
