"""How facts about an image are told: the JSON of `qemu-img info`, and a page for people.

It reads nothing. Text that came from the image never reaches the terminal unescaped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cowslice.cli.output import exact_size, paint, printable, say, say_fields, say_table
from cowslice.format.header import Autoclear, Compatible, CompressionType, CryptMethod, Header
from cowslice.units import format_size

if TYPE_CHECKING:
    from cowslice.codec.luks1 import LuksHeader
    from cowslice.format.bitmaps import Bitmap
    from cowslice.format.snapshots import Snapshot
    from cowslice.ops.info import ImageFacts

NANOSECONDS = 1_000_000_000


def as_json(facts: ImageFacts) -> dict[str, Any]:
    """The facts with qemu-img's keys; what it does not tell is under "cowslice"."""
    shown: dict[str, Any] = {"filename": facts.filename, "format": facts.format, "virtual-size": facts.virtual_size}
    if facts.actual_size is not None:
        shown["actual-size"] = facts.actual_size
    header = facts.header
    if header is not None:
        shown["cluster-size"] = header.geometry.cluster_size
    shown["dirty-flag"] = header is not None and header.is_dirty
    if facts.encrypted:
        shown["encrypted"] = True
    shown.update(_backing_json(facts))
    if facts.snapshots:
        shown["snapshots"] = [snapshot_json(snapshot) for snapshot in facts.snapshots]
    if header is not None:
        shown["format-specific"] = {"type": "qcow2", "data": _specific_json(facts, header)}
    shown["cowslice"] = _our_json(facts)
    return shown


def _backing_json(facts: ImageFacts) -> Iterator[tuple[str, str]]:
    if facts.first is None or facts.backing_name is None or facts.full_backing_name is None:
        return
    yield "backing-filename", facts.backing_name
    yield "full-backing-filename", facts.full_backing_name
    if facts.first.backing_format:
        yield "backing-filename-format", facts.first.backing_format


def snapshot_json(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot with qemu-img's keys."""
    shown: dict[str, Any] = {
        "id": os.fsdecode(snapshot.id), "name": os.fsdecode(snapshot.name), "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.seconds, "date-nsec": snapshot.nanoseconds,
        "vm-clock-sec": snapshot.vm_clock_ns // NANOSECONDS, "vm-clock-nsec": snapshot.vm_clock_ns % NANOSECONDS,
    }  # fmt: skip
    if snapshot.icount is not None:
        shown["icount"] = snapshot.icount
    return shown


def _specific_json(facts: ImageFacts, header: Header) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "compat": "0.10" if header.version == 2 else "1.1",
        "compression-type": compression_name(header),
        "refcount-bits": header.geometry.refcount_bits if header.refcount_order <= 6 else 0,
    }
    if header.version >= 3:
        shown["lazy-refcounts"] = bool(header.compatible & Compatible.LAZY_REFCOUNTS)
        shown["corrupt"] = header.is_corrupt
        shown["extended-l2"] = header.extended_l2
        if header.has_data_file and facts.first is not None:
            if facts.first.data_file_name:
                shown["data-file"] = os.fsdecode(facts.first.data_file_name)
            shown["data-file-raw"] = bool(header.autoclear & Autoclear.RAW_EXTERNAL)
    if facts.bitmaps:
        shown["bitmaps"] = [_bitmap_json(bitmap) for bitmap in facts.bitmaps if bitmap.usable]
    if facts.encrypted:
        shown["encrypt"] = _luks_json(facts.luks) if facts.luks else {"format": _crypt_name(header)}
    return shown


def _bitmap_json(bitmap: Bitmap) -> dict[str, Any]:
    flags = [name for name, on in (("in-use", bitmap.in_use), ("auto", bitmap.flags & 2)) if on]
    return {"name": os.fsdecode(bitmap.name), "granularity": bitmap.granularity, "flags": flags}


def _luks_json(luks: LuksHeader) -> dict[str, Any]:
    mode, _, ivgen = luks.cipher_mode.partition("-")
    ivgen, _, ivgen_hash = ivgen.partition(":")
    bits = luks.key_bytes * 8 // (2 if mode == "xts" else 1)
    shown: dict[str, Any] = {"format": "luks", "cipher-alg": f"{luks.cipher_name}-{bits}", "cipher-mode": mode,
                             "ivgen-alg": ivgen or "plain", "hash-alg": luks.hash_name, "uuid": luks.uuid,
                             "payload-offset": luks.payload_offset * 512, "master-key-iters": luks.digest_iterations}
    if ivgen_hash:
        shown["ivgen-hash-alg"] = ivgen_hash
    shown["slots"] = [
        {"active": True, "iters": slot.iterations, "stripes": 4000, "key-offset": slot.key_offset * 512} if slot.active
        else {"active": False, "key-offset": slot.key_offset * 512} for slot in luks.slots]
    return shown


def _our_json(facts: ImageFacts) -> dict[str, Any]:
    shown: dict[str, Any] = {"file-length": facts.file_length, "usable": not facts.fatal}
    if facts.guessed:
        shown["format-guessed"] = True
    if facts.cache is not None:
        shown["cache"] = {"full-coverage": facts.cache.full_coverage,
                          "default-l2-cache-size": facts.cache.l2_cache_size,
                          "default-l2-cache-entry-size": facts.cache.l2_cache_entry_size,
                          "default-covers": min(facts.cache.covered, facts.virtual_size)}
    if facts.map_size is not None:
        shown["map"] = {"l2-tables": facts.map_size.tables, "l2-bytes": facts.map_size.raw,
                        "packed-bytes": facts.map_size.packed, "exact": facts.map_size.exact}
    shown["findings"] = [
        {"fault": finding.fault.value, "where": finding.where, "message": finding.message}
        | ({"field": finding.field} if finding.field else {})
        | ({"offset": finding.offset} if finding.offset >= 0 else {}) for finding in facts.findings]
    return shown


def compression_name(header: Header) -> str:
    """zlib or zstd, or the number of a type that nobody here knows."""
    names: dict[int, str] = {CompressionType.DEFLATE: "zlib", CompressionType.ZSTD: "zstd"}
    return names.get(header.compression_type, str(header.compression_type))


def _crypt_name(header: Header) -> str:
    names: dict[int, str] = {CryptMethod.AES: "aes", CryptMethod.LUKS: "luks"}
    return names.get(header.crypt_method, str(header.crypt_method))


def say_facts(facts: ImageFacts) -> None:
    """Print the facts for people."""
    say_fields(_fields(facts))
    if facts.snapshots:
        say()
        say_snapshots(facts.snapshots)
    if facts.bitmaps:
        say()
        say_table(("bitmap", "granularity", "state"), [
            (printable(os.fsdecode(bitmap.name)), format_size(bitmap.granularity) if bitmap.usable else "",
             bitmap.fault or ("in use: inconsistent" if bitmap.in_use else "consistent")) for bitmap in facts.bitmaps
        ], right="lr")
    if facts.findings:
        say()
        _say_findings(facts)


def _fields(facts: ImageFacts) -> Iterator[tuple[str, str]]:
    yield "image", printable(facts.filename)
    yield "format", facts.format + (" (guessed: it has no qcow2 header)" if facts.guessed else "")
    yield "virtual size", exact_size(facts.virtual_size)
    if facts.actual_size is not None:
        yield "disk size", format_size(facts.actual_size)
    if facts.header is None or facts.first is None:
        return
    yield "cluster size", format_size(facts.header.geometry.cluster_size)
    if facts.backing_name is not None:
        kind = facts.first.backing_format
        said = f" ({printable(kind)})" if kind else " (format not said)"
        yield "backing file", printable(facts.backing_name) + said
    if facts.first.data_file_name:
        raw = ", raw" if facts.header.autoclear & Autoclear.RAW_EXTERNAL else ""
        yield "data file", printable(os.fsdecode(facts.first.data_file_name)) + raw
    yield from _header_fields(facts, facts.header)
    yield from _cache_fields(facts)


def _header_fields(facts: ImageFacts, header: Header) -> Iterator[tuple[str, str]]:
    yield "version", f"{header.version} (compat {'0.10' if header.version == 2 else '1.1'})"
    yield "compression", compression_name(header)
    yield "refcounts", f"{header.geometry.refcount_bits} bits" if header.refcount_order <= 6 else "impossible"
    on = [name for name, present in (
        ("extended L2 entries", header.extended_l2), ("lazy refcounts", header.compatible & Compatible.LAZY_REFCOUNTS),
        ("external data file", header.has_data_file), ("dirty", header.is_dirty), ("corrupt", header.is_corrupt),
    ) if present]
    if on:
        yield "features", ", ".join(on)
    if facts.luks:
        shown = _luks_json(facts.luks)
        active = sum(slot.active for slot in facts.luks.slots)
        yield "encryption", printable(f"LUKS1, {shown['cipher-alg']} {shown['cipher-mode']}, {active} of "
                                      f"{len(facts.luks.slots)} key slots in use")
    elif facts.encrypted:
        yield "encryption", _crypt_name(header)


def _cache_fields(facts: ImageFacts) -> Iterator[tuple[str, str]]:
    cache, packed = facts.cache, facts.map_size
    if cache is not None:
        covered = min(cache.covered, facts.virtual_size)
        reach = "the whole disk" if covered >= facts.virtual_size else format_size(covered)
        yield "L2 cache", (f"{format_size(cache.full_coverage)} cover the whole disk; the default of "
                           f"{format_size(cache.l2_cache_size)} covers {reach}")
    if packed is not None and packed.tables:
        about = "" if packed.exact else "about "
        yield "map", f"{format_size(packed.raw)} of L2 tables pack into {about}{format_size(packed.packed)}"


def say_snapshots(snapshots: Sequence[Snapshot]) -> None:
    """Print a table of snapshots."""
    from datetime import datetime

    rows = []
    for snapshot in snapshots:
        when = datetime.fromtimestamp(snapshot.seconds).strftime("%Y-%m-%d %H:%M:%S")
        seconds, milliseconds = divmod(snapshot.vm_clock_ns // 1_000_000, 1000)
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"
        rows.append((printable(os.fsdecode(snapshot.id)), printable(os.fsdecode(snapshot.name)),
                     format_size(snapshot.vm_state_size), when, clock))
    say_table(("snapshot", "name", "VM state", "taken", "VM clock"), rows, right="llrll")


def _say_findings(facts: ImageFacts) -> None:
    for finding in facts.findings:
        colour = "red" if finding.fatal else "yellow"
        at = f" at {finding.offset:#x}" if finding.offset >= 0 else ""
        say(f"{paint(finding.fault.value, colour)} ({finding.where}{at}): {printable(finding.message)}")
