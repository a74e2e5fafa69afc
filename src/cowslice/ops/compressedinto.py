"""Copies disks compressed into an image that is there already.

It does not know paths. Whatever stops the work, the image stays sound, with a part of the copy in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from cowslice.errors import BadOption, UnsupportedImage
from cowslice.image.gate import shown
from cowslice.image.image import Image
from cowslice.ops.bytescan import is_zero
from cowslice.ops.convert import CHUNK, ConvertOptions, Count, Progress, workers_for
from cowslice.ops.imagetarget import ImageTarget
from cowslice.ops.pace import Pace, paced
from cowslice.ops.pump import Pump
from cowslice.ops.sources import Chunk, Content, Sources


def convert_compressed_into(
    images: Sequence[Image], target: Image, options: ConvertOptions, *, target_is_zero: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the images one behind another over `target`, each cluster compressed where that makes it smaller.

    `target_is_zero`: it is known to read as zeros. `progress(done, total)` counts bytes. Raises UnsupportedImage for a
    target that cannot hold compressed clusters, BadOption, else as ImageTarget, reading and writing do: the first stops
    all.
    """
    if options.salvage or options.offload:
        raise BadOption("compressed copies into an existing image know neither salvage nor copy offload")
    unit = compressible_unit(target)
    sources = Sources(images, seek_zeros=options.sparse > 0)
    wanted = ImageTarget(target, sources.size, is_zero=target_is_zero)
    count = Count(sources.size, progress)
    chunks = paced(sources.chunks(most=max(CHUNK, unit), unit=unit), Pace(options.rate),
                   lambda chunk: chunk.length if chunk.content is Content.DATA else 0, lambda: pump.stopped)
    pump: Pump[Chunk] = Pump(
        chunks, lambda: _Worker(sources, target, wanted, unit, count), workers_for(images, options))
    count.add(0)
    pump.run()


def compressible_unit(target: Image) -> int:
    """The size of the clusters that can be written compressed. Raises UnsupportedImage where none can be."""
    header = target.header
    if header is None or header.has_data_file or target.encrypted:
        raise UnsupportedImage(f"'{shown(target.path)}' is raw, encrypted or has a data file, expected a qcow2 image "
                               "that can hold compressed clusters", features=("compressed cluster",))
    return header.geometry.cluster_size


class _Worker:
    """One thread's part; its buffer is made once and reused for every chunk."""

    def __init__(self, sources: Sources, image: Image, target: ImageTarget, unit: int, count: Count) -> None:
        self._sources = sources
        self._image = image
        self._target = target
        self._unit = unit
        self._count = count
        self._buffer = memoryview(bytearray(max(CHUNK, unit)))

    def __call__(self, number: int, chunk: Chunk) -> None:
        if chunk.content is not Content.DATA:
            self._target.zero(chunk.start, chunk.length)
        else:
            view = self._buffer[: chunk.length]
            self._sources.read_into(chunk.start, view)
            for at in range(0, len(view), self._unit):
                self._put(chunk.start + at, view[at : at + self._unit])
        self._count.add(chunk.length)

    def _put(self, offset: int, cluster: memoryview) -> None:
        """Write one cluster; a part of one, where the copy ends inside the image, cannot be compressed."""
        if is_zero(cluster):
            self._target.zero(offset, len(cluster))
        elif len(cluster) == self._unit or offset + len(cluster) == self._image.size:
            self._image.write_compressed(offset, cluster)
        else:
            self._target.write(offset, cluster)
