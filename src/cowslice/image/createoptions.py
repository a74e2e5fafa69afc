"""How an image is made, as one frozen record, and every rule about what goes with what.

It opens nothing. Option names are those of QEMU with underscores; sizes are bytes or text such as "64k".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

from cowslice.errors import BadOption
from cowslice.format.extensions import Extension, ExtensionType, encode_feature_names
from cowslice.format.geometry import Geometry
from cowslice.format.header import Autoclear, Compatible, CompressionType, CryptMethod, Header, Incompatible
from cowslice.format.limits import (
    HEADER_LENGTH_V2,
    MAX_BACKING_FORMAT,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L1_ENTRIES,
    MIN_CLUSTER_BITS,
    MIN_CLUSTER_BITS_EXTENDED_L2,
    REFCOUNT_ORDER_V2,
)
from cowslice.image.gate import FolderGate, Gate
from cowslice.image.options import Secret
from cowslice.units import SECTOR, format_size, is_power_of_two, parse_size, round_up

Size = int | str
FORMATS = ("qcow2", "raw")
COMPATS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
COMPRESSIONS = {"zlib": CompressionType.DEFLATE, "zstd": CompressionType.ZSTD}
PREALLOCATIONS = ("off", "metadata", "falloc", "full")
ENCRYPTIONS = {"aes": CryptMethod.AES, "luks": CryptMethod.LUKS}
_FEATURE_NAMES_FROM = 4096  # the table of feature names would fill too much of a smaller first cluster
_MAX_EXTENT_HINT = (1 << 32) - 1


class CreateKeywords(TypedDict, total=False):
    """The keywords of `cowslice.create`, for type checkers and editors: the fields of CreateOptions."""

    format: str
    compat: str
    cluster_size: Size
    refcount_bits: int
    lazy_refcounts: bool
    extended_l2: bool
    compression_type: str
    preallocation: str
    backing_file: str | os.PathLike[str] | None
    backing_format: str | None
    check_backing: bool
    data_file: str | os.PathLike[str] | None
    data_file_raw: bool
    replace_data_file: bool
    encryption: str | None
    secret: Secret | None
    cipher_alg: str | None
    cipher_mode: str | None
    ivgen_alg: str | None
    ivgen_hash_alg: str | None
    hash_alg: str | None
    iter_time: int | None
    nocow: bool
    extent_size_hint: Size | None
    gate: Gate
    sync: bool
    on_warning: Callable[[str], None] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateOptions:
    """Every option of `cowslice.create`, which explains them. Raises BadOption for what can never be made."""

    format: str = "qcow2"
    compat: str = "1.1"
    cluster_size: Size = 65536
    refcount_bits: int = 16
    lazy_refcounts: bool = False
    extended_l2: bool = False
    compression_type: str = "zlib"
    preallocation: str = "off"
    backing_file: str | os.PathLike[str] | None = None
    backing_format: str | None = None
    check_backing: bool = True
    data_file: str | os.PathLike[str] | None = None
    data_file_raw: bool = False
    replace_data_file: bool = False
    encryption: str | None = None
    secret: Secret | None = field(default=None, repr=False)
    cipher_alg: str | None = None
    cipher_mode: str | None = None
    ivgen_alg: str | None = None
    ivgen_hash_alg: str | None = None
    hash_alg: str | None = None
    iter_time: int | None = None
    nocow: bool = False
    extent_size_hint: Size | None = None
    gate: Gate = field(default_factory=FolderGate)
    sync: bool = True
    on_warning: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        _one_of("format", self.format, FORMATS)
        _one_of("preallocation", self.preallocation, PREALLOCATIONS)
        _check_extent_hint(self.extent_size_hint)
        if self.format == "raw":
            self._check_raw()
            return
        _one_of("compat", self.compat, tuple(COMPATS))
        _one_of("compression_type", self.compression_type, tuple(COMPRESSIONS))
        _one_of("encryption", self.encryption, (None, *ENCRYPTIONS))
        _check_cluster_size(parse_size(self.cluster_size, "cluster_size"), extended_l2=self.extended_l2)
        bits = self.refcount_bits
        if not isinstance(bits, int) or not is_power_of_two(bits) or bits > 64:
            raise BadOption(f"refcount_bits is {bits!r}, expected 1, 2, 4, 8, 16, 32 or 64")
        if self.version == 2:
            self._check_version_2()
        self._check_backing()
        self._check_data_file()
        self._check_encryption()

    @property
    def version(self) -> int:
        """The version of the header: 2 or 3."""
        return COMPATS[self.compat]

    @property
    def geometry(self) -> Geometry:
        """How the image will be cut up."""
        bits = parse_size(self.cluster_size, "cluster_size").bit_length() - 1
        return Geometry(bits, self.extended_l2, self.refcount_bits.bit_length() - 1)

    @property
    def backing_name(self) -> bytes:
        """The backing file as the image names it, b"" for none."""
        return os.fsencode(self.backing_file) if self.backing_file is not None else b""

    @property
    def effective_preallocation(self) -> str:
        """What is preallocated: a raw data file is read through the map, so the map must cover it from the start."""
        return "metadata" if self.data_file_raw and self.preallocation == "off" else self.preallocation

    def header(self, size: int) -> Header:
        """The header of an empty image of `size` guest bytes, without the places of its tables."""
        header = Header(
            version=self.version, cluster_bits=self.geometry.cluster_bits, size=size,
            crypt_method=ENCRYPTIONS[self.encryption] if self.encryption else CryptMethod.NONE,
            l1_size=self.geometry.l1_entries(size), refcount_order=self.geometry.refcount_order,
            compression_type=COMPRESSIONS[self.compression_type],
        )  # fmt: skip
        if self.version == 2:
            return replace(header, header_length=HEADER_LENGTH_V2, tail=b"")
        return replace(
            header, incompatible=self._incompatible(),
            compatible=Compatible.LAZY_REFCOUNTS if self.lazy_refcounts else Compatible(0),
            autoclear=Autoclear.RAW_EXTERNAL if self.data_file_raw else Autoclear(0))

    def extensions(self) -> tuple[Extension, ...]:
        """The header extensions that follow from the options alone, in QEMU's order."""
        found = []
        if self.backing_format:
            found.append(Extension(ExtensionType.BACKING_FORMAT, self.backing_format.encode()))
        if self.data_file is not None:
            found.append(Extension(ExtensionType.DATA_FILE, os.fsencode(self.data_file)))
        if self.version >= 3 and self.geometry.cluster_size > _FEATURE_NAMES_FROM:
            found.append(encode_feature_names())
        return tuple(found)

    def check_size(self, size: int) -> int:
        """Return the guest size rounded up to sectors. Raises BadOption when no such disk can be."""
        rounded = round_up(parse_size(size), SECTOR)
        if rounded >= 1 << 63:
            raise BadOption(f"size is {size}, expected less than 8 EiB")
        if self.format == "qcow2" and self.geometry.l1_entries(rounded) > MAX_L1_ENTRIES:
            most = format_size(MAX_L1_ENTRIES * self.geometry.l2_span)
            raise BadOption(f"size is {size}, expected at most {most} with clusters of {self.geometry.cluster_size} "
                            "bytes", hint="Larger clusters allow a larger disk.")
        return rounded

    def _incompatible(self) -> Incompatible:
        features = Incompatible(0)
        if self.data_file is not None:
            features |= Incompatible.DATA_FILE
        if self.compression_type != "zlib":
            features |= Incompatible.COMPRESSION
        if self.extended_l2:
            features |= Incompatible.EXTENDED_L2
        return features

    def _check_raw(self) -> None:
        if self.preallocation == "metadata":
            raise BadOption("preallocation is 'metadata', but a raw file has none, expected off, falloc or full")
        for name, default in _QCOW2_ONLY.items():
            if getattr(self, name) != default:
                raise BadOption(f"{name} is given, expected it only with format qcow2: a raw file cannot hold it")

    def _check_version_2(self) -> None:
        for name, given in (
            ("lazy_refcounts", self.lazy_refcounts), ("extended_l2", self.extended_l2),
            ("data_file", self.data_file is not None), ("compression_type zstd", self.compression_type != "zlib"),
            (f"refcount_bits {self.refcount_bits}", self.refcount_bits != 1 << REFCOUNT_ORDER_V2),
        ):  # fmt: skip
            if given:
                raise BadOption(f"compat is '{self.compat}', but {name} needs version 3, expected compat 1.1")

    def _check_backing(self) -> None:
        kind = self.backing_format
        if self.backing_file is None:
            if kind is not None:
                raise BadOption(f"backing_format is '{kind}', expected it only beside a backing file")
            return
        if not kind:
            raise BadOption(f"backing_file is '{os.fspath(self.backing_file)}' without a backing_format",
                            hint="Say what it is, qcow2 or raw: a guessed format lets a guest choose what is read.")
        if len(kind.encode()) > MAX_BACKING_FORMAT or not kind.isascii() or not kind.isprintable():
            raise BadOption(f"backing_format is {kind!r}, expected the name of a format")
        if self.check_backing:
            _one_of("backing_format", kind, FORMATS)
        name = self.backing_name
        if not name or b"\0" in name or len(name) > MAX_BACKING_NAME:
            raise BadOption(f"backing_file is a name of {len(name)} bytes, expected 1 to {MAX_BACKING_NAME} without "
                            "zero bytes")
        if self.preallocation != "off" and not self.extended_l2:
            raise BadOption(f"preallocation is '{self.preallocation}', but a preallocated cluster would hide the "
                            "backing file, expected off, or extended_l2")

    def _check_data_file(self) -> None:
        if self.data_file is None:
            for name in ("data_file_raw", "replace_data_file"):
                if getattr(self, name):
                    raise BadOption(f"{name} is on, expected it only beside a data_file")
            return
        path = os.fspath(self.data_file)
        if not path or "\0" in path:
            raise BadOption(f"data_file is {path!r}, expected a file name")
        if self.data_file_raw and self.backing_file is not None:
            raise BadOption("data_file_raw is on, expected no backing file: it could not be seen through a raw file")

    def _check_encryption(self) -> None:
        details = [name for name in LUKS_DETAILS if getattr(self, name) is not None]
        if self.encryption != "luks" and details:
            raise BadOption(f"{details[0]} is given, expected it only with encryption 'luks'")
        if self.encryption is None:
            if self.secret is not None:
                raise BadOption("a secret is given, expected it only with encryption 'luks' or 'aes'")
            return
        if self.secret is None:
            raise BadOption(f"encryption is '{self.encryption}' without a secret, expected the passphrase")
        if self.iter_time is not None and not 1 <= self.iter_time <= MAX_ITER_TIME:
            raise BadOption(f"iter_time is {self.iter_time}, expected 1 to {MAX_ITER_TIME} milliseconds")


LUKS_DETAILS = ("cipher_alg", "cipher_mode", "ivgen_alg", "ivgen_hash_alg", "hash_alg", "iter_time")
MAX_ITER_TIME = 3_600_000  # an hour for each opening is more than anyone means
_QCOW2_ONLY = {
    "compat": "1.1", "cluster_size": 65536, "refcount_bits": 16, "lazy_refcounts": False, "extended_l2": False,
    "compression_type": "zlib", "backing_file": None, "backing_format": None, "data_file": None,
    "data_file_raw": False, "replace_data_file": False, "encryption": None, "secret": None,
    **dict.fromkeys(LUKS_DETAILS),
}  # fmt: skip


def _check_cluster_size(size: int, *, extended_l2: bool) -> None:
    if not is_power_of_two(size) or not MIN_CLUSTER_BITS <= size.bit_length() - 1 <= MAX_CLUSTER_BITS:
        raise BadOption(f"cluster_size is {size}, expected a power of two from {1 << MIN_CLUSTER_BITS} to "
                        f"{1 << MAX_CLUSTER_BITS}")
    if extended_l2 and size < 1 << MIN_CLUSTER_BITS_EXTENDED_L2:
        raise BadOption(f"cluster_size is {size}, but extended_l2 needs at least {1 << MIN_CLUSTER_BITS_EXTENDED_L2}")


def _check_extent_hint(hint: Size | None) -> None:
    if hint is None:
        return
    size = parse_size(hint, "extent_size_hint")
    if size % SECTOR or size > _MAX_EXTENT_HINT:
        raise BadOption(f"extent_size_hint is {size}, expected a multiple of {SECTOR} less than 4 GiB, or 0")


def _one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        expected = ", ".join("None" if one is None else f"'{one}'" for one in allowed)
        raise BadOption(f"{name} is {value!r}, expected one of {expected}")
