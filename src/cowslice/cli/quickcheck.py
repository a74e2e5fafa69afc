"""`cowslice check` of a sound image in its plainest words, before the rest of the command line is imported.

It does not know more words than these: `check [-q] [-U] [-f qcow2] [--output=human|json] PATH`. Anything else, and any
image that is not plain and clean, is None: then the real verb runs as if nothing had happened.
"""

from __future__ import annotations


def run(arguments: list[str]) -> int | None:
    """Check, print and return the exit status 0; or return None without having printed anything."""
    parsed = _parse(arguments)
    if parsed is None:
        return None
    from cowslice.ops.quickcheck import quick_check

    path, output, quiet, force_share = parsed
    totals = quick_check(path, force_share=force_share)
    if totals is None:
        return None
    from cowslice.cli.checkout import say_report

    return say_report(totals, (), 0, name=path, output=output, quiet=quiet)


def _parse(arguments: list[str]) -> tuple[str, str, bool, bool] | None:
    """(path, output, quiet, force_share), or None."""
    path, output, quiet, force_share = "", "human", False, False
    words = iter(arguments)
    for word in words:
        if word in ("-q", "--quiet"):
            quiet = True
        elif word in ("-U", "--force-share"):
            force_share = True
        elif word in ("--output=json", "--output=human"):
            output = word[9:]
        elif word == "-f" and next(words, "") == "qcow2":
            continue
        elif not word or word[0] == "-" or ":" in word or path:
            return None
        else:
            path = word
    return (path, output, quiet, force_share) if path else None
