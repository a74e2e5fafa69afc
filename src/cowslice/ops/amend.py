"""Change what kind of qcow2 image a file is: its version, key slots, refcount width, size and data file.

It does not know terminals. Each change is whole and stable by itself, in an order in which every one leaves a sound
image; what was refused is refused before the first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from cowslice.errors import UnsupportedImage
from cowslice.format.extensions import ExtensionType, encode_feature_names, with_extension
from cowslice.format.first_cluster import FirstCluster
from cowslice.format.header import Autoclear, Compatible, Header, Incompatible
from cowslice.format.limits import HEADER_LENGTH_V2
from cowslice.image.expanding import expand_zeros
from cowslice.image.gate import shown
from cowslice.image.headerswitch import rearranged, switch_first_cluster
from cowslice.image.image import Image
from cowslice.image.keys import passphrase_of
from cowslice.image.options import OpenOptions
from cowslice.image.qcow2 import Qcow2Layer
from cowslice.image.recounting import change_width, forget_structures
from cowslice.image.snapshotting import Snapshotting
from cowslice.image.writable import opened_writer
from cowslice.ops.amendrules import Amendment, check_amendment, slots_of
from cowslice.ops.opening import mend_dirty
from cowslice.units import SECTOR, round_up

Progress = Callable[[int, int], None]
_NAMES_FROM = 4096  # the table of feature names would fill too much of a smaller first cluster


def amend(path: str, options: OpenOptions, wanted: Amendment, *, progress: Progress | None = None) -> None:
    """Change the image at `path`. Raises BadOption and UnsupportedImage for what cannot be, and before any change.

    A refcount that does not fit the width that is wanted is a RefcountOverflow: the version may be another one then.
    Raises also the errors of opening and writing.
    """
    options = replace(options, writable=True, warmup="off")
    if options.format == "raw":
        raise UnsupportedImage(f"'{shown(path)}' is raw, expected a qcow2 image: a raw file has nothing to amend",
                               features=("amending a raw file",))
    mend_dirty(path, direct=options.direct, on_warning=options.on_warning)
    with Image(path, options) as image:
        first = image.first_cluster
        assert first is not None
        check_amendment(image, wanted)
        _described(first, wanted)
        if wanted.version == 3:
            _upgraded(first)  # raises where the longer header does not fit
    header = first.header
    if wanted.version == 3 and header.version == 2:
        _upgrade(path, options)
    if wanted.refcount_bits not in (None, header.geometry.refcount_bits):
        _change_width(path, options, wanted.refcount_bits, progress)
    with Image(path, options) as image:  # what writes goes by the version that it saw when it was opened
        _switch(image.layers[0], lambda first: _described(first, wanted))
        if wanted.size is not None and round_up(wanted.size, SECTOR) != image.size:
            image.resize(round_up(wanted.size, SECTOR))
    if wanted.version == 2 and header.version == 3:
        _downgrade(path, options, progress)
    if wanted.keys is not None:  # last: the secret that was given may open nothing afterwards
        with Image(path, options) as image:
            slots = slots_of(image, max_rounds=options.max_key_rounds)
            slots.change(wanted.keys, passphrase_of(options.secret, path))


def _upgrade(path: str, options: OpenOptions) -> None:
    with opened_writer(path, options) as writer:
        Snapshotting(writer).complete()
        _switch(writer.layer, _upgraded)


def _change_width(path: str, options: OpenOptions, bits: int, progress: Progress | None) -> None:
    with opened_writer(path, options) as writer:
        former = change_width(writer, bits, progress)
    with opened_writer(path, options) as writer:
        forget_structures(writer, former)


def _downgrade(path: str, options: OpenOptions, progress: Progress | None) -> None:
    with opened_writer(path, options) as writer:
        expand_zeros(writer, progress)
        _switch(writer.layer, _downgraded)


def _switch(layer: object, change: Callable[[FirstCluster], FirstCluster]) -> None:
    """Put the first cluster in place that `change` makes of the one there is, if it is another one."""
    assert isinstance(layer, Qcow2Layer)
    first = change(layer.first)
    if first != layer.first:
        switch_first_cluster(layer, first)


def _upgraded(first: FirstCluster) -> FirstCluster:
    fresh = Header(version=3)
    if first.header.version == 3:
        return first
    header = replace(first.header, version=3, header_length=fresh.header_length, tail=fresh.tail)
    extensions = first.extensions
    if header.geometry.cluster_size > _NAMES_FROM:
        extensions = with_extension(extensions, ExtensionType.FEATURE_NAMES, encode_feature_names().payload)
    return rearranged(first, header=header, extensions=extensions)


def _described(first: FirstCluster, wanted: Amendment) -> FirstCluster:
    """With the fields that only describe: lazy refcounts, and the name and rawness of the data file."""
    header, extensions = first.header, first.extensions
    if wanted.lazy_refcounts is not None:
        others = header.compatible & ~Compatible.LAZY_REFCOUNTS
        header = replace(header, compatible=others | (Compatible.LAZY_REFCOUNTS * wanted.lazy_refcounts))
    if wanted.data_file_raw is False:
        header = replace(header, autoclear=header.autoclear & ~Autoclear.RAW_EXTERNAL)
    if wanted.data_file is not None:
        name = os.fsencode(wanted.data_file) or None
        extensions = with_extension(extensions, ExtensionType.DATA_FILE, name)
    if (header, extensions) == (first.header, first.extensions):
        return first
    return rearranged(first, header=header, extensions=extensions)


def _downgraded(first: FirstCluster) -> FirstCluster:
    header = replace(first.header, version=2, header_length=HEADER_LENGTH_V2, tail=b"", incompatible=Incompatible(0),
                     compatible=Compatible(0), autoclear=Autoclear(0), compression_type=0)
    extensions = with_extension(first.extensions, ExtensionType.FEATURE_NAMES, None)
    return rearranged(first, header=header, extensions=extensions)
