"""One open disk image: what `cowslice.open` returns.

It does not know formats: layers answer. Any number of threads may read at once, and one may close meanwhile: requests
that are inside finish first, later ones raise Closed.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cached_property
from typing import TYPE_CHECKING

from cowslice.cache.slicemap import SliceCache
from cowslice.errors import BadOption, CowsliceError, OutOfRange, ReadOnly, RequestError
from cowslice.format.first_cluster import FirstCluster
from cowslice.format.geometry import Geometry
from cowslice.format.header import CryptMethod, Header
from cowslice.format.snapshots import Snapshot
from cowslice.image.chain import fast_path, open_chain
from cowslice.image.decompressed import DecompressedCache
from cowslice.image.diskbitmaps import DiskBitmaps
from cowslice.image.fastpath import FastPath
from cowslice.image.file import ImageFile
from cowslice.image.layer import Layer
from cowslice.image.lease import Lease
from cowslice.image.mapping import Extent, extents, merged
from cowslice.image.offsets import offsets_of
from cowslice.image.options import OpenKeywords, OpenOptions, Source
from cowslice.image.qcow2 import Qcow2Layer
from cowslice.image.reading import read_piece
from cowslice.image.snapshots import load_snapshots
from cowslice.image.upkeep import Upkeep
from cowslice.storage.base import Storage

if TYPE_CHECKING:
    from typing import Self, Unpack

    from _typeshed import ReadableBuffer, WriteableBuffer

    from cowslice.image.capture import Capture
    from cowslice.image.writes import Writes

_WRITE, _FLUSH, _DISCARD, _ZERO = range(1, 5)  # kinds of requests in a capture
MAX_THREADS = 64  # of one read_many; more only wait for each other


class Image(DiskBitmaps):
    """A guest disk of `size` bytes, open for reading. Made by `open_image`; offsets and lengths are guest bytes.

    `layers` are the files of the chain, top first; they share `cache`, the metadata memory, and `decompressed`, which
    keeps compressed clusters ready; `warnings` says what was odd about the files.
    """

    def __init__(self, source: Source, options: OpenOptions) -> None:
        self._warnings: list[str] = []
        self._options = options
        chain = open_chain(source, options, self._warn)
        self.layers: tuple[Layer, ...] = chain.layers
        self.cache: SliceCache = chain.cache
        self.decompressed: DecompressedCache = chain.decompressed
        self.size: int = self.layers[0].size
        self._lease = Lease(self.path)
        try:
            self._fast = None if options.metadata_only else fast_path(self.layers)
            self._writes: Writes | None = None
            if options.writable:
                from cowslice.image.writable import open_writes  # only here: who reads need not load all that writes

                self._writes = open_writes(chain, options, self._fast)
        except BaseException:
            chain.stack.close()  # now: whoever keeps the error would keep the locks
            raise
        self._upkeep = Upkeep((chain.cache, chain.decompressed), chain.slice_maps, warm=self._warms(),
                              interval=options.cache_clean_interval)
        self._files = chain.stack
        # Also when nobody closes: an image that is forgotten must not leave its thread and its files behind.
        self._release = weakref.finalize(self, _give_back, self._upkeep, self._writes, chain.stack)

    @property
    def path(self) -> str:
        """The name of the top file, as it was given."""
        return self.layers[0].name

    @property
    def format(self) -> str:
        """"qcow2" or "raw"."""
        return self.layers[0].format

    @property
    def first_cluster(self) -> FirstCluster | None:
        """Header, extensions and names of the top file; None for a raw one. Names are untrusted."""
        top = self.layers[0]
        return top.first if isinstance(top, Qcow2Layer) else None

    @property
    def header(self) -> Header | None:
        """The header of the top file, None for a raw one."""
        return self.layers[0].header

    @property
    def geometry(self) -> Geometry | None:
        """How the top file is cut up, None for a raw one."""
        return self.header.geometry if self.header else None

    @property
    def encrypted(self) -> bool:
        """Whether the top file's content is encrypted."""
        return self.header is not None and self.header.crypt_method != CryptMethod.NONE

    @property
    def dirty(self) -> bool:
        """Whether a writer did not finish: refcounts may be stale, what is read is not."""
        return self.header is not None and self.header.is_dirty

    @property
    def corrupt(self) -> bool:
        """Whether someone marked the top file corrupt: what is read may be wrong."""
        return self.header is not None and self.header.is_corrupt

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was odd about the files, one sentence each; also told to `on_warning` when it is found."""
        return tuple(self._warnings)

    @property
    def fast_path(self) -> FastPath | None:
        """The compiled path over the same layers, for compiled callers; None when opened for metadata only."""
        return self._fast

    @property
    def writable(self) -> bool:
        """Whether the image was opened with mode "r+"."""
        return self._writes is not None

    @property
    def zeroes_fast(self) -> bool:
        """Whether `zero` of whole clusters writes none: all but version 2 images over a backing file."""
        return self.header is None or self.header.version >= 3 or len(self.layers) == 1

    @property
    def closed(self) -> bool:
        return self._lease.ended

    @cached_property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """Internal snapshots of the top file, read when first asked for. Raises ImageError for a damaged table."""
        with self._lease:
            return load_snapshots(self._top_storage, self.header) if self.header else ()

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`. Raises OutOfRange past the end, else as read_into."""
        self._check_span(offset, length)
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: WriteableBuffer, *, noted: bool = False) -> None:
        """Fill the whole of `buffer`, any contiguous writable one, from `offset`.

        A capture leaves out what is `noted`: a part of a request that it was told of as a whole.
        Raises OutOfRange, Closed, CorruptImage, StorageError or CryptoError; then its content is unknown.
        """
        if self._fast is None or not 0 <= offset <= self.size:
            raise self._refusal(offset)
        done = self._fast.read_into(offset, buffer, 0, noted)
        if done < memoryview(buffer).nbytes:
            self._complete(offset, memoryview(buffer).cast("B"), done)

    def read_many(
        self, offsets: ReadableBuffer | Iterable[int], length: int, out: WriteableBuffer, *, depth: int = 1
    ) -> None:
        """Fill `out` with `length` bytes from each of `offsets`, one after another in their order.

        `offsets` is a buffer of 64-bit integers (an int64 array) or integers; `out` has len(offsets) * length bytes.
        `depth` is how many reads may be under way together. Raises as read_into, BadOption where sizes do not fit.
        """
        chosen = offsets_of(offsets)
        view = memoryview(out).cast("B")
        if length < 0 or len(chosen) * length != len(view):
            raise BadOption(f"out has {len(view)} bytes, expected {len(chosen)} reads of {length} bytes")
        if depth < 1:
            raise BadOption(f"depth is {depth}, expected at least 1")
        if self._fast is None:
            raise self._refusal(0)
        undone = self._fast.read_many(chosen, length, view, depth) if length else []

        def complete(number: int) -> None:
            self._complete(chosen[number], view[number * length : (number + 1) * length], 0)

        if depth == 1 or len(undone) < 2:
            for number in undone:
                complete(number)
            return
        from concurrent.futures import ThreadPoolExecutor  # only here: start-up stays light

        with ThreadPoolExecutor(min(depth, len(undone), MAX_THREADS)) as pool:
            for _ in pool.map(complete, undone):
                pass

    def write(self, offset: int, data: ReadableBuffer) -> None:
        """Write all of `data`, any contiguous buffer of bytes, at `offset`. Stable after the next `flush`.

        Threads may write at once; where their spans overlap either one may win. Raises ReadOnly, OutOfRange, Closed,
        CorruptImage, NoSpace or StorageError; then bytes of the span are old or new, and no others have changed.
        """
        writes, view = self._for_writing(), memoryview(data).cast("B")
        if self._options.detect_zeroes != "off" and writes.is_zero(view):
            self._check_span(offset, len(view))
            self._note(_WRITE, offset, len(view))
            with self._lease, writes.request():
                writes.zero(offset, len(view), keep=self._options.detect_zeroes == "on")
            return
        assert self._fast is not None
        done = self._fast.write_from(offset, view)
        if done < len(view):
            with self._lease, writes.request():
                writes.write(offset + done, view[done:])

    def write_many(self, offsets: ReadableBuffer | Iterable[int], length: int, data: ReadableBuffer, *,
                   depth: int = 1) -> None:
        """Write `length` bytes of `data` at each of `offsets`, one after another in their order.

        Arguments are as those of read_many; with `depth` above 1 the order of overlapping writes is not kept.
        Raises as write and read_many.
        """
        writes, chosen, view = self._for_writing(), offsets_of(offsets), memoryview(data).cast("B")
        if length < 0 or len(chosen) * length != len(view):
            raise BadOption(f"data has {len(view)} bytes, expected {len(chosen)} writes of {length} bytes")
        if depth < 1:
            raise BadOption(f"depth is {depth}, expected at least 1")
        assert self._fast is not None
        for number in self._fast.write_many(chosen, length, view, depth) if length else ():
            part = view[number * length : (number + 1) * length]
            zeros = self._options.detect_zeroes != "off" and writes.is_zero(part)
            with self._lease, writes.request():
                if zeros:
                    writes.zero(chosen[number], length, keep=self._options.detect_zeroes == "on")
                else:
                    writes.write(chosen[number], part)

    def write_compressed(self, offset: int, data: ReadableBuffer) -> None:
        """Write whole clusters compressed; the last one may be cut by the end of the disk.

        Raises as write, BadOption for parts of clusters, UnsupportedImage where the image cannot hold them.
        """
        writes, view = self._for_writing(), memoryview(data).cast("B")
        self._check_span(offset, len(view))
        self._note(_WRITE, offset, len(view))
        with self._lease, writes.request():
            writes.write_compressed(offset, view)

    def zero(self, offset: int, length: int, *, keep: bool = False) -> None:
        """Make the span read as zeros, without writing them where the format can say so.

        `keep` holds on to the space, so that writing there later needs no allocation. Raises as write.
        """
        writes = self._for_writing()
        self._check_span(offset, length)
        self._note(_ZERO, offset, length)
        with self._lease, writes.request():
            writes.zero(offset, length, keep=keep)

    def discard(self, offset: int, length: int) -> None:
        """Forget the whole clusters of the span: they read as zeros, and their space can be used again.

        Parts of clusters stay as they are. Does nothing when the image was opened with discard "ignore".
        """
        writes = self._for_writing()
        self._check_span(offset, length)
        self._note(_DISCARD, offset, length)
        if self._options.discard == "unmap":
            with self._lease, writes.request():
                writes.discard(offset, length)

    def vacate(self) -> None:
        """Forget all that the top file holds, so that its backing file shows everywhere. Raises as write.

        Raises UnsupportedImage for a raw file, which always holds all of its disk.
        """
        writes = self._for_writing()
        with self._lease, writes.request():
            writes.vacate()

    def flush(self) -> None:
        """Return when every write that ended before the call is stable. Raises StorageError.

        After a failed flush the image takes no more writes until it is opened again.
        """
        self._note(_FLUSH, 0, 0)
        if self._writes is not None:
            with self._lease:
                self._writes.flush()

    def snapshot(self, name: str) -> Snapshot:
        """Keep the disk as it is now as an internal snapshot, stably; returns its record. Others wait meanwhile.

        Raises BadOption, ReadOnly, UnsupportedImage, RefcountOverflow, CorruptImage, NoSpace or StorageError; then
        nothing has changed.
        """
        writes = self._for_writing()
        with self._lease, self._other_snapshots():
            return writes.create_snapshot(name)

    def apply_snapshot(self, id_or_name: str) -> None:
        """Let the disk be again what an internal snapshot holds, its size too; what was written since is lost.

        Raises as `snapshot`, MalformedImage for a damaged snapshot.
        """
        writes = self._for_writing()
        with self._lease, self._other_snapshots():
            writes.apply_snapshot(id_or_name)

    def delete_snapshot(self, id_or_name: str) -> None:
        """Delete the internal snapshot of this name, or else with this id. Raises as `apply_snapshot`."""
        writes = self._for_writing()
        with self._lease, self._other_snapshots():
            writes.delete_snapshot(id_or_name)

    def resize(self, size: int, *, shrink: bool = False, preallocation: str = "off") -> None:
        """Give the disk `size` bytes, a multiple of 512, stably; what is added reads as zeros. Others wait meanwhile.

        `shrink` permits fewer bytes than before: what lies behind them is lost. `preallocation` of what is added is
        "off", "metadata", "falloc" or "full". Raises BadOption, RequestError, ReadOnly, UnsupportedImage, CorruptImage,
        NoSpace or StorageError; then the size is as before.
        """
        writes = self._for_writing()
        with self._lease, self._other_snapshots():
            writes.resize(size, shrink=shrink, preallocation=preallocation)

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Yield what the span is made of, in order, neighbours that continue each other as one; to the end by default.

        Reads metadata only. Raises OutOfRange at the call, CorruptImage and others where it comes to them.
        """
        length = self.size - offset if length is None else length
        self._check_span(offset, length)
        return self._leased(merged(extents(self.layers, offset, length)))

    def file(self) -> ImageFile:
        """Return a new binary file object over the disk, with its own position. Closing it leaves the image open."""
        return ImageFile(self, self.path)

    def capture(self, path: str | os.PathLike[str]) -> Capture:
        """Record in the new file `path` what the disk is asked from now on, until the capture or the image is closed.

        A request takes 16 bytes; image.capture says which. `with disk.capture(path):` closes it. Raises RequestError
        while another capture of this image goes on, BadOption for a disk too large to describe, Closed, StorageError.
        """
        if self._fast is None:
            raise self._refusal(0)
        from cowslice.image.capture import Capture

        with self._lease:
            capture = Capture(path, self._fast.recorder, size=self.size)
            self._files.callback(capture.close)
        return capture

    def wait_warm(self, timeout: float | None = None) -> bool:
        """Wait until the warm-up of the maps is over, at most `timeout` seconds; return whether it is."""
        return self._upkeep.wait_warm(timeout)

    def close(self) -> None:
        """Finish the requests under way, flush, then give everything back. It may be called twice and by any thread.

        Raises StorageError where the flush fails, or the end of a capture; the files are closed all the same.
        """
        if self._fast is not None:
            self._fast.close()
        self._lease.end()
        try:
            if self._release.alive and self._writes is not None:
                self._writes.finish()
        finally:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.size} bytes, {len(self.layers)} layers"
        return f"<Image {self.path!r} {self.format} {state}>"

    @property
    def _top_storage(self) -> Storage:
        return self.layers[0].storage

    def _warn(self, message: str) -> None:
        self._warnings.append(message)
        if self._options.on_warning is not None:
            self._options.on_warning(message)

    def _warms(self) -> bool:
        """Warm-up by default reads local files only: over a network it could cost more than it will ever save."""
        warmup = self._options.warmup
        return warmup == "full" or (warmup == "auto" and all(layer.storage.fileno() >= 0 for layer in self.layers))

    def _complete(self, offset: int, view: memoryview, done: int) -> None:
        """Provide by the plain path what the compiled one left, piece by piece; it goes on after each."""
        assert self._fast is not None
        while done < len(view):
            with self._lease, self._in_flight():
                done += read_piece(self.layers, offset + done, view[done:])
            if done < len(view):
                done = self._fast.read_into(offset, view, done)

    @contextmanager
    def _other_snapshots(self) -> Iterator[None]:
        """What is known of snapshots and of the size may be another afterwards."""
        try:
            yield
        finally:
            self.size = self.layers[0].size
            self.__dict__.pop("snapshots", None)

    def _in_flight(self) -> AbstractContextManager[object]:
        """Tell writers that a request is inside: what it looks at is not used again before it has left."""
        return nullcontext() if self._writes is None else self._writes.request()

    def _note(self, kind: int, offset: int, length: int) -> None:
        """Tell a capture of a request that the compiled path does not see."""
        if self._fast is not None and self._fast.recorder.running and (length or kind == _FLUSH):
            self._fast.recorder.note(kind, offset, length)

    def _for_writing(self) -> Writes:
        if self._writes is None:
            raise ReadOnly(f"cannot write to '{self.path}': it was opened for reading only")
        if self._fast is None:
            raise RequestError(f"'{self.path}' was opened for its metadata only, so its data cannot be changed")
        return self._writes

    def _refusal(self, offset: int) -> RequestError:
        if not 0 <= offset <= self.size:
            return OutOfRange(f"offset is {offset}, expected one inside the disk of {self.size} bytes")
        return RequestError(f"'{self.path}' was opened for its metadata only, so its data cannot be read")

    def _check_span(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OutOfRange(f"{length} bytes at offset {offset} asked, expected a span inside the disk of "
                             f"{self.size} bytes")

    def _leased(self, found: Iterator[Extent]) -> Iterator[Extent]:
        """Each step is a request of its own, so that an unfinished walk does not keep the image open."""
        while True:
            with self._lease:
                extent = next(found, None)
            if extent is None:
                return
            yield extent


def open_image(source: Source, mode: str = "r", **options: Unpack[OpenKeywords]) -> Image:
    """Open a qcow2 or raw image by path, URL or storage: `mode` "r" for reading, "r+" for writing too.

    format: "qcow2" or "raw"; by default a file must have qcow2's magic. Never trust a default for a disk that a guest
        may write raw: it can imitate any header.
    force_share: read although another program writes; what is seen may not fit together. direct: use O_DIRECT.
    cache_size, l2_cache_size, refcount_cache_size, l2_cache_entry_size: as in QEMU, bytes or "1M"; one budget for the
        whole chain. cache_clean_interval: seconds between giving unused memory back, 0 never.
    decompressed_cache_size: bytes of decompressed clusters to keep, 0 for none.
    policy: "clock2q+" or "lru". warmup: read the maps in the background "auto" (local files), "off", "full".
    readahead: let one metadata read bring several pieces of the map to a sequential reader.
    gate: judges every name found inside an image; by default only files under the image's own folder are opened.
    backing: None leaves the backing file closed, and what it holds reads as zeros; a path, URL or storage replaces it,
        of format backing_format. data_file: replaces the external data file.
    snapshot: id or name of the internal snapshot to show. secret: passphrase of an encrypted image, or a function that
        gives it for a file's name; max_key_rounds bounds what its key slots may make us compute.
    metadata_only: open neither backing nor data file nor key; only maps can be read, and bitmaps changed.
    discard: "unmap" frees discarded clusters, "ignore" makes `discard` do nothing. discard_no_unref: they stay with
        their guest clusters. pass_discard_request (by default as discard says), pass_discard_snapshot (True) and
        pass_discard_other (False): whether what requests, snapshot operations or anything else freed leaves the file
        at once. detect_zeroes: "on" and "unmap" look for zeros in what is written, and keep or free their space.
    max_depth: most layers in a chain. on_warning: called with a sentence about what is odd.

    Raises BadOption, NotAnImage, MalformedImage, UnsupportedImage, CorruptImage, ReferenceRefused, CryptoError,
    StorageError. A storage that is passed in stays open when the image is closed.
    """
    if mode not in ("r", "r+"):
        raise BadOption(f"mode is '{mode}', expected 'r' or 'r+'")
    unknown = options.keys() - OpenKeywords.__annotations__.keys()
    if unknown:
        known = ", ".join(OpenKeywords.__annotations__)
        raise BadOption(f"unknown option {', '.join(sorted(unknown))}, expected one of {known}")
    return Image(source, OpenOptions(**options, writable=mode == "r+"))


def _give_back(upkeep: Upkeep, writes: Writes | None, files: ExitStack) -> None:
    """End the thread before the files that it reads are closed. What a forgotten image wrote is kept, if it can be."""
    upkeep.end()
    try:
        if writes is not None:
            with suppress(CowsliceError):
                writes.finish()
    finally:
        files.close()
