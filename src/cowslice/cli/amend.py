"""`cowslice amend`: the words, and nothing of the work."""

from __future__ import annotations

import click

from cowslice.cli import exitcodes
from cowslice.cli.creating import KEYS, asks_for_keys, parse_keys
from cowslice.cli.images import describe, explained
from cowslice.cli.options import CACHE_MODES, Given, chain, changing, image_format
from cowslice.cli.output import say, say_fields
from cowslice.cli.termination import Terminated, ending_on_sigterm
from cowslice.errors import BadOption
from cowslice.units import parse_size

EPILOG = """\b
Examples:
  cowslice amend -o compat=1.1,lazy_refcounts=on disk.qcow2
  cowslice amend -o size=80G disk.qcow2
  cowslice amend -p -o refcount_bits=64 disk.qcow2    (for more snapshots than 16 bits can count)
  cowslice amend -o compat=0.10 disk.qcow2            (for a reader that only knows version 2)
  cowslice amend -o data_file=disk.raw disk.qcow2     (where the data file is now)
  cowslice amend -o help

\b
After Ctrl-C the image is sound: what was finished stays changed, and check -r leaks gives back the space of the rest.
Exit status: 0 done, 1 failed, 64 usage, 130 interrupted."""

AMENDABLE = ("compat", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits", "size")


@click.command("amend", epilog=EPILOG)
@image_format
@click.option("-o", "texts", multiple=True, required=True, metavar="KEY=VALUE,...", help="What to change; 'help' lists "
              "the keys.")
@click.option("-p", "progress", is_flag=True, help="Show progress.")
@click.option("-t", "cache", type=click.Choice(CACHE_MODES), default="writeback",
              help="'none' reads and writes around the page cache.")
@changing
@chain
@click.argument("file", required=False)
def command(
    file: str | None, format_name: str | None, texts: tuple[str, ...], progress: bool, cache: str, image_opts: bool,
    objects: tuple[str, ...], quiet: bool, allowed: tuple[str, ...], allow_any: bool,
) -> int | None:
    """Change the version, refcount width, size or other features of the qcow2 image FILE."""
    from cowslice.cli.progress import maybe_shown
    from cowslice.ops.amend import amend
    from cowslice.ops.amendrules import Amendment

    if asks_for_keys(texts):
        say("What can be changed, as -o KEY=VALUE,...")
        say_fields(((f"{name}=<{KEYS[name].kind}>", KEYS[name].meaning) for name in AMENDABLE), indent=2)
        return None
    if file is None:
        raise click.UsageError("Missing argument 'FILE'")
    fields = parse_keys("qcow2", texts, objects)
    for name in fields:
        if name in ("backing_file", "backing_format"):
            raise BadOption("the backing file is not changed here", hint="Change it with rebase.")
        if name not in AMENDABLE:
            raise BadOption(f"{name} cannot be changed, expected one of {', '.join(AMENDABLE)}",
                            hint="Copy the image into a new one with convert -O qcow2.")
    if "size" in fields:
        fields["size"] = parse_size(fields["size"])
    given = Given(format_name=format_name, image_opts=image_opts, objects=objects, allowed=allowed,
                  allow_any=allow_any, direct=cache in ("none", "directsync"))
    try:
        with ending_on_sigterm(), explained(), maybe_shown("amending", progress and not quiet, unit="") as advance:
            amend(*describe(file, given), Amendment(**fields), progress=advance)
    except Terminated:
        return exitcodes.TERMINATED
    return None
