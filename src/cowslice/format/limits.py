"""Every limit of the format, each with its reason, in one place.

A limit that the specification gives is marked "spec"; one that QEMU enforces, and that we share so that both refuse
the same images, is marked "QEMU"; the rest are ours and say why.
"""

from __future__ import annotations

from typing import Final

from cowslice.units import MiB

# Numbers that a 64-bit signed host offset can hold; every offset + length must stay inside (QEMU, off_t).
MAX_OFFSET: Final = (1 << 63) - 1
# L1, L2 and bitmap table entries hold host offsets in bits 9..55 (spec).
MAX_HOST_OFFSET: Final = (1 << 56) - 1

# Cluster sizes 512 bytes (spec) to 2 MiB (QEMU); 32 subclusters of at least one sector need 16 KiB (spec).
MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
MIN_CLUSTER_BITS_EXTENDED_L2: Final = 14
MAX_CLUSTER_SIZE: Final = 1 << MAX_CLUSTER_BITS

# Header lengths (spec). 112 is what is written today: version 3, compression type, padding.
HEADER_LENGTH_V2: Final = 72
HEADER_LENGTH_V3: Final = 104
HEADER_LENGTH_WRITTEN: Final = 112

# Refcounts are 1, 2, 4 ... 64 bits wide (spec); version 2 knows only 16.
MAX_REFCOUNT_ORDER: Final = 6
REFCOUNT_ORDER_V2: Final = 4

# Names. The backing name has at most 1023 bytes (spec); a format name fits 16 bytes with its terminator (QEMU).
MAX_BACKING_NAME: Final = 1023
MAX_BACKING_FORMAT: Final = 15
FEATURE_NAME_LENGTH: Final = 46

# Tables read whole at open: 32 MiB of L1 map 2 PiB at 64 KiB clusters, 8 MiB of refcount table count 2 PiB (QEMU).
MAX_L1_BYTES: Final = 32 * MiB
MAX_L1_ENTRIES: Final = MAX_L1_BYTES // 8
MAX_REFTABLE_BYTES: Final = 8 * MiB

# Snapshots (QEMU). An id or a name is counted in 16 bits (spec).
MAX_SNAPSHOTS: Final = 65536
MAX_SNAPSHOT_EXTRA: Final = 1024
MAX_SNAPSHOT_TABLE_BYTES: Final = 1024 * MAX_SNAPSHOTS
MAX_SNAPSHOT_TEXT: Final = 65535

# Persistent dirty bitmaps (QEMU). 512 MiB of bitmap cover 256 TiB at the default granularity of 64 KiB.
MAX_BITMAPS: Final = 65535
MAX_BITMAP_DIRECTORY_BYTES: Final = 1024 * MAX_BITMAPS
MAX_BITMAP_NAME: Final = 1023
MAX_BITMAP_TABLE_ENTRIES: Final = 0x8000000
MAX_BITMAP_BYTES: Final = 512 * MiB
MIN_BITMAP_GRANULARITY_BITS: Final = 9
# Entries of all tables that a writer keeps in memory, 8 MiB (ours): 64 GiB of bits with clusters of 64 KiB.
MAX_LOADED_BITMAP_ENTRIES: Final = 1 << 20
MAX_BITMAP_GRANULARITY_BITS: Final = 31

# A LUKS1 header with eight slots of 64-byte keys and 4000 stripes takes 2 MiB. Eight times that is generous (ours: it
# is read whole before anything of it can be trusted).
MAX_CRYPTO_HEADER_BYTES: Final = 16 * MiB

# Header extensions in one image: five types are known, and a 2 MiB cluster could hold 262144 empty ones (ours).
MAX_EXTENSIONS: Final = 4096

# Untrusted text is cut to this many characters when it is quoted in a message (ours: a message is one line).
MAX_QUOTED_TEXT: Final = 200
# Findings about one kind of structure, so that a hostile image cannot make a report of any length (ours).
MAX_FINDINGS: Final = 256
