"""`cowslice create`: the words, and the line that says what is made."""

from __future__ import annotations

import click

from cowslice.cli.creating import asks_for_keys, check_format, create_options, join, parse_keys, say_keys
from cowslice.cli.options import Allowed, chain
from cowslice.cli.output import printable, say, warn
from cowslice.errors import CowsliceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cowslice.image.createoptions import CreateOptions

EPILOG = """\b
Examples:
  cowslice create -f qcow2 disk.qcow2 40G
  cowslice create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  cowslice create -f qcow2 -o cluster_size=128k,extended_l2=on,preallocation=metadata disk.qcow2 1T
  cowslice create -f qcow2 -o help

\b
A file that is there already is replaced when the new one is complete, and never while another program uses it.
Exit status: 0 made, 1 failed, 64 usage, 130 interrupted."""


@click.command("create", epilog=EPILOG)
@click.option("-f", "format_name", metavar="FORMAT", default="raw", show_default=True,
              help="Format of the new image: qcow2 or raw.")
@click.option("-b", "backing", metavar="FILE", help="What shows through where nothing was written.")
@click.option("-F", "backing_format", metavar="FORMAT", help="Its format: qcow2 or raw.")
@click.option("-u", "unchecked", is_flag=True, help="Do not open the backing file; SIZE is then needed.")
@click.option("-o", "texts", multiple=True, metavar="KEY=VALUE,...", help="Options of the image; 'help' lists them.")
@click.option("--replace-data-file", is_flag=True, help="Empty a data file that is there already.")
@click.option("--object", "objects", multiple=True, metavar="OBJECT",
              help="'secret,id=ID,data=TEXT' or 'secret,id=ID,file=PATH': a passphrase.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@chain
@click.argument("file", required=False)
@click.argument("size", required=False)
def command(
    file: str | None, size: str | None, format_name: str, backing: str | None, backing_format: str | None,
    unchecked: bool, texts: tuple[str, ...], replace_data_file: bool, objects: tuple[str, ...], quiet: bool,
    allowed: Allowed,
) -> None:
    """Make a new, empty disk image FILE of SIZE (such as 40G); with a backing file its size is the default."""
    check_format(format_name, "-f")
    if asks_for_keys(texts):
        say_keys(format_name)
        return
    if file is None:
        raise click.UsageError("Missing argument 'FILE'")
    fields = parse_keys(format_name, texts, objects)
    join(fields, "backing_file", backing, "-b")
    join(fields, "backing_format", backing_format, "-F")
    join(fields, "size", size, "SIZE")
    options = create_options(format_name, fields, allowed=allowed, check_backing=not unchecked,
                             replace_data_file=replace_data_file)
    if format_name == "raw" and file.endswith(".qcow2") and not quiet:
        warn(f"'{file}' becomes a raw image: -f qcow2 makes another one")
    _create(file, fields.get("size"), options, quiet=quiet)


def _create(file: str, size: str | None, options: CreateOptions, *, quiet: bool) -> None:
    from cowslice.image.creation import guest_size, make_image

    try:
        guest = guest_size(file, size, options)
        make_image(file, guest, options)
    except CowsliceError as error:
        if "replace_data_file" in error.hint:
            error.hint = error.hint.replace("replace_data_file", "--replace-data-file")
        raise
    if not quiet:
        say(f"Formatting '{printable(file)}', {_described(options, guest)}")


def _described(options: CreateOptions, size: int) -> str:
    """What was made, in the words of -o. No secret is among them."""
    words = [f"fmt={options.format}"]
    if options.format == "qcow2":
        geometry = options.geometry
        words += [f"cluster_size={geometry.cluster_size}", f"extended_l2={_switch(options.extended_l2)}",
                  f"compression_type={options.compression_type}"]
        words += [f"{name}={printable(str(value))}" for name, value in (
            ("compat", options.compat if options.version == 2 else None), ("backing_file", options.backing_file),
            ("backing_fmt", options.backing_format), ("data_file", options.data_file),
            ("encrypt.format", options.encryption)) if value is not None]
        words += ["data_file_raw=on"] * options.data_file_raw
        words += [f"lazy_refcounts={_switch(options.lazy_refcounts)}", f"refcount_bits={options.refcount_bits}"]
    if options.preallocation != "off":
        words.append(f"preallocation={options.preallocation}")
    return " ".join([*words, f"size={size}"])


def _switch(on: bool) -> str:
    return "on" if on else "off"
