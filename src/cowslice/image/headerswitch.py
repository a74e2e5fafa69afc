"""Changing the first cluster of an image that is open: it says the old or the new, whatever moment the power fails at.

It does not know why anything changes. What must hold: invariant I5, the sector with the header's fields is written in
one request after all that it points to is stable, and is synced by itself; what it points at behind itself stays
untouched until then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from cowslice.errors import BadOption
from cowslice.format.extensions import encode_extensions
from cowslice.format.first_cluster import FirstCluster, encode_first_cluster, lay_out
from cowslice.format.header import COMPRESSION_TYPE_OFFSET
from cowslice.storage.base import Storage
from cowslice.units import SECTOR, round_up

if TYPE_CHECKING:
    from cowslice.image.qcow2 import Qcow2Layer


def switch_header(layer: Qcow2Layer, **fields: object) -> None:
    """Change fields of the header (names of format.header.Header) on disk, stably, and then in memory.

    All else in the first cluster stays as it is. Raises StorageError; then it is unknown whether the disk has changed.
    """
    header = replace(layer.first.header, **fields)  # type: ignore[arg-type]
    switch_first_cluster(layer, replace(layer.first, header=header))


def switch_first_cluster(layer: Qcow2Layer, first: FirstCluster) -> None:
    """Replace header, extensions and backing name on disk, stably, and then in memory. The places are as `first` says.

    Where `is_whole` says no, a crash can leave the old header with what is new behind its sector.
    Raises BadOption where the parts do not fit the first cluster, StorageError.
    """
    forms = [_Form(layer.first), *_forms_between(layer.first, first)]
    if len(forms) == 1:
        forms.append(_Form(first))
    for old, new in pairwise(forms):
        _pass(layer.storage, old, new)
    _tidy(layer.storage, forms)
    layer.adopt(first)


def is_whole(old: FirstCluster, new: FirstCluster) -> bool:
    """Whether one can take the place of the other so that a crash leaves either, and nothing between them.

    It can unless both reach behind the first sector and the cluster has no room beside them, or both are of version 2
    and have other extensions there.
    """
    return bool(_forms_between(old, new))


def rearranged(first: FirstCluster, **changes: object) -> FirstCluster:
    """The same with other `header`, `extensions` or `raw_backing_name`, laid out anew one behind the other.

    Raises BadOption where they do not fit the first cluster.
    """
    wanted = replace(first, **changes)  # type: ignore[arg-type]
    return lay_out(wanted.header, wanted.extensions, wanted.raw_backing_name)


def write_first_cluster(storage: Storage, raw: bytes) -> None:
    """Write the bytes of a first cluster over one that nobody reads, the sector of the header last."""
    head, rest = raw[:SECTOR], raw[SECTOR:]
    if rest and storage.read(SECTOR, len(rest)) != rest:
        storage.pwrite(SECTOR, rest)
        storage.sync()
    storage.pwrite(0, head)
    storage.sync()


@dataclass(frozen=True, slots=True)
class _Form:
    """A first cluster on its way; its bytes before `start` mean nothing but for those of the first sector."""

    first: FirstCluster
    start: int = 0

    @property
    def raw(self) -> bytes:
        return encode_first_cluster(self.first)

    def behind(self) -> Iterator[tuple[int, int]]:
        """Yield what it needs behind the first sector, which is written whole or not at all: (begin, end) in bytes."""
        header, name = self.first.header, self.first.raw_backing_name
        # An END record for which there is no room is not there.
        extensions = min(header.header_length + len(encode_extensions(self.first.extensions)), len(self.raw))
        for begin, end in ((self.start, extensions),
                           (header.backing_file_offset, header.backing_file_offset + len(name))):
            if end > SECTOR and end > begin:
                yield max(begin, SECTOR), end


def _forms_between(old: FirstCluster, new: FirstCluster) -> Sequence[_Form]:
    """The forms to take one after the other, `new` last, so that none spoils the one before; empty where none can."""
    start, end = _Form(old), _Form(new)
    at = round_up(max((stop for form in (start, end) for _, stop in form.behind()), default=SECTOR), 8)
    for way in ([end], [_aside(new, at), end], [_aside(old, at), end]):
        forms = [form for form in way if form is not None]
        if len(forms) == len(way) and all(not _spoils(one, other) for one, other in pairwise([start, *forms])):
            return forms
    return []


def _aside(first: FirstCluster, at: int) -> _Form | None:
    """The same with extensions and backing name from `at` on, None where there is no room.

    A header of version 3 says itself how long it is; after one of version 2 only the name can lie elsewhere.
    """
    header = first.header
    try:
        if header.version == 2:
            form = _Form(replace(first, header=replace(header, backing_file_offset=at)))
            return form if first.raw_backing_name and len(form.raw) <= 1 << header.cluster_bits else None
        longer = replace(header, header_length=at, tail=header.tail.ljust(at - COMPRESSION_TYPE_OFFSET - 1, b"\0"))
        return _Form(lay_out(longer, first.extensions, first.raw_backing_name), at)
    except BadOption:
        return None


def _spoils(old: _Form, new: _Form) -> bool:
    """Whether writing what `new` has behind the first sector changes what `old` has there."""
    before, after = old.raw, _merged(old, new)
    return any(before[begin:end] != after[begin:end] for begin, end in old.behind())


def _merged(old: _Form, new: _Form) -> bytearray:
    """The bytes of `old` with those that `new` needs behind the first sector."""
    raw = new.raw
    both = bytearray(old.raw.ljust(max(SECTOR, len(raw)), b"\0"))
    for begin, end in new.behind():
        both[begin:end] = raw[begin:end].ljust(end - begin, b"\0")
    return both


def _pass(storage: Storage, old: _Form, new: _Form) -> None:
    """Write what is new behind the first sector, and when that is stable the first sector."""
    behind = False
    both = _merged(old, new)
    for begin, end in new.behind():
        if storage.read(begin, end - begin) != both[begin:end]:
            storage.pwrite(begin, both[begin:end])
            behind = True
    if behind:
        storage.sync()
    storage.pwrite(0, new.raw[:SECTOR].ljust(min(SECTOR, len(old.raw)), b"\0"))
    storage.sync()


def _tidy(storage: Storage, forms: Sequence[_Form]) -> None:
    """Let what the last form has no use for be zeros. It means nothing, so it need not be stable."""
    length = max(len(form.raw) for form in forms)
    rest = forms[-1].raw.ljust(length, b"\0")[SECTOR:]
    if rest and storage.read(SECTOR, len(rest)) != rest:
        storage.pwrite(SECTOR, rest)
