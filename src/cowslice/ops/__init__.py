"""Verbs on images, one per file.

They do not know terminals: what is found comes back as records, progress goes to a callable.
"""
