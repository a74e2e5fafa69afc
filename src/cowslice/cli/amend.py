"""`cowslice amend`: the words, and nothing of the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cowslice.cli.creating import KEYS, SLOT_KEYS, asks_for_keys, parse_keys
from cowslice.cli.images import describe, explained
from cowslice.cli.options import CACHE_MODES, Allowed, Given, chain, changing, image_format
from cowslice.cli.output import say, say_fields
from cowslice.errors import BadOption
from cowslice.units import parse_size

if TYPE_CHECKING:
    from cowslice.ops.amendrules import Amendment

EPILOG = """\b
Examples:
  cowslice amend -o compat=1.1,lazy_refcounts=on disk.qcow2
  cowslice amend -o size=80G disk.qcow2
  cowslice amend -p -o refcount_bits=64 disk.qcow2    (for more snapshots than 16 bits can count)
  cowslice amend -o compat=0.10 disk.qcow2            (for a reader that only knows version 2)
  cowslice amend -o data_file=disk.raw disk.qcow2     (where the data file is now)
  cowslice amend --object secret,id=old,file=OLD --object secret,id=new,file=NEW --image-opts \\
      -o encrypt.state=active,encrypt.new-secret=new \\
      driver=qcow2,file.filename=disk.qcow2,encrypt.key-secret=old    (a passphrase more)
  cowslice amend --object secret,id=old,file=OLD --object secret,id=new,file=NEW --image-opts \\
      -o encrypt.state=inactive,encrypt.old-secret=old \\
      driver=qcow2,file.filename=disk.qcow2,encrypt.key-secret=new    (the old one no more)
  cowslice amend -o help

\b
After Ctrl-C the image is sound: what was finished stays changed, and check -r leaks gives back the space of the rest.
Exit status: 0 done, 1 failed, 64 usage, 130 interrupted."""

AMENDABLE = {name: KEYS[name] for name in ("compat", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits",
                                           "size")} | SLOT_KEYS


@click.command("amend", epilog=EPILOG)
@image_format
@click.option("-o", "texts", multiple=True, required=True, metavar="KEY=VALUE,...", help="What to change; 'help' lists "
              "the keys.")
@click.option("-p", "progress", is_flag=True, help="Show progress.")
@click.option("--force", is_flag=True, help="Overwrite an active key slot, or erase the last one.")
@click.option("-t", "cache", type=click.Choice(CACHE_MODES), default="writeback",
              help="'none' reads and writes around the page cache.")
@changing
@chain
@click.argument("file", required=False)
def command(
    file: str | None, format_name: str | None, texts: tuple[str, ...], progress: bool, force: bool, cache: str,
    image_opts: bool, objects: tuple[str, ...], quiet: bool, allowed: Allowed,
) -> None:
    """Change the version, refcount width, size, passphrases or other features of the qcow2 image FILE."""
    from cowslice.cli.progress import maybe_shown
    from cowslice.ops.amend import amend

    if asks_for_keys(texts):
        say("What can be changed, as -o KEY=VALUE,...")
        say_fields(((f"{name}=<{key.kind}>", key.meaning) for name, key in AMENDABLE.items()), indent=2)
        return
    if file is None:
        raise click.UsageError("Missing argument 'FILE'")
    wanted = amendment(parse_keys("qcow2", texts, objects, more=SLOT_KEYS), force=force)
    given = Given(format_name=format_name, image_opts=image_opts, objects=objects, allowed=allowed,
                  direct=cache in ("none", "directsync"))
    with explained(), maybe_shown("amending", progress and not quiet, unit="") as advance:
        amend(*describe(file, given), wanted, progress=advance)


def amendment(fields: dict[str, Any], *, force: bool) -> Amendment:
    """The record that the keys of -o give. Raises BadOption."""
    from cowslice.image.keyslots import KeyChange
    from cowslice.ops.amendrules import Amendment

    slots = {name: fields.pop(name) for name in [key.field for key in SLOT_KEYS.values()] if name in fields}
    amendable = [key.field for key in AMENDABLE.values()]
    for name in fields:
        if name in ("backing_file", "backing_format"):
            raise BadOption("the backing file is not changed here", hint="Change it with rebase.")
        if name not in amendable:
            raise BadOption(f"{name} cannot be changed, expected one of {', '.join(AMENDABLE)}",
                            hint="Copy the image into a new one with convert -O qcow2.")
    if "size" in fields:
        fields["size"] = parse_size(fields["size"])
    if not slots:
        return Amendment(**fields)
    state = slots.pop("state", None)
    if state not in ("active", "inactive"):
        raise BadOption(f"encrypt.state is {state!r}, expected active or inactive where a key slot changes")
    return Amendment(**fields, keys=KeyChange(active=state == "active", force=force, **slots))
