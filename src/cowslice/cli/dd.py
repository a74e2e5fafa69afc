"""`cowslice dd`: the words, and nothing of the work."""

from __future__ import annotations

import click

from cowslice.cli.convert import Wish, copy_to_qcow2, copy_to_raw, descriptors
from cowslice.cli.creating import check_format
from cowslice.cli.images import open_image
from cowslice.cli.options import Allowed, Given, chain, common, image_format
from cowslice.errors import BadOption
from cowslice.units import parse_size

EPILOG = """\b
Examples:
  cowslice dd if=disk.qcow2 of=boot.bin count=1       (the first 512 bytes)
  cowslice dd bs=1M skip=1 count=100 if=disk.qcow2 of=part.raw
  cowslice dd -O qcow2 bs=1M skip=1 if=disk.raw of=rest.qcow2

\b
OUT is made anew, to whole sectors. Always COUNT blocks are copied where there are so many behind SKIP; qemu-img copies
COUNT less SKIP.
Exit status: 0 done, 1 failed, 64 usage, 130 interrupted."""

_OPERANDS = ("if", "of", "bs", "count", "skip")


@click.command("dd", epilog=EPILOG, options_metavar="[OPTIONS] if=IN of=OUT [bs=SIZE] [count=BLOCKS] [skip=BLOCKS]")
@image_format
@click.option("-O", "target_format", metavar="FORMAT", default="raw", show_default=True,
              help="Format of OUT: raw or qcow2.")
@common
@chain
@click.argument("operands", nargs=-1, metavar="")
def command(
    operands: tuple[str, ...], format_name: str | None, target_format: str, image_opts: bool, objects: tuple[str, ...],
    force_share: bool, quiet: bool, allowed: Allowed,
) -> None:
    """Copy blocks of the disk IN into a new file OUT. bs is 512 bytes unless given."""
    from cowslice.ops.convert import ConvertOptions
    from cowslice.ops.dd import Blocks, part_of
    from cowslice.ops.rawtarget import refuse_sources

    check_format(target_format, "-O")
    words = _parsed(operands)
    blocks = Blocks(size=parse_size(words.get("bs", "512"), "bs"), skip=_number(words.get("skip", "0"), "skip"),
                    count=_number(words["count"], "count") if "count" in words else None)
    given = Given(format_name=format_name, image_opts=image_opts, objects=objects, force_share=force_share,
                  allowed=allowed)
    with open_image(words["if"], given, warmup="off") as disk, part_of(disk, blocks) as part:
        refuse_sources(words["of"], descriptors([disk]))
        if target_format == "qcow2":
            copy_to_qcow2([part], words["of"], ConvertOptions(), Wish(), given, sync=False, progress=False)
        else:
            copy_to_raw([part], words["of"], ConvertOptions(), existing=False, is_zero=False, sync=False,
                        progress=False)


def _parsed(operands: tuple[str, ...]) -> dict[str, str]:
    words: dict[str, str] = {}
    for operand in operands:
        name, equals, value = operand.partition("=")
        if not equals or name not in _OPERANDS:
            raise BadOption(f"the operand is '{operand}', expected {', '.join(f'{name}=' for name in _OPERANDS)}")
        words[name] = value
    for name in ("if", "of"):
        if not words.get(name):
            raise BadOption(f"there is no {name}=, expected if=IN and of=OUT")
    return words


def _number(text: str, name: str) -> int:
    """A number of blocks; qemu-img takes suffixes here too."""
    return parse_size(text, name)
