"""Copy disks into one new qcow2 image: read and compress in parallel, place in order, write in parallel.

It does not know paths: the image under construction is the caller's (image/creation.py), who also throws it away when
this raises.
"""

from __future__ import annotations

from collections.abc import Sequence

from cowslice.errors import BadOption, CowsliceError
from cowslice.image.createoptions import CreateOptions
from cowslice.image.image import Image
from cowslice.image.layer import fill_zeros
from cowslice.image.newimage import NewImage
from cowslice.ops.bitmapcopy import place_bitmaps
from cowslice.ops.convert import CHUNK, ConvertOptions, Count, Progress, Warn, workers_for
from cowslice.ops.pace import Pace, paced
from cowslice.ops.pump import Pump
from cowslice.ops.qcow2target import Qcow2Target
from cowslice.ops.sources import Chunk, Content, Sources
from cowslice.units import SECTOR, round_up


def check_compressible(options: CreateOptions) -> None:
    """Raise BadOption when an image made with these options cannot hold compressed clusters."""
    for name, given in (("encryption", options.encryption is not None), ("a data file", options.data_file is not None),
                        ("preallocation", options.preallocation != "off")):
        if given:
            raise BadOption(f"compression and {name} exclude each other, expected only one of them")


def convert_to_qcow2(
    images: Sequence[Image], target: NewImage, options: ConvertOptions, made: CreateOptions, *,
    compress: bool = False, backing_size: int = 0, bitmaps: bool = False, progress: Progress | None = None,
    warn: Warn | None = None,
) -> None:
    """Copy the images one behind another into `target`, which was made with the options `made`.

    Over a backing file of the target, of `backing_size` bytes, what an image leaves to its own backing file is not
    copied. `bitmaps`: the usable ones of the only image go with it. `progress(done, total)` counts bytes.
    Raises the errors of reading and writing: the first stops all.
    """
    if bitmaps:
        target.check_bitmaps()
    if compress:
        check_compressible(made)
    sources = Sources(images, over_backing=made.backing_file is not None, seek_zeros=options.sparse > 0)
    unit = target.geometry.cluster_size
    writer = Qcow2Target(target, sparse=options.sparse, compress=compress, backing_size=backing_size,
                         preallocation=made.effective_preallocation)
    count = Count(sources.size, progress)
    chunks = paced(sources.chunks(most=max(CHUNK, unit), unit=unit), Pace(options.rate),
                   lambda chunk: chunk.length if chunk.content is Content.DATA else 0, lambda: pump.stopped)
    pump: Pump[Chunk] = Pump(
        chunks, lambda: _Worker(sources, writer, unit, options, pump, count, warn), workers_for(images, options))
    count.add(0)
    pump.run()
    writer.finish()
    if bitmaps:
        place_bitmaps(images[0], target, warn=warn or (lambda _: None))


class _Worker:
    """One thread's part; its buffer is made once and reused for every chunk."""

    def __init__(
        self, sources: Sources, writer: Qcow2Target, unit: int, options: ConvertOptions, pump: Pump[Chunk],
        count: Count, warn: Warn | None,
    ) -> None:
        self._sources = sources
        self._writer = writer
        self._unit = unit
        self._options = options
        self._pump = pump
        self._count = count
        self._warn = warn
        self._buffer = memoryview(bytearray(max(CHUNK, unit)))

    def __call__(self, number: int, chunk: Chunk) -> None:
        view = self._buffer[: round_up(chunk.length, self._unit) if chunk.content is Content.DATA else 0]
        self._read(chunk.start, view)
        prepared = self._writer.prepare(chunk, view)
        self._pump.wait_turn(number)
        placed = self._writer.place(prepared)
        self._pump.end_turn()
        self._writer.store(placed)
        self._count.add(chunk.length)

    def _read(self, start: int, view: memoryview) -> None:
        try:
            self._sources.read_into(start, view)
        except CowsliceError:
            if not self._options.salvage:
                raise
            self._salvage(start, view)

    def _salvage(self, start: int, view: memoryview) -> None:
        """Read sector by sector; what cannot be read becomes zeros and is told once per chunk."""
        lost = 0
        for at in range(0, len(view), SECTOR):
            part = view[at : at + SECTOR]
            try:
                self._sources.read_into(start + at, part)
            except CowsliceError:
                fill_zeros(part)
                lost += len(part)
        if lost and self._warn:
            self._warn(f"{lost} bytes between {start} and {start + len(view)} cannot be read and became zeros")
