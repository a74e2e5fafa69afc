"""A setting as each program wants to be told it, ready to paste.

It knows option words and escapes, and nothing of why a setting was chosen. What must hold: QEMU's own rules turn each
text into the very sizes that were meant.
"""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape

from cowslice.cache.sizes import MIN_REFCOUNT_ENTRIES, PARTIAL_ENTRY_SIZE
from cowslice.format.geometry import Geometry
from cowslice.units import GiB, KiB, MiB


@dataclass(frozen=True, slots=True)
class Pastes:
    """The same setting for `-drive`, `-blockdev`, libvirt, `qemu-img --image-opts`, cowslice's words and its Python.

    `libvirt_note` says what libvirt cannot be told, or ''.
    """

    drive: str
    blockdev: str
    libvirt: str
    libvirt_note: str
    cowslice: str
    python: str


def pastes(path: str, geometry: Geometry, *, qemu: tuple[int, int], ours: int, full_coverage: int) -> Pastes:
    """Write out a setting for the image at `path`: (L2 cache bytes, entry bytes) for QEMU, bytes for cowslice."""
    cache, entry = qemu
    name = path.replace(",", ",,")
    l2 = f"l2-cache-size={option_size(cache)},l2-cache-entry-size={option_size(entry)}"
    return Pastes(
        drive=f"-drive file={name},format=qcow2,if=virtio,{l2}",
        blockdev=f"-blockdev driver=qcow2,node-name=disk0,file.driver=file,file.filename={name},{l2}",
        libvirt=_libvirt(libvirt_size(cache, geometry)), libvirt_note=_note(cache, entry, geometry, full_coverage),
        cowslice=f"--image-opts driver=qcow2,file.filename={name},l2-cache-size={option_size(ours)}",
        python=f'cowslice.open({_quoted(path)}, l2_cache_size="{option_size(ours)}")')


def option_size(size: int) -> str:
    """A size as every option takes it, exactly: 65536 -> '64k'."""
    for unit, suffix in ((GiB, "G"), (MiB, "M"), (KiB, "k")):
        if size and size % unit == 0:
            return f"{size // unit}{suffix}"
    return str(size)


def libvirt_size(cache: int, geometry: Geometry) -> int:
    """`max_size` that leaves `cache` bytes for L2 tables: of QEMU's `cache-size` four refcount blocks come first."""
    return cache + MIN_REFCOUNT_ENTRIES * geometry.cluster_size


def _libvirt(size: int) -> str:
    return ("<driver name='qemu' type='qcow2'>\n  <metadata_cache>\n"
            f"    <max_size unit='bytes'>{escape(str(size))}</max_size>\n  </metadata_cache>\n</driver>")


def _note(cache: int, entry: int, geometry: Geometry, full_coverage: int) -> str:
    """libvirt cannot name the entry size, so QEMU's default holds."""
    default = min(geometry.cluster_size, PARTIAL_ENTRY_SIZE) if cache < full_coverage else geometry.cluster_size
    if default == entry:
        return ""
    return (f"libvirt has no word for the entry size: QEMU will take {option_size(default)} instead of "
            f"{option_size(entry)}")


def _quoted(text: str) -> str:
    """A Python string literal that is easy to read."""
    return f'"{text}"' if text.isprintable() and '"' not in text and "\\" not in text else ascii(text)
