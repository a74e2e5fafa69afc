"""Change what kind of qcow2 image a file is: its version, lazy refcounts, size and data file.

It does not know terminals. Each change is whole and stable by itself, in an order in which every one leaves a sound
image; what was refused is refused before the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cowslice.errors import BadOption, UnsupportedImage
from cowslice.format.entries import Kind
from cowslice.format.extensions import ExtensionType, encode_feature_names, with_extension
from cowslice.format.first_cluster import FirstCluster
from cowslice.format.header import Autoclear, Compatible, CryptMethod, Header, Incompatible
from cowslice.format.limits import HEADER_LENGTH_V2, REFCOUNT_ORDER_V2
from cowslice.image.createoptions import COMPATS
from cowslice.image.gate import shown
from cowslice.image.headerswitch import rearranged, switch_first_cluster
from cowslice.image.image import Image
from cowslice.image.options import OpenOptions
from cowslice.image.qcow2 import Qcow2Layer
from cowslice.units import SECTOR, round_up

_NAMES_FROM = 4096  # the table of feature names would fill too much of a smaller first cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Amendment:
    """What shall change; None stays as it is. `compat` as in creation, `data_file` "" forgets the stored name."""

    compat: str | None = None
    lazy_refcounts: bool | None = None
    size: int | None = None
    data_file: str | None = None
    data_file_raw: bool | None = None
    refcount_bits: int | None = None

    def __post_init__(self) -> None:
        if self.compat is not None and self.compat not in COMPATS:
            raise BadOption(f"compat is '{self.compat}', expected one of {', '.join(COMPATS)}")
        if self.data_file is not None and "\0" in self.data_file:
            raise BadOption(f"data_file is {self.data_file!r}, expected a file name")

    @property
    def version(self) -> int | None:
        """The version of the header that is wanted."""
        return None if self.compat is None else COMPATS[self.compat]


def amend(path: str, options: OpenOptions, wanted: Amendment) -> None:
    """Change the image at `path`. Raises BadOption and UnsupportedImage for what cannot be, and before any change.

    Raises also the errors of opening and writing.
    """
    options = replace(options, writable=True, warmup="off")
    if options.format == "raw":
        raise UnsupportedImage(f"'{shown(path)}' is raw, expected a qcow2 image: a raw file has nothing to amend",
                               features=("amending a raw file",))
    with Image(path, options) as image:
        _refuse(image, wanted)
        if wanted.version == 3 and _first(image).header.version == 2:
            _switch(image, _upgraded(_first(image)))
    with Image(path, options) as image:  # what writes goes by the version that it saw when it was opened
        _switch(image, _described(_first(image), wanted))
        if wanted.size is not None and round_up(wanted.size, SECTOR) != image.size:
            image.resize(round_up(wanted.size, SECTOR))
        if wanted.version == 2 and _first(image).header.version == 3:
            image.flush()
            _switch(image, _downgraded(_first(image)))


def _first(image: Image) -> FirstCluster:
    first = image.first_cluster
    assert first is not None
    return first


def _switch(image: Image, first: FirstCluster) -> None:
    """Put the first cluster in place, if it is another one."""
    layer = image.layers[0]
    assert isinstance(layer, Qcow2Layer)
    if first != layer.first:
        switch_first_cluster(layer, first)


def _upgraded(first: FirstCluster) -> FirstCluster:
    fresh = Header(version=3)
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
                     compatible=Compatible(0), autoclear=Autoclear(0))
    extensions = with_extension(first.extensions, ExtensionType.FEATURE_NAMES, None)
    return rearranged(first, header=header, extensions=extensions)


def _refuse(image: Image, wanted: Amendment) -> None:
    """Raise for whatever cannot be, before anything changes."""
    first = _first(image)
    header, name = first.header, shown(image.path)
    version = wanted.version or header.version
    if wanted.refcount_bits not in (None, header.geometry.refcount_bits):
        raise UnsupportedImage(f"'{name}' has refcounts of {header.geometry.refcount_bits} bits, and other widths are "
                               "given to new images only", features=("another refcount width",),
                               hint="Copy it with convert -O qcow2 -o refcount_bits=N.")
    if wanted.lazy_refcounts and version == 2:
        raise BadOption("lazy_refcounts is on, but needs version 3, expected compat 1.1")
    if wanted.size is not None and round_up(wanted.size, SECTOR) < image.size:
        raise BadOption(f"size is {wanted.size}, less than the {image.size} bytes that the disk has",
                        hint="Shrink it with resize --shrink.")
    if not header.has_data_file and (wanted.data_file is not None or wanted.data_file_raw):
        raise BadOption(f"data_file is given, but '{name}' has its data inside, expected an image with a data file")
    if wanted.data_file_raw and not header.autoclear & Autoclear.RAW_EXTERNAL:
        raise BadOption("data_file_raw is on, but can only be switched off: the data file is not a raw disk")
    if version == 3 and header.version == 2:
        if any(one.disk_size is None for one in image.snapshots):
            raise _kept(name, 2, "a snapshot that does not say how large the disk was")
        _upgraded(first)  # raises where the longer header does not fit
    if version == 2 and header.version == 3:
        for reason in _kept_in_version_3(image, header):
            raise _kept(name, 3, reason)
    _described(first, wanted)


def _kept_in_version_3(image: Image, header: Header) -> Iterator[str]:
    if header.refcount_order != REFCOUNT_ORDER_V2:
        yield f"refcounts of {header.geometry.refcount_bits} bits, and version 2 only knows 16"
    for has, what in (
        (header.has_data_file, "an external data file"), (header.extended_l2, "extended L2 entries"),
        (bool(header.compression_type), "the compression type zstd"), (bool(image.snapshots), "snapshots"),
        (bool(image.bitmaps), "dirty bitmaps"),
        (header.crypt_method == CryptMethod.LUKS, "LUKS encryption"),
    ):  # fmt: skip
        if has:
            yield what
    if _has_zero_clusters(image):
        yield "clusters that are said to be zeros, which version 2 cannot say"


def _has_zero_clusters(image: Image) -> bool:
    offset, top = 0, image.layers[0]
    while offset < image.size:
        piece = top.piece_at(offset, image.size - offset)
        if piece.kind in (Kind.ZERO, Kind.ZERO_ALLOCATED):
            return True
        offset += piece.length
    return False


def _kept(name: str, version: int, reason: str) -> UnsupportedImage:
    return UnsupportedImage(f"'{name}' stays version {version}: it has {reason}", features=(reason,),
                            hint="Copy it into a new image with convert -O qcow2.")
