"""Who belongs to a fleet: the images below a folder with the traces beside them, or the lines of a list.

It opens no image; it looks at the first bytes of files. What must hold: nothing is guessed. A line of a list that is
not understood is refused by its number, and a disk with several traces is not given one of them.
"""

from __future__ import annotations

import csv
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from cowslice.errors import BadOption, StorageError
from cowslice.format.findings import escaped
from cowslice.storage.locate import local_path
from cowslice.tune.bytestream import blocks, name_of
from cowslice.tune.study import Setting
from cowslice.units import MiB, parse_size

MAGIC = b"QFI\xfb"
TRACE_ENDINGS = ("trace", "log", "iolog", "blkparse", "csv", "capture")
COMPRESSED_ENDINGS = ("gz", "zst")
WITHOUT_HEADING = ("image", "trace", "disk")
SIZES = {"cache-size", "l2-cache-size", "refcount-cache-size", "l2-cache-entry-size"}
COLUMNS = (*WITHOUT_HEADING, *sorted(SIZES))
MOST_LIST_BYTES = 64 * MiB  # room for 100,000 disks with the longest names in use
MOST_DISKS = 100_000  # a host has hundreds, a cluster some thousands
_TRACE_NAME = re.compile(rf"\.(?:{'|'.join(TRACE_ENDINGS)})(?:\.(?:{'|'.join(COMPRESSED_ENDINGS)}))?")


@dataclass(frozen=True, slots=True)
class Member:
    """One disk of a fleet: paths or URLs of its image and its trace, and which disk of a trace of several it is.

    `today` holds the cache options that are known of this disk alone.
    """

    image: str
    trace: str | None = None
    disk: str | None = None
    today: Setting = field(default_factory=Setting)


@dataclass(frozen=True, slots=True)
class Broken:
    """A disk that was passed over, and why: `kind` is the name of the error's class."""

    image: str
    error: str
    hint: str = ""
    kind: str = "StorageError"


def members(source: str | os.PathLike[str]) -> tuple[Member | Broken, ...]:
    """Return the disks of a folder, by their names, or of a list, in its order.

    Raises StorageError, BadOption for a list that is wrong in one line, or for nobody at all.
    """
    path = local_path(source)
    found = tuple(_in_folder(path) if path is not None and os.path.isdir(path) else _in_list(source))
    if not found:
        raise BadOption(f"'{name_of(source)}' has no image, expected a folder with some, or a list of some")
    return found


# -- a folder


def _in_folder(top: str) -> Iterator[Member | Broken]:
    known: set[tuple[int, int]] = set()
    troubles: list[OSError] = []
    for folder, folders, names in os.walk(os.path.abspath(top), onerror=troubles.append):
        folders.sort()
        traces = [name for name in names if _TRACE_NAME.search(name)]
        for name in sorted(names):
            path = os.path.join(folder, name)
            try:
                if _is_image(path, known):
                    yield _with_trace(folder, name, traces)
            except OSError as error:
                yield Broken(path, str(StorageError.of(error, "open", path)))
    for trouble in troubles:
        yield Broken(str(trouble.filename), str(StorageError.of(trouble, "list", str(trouble.filename))))


def _is_image(path: str, known: set[tuple[int, int]]) -> bool:
    """Whether the file begins like an image or is named like one. A second name of the same file is none."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) in known:
        return False
    with open(path, "rb", buffering=0) as file:
        if file.read(len(MAGIC)) != MAGIC and not path.endswith(".qcow2"):
            return False
    known.add((status.st_dev, status.st_ino))
    return True


def _with_trace(folder: str, name: str, traces: list[str]) -> Member | Broken:
    """The image with what is named like it, or like it without its ending, and then like a trace."""
    stems = {name, os.path.splitext(name)[0]}
    fitting = sorted(trace for trace in traces
                     if any(trace.startswith(stem) and _TRACE_NAME.fullmatch(trace, len(stem)) for stem in stems))
    path = os.path.join(folder, name)
    if len(fitting) > 1:
        shown = ", ".join(f"'{trace}'" for trace in fitting)
        return Broken(path, f"'{path}' has several traces beside it ({shown}), expected one at most",
                      "Say which one in a list of disks.", BadOption.__name__)
    return Member(path, os.path.join(folder, fitting[0]) if fitting else None)


# -- a list


def _in_list(source: str | os.PathLike[str]) -> Iterator[Member]:
    """Lines of comma-separated values; a heading names the columns."""
    name, path = name_of(source), local_path(source)
    folder = os.path.dirname(os.path.abspath(path)) if path is not None else None
    columns: tuple[str, ...] = WITHOUT_HEADING
    known: dict[str, int] = {}
    begun = False
    for number, line in _lines(source, name):
        where = f"'{name}', line {number}"
        fields = _fields(line, where)
        if not fields:
            continue
        if not begun and fields[0] == COLUMNS[0]:
            columns = _heading(fields, where)
        else:
            member = _member(fields, columns, folder, where)
            if len(known) == MOST_DISKS:
                raise BadOption(f"{where}: the list goes on, expected at most {MOST_DISKS} disks")
            first = known.setdefault(member.image, number)
            if first != number:
                raise BadOption(f"{where}: '{_shown(member.image)}' is the image of line {first}, expected each once")
            yield member
        begun = True


def _lines(source: str | os.PathLike[str], name: str) -> Iterator[tuple[int, str]]:
    content = bytearray()
    for block in blocks(source):
        content += block
        if len(content) > MOST_LIST_BYTES:
            raise BadOption(f"'{name}' is longer than {MOST_LIST_BYTES} bytes, expected a list of disks")
    for number, line in enumerate(bytes(content).split(b"\n"), 1):
        yield number, os.fsdecode(line.removesuffix(b"\r"))


def _fields(line: str, where: str) -> list[str]:
    """The values of a line; none in an empty one and in one that begins with '#'."""
    if not line.strip() or line.startswith("#"):
        return []
    if not all(c.isprintable() or "\udc80" <= c <= "\udcff" for c in line):
        raise BadOption(f"{where}: '{_shown(line)}', expected printable text")
    try:
        return [field.strip() for field in next(csv.reader([line], strict=True, skipinitialspace=True))]
    except csv.Error as error:
        raise BadOption(f"{where}: '{_shown(line)}', expected comma-separated values ({error})") from None


def _heading(fields: list[str], where: str) -> tuple[str, ...]:
    for value in fields:
        if value not in COLUMNS or fields.count(value) > 1:
            raise BadOption(f"{where}: the heading has '{_shown(value)}', expected each of some of "
                            f"{', '.join(COLUMNS)} once")
    return tuple(fields)


def _member(fields: list[str], columns: tuple[str, ...], folder: str | None, where: str) -> Member:
    if len(fields) > len(columns):
        raise BadOption(f"{where}: {len(fields)} values, expected at most {len(columns)}: {', '.join(columns)}")
    given = {column: field for column, field in zip(columns, fields, strict=False) if field}
    if "image" not in given:
        raise BadOption(f"{where}: no image, expected {', '.join(columns)}")
    if "disk" in given and "trace" not in given:
        raise BadOption(f"{where}: disk '{_shown(given['disk'])}' of no trace, expected a trace before it")
    try:
        trace = _placed(given["trace"], folder) if "trace" in given else None
        sizes = {column: parse_size(given[column], column) for column in SIZES & given.keys()}
        today = Setting(**{column.replace("-", "_"): size for column, size in sizes.items()})
        return Member(_placed(given["image"], folder), trace, given.get("disk"), today)
    except BadOption as error:
        raise BadOption(f"{where}: {error}", hint=error.hint) from None


def _placed(name: str, folder: str | None) -> str:
    """A name in a list that lies in `folder`: absolute, or a URL."""
    path = local_path(name)
    if path is None:
        return name
    if folder is None and not os.path.isabs(path):
        raise BadOption(f"'{_shown(name)}' is relative, expected a URL or an absolute path in a list that is at a URL")
    return os.path.normpath(os.path.join(folder or "/", path))


def _shown(text: str) -> str:
    return escaped(os.fsencode(text))
