"""The files that together are one disk: the image, its data file, its backing file, and so on down.

It does not read guest data. Every name found inside an image passes the gate; a file that is its own ancestor and a
chain that is too deep are refused; on failure everything opened here is closed again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field

from cowslice.cache.slicemap import SliceCache, SliceMap
from cowslice.errors import BadOption, CowsliceError, MalformedImage, ReferenceRefused, UnsupportedImage
from cowslice.format.header import Autoclear
from cowslice.image.compressed import CompressedClusters
from cowslice.image.decompressed import DecompressedCache
from cowslice.image.fastpath import FastPath
from cowslice.image.gate import Role, pass_gate, resolve, root_of, shown
from cowslice.image.keys import open_cipher
from cowslice.image.layer import Layer
from cowslice.image.opening import OpenedFile, Place, decide_format, has_magic, naming, open_file, open_place
from cowslice.image.options import NAMED, Named, OpenOptions, Source, plan_chain_cache
from cowslice.image.qcow2 import Qcow2Layer, SectorCipher
from cowslice.image.raw import RawLayer
from cowslice.storage.base import Storage
from cowslice.units import parse_size

_RAW_FORMATS = ("raw", "file", "host_device")  # the last two are QEMU's names for the file below a raw image


@dataclass(frozen=True, slots=True)
class _Link:
    """One file of the chain before its layer is made. `file` is None for raw."""

    place: Place
    file: OpenedFile | None
    data: Storage | None
    cipher: SectorCipher | None = None


@dataclass(slots=True)
class _Walk:
    """What is known while the chain is followed downwards."""

    options: OpenOptions
    stack: ExitStack
    warn: Callable[[str], None]
    root: str = ""
    links: list[_Link] = field(default_factory=list)
    seen: set[object] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Chain:
    """The open layers, top first, and the memory they share. Closing `stack` closes every file of ours."""

    layers: tuple[Layer, ...]
    cache: SliceCache
    slice_maps: tuple[SliceMap, ...]
    decompressed: DecompressedCache
    refcount_budget: int
    stack: ExitStack


def open_chain(source: Source, options: OpenOptions, warn: Callable[[str], None]) -> Chain:
    """Open an image and all that it stands on. Raises the errors of every step; `warn` hears what is merely odd."""
    with ExitStack() as stack:
        walk = _Walk(options, stack, warn)
        _follow(walk, source)
        chain = _assemble(walk)
        return Chain(*chain, stack.pop_all())


def _follow(walk: _Walk, source: Source) -> None:
    """Open the top and then each backing file until one has none."""
    options = walk.options
    place = open_place(source, options, walk.stack, writable=options.writable)
    walk.root = root_of(place.path)
    _add(walk, place, decide_format(place, options.format), snapshot=options.snapshot)
    following = None if options.metadata_only else _below_top(walk)
    while following is not None:
        if len(walk.links) >= options.max_depth:
            raise UnsupportedImage(f"the backing chain of '{shown(walk.links[0].place.storage.name)}' has more than "
                                   f"{options.max_depth} layers", features=("deep backing chain",))
        place, kind = following
        _add(walk, place, kind, snapshot=None)
        following = _named_backing(walk)


def _add(walk: _Walk, place: Place, kind: str, *, snapshot: str | None) -> None:
    identity = place.identity
    if identity in walk.seen:
        raise ReferenceRefused(f"'{shown(place.storage.name)}' is its own backing file, directly or through others")
    walk.seen.add(identity)
    if kind == "raw":
        if snapshot is not None:
            raise BadOption(f"snapshot is '{snapshot}', but a raw file has no snapshots")
        walk.links.append(_Link(place, None, place.storage))
        return
    file = open_file(place, snapshot)
    if file.first.header.is_corrupt:
        walk.warn(f"'{shown(place.storage.name)}' is marked corrupt: what is read may be wrong")
    if file.first.header.autoclear & Autoclear.RAW_EXTERNAL and file.first.backing_name:
        raise MalformedImage(f"'{shown(place.storage.name)}' has raw external data and a backing file, expected only "
                             "one of them", where="header", field="autoclear")
    walk.links.append(_Link(place, file, _open_data(walk, file), _open_cipher(walk, file)))


def _below_top(walk: _Walk) -> tuple[Place, str] | None:
    """The layer below the top one: what the caller says, else what the image names."""
    backing = walk.options.backing
    if backing is None:
        return None
    if isinstance(backing, Named):
        return _named_backing(walk)
    if walk.links[0].file is None:
        raise BadOption("backing is given, expected it only with a qcow2 image: a raw file has no backing file")
    place = open_place(backing, walk.options, walk.stack)
    walk.root = root_of(place.path)
    return place, decide_format(place, walk.options.backing_format)


def _named_backing(walk: _Walk) -> tuple[Place, str] | None:
    """The backing file that the lowest layer so far names, opened, with its format; None when it names none."""
    file = walk.links[-1].file
    if file is None or file.first.backing_name is None:
        return None
    kind = _backing_format(file)
    place = _open_named(walk, file, Role.BACKING, file.first.backing_name, kind)
    if kind is None:
        kind = "qcow2" if has_magic(place.storage) else "raw"
        walk.warn(f"'{shown(file.place.storage.name)}' does not say the format of its backing file "
                  f"'{shown(place.storage.name)}', which looks like {kind}")
    return place, kind


def _backing_format(file: OpenedFile) -> str | None:
    named = file.first.backing_format
    if named is None or named == "qcow2":
        return named
    if named in _RAW_FORMATS:
        return "raw"
    raise UnsupportedImage(f"'{shown(file.place.storage.name)}' has a backing file of format '{shown(named)}', "
                           "expected qcow2 or raw", features=(f"backing format {shown(named)}",))


def _open_data(walk: _Walk, file: OpenedFile) -> Storage | None:
    """The storage of normal clusters: the file itself, or its external data file; None when that stays closed."""
    top = not walk.links
    given = walk.options.data_file if top else NAMED
    if not file.first.header.has_data_file:
        if not isinstance(given, Named):
            raise BadOption(f"data_file is given, but '{shown(file.place.storage.name)}' has none")
        return file.place.storage
    if not isinstance(given, Named):
        return open_place(given, walk.options, walk.stack, writable=walk.options.writable).storage
    if walk.options.metadata_only:
        return None
    if file.first.data_file_name is None:
        raise MalformedImage(f"'{shown(file.place.storage.name)}' needs an external data file but does not name it",
                             where="header extensions", field="data file", hint="Name it with data_file.")
    writable = top and walk.options.writable
    return _open_named(walk, file, Role.DATA, file.first.data_file_name, "raw", writable=writable).storage


def _open_cipher(walk: _Walk, file: OpenedFile) -> SectorCipher | None:
    if walk.options.metadata_only:
        return None
    with naming(file.place.storage):
        return open_cipher(
            file.place.storage, file.first, walk.options.secret, max_rounds=walk.options.max_key_rounds)


def _open_named(walk: _Walk, file: OpenedFile, role: Role, name: bytes, kind: str | None, *, writable: bool = False
                ) -> Place:
    """Open what an image names, if the gate permits it."""
    reference = resolve(role, os.fsdecode(name), kind, image=file.place.path, root=walk.root)
    pass_gate(walk.options.gate, reference)
    try:
        return open_place(reference.target, walk.options, walk.stack, writable=writable)
    except CowsliceError as failure:
        # The message quotes a name that a stranger chose: no control character of it may reach a terminal.
        failure.args = (f"the {role.value} that '{shown(file.place.storage.name)}' names: {shown(str(failure))}",)
        raise


def _assemble(walk: _Walk) -> tuple[tuple[Layer, ...], SliceCache, tuple[SliceMap, ...], DecompressedCache, int]:
    """Make the layers, their maps and the memory these share."""
    files = [link.file for link in walk.links if link.file is not None]
    plan = plan_chain_cache([(file.size, file.first.header.geometry) for file in files], walk.options)
    cache = SliceCache(plan.budget, walk.options.policy)
    decompressed = DecompressedCache(parse_size(walk.options.decompressed_cache_size, "decompressed_cache_size"))
    units = iter(plan.entry_bytes)
    layers: list[Layer] = []
    maps: list[SliceMap] = []
    for link in walk.links:
        if link.file is None:
            layers.append(RawLayer(link.place.storage))
            continue
        maps.append(_slice_map(cache, link.file, next(units), readahead=walk.options.readahead))
        layers.append(_qcow2_layer(link.file, link, maps[-1], decompressed))
    return tuple(layers), cache, tuple(maps), decompressed, plan.refcounts


def _slice_map(cache: SliceCache, file: OpenedFile, entry_bytes: int, *, readahead: bool) -> SliceMap:
    geometry = file.first.header.geometry
    return SliceMap(
        cache, cluster_bits=geometry.cluster_bits, extended_l2=geometry.extended_l2, l1=file.l1,
        clusters=geometry.clusters(file.size), entry_bytes=entry_bytes, storage=file.place.storage,
        l1_offset=file.l1_offset, readahead=readahead)


def _qcow2_layer(
    file: OpenedFile, link: _Link, slices: SliceMap, decompressed: DecompressedCache
) -> Qcow2Layer:
    return Qcow2Layer(
        file.place.storage, file.first, size=file.size, l1=file.l1, slices=slices, data=link.data,
        compressed=_compressed(file, decompressed), cipher=link.cipher)


def _compressed(file: OpenedFile, decompressed: DecompressedCache) -> CompressedClusters:
    header = file.first.header
    return CompressedClusters(file.place.storage, kind=header.compression_type,
                              cluster_size=header.geometry.cluster_size, shared=decompressed)


def fast_path(layers: Iterable[Layer]) -> FastPath:
    """The compiled path over the same layers."""
    fast = FastPath()
    for layer in layers:
        if isinstance(layer, Qcow2Layer):
            layer.join(fast)
        else:
            fast.add_raw(size=layer.size, data=layer.storage)
    return fast
