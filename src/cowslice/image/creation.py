"""Makes images: checks everything first, lays the file out in one go, and leaves nothing behind when it fails.

It does not know what a guest will write. A file appears under its name only when it is complete, so whatever was there
before survives every failure; a device or a storage that the caller opened is written in place, its header last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from cowslice.errors import BadOption, OutOfRange
from cowslice.format.extensions import CryptoPointer, ExtensionType, with_extension
from cowslice.image.backing import check_backing
from cowslice.image.createoptions import CreateKeywords, CreateOptions, Size
from cowslice.image.filling import preallocate, provide_space
from cowslice.image.keymaking import NewKeys, choices_of, make_keys
from cowslice.image.keys import passphrase_of
from cowslice.image.newimage import Blueprint, NewImage, table_clusters
from cowslice.image.targets import Target, open_data_file, open_target, path_of, prepare_data_file
from cowslice.units import parse_size

if TYPE_CHECKING:
    from typing import Unpack

    from cowslice.codec.sectors import SectorCipher


def create(target: Target, size: Size | None = None, **options: Unpack[CreateKeywords]) -> None:
    """Make a new, empty disk image of `size` guest bytes (or "10G"), rounded up to 512, at a path or in a storage.

    A file that exists is replaced when the new one is complete, unless somebody has it open for writing.
    format: "qcow2" or "raw". compat: "1.1" or "0.10". cluster_size: 512 to 2 MiB. refcount_bits: 1 to 64.
    lazy_refcounts, extended_l2: on or off. compression_type: "zlib" or "zstd".
    preallocation: "off"; "metadata" maps every cluster; "falloc" also takes the space; "full" also writes it.
    backing_file, backing_format: what shows through where nothing was written; its size is the default of `size`. It
        is opened to check it, and what it names must pass `gate`, unless check_backing is False.
    data_file: keeps guest data outside of the image; a relative name is beside it. data_file_raw: keep that file a
        valid raw disk; then one that exists keeps its content. Else one that is not empty is refused, unless
        replace_data_file allows to empty it.
    encryption: "luks", or "aes", which is weak; secret: the passphrase. cipher_alg, cipher_mode, ivgen_alg,
        ivgen_hash_alg, hash_alg, iter_time (milliseconds): of LUKS, as in QEMU.
    nocow, extent_size_hint: told to the file system. sync: all is stable on return.
    on_warning: called with a sentence about what is odd.

    Raises BadOption, StorageError (Locked), CryptoError, and the errors of opening the backing file.
    """
    unknown = options.keys() - CreateOptions.__dataclass_fields__.keys()
    if unknown:
        known = ", ".join(CreateOptions.__dataclass_fields__)
        raise BadOption(f"unknown option {', '.join(sorted(unknown))}, expected one of {known}")
    make_image(target, size, CreateOptions(**options))


def make_image(target: Target, size: Size | None, options: CreateOptions) -> None:
    """As `create`, with its options as a record."""
    guest = guest_size(target, size, options)
    if options.format == "raw":
        _make_raw(target, guest, options)
        return
    mode = options.effective_preallocation
    clusters = 0
    if mode != "off":
        geometry = options.geometry
        clusters = geometry.l1_entries(guest) + (0 if options.data_file is not None else geometry.clusters(guest))
    with new_image(target, guest, options, clusters=clusters) as image:
        if mode != "off":
            preallocate(image, mode, visible=options.data_file_raw)


def guest_size(target: Target, size: Size | None, options: CreateOptions) -> int:
    """The guest bytes of the image to be made, after opening the backing file to check it. Raises as `create`."""
    backing = None
    if options.backing_file is not None and options.check_backing:
        backing = check_backing(options, path_of(target))
    if size is None and backing is None:
        why = " (an unchecked backing file does not say it)" if options.backing_file is not None else ""
        raise BadOption(f"size is missing, expected the size of the disk{why}")
    return options.check_size(backing if size is None else parse_size(size))  # type: ignore[arg-type]


@contextmanager
def new_image(target: Target, size: int, options: CreateOptions, *, clusters: int = 0) -> Iterator[NewImage]:
    """Yield a qcow2 image of `size` guest bytes, checked already, to fill; it is finished when the block ends well.

    If it ends otherwise what was made is removed. `clusters`: how many will be taken for L2 tables and data, where
    that is known. A data file has its size and its preallocated space.
    """
    keys = _make_keys(options, path_of(target))
    with ExitStack() as stack:
        data, fresh = open_data_file(target, size, options, stack)
        storage, blank = open_target(target, options, stack)
        blueprint = _blueprint(options, size, keys, clusters=clusters, blank=blank)
        image = NewImage(storage, blueprint, data=data, cipher=_cipher(options, keys, path_of(target)))
        if data is not None:
            prepare_data_file(data, size, options, fresh=fresh)
        extensions = blueprint.extensions
        if keys is not None:
            _write_keys(image, keys)
            pointer = CryptoPointer(image.crypto_offset, keys.length).encode()
            extensions = with_extension(extensions, ExtensionType.CRYPTO, pointer.payload)
        yield image
        image.finish(extensions=extensions, sync=options.sync)


def _blueprint(
    options: CreateOptions, size: int, keys: NewKeys | None, *, clusters: int, blank: bool
) -> Blueprint:
    geometry = options.geometry
    header = options.header(size)
    crypto_bytes = keys.length if keys else 0
    others = 1 + geometry.clusters(header.l1_size * 8) + geometry.clusters(crypto_bytes) + clusters
    return Blueprint(
        header=header, extensions=options.extensions(), backing_name=options.backing_name, crypto_bytes=crypto_bytes,
        table_clusters=table_clusters(others, geometry), blank=blank)


def _make_keys(options: CreateOptions, name: str) -> NewKeys | None:
    if options.encryption != "luks":
        return None
    return make_keys(passphrase_of(options.secret, name), choices_of(options))


def _cipher(options: CreateOptions, keys: NewKeys | None, name: str) -> SectorCipher | None:
    if options.encryption is None:
        return None
    from cowslice.codec.sectors import SectorCipher, legacy_aes

    if keys is not None:
        return SectorCipher(keys.header.cipher, keys.key)
    return legacy_aes(passphrase_of(options.secret, name))


def _write_keys(image: NewImage, keys: NewKeys) -> None:
    """Write the LUKS header; the places of unused key slots are zeros."""
    if not image.blank:
        image.storage.zero(image.crypto_offset, image.geometry.clusters(keys.length) << image.geometry.cluster_bits)
    for offset, piece in keys.pieces:
        image.storage.pwrite(image.crypto_offset + offset, piece)


def _make_raw(target: Target, size: int, options: CreateOptions) -> None:
    with ExitStack() as stack:
        storage, blank = open_target(target, options, stack)
        if blank:
            storage.truncate(size)
        elif storage.length() < size:
            raise OutOfRange(f"'{storage.name}' has {storage.length()} bytes, but the disk has {size}")
        else:
            storage.zero(0, size)
        provide_space(storage, options.preallocation, 0, size)
        if options.sync:
            storage.sync()
