"""One qcow2 file as a layer: asks the slice map for entries and turns them into pieces and bytes.

It does not know the other layers, nor how entries are cached. Every entry is checked each time it is used: an image
may be changed by someone else, and a bad one fails its own request only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

from cowslice.cache.slicemap import SliceMap
from cowslice.codec.evp import EvpCipher
from cowslice.errors import CorruptImage, CryptoError, RequestError
from cowslice.format.entries import L1_OFFSET_MASK, Entry, Kind, decode_entry, subcluster_runs
from cowslice.format.first_cluster import FirstCluster
from cowslice.format.geometry import Geometry
from cowslice.format.header import CryptMethod
from cowslice.image.compressed import CompressedClusters, Part
from cowslice.image.fastpath import FastPath
from cowslice.image.gate import shown
from cowslice.image.layer import Layer, Piece, fill_zeros, narrowed
from cowslice.image.preallocation import looks_preallocated
from cowslice.storage.base import Storage
from cowslice.units import SECTOR, round_up


class EntrySource(Protocol):
    """Where L2 entries come from: cache.slicemap.SliceMap, or a plain dictionary in tests."""

    def lookup(self, cluster: int, want: int = ...) -> tuple[int, int, int]:
        """Return (entry word, subcluster bitmap, clusters from here that are one run, exact up to `want`)."""


class SectorCipher(Protocol):
    """What deciphers 512-byte sectors in place of their initialization vectors.

    `compiled` does the same without the GIL; None where only these methods can.
    """

    compiled: EvpCipher | None

    def decrypt(self, first_sector: int, data: bytes) -> bytes:
        """Return the plain bytes of whole sectors, the first of which has number `first_sector`."""

    def encrypt(self, first_sector: int, data: bytes | memoryview) -> bytes:
        """Return the enciphered bytes of whole sectors, numbered alike."""


class Qcow2Layer(Layer):
    """The mapping and content of one qcow2 image, active or of one internal snapshot.

    `l1` is the big-endian L1 table that `slices` was made from. `data` holds normal clusters: the file itself, or the
    external data file, or None when that was left closed. `compressed` gives whole clusters by where they are stored.
    """

    format = "qcow2"

    def __init__(self, storage: Storage, first: FirstCluster, *, size: int, l1: bytes, slices: EntrySource,
                 data: Storage | None, compressed: CompressedClusters, cipher: SectorCipher | None = None) -> None:
        self.storage = storage
        self.data = storage if data is None else data
        self.first = first
        self.header = first.header
        self.geometry: Geometry = first.header.geometry
        self.size = size
        self.l1 = l1
        self.slices = slices
        self.cipher = cipher
        self.compressed = compressed
        self._has_data = data is not None
        self._bits = self.geometry.cluster_bits
        self._mask = self.geometry.cluster_size - 1
        self._data_file = first.header.has_data_file
        self._version = first.header.version
        self._encrypted = first.header.crypt_method != CryptMethod.NONE
        # LUKS numbers the sectors of the host file, the old method those of the guest disk.
        self._luks = first.header.crypt_method == CryptMethod.LUKS

    @property
    def shows_offsets(self) -> bool:
        return not self._encrypted

    @cached_property
    def preallocated(self) -> bool:
        """Whether far more clusters are referenced than stored, so that data clusters are worth probing for holes."""
        return looks_preallocated(self.storage, self.header) if self.header else False

    def piece_at(self, offset: int, length: int) -> Piece:
        bits, within = self._bits, offset & self._mask
        cluster = offset >> bits
        word, bitmap, run = self._lookup(cluster, (within + length - 1 >> bits) + 1)
        entry = self._decode(word, bitmap, cluster)
        if entry.kind is Kind.MIXED:
            return self._mixed_piece(entry, offset, length)
        if entry.kind is Kind.COMPRESSED:
            most = (1 << bits) - within
            return Piece(offset, min(length, most), entry.kind, entry.host_offset, entry.length)
        if entry.kind is Kind.ZERO and entry.copied:
            run = 1  # the first cluster of a data file: those that follow it have an offset
        most = (max(run, 1) << bits) - within
        host = entry.host_offset + within if entry.host_offset >= 0 else -1
        return self._checked(Piece(offset, min(length, most), entry.kind, host))

    def with_holes(self, piece: Piece) -> Piece:
        if piece.kind is Kind.NORMAL and self.shows_offsets and self.preallocated:
            return narrowed(piece, self.data)
        return piece

    def fill(self, piece: Piece, buffer: memoryview) -> None:
        if piece.kind is Kind.NORMAL:
            self._fill_normal(piece, buffer)
        elif piece.kind is Kind.COMPRESSED:
            self._fill_compressed((piece,), (buffer,))
        else:
            fill_zeros(buffer)

    def fill_all(self, pieces: Sequence[Piece], buffers: Sequence[memoryview]) -> None:
        if any(piece.kind is not Kind.COMPRESSED for piece in pieces):
            super().fill_all(pieces, buffers)
            return
        self._fill_compressed(pieces, buffers)

    def join(self, fast: FastPath) -> None:
        """Add this layer to a compiled path. Raises TypeError unless `slices` is a SliceMap."""
        if not isinstance(self.slices, SliceMap):
            raise TypeError(f"slices is a {type(self.slices).__name__}, expected a SliceMap")
        fast.add_qcow2(
            self.slices, size=self.size, data=self.data if self._has_data else None,
            cluster_bits=self.geometry.cluster_bits, extended_l2=self.geometry.extended_l2, version=self._version,
            data_file=self._data_file, opaque=self._encrypted,
            cipher=None if self.cipher is None else self.cipher.compiled, guest_sectors=not self._luks,
            inflated=self.compressed.inflated, number=self.compressed.layer, zstd=self.compressed.zstd)

    def adopt(self, first: FirstCluster) -> None:
        """Take over a first cluster that is on disk now; only a writer changes it."""
        self.first = first
        self.header = first.header

    def checked(self, entry: Entry, cluster: int) -> Entry:
        """The entry, unless it belongs to another guest cluster of the data file. Raises CorruptImage."""
        if self._data_file and entry.host_offset >= 0 and entry.host_offset != cluster << self._bits:
            raise self._corrupt(f"L2 entry maps the cluster to {entry.host_offset:#x} of the data file, expected the "
                                "same offset as in the guest", cluster)
        return entry

    def entry_place(self, cluster: int) -> int:
        """Host offset of the L2 entry of a guest cluster, or -1 when it has no L2 table."""
        guest = cluster << self.geometry.cluster_bits
        at = self.geometry.l1_index(guest) * 8
        table = int.from_bytes(self.l1[at : at + 8], "big") & L1_OFFSET_MASK
        return table + self.geometry.l2_index(guest) * self.geometry.l2_entry_size if table else -1

    def _lookup(self, cluster: int, want: int) -> tuple[int, int, int]:
        try:
            return self.slices.lookup(cluster, want)
        except CorruptImage as fault:
            raise CorruptImage(f"{fault} (guest cluster {cluster}, in '{shown(self.name)}')", structure=fault.structure,
                               offset=fault.offset) from None

    def _decode(self, word: int, bitmap: int, cluster: int) -> Entry:
        try:
            return decode_entry(word, bitmap, self.geometry, version=self._version, data_file=self._data_file)
        except CorruptImage as fault:
            raise self._corrupt(str(fault), cluster) from None

    def _mixed_piece(self, entry: Entry, offset: int, length: int) -> Piece:
        """The piece of one cluster whose subclusters differ."""
        size = self.geometry.subcluster_size
        index = self.geometry.subcluster_index(offset)
        within = self.geometry.in_cluster(offset)
        for first, count, kind in subcluster_runs(entry, self.geometry):
            if first <= index < first + count:
                host = entry.host_offset + within if entry.host_offset >= 0 else -1
                return self._checked(Piece(offset, min(length, (first + count) * size - within), kind, host))
        raise AssertionError(f"no subcluster {index}")

    def _checked(self, piece: Piece) -> Piece:
        if self._data_file and piece.host >= 0 and piece.host != piece.start:
            raise self._corrupt(f"L2 entry maps guest offset {piece.start:#x} to {piece.host:#x} of the data file, "
                                "expected the same offset", piece.start >> self.geometry.cluster_bits)
        return piece

    def _corrupt(self, message: str, cluster: int) -> CorruptImage:
        at = self.entry_place(cluster)
        where = f" at host offset {at:#x}" if at >= 0 else ""
        return CorruptImage(f"{message} (guest cluster {cluster}, entry{where}, in '{shown(self.name)}')",
                            structure="L2 table", offset=at)

    def _fill_compressed(self, pieces: Sequence[Piece], buffers: Sequence[memoryview]) -> None:
        """Never deciphered: QEMU stores compressed clusters of encrypted images in clear."""
        self.compressed.fill([
            Part(piece.host, piece.stored, self.geometry.in_cluster(piece.start), buffer)
            for piece, buffer in zip(pieces, buffers, strict=True)])

    def _fill_normal(self, piece: Piece, buffer: memoryview) -> None:
        if not self._has_data:
            raise RequestError(f"'{shown(self.name)}' was opened without its data file, so its data cannot be read")
        if not self._encrypted:
            self.data.read_into(piece.host, buffer)
            return
        if self.cipher is None:
            raise CryptoError(f"'{shown(self.name)}' is encrypted and was opened without its secret")
        self._fill_encrypted(piece, buffer, self.cipher)

    def sector_number(self, host: int, guest: int) -> int:
        """The number, to the cipher, of the sector whose first byte lies at `host` and is the guest's at `guest`."""
        return (host if self._luks else guest) // SECTOR

    def _fill_encrypted(self, piece: Piece, buffer: memoryview, cipher: SectorCipher) -> None:
        """Read the whole sectors around the piece; guest and host offsets agree modulo a sector."""
        skew = piece.start % SECTOR
        length = round_up(skew + piece.length, SECTOR)
        first = self.sector_number(piece.host - skew, piece.start - skew)
        plain = cipher.decrypt(first, self.data.read(piece.host - skew, length))
        buffer[:] = plain[skew : skew + piece.length]
