"""Measuring: random and sequential reads through the metadata cache, beside QEMU and beside plain reads."""
