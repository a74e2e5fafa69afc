"""The verbs, each in a file of its own that is imported when its word is said; and what their faults become.

A verb is a click command whose callback returns the exit status, or None for 0. It raises cowslice.errors only.
"""

from __future__ import annotations

from importlib import import_module

import click

from cowslice.cli import exitcodes
from cowslice.cli.output import complain
from cowslice.cli.termination import Ending, ended_by_signals
from cowslice.errors import CowsliceError

# Word, and what it does: `--help` lists them without importing a verb.
VERBS = {
    "create": "Make a new, empty disk image.",
    "info": "Show what an image is, without opening anything it names.",
    "map": "Show where each part of the disk is stored.",
    "check": "Find leaks and corruption; changes nothing.",
    "compare": "Tell whether two disks have the same content.",
    "convert": "Copy a disk into a raw or qcow2 file, or to standard output.",
    "commit": "Copy what an overlay holds into its backing file.",
    "snapshot": "List, take, apply or delete internal snapshots.",
    "resize": "Give a disk another size.",
    "rebase": "Give an overlay another backing file.",
    "dd": "Copy blocks of a disk into a new file.",
    "amend": "Change the version, size or other features of an image.",
    "bitmap": "List, add, remove or change the dirty bitmaps of an image.",
    "measure": "Say how large an image would be.",
    "serve": "Give disks to NBD clients: virtual machines, nbdcopy, qemu-img.",
    "tune": "Say which metadata cache a disk needs.",
    "bench": "Measure how fast an image is read, beside QEMU.",
}

EPILOG = """\b
Examples:
  cowslice info disk.qcow2
  cowslice check disk.qcow2 && cowslice convert -p disk.qcow2 disk.raw
  cowslice map --output=json disk.qcow2 | jq length

\b
Exit status: as qemu-img for each verb (see its --help); besides,
  64 the command line is wrong, 70 a fault of this program, 141 nobody reads the output,
  129, 130, 143 ended by SIGHUP, Ctrl-C, SIGTERM. A second one is not needed: it ends once its files are in order."""


class Verbs(click.Group):
    """A group whose members are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        verb: click.Command = import_module(f"cowslice.cli.{cmd_name}").command
        return verb

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"cowslice {version('cowslice')}")
    except PackageNotFoundError:
        click.echo("cowslice (not installed)")
    ctx.exit()


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=Verbs, epilog=EPILOG, context_settings=_SETTINGS)
@click.option("-V", "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
              help="Show the version.")
def cowslice() -> None:
    """Look at, check, compare and convert qcow2 disk images.

    The words, options, JSON and exit statuses are those of qemu-img.
    """


def run_verb(arguments: list[str]) -> int:
    """Run the verb that the arguments begin with and return the exit status; faults are told on standard error."""
    with ended_by_signals() as ending:
        try:
            return _run_verb(arguments, ending)
        except click.Abort:  # what click makes of Terminated
            return ending.status


def _run_verb(arguments: list[str], ending: Ending) -> int:
    try:
        status = cowslice.main(args=arguments, prog_name="cowslice", standalone_mode=False, obj=ending)
    except click.UsageError as error:
        return _usage(error)
    except SystemExit as ended:  # click's answer to a closed pipe, whatever the mode
        raise BrokenPipeError from ended
    except click.ClickException as error:
        complain(error.format_message())
        return exitcodes.FAILED
    except CowsliceError as error:
        complain(str(error), error.hint)
        return error.exit_code
    return status if isinstance(status, int) else exitcodes.OK


def _usage(error: click.UsageError) -> int:
    path = error.ctx.command_path if error.ctx else "cowslice"
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
    else:
        complain(error.format_message().rstrip("."), f"Try '{path} --help'.")
    return exitcodes.USAGE
