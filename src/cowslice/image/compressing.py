"""Writing whole clusters compressed: streams packed back to back on the host.

It does not know how streams are made (codec/compression.py). A stream is stable with its neighbours: the first barrier
covers it (I2), and the counts of the host clusters that it shares rise before an entry shows it (I1).
"""

from __future__ import annotations

from collections.abc import Sequence

from cowslice.codec.compression import compress_cluster
from cowslice.errors import BadOption, CorruptImage, UnsupportedImage
from cowslice.format.entries import encode_compressed
from cowslice.format.header import CryptMethod
from cowslice.image.writing import Writer


class Compressing:
    """Compressed writes to the image of `writer`."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.tables = writer.tables
        self._geometry = writer.layer.first.header.geometry

    def write(self, offset: int, view: memoryview) -> None:
        """Write whole clusters compressed, what does not shrink as it is. The last may end with the disk.

        Raises BadOption for a span that is not whole clusters, UnsupportedImage where the image cannot hold them.
        """
        self.check(offset, len(view))
        size = self._geometry.cluster_size
        kind = self.writer.layer.first.header.compression_type
        for start in range(0, len(view), size):
            part = view[start : start + size]
            whole = part if len(part) == size else bytes(part).ljust(size, b"\0")
            payload = compress_cluster(kind, whole)
            if payload is None:
                self.writer.write(offset + start, part)
            else:
                self.store([(offset + start >> self._geometry.cluster_bits, payload)])

    def check(self, offset: int, length: int) -> None:
        """Raise unless the span can be written compressed."""
        header = self.writer.layer.first.header
        if header.has_data_file:
            raise UnsupportedImage("compressed clusters cannot be written to an image with an external data file",
                                   features=("compressed cluster with external data file",))
        if header.crypt_method != CryptMethod.NONE:
            raise UnsupportedImage("compressed clusters would stand in clear in an encrypted image",
                                   features=("compressed cluster with encryption",))
        size = self._geometry.cluster_size
        if offset % size or (length % size and offset + length != self.writer.layer.size):
            raise BadOption(f"{length} bytes at offset {offset} asked to be compressed, expected whole clusters of "
                            f"{size} bytes")

    def store(self, streams: Sequence[tuple[int, bytes]]) -> None:
        """Store (guest cluster, payload) pairs, packed in their order. What the clusters were is dropped."""
        writer = self.writer
        writer.commits.check()
        for cluster, payload in streams:
            if writer.track is not None:
                writer.track(cluster << self._geometry.cluster_bits, self._geometry.cluster_size)
            with writer.claims.on(cluster, cluster + 1):
                self._store_one(cluster, payload)
        writer.relieve()

    def _store_one(self, cluster: int, payload: bytes) -> None:
        tables, writer, bits = self.tables, self.writer, self._geometry.cluster_bits
        with tables.lock:
            writer.commits.check()
            word, bitmap = writer.entries(cluster, 1)[0]
            dropped = writer.planner.span_of(writer.planner.decode(word, bitmap))
            if dropped is not None:
                writer.check_fence(*dropped)
            writer.own_table(cluster)
            host = self._take(len(payload))
        try:
            tables.layer.storage.pwrite(host, payload)
            tables.layer.compressed.forget()
            with tables.lock:
                writer.commits.check()
                entry = encode_compressed(host, len(payload), bits)
                tables.slices.store(cluster, writer.packed([(entry, 0)]))
                if dropped is not None:
                    tables.drop(dropped[0], count=dropped[1] >> bits)
        except BaseException:
            with tables.lock:
                tables.give_back(host >> bits, (host + len(payload) - 1 >> bits) - (host >> bits) + 1)
            raise

    def _take(self, length: int) -> int:
        """Room for a stream, below what an entry can say."""
        try:
            return self.tables.allocator.take_bytes(length, below=1 << min(70 - self._geometry.cluster_bits, 56))
        except CorruptImage as fault:
            self.writer.mark_corrupt(fault)
            raise
