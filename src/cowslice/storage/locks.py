"""Image locks on an open file, as every QEMU program understands them.

It does not know paths or storages: it gets a descriptor. A read lock on byte 100 + n says "I use permission n",
one on byte 200 + n says "nobody else may use permission n"; the locks belong to the open file and die with it.
"""

from __future__ import annotations

import errno
import fcntl
import struct

from cowslice.errors import BadOption, Locked, StorageError

USED, UNSHARED = 100, 200  # first byte of each of the two ranges
READ, WRITE, RESIZE = 0, 1, 3  # permission numbers; 2, writing what is there already, excludes nobody we care about
_FLOCK = struct.Struct("hhqqi0q")  # struct flock: type, whence, start, length, pid
_HINT = {
    True: "Close the program that has it open before writing to it.",
    False: "Close the program that writes to it, or read it with force-share (-U), which may see a half-written state.",
}


def lock_image(descriptor: int, name: str, *, writing: bool, force_share: bool = False) -> None:
    """Lock the open file for reading or for writing, or raise Locked where another open file forbids it.

    A reader allows other readers; a writer allows nobody; with `force_share` a reader allows everybody.
    """
    if writing and force_share:
        raise BadOption(f"force-share was asked for '{name}' opened for writing, expected it only with reading")
    used = (READ, WRITE, RESIZE) if writing else (READ,)
    unshared = () if force_share else (WRITE, RESIZE)
    try:
        taken = _take(descriptor, used, unshared)
    except OSError as error:
        fault = StorageError.of(error, "lock", name)
        fault.hint = "Its file system may not support locks; open it without locking only if nobody else has it open."
        raise fault from error
    if not taken:
        raise _refused(name, writing)


def _take(descriptor: int, used: tuple[int, ...], unshared: tuple[int, ...]) -> bool:
    """Take first, look afterwards: two that race may both lose, never both win."""
    for byte in [USED + n for n in used] + [UNSHARED + n for n in unshared]:
        if not _read_lock(descriptor, byte):
            return False
    against = [UNSHARED + n for n in used] + [USED + n for n in unshared]
    return not any(_held_by_another(descriptor, byte) for byte in against)


def _read_lock(descriptor: int, byte: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, 0, byte, 1, 0))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # somebody holds a write lock, which QEMU never does
            return False
        raise
    return True


def _held_by_another(descriptor: int, byte: int) -> bool:
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _refused(name: str, writing: bool) -> Locked:
    doing, why = ("writing", "open elsewhere") if writing else ("reading", "open for writing elsewhere")
    return Locked(
        f"cannot open '{name}' for {doing}: it is {why}",
        errno=errno.EAGAIN,
        filename=name,
        hint=_HINT[writing],
    )
