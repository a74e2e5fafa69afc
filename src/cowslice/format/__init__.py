"""Everything that qcow2 keeps on disk, as bytes and as records.

It does not know that files exist: no I/O, no clock, no randomness.
"""
