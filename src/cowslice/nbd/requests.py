"""The rules that a request must keep: the server answers a breach with an error, the client never sends one.

It knows neither bytes nor what a request does. The errors are those of the specification ("Error values").
"""

from __future__ import annotations

from dataclasses import dataclass

from cowslice.nbd.events import Request, Session
from cowslice.nbd.wire import Command, CommandFlag, ExportFlag, Mode, NbdError

CHANGES = frozenset((Command.WRITE, Command.TRIM, Command.WRITE_ZEROES))
_SPANLESS = frozenset((Command.FLUSH, Command.DISC))
_KNOWN = frozenset(int(command) for command in Command)

# The transmission flag without which a command must not be used. CACHE needs none: clients exist that send it anyway.
_NEEDS: dict[int, int] = {
    Command.FLUSH: int(ExportFlag.SEND_FLUSH),
    Command.TRIM: int(ExportFlag.SEND_TRIM),
    Command.WRITE_ZEROES: int(ExportFlag.SEND_WRITE_ZEROES),
}
# Command flags with the commands they belong to and the transmission flag that allows them.
_BELONGS: tuple[tuple[int, frozenset[int], int], ...] = (
    (int(CommandFlag.FUA), _KNOWN, int(ExportFlag.SEND_FUA)),
    (int(CommandFlag.NO_HOLE), frozenset((Command.WRITE_ZEROES,)), int(ExportFlag.SEND_WRITE_ZEROES)),
    (int(CommandFlag.DF), frozenset((Command.READ,)), int(ExportFlag.SEND_DF)),
    (int(CommandFlag.REQ_ONE), frozenset((Command.BLOCK_STATUS,)), int(ExportFlag.HAS_FLAGS)),
    (int(CommandFlag.FAST_ZERO), frozenset((Command.WRITE_ZEROES,)), int(ExportFlag.SEND_FAST_ZERO)),
)
_KNOWN_FLAGS = sum(int(flag) for flag, _, _ in _BELONGS)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a request is refused: the protocol's error and a sentence."""

    error: NbdError
    reason: str


SHUTTING_DOWN = Fault(NbdError.ESHUTDOWN, "the server is shutting down")


def fault_of(session: Session, request: Request) -> Fault | None:
    """The first rule that the request breaks, or None. It looks at the effect, not at the payload."""
    return (
        _fault_of_command(session, request)
        or _fault_of_flags(session, request)
        or _fault_of_span(session, request)
        or _fault_of_size(session, request)
    )


def _invalid(reason: str) -> Fault:
    return Fault(NbdError.EINVAL, reason)


def _fault_of_command(session: Session, request: Request) -> Fault | None:
    command = request.command
    if command not in _KNOWN:
        return _invalid(f"command {command} is not known")
    if command in CHANGES and session.flags & ExportFlag.READ_ONLY:
        return Fault(NbdError.EPERM, "the export is read-only")
    needed = _NEEDS.get(command)
    if needed is not None and not session.flags & needed:
        return _invalid(f"{Command(command).name} was not offered")
    if command == Command.BLOCK_STATUS and not session.contexts:
        return _invalid("BLOCK_STATUS without a metadata context")
    return None


def _fault_of_flags(session: Session, request: Request) -> Fault | None:
    flags = request.flags
    if not flags:
        return None
    if flags & ~_KNOWN_FLAGS:
        return _invalid(f"command flags are {flags:#x}, expected no bit beyond {_KNOWN_FLAGS:#x}")
    for flag, commands, needed in _BELONGS:
        if flags & flag and (request.command not in commands or not session.flags & needed):
            return _invalid(f"{Command(request.command).name} does not take the flag {CommandFlag(flag).name}")
    return None


def _fault_of_span(session: Session, request: Request) -> Fault | None:
    offset, length = request.offset, request.length
    if request.command in _SPANLESS:
        named = Command(request.command).name
        return _invalid(f"{named} has offset {offset} and length {length}, expected 0") if offset or length else None
    end = offset + length
    if end > session.size:
        beyond = NbdError.ENOSPC if request.command in (Command.WRITE, Command.WRITE_ZEROES) else NbdError.EINVAL
        return Fault(beyond, f"{length} bytes at {offset} end beyond the export's {session.size}")
    minimum = session.block_sizes.minimum
    # The last block of an export whose size is no multiple could not be reached otherwise.
    if offset % minimum or (length % minimum and end != session.size):
        return _invalid(f"{length} bytes at {offset} are not aligned to the minimum block size {minimum}")
    return None


def _fault_of_size(session: Session, request: Request) -> Fault | None:
    length, maximum = request.length, session.block_sizes.maximum
    if request.command == Command.BLOCK_STATUS and not length:
        return _invalid("BLOCK_STATUS of no bytes")
    if request.command == Command.WRITE and length > maximum:
        return _invalid(f"{length} bytes are to be written, expected up to {maximum}")
    if request.command == Command.READ and length > maximum:
        # EOVERFLOW belongs to replies that come in chunks; a simple client may not know it.
        error = NbdError.EINVAL if session.mode is Mode.SIMPLE else NbdError.EOVERFLOW
        return Fault(error, f"{length} bytes are to be read, expected up to {maximum}")
    return None
