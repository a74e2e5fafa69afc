"""What deciphering adds to each read of an encrypted image, for either engine, beside what the storage takes.

It does not know ciphers. What must hold: only clusters with data are read, for no others are ciphered, and they are
read from a map that is in memory, for misses are the model's.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from cowslice.format.header import CryptMethod
from cowslice.image.image import Image
from cowslice.storage.locate import local_path
from cowslice.tune import qemuio
from cowslice.tune.calibrate import LARGE, SECONDS, SMALL, Calibration, quickest, rate_of
from cowslice.tune.model import DEPTH, Device

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PLACES = 16  # that are read again and again: one slice of the map holds them
_SEARCHED = 4096  # extents of the disk, for places with data
_QEMU_READS = 2000


def key_of(disk: Image, secret: bytes | None) -> qemuio.Key | None:
    """What QEMU needs to open the same image, None where it is not encrypted or nobody knows the passphrase."""
    if secret is None or disk.header is None or not disk.encrypted:
        return None
    return qemuio.Key("aes" if disk.header.crypt_method == CryptMethod.AES else "luks", secret)


def deciphering(calibration: Calibration, disk: Image, key: qemuio.Key | None, *,
                seconds: float = SECONDS) -> Calibration:
    """The same storage, with what an open encrypted image costs besides. Unchanged where there is nothing to measure.

    Raises what reading the image raises, and StorageError from QEMU.
    """
    places = _places(disk)
    if key is None or calibration.given or not len(places):
        return calibration
    ours = _with_cipher(calibration.ours, *(
        1 / rate_of(disk, places, length=length, depth=DEPTH, seconds=seconds) for length in (SMALL, LARGE)))
    path = local_path(disk.path)
    if path is None or not qemuio.version():
        return replace(calibration, ours=ours)
    assert disk.geometry is not None
    target = qemuio.qcow2_target(path, cache_bytes=16 * disk.geometry.cluster_size,
                                 entry_bytes=disk.geometry.cluster_size, direct=calibration.direct)
    offsets = np.resize(places, _QEMU_READS).tolist()
    qemu = _with_cipher(calibration.qemu, *(
        quickest(target, [(offset, length) for offset in offsets], DEPTH, key=key) for length in (SMALL, LARGE)))
    return replace(calibration, ours=ours, qemu=qemu)


def _with_cipher(device: Device, small: float, large: float) -> Device:
    """From seconds of a read of either length, all that is done for it included."""
    each = max(0.0, large - small) / (LARGE - SMALL)
    return replace(device, cpu=max(device.cpu, small - each * SMALL), cipher=each)


def _places(disk: Image) -> NDArray[np.int64]:
    """Offsets inside one stretch of ciphered data, LARGE bytes apart; none where no stretch is as long as that."""
    longest = (0, 0)  # (first byte, end)
    start = end = 0
    for extent in islice(disk.extents(), _SEARCHED):
        if not extent.data or extent.depth or extent.compressed:
            continue
        start, end = extent.start if extent.start != end else start, extent.end
        longest = max(longest, (start, end), key=lambda stretch: stretch[1] - stretch[0])
    count = min(_PLACES, (longest[1] - longest[0]) // LARGE)
    return longest[0] + np.arange(count, dtype=np.int64) * LARGE
