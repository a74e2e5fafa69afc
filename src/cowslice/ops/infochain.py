"""Facts about an image and everything below it: each name that an image holds passes the gate before it is opened.

It reads headers, never content. A chain that bites its own tail is refused by the identity of its files.
"""

from __future__ import annotations

import os

from cowslice.errors import ReferenceRefused, UnsupportedImage
from cowslice.image.gate import Gate, Role, pass_gate, resolve, root_of
from cowslice.image.options import MAX_DEPTH
from cowslice.ops.info import ImageFacts, inspect
from cowslice.storage.base import Storage
from cowslice.storage.locate import locate


def inspect_chain(
    name: str, gate: Gate, *, format_name: str | None = None, force_share: bool = False, max_depth: int = MAX_DEPTH
) -> list[ImageFacts]:
    """Facts of the image called `name` and of its backing files, top first.

    Raises ReferenceRefused, StorageError, or UnsupportedImage for a chain without end.
    """
    chain: list[ImageFacts] = []
    seen: set[object] = set()
    root, place, shown, wanted = root_of(name), name, name, format_name
    while True:
        with locate(place, locking="force-share" if force_share else True) as storage:
            identity = _identity(storage)
            if identity in seen:
                raise ReferenceRefused(f"'{place}' is its own backing file, directly or through others")
            seen.add(identity)
            chain.append(inspect(storage, format_name=wanted))
        facts = chain[-1]
        facts.filename = shown
        below = facts.backing_name
        if below is None or facts.first is None:
            return chain
        if len(chain) >= max_depth:
            raise UnsupportedImage(f"the backing chain of '{name}' has more than {max_depth} layers",
                                   features=("deep backing chain",))
        reference = resolve(Role.BACKING, below, facts.first.backing_format, image=place, root=root)
        pass_gate(gate, reference)
        place, shown, wanted = reference.target, facts.full_backing_name or "", facts.first.backing_format


def _identity(storage: Storage) -> object:
    descriptor = storage.fileno()
    if descriptor < 0:
        return storage.name
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
