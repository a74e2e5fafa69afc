"""The files that a new image is written to: the image itself and its external data file.

It does not know what is written. A file that somebody else uses is never touched, and a data file with content only
where the caller said so.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import ExitStack

from cowslice.errors import BadOption, StorageError
from cowslice.image.createoptions import CreateOptions
from cowslice.image.filling import provide_space
from cowslice.image.gate import has_protocol, shown
from cowslice.storage.appearing import AppearingFile
from cowslice.storage.attributes import hint_extent_size, switch_off_copy_on_write
from cowslice.storage.base import Storage
from cowslice.storage.file import FileStorage
from cowslice.storage.locate import local_path, locate
from cowslice.units import parse_size

_HEADER_BYTES = 512  # wiped first in a storage that is written in place: without it there is no image

Target = str | os.PathLike[str] | Storage


def path_of(target: Target) -> str:
    """The path or URL of a target, '' for a storage that the caller opened."""
    return "" if isinstance(target, Storage) else os.fspath(target)


def open_target(target: Target, options: CreateOptions, stack: ExitStack) -> tuple[Storage, bool]:
    """Return (empty storage to write the image to, whether what is never written reads as zeros).

    A regular file appears when `stack` ends well. A device, an export or a given storage is written in place; the
    first bytes are zeros then. Raises StorageError: Locked where another program uses it.
    """
    if isinstance(target, Storage):
        return target, _emptied(target)
    path = local_path(target)
    if path is None or (os.path.exists(path) and not os.path.isfile(path)):
        storage = stack.enter_context(locate(target, "r+"))
        return storage, _emptied(storage)
    file = stack.enter_context(AppearingFile(path, sync=options.sync))
    _tell_file_system(file.storage, options)
    return file.storage, True


def open_data_file(
    target: Target, size: int, options: CreateOptions, stack: ExitStack
) -> tuple[Storage | None, bool]:
    """Return (the data file, whether it was made here), or (None, False) when the image has none; it is unchanged.

    One that is made here is removed again when `stack` does not end well. Raises BadOption when its content would be
    lost, StorageError.
    """
    if options.data_file is None:
        return None, False
    path = _data_path(os.fspath(options.data_file), path_of(target))
    if not os.path.exists(path):
        storage = FileStorage(path, "x")
        stack.push(lambda kind, error, trace: _end_new(storage, path, failed=kind is not None))
        _tell_file_system(storage, options)
        return storage, True
    storage = stack.enter_context(FileStorage(path, "r+"))
    _check_content(storage, size, options)
    return storage, False


def refuse_data_content(target: Target, options: CreateOptions) -> None:
    """Raise BadOption when a copy would be mixed with what its data file holds already."""
    if options.data_file is None or options.replace_data_file:
        return
    path = _data_path(os.fspath(options.data_file), path_of(target))
    if os.path.exists(path) and (not os.path.isfile(path) or os.path.getsize(path)):
        raise BadOption(f"data file '{shown(path)}' is not empty: a copy needs one of its own", hint=_HINT)


def prepare_data_file(data: Storage, size: int, options: CreateOptions, *, fresh: bool) -> None:
    """Give the data file the size of the disk and, as far as it grows, its preallocated space."""
    kept = 0 if fresh or options.replace_data_file else data.length()
    if not os.path.isfile(data.name):
        if options.replace_data_file or not options.data_file_raw:
            data.zero(0, size)
        return
    data.truncate(kept)
    data.truncate(size)
    provide_space(data, options.preallocation, kept, size - kept)


def _data_path(name: str, image: str) -> str:
    """Where the data file lies: beside the image when its name is relative, as it will be looked for."""
    if has_protocol(name):
        raise BadOption(f"data_file is '{shown(name)}', expected a local file (a path? write ./{shown(name)})")
    if not os.path.isabs(name):
        if not image or local_path(image) is None:
            raise BadOption(f"data_file is '{shown(name)}', expected an absolute path: the image has no folder")
        name = os.path.join(os.path.dirname(os.path.abspath(image)), name)
    path = os.path.realpath(name)
    if image and path == os.path.realpath(image):
        raise BadOption(f"data_file is '{shown(name)}', the image itself, expected another file")
    return path


def _check_content(storage: FileStorage, size: int, options: CreateOptions) -> None:
    """Refuse to lose what an existing data file holds."""
    length, name = storage.length(), shown(storage.name)
    if not os.path.isfile(storage.name):
        if length < size:
            raise BadOption(f"data file '{name}' has {length} bytes, but the disk has {size}")
        if not options.data_file_raw and not options.replace_data_file:
            raise BadOption(f"data file '{name}' is a device, whose content would be lost", hint=_HINT)
        return
    if options.replace_data_file or not length:
        return
    if not options.data_file_raw:
        raise BadOption(f"data file '{name}' is not empty: its {length} bytes would be lost", hint=_HINT)
    if length > size:
        raise BadOption(f"data file '{name}' has {length} bytes, more than the disk of {size}: it would be cut",
                        hint="Make the disk as large as the file, or permit its content to be lost.")


_HINT = "Choose another name, or remove the file, or permit its content to be lost (replace_data_file)."


def _end_new(storage: Storage, path: str, *, failed: bool) -> bool:
    storage.close()
    if failed:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return False


def _emptied(storage: Storage) -> bool:
    """Empty a storage; of one that keeps its length, wipe the header. Return whether it is empty now."""
    try:
        storage.truncate(0)
    except StorageError:
        storage.zero(0, min(_HEADER_BYTES, storage.length()))
        storage.sync()
        return False
    return True


def _tell_file_system(storage: FileStorage, options: CreateOptions) -> None:
    if options.nocow:
        switch_off_copy_on_write(storage.fileno())
    if options.extent_size_hint is not None and (size := parse_size(options.extent_size_hint, "extent_size_hint")):
        hint_extent_size(storage.fileno(), size)
