"""What an amendment asks for, and every reason why an image cannot become that: raised before anything changes.

It changes nothing. An image stays version 3 where version 2 has no words for what it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cowslice.errors import BadOption, UnsupportedImage
from cowslice.format.header import Autoclear, Header
from cowslice.format.limits import REFCOUNT_ORDER_V2
from cowslice.image.createoptions import COMPATS
from cowslice.image.expanding import has_compressed
from cowslice.image.gate import shown
from cowslice.image.image import Image
from cowslice.image.keyslots import KeyChange, KeySlots
from cowslice.image.qcow2 import Qcow2Layer
from cowslice.units import SECTOR, is_power_of_two, round_up

_MAX_STATE_V2 = (1 << 32) - 1  # bytes of VM state: version 2 has a 32-bit field


@dataclass(frozen=True, slots=True, kw_only=True)
class Amendment:
    """What shall change; None stays as it is. `compat` as in creation, `data_file` "" forgets the stored name."""

    compat: str | None = None
    lazy_refcounts: bool | None = None
    size: int | None = None
    data_file: str | None = None
    data_file_raw: bool | None = None
    refcount_bits: int | None = None
    keys: KeyChange | None = None

    def __post_init__(self) -> None:
        if self.compat is not None and self.compat not in COMPATS:
            raise BadOption(f"compat is '{self.compat}', expected one of {', '.join(COMPATS)}")
        if self.data_file is not None and "\0" in self.data_file:
            raise BadOption(f"data_file is {self.data_file!r}, expected a file name")
        if (bits := self.refcount_bits) is not None and (not is_power_of_two(bits) or bits > 64):
            raise BadOption(f"refcount_bits is {bits}, expected 1, 2, 4, 8, 16, 32 or 64")

    @property
    def version(self) -> int | None:
        """The version of the header that is wanted."""
        return None if self.compat is None else COMPATS[self.compat]


def check_amendment(image: Image, wanted: Amendment) -> None:
    """Raise BadOption or UnsupportedImage for whatever cannot be."""
    header, name = image.header, shown(image.path)
    assert header is not None
    version = wanted.version or header.version
    _check_size(image, wanted)
    _check_data_file(header, wanted, name)
    if wanted.keys is not None:
        slots_of(image).check(wanted.keys)
    if wanted.lazy_refcounts and version == 2:
        raise BadOption("lazy_refcounts is on, but needs version 3, expected compat 1.1")
    bits = wanted.refcount_bits or header.geometry.refcount_bits
    if version == 2 and bits != 1 << REFCOUNT_ORDER_V2:
        reason = f"refcounts of {bits} bits, and version 2 only knows 16"
        raise _stays(name, 3, reason) if header.version == 3 else BadOption(
            f"refcount_bits is {bits}, expected 16: version 2 knows no other")
    if version == 2 and header.version == 3:
        for reason in _kept_in_version_3(image, header, wanted):
            raise _stays(name, 3, reason)


def slots_of(image: Image, *, max_rounds: int | None = None) -> KeySlots:
    """The key slots of an image. Raises BadOption where it has none, MalformedImage, StorageError."""
    pointer = image.first_cluster and image.first_cluster.crypto
    if not pointer:
        raise BadOption(f"'{shown(image.path)}' is not encrypted with LUKS, expected an image that has key slots")
    return KeySlots(image.layers[0].storage, pointer, max_rounds=max_rounds)


def _check_size(image: Image, wanted: Amendment) -> None:
    if wanted.size is not None and round_up(wanted.size, SECTOR) < image.size:
        raise BadOption(f"size is {wanted.size}, less than the {image.size} bytes that the disk has",
                        hint="Shrink it with resize --shrink.")


def _check_data_file(header: Header, wanted: Amendment, name: str) -> None:
    if not header.has_data_file and (wanted.data_file is not None or wanted.data_file_raw):
        raise BadOption(f"data_file is given, but '{name}' has its data inside, expected an image with a data file")
    if wanted.data_file_raw and not header.autoclear & Autoclear.RAW_EXTERNAL:
        raise BadOption("data_file_raw is on, but can only be switched off: the data file is not a raw disk")


def _kept_in_version_3(image: Image, header: Header, wanted: Amendment) -> Iterator[str]:
    top = image.layers[0]
    assert isinstance(top, Qcow2Layer)
    size = image.size if wanted.size is None else round_up(wanted.size, SECTOR)
    for has, what in (
        (header.has_data_file, "an external data file"), (header.extended_l2, "extended L2 entries"),
        (bool(image.bitmaps), "dirty bitmaps"),
        (any(one.disk_size not in (None, size) for one in image.snapshots), "snapshots of another size of the disk"),
        (any(one.vm_state_size > _MAX_STATE_V2 for one in image.snapshots), "a snapshot with 4 GiB of VM state"),
    ):  # fmt: skip
        if has:
            yield what
    if header.compression_type and has_compressed(top):
        yield "clusters of the compression type zstd"


def _stays(name: str, version: int, reason: str) -> UnsupportedImage:
    return UnsupportedImage(f"'{name}' stays version {version}: it has {reason}", features=(reason,),
                            hint="Copy it into a new image with convert -O qcow2.")
