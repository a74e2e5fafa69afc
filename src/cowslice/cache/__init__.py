"""Metadata in memory: slices of the map from guest to host clusters, how they are packed, and which of them stay."""
