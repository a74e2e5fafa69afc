"""The backing file that a new image will name: opened as it will be, to see that it is there and how large it is.

It does not write the name. What the caller names he may name; what that file names in turn passes the gate.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from cowslice.errors import BadOption, CryptoError
from cowslice.image.chain import open_chain
from cowslice.image.createoptions import CreateOptions
from cowslice.image.gate import Deny, Role, resolve, root_of, shown
from cowslice.image.options import OpenOptions


def check_backing(options: CreateOptions, image: str) -> int:
    """Return the guest bytes of the backing file of the new image at the path `image`, '' for one without a place.

    Raises BadOption when it is the image itself, and the errors of opening it and everything below. An encrypted one
    is opened without its key, so what lies below it stays closed.
    """
    reference = resolve(Role.BACKING, os.fsdecode(options.backing_name), options.backing_format,
                        image=image, root=root_of(image))
    if image and reference.local and reference.target == os.path.realpath(image):
        raise BadOption(f"backing_file is '{shown(reference.name)}', the image itself, expected another file")
    verdict = options.gate.judge(reference)
    if isinstance(verdict, Deny) and options.on_warning is not None:
        options.on_warning(f"the image will open only where the gate permits its backing file: {verdict.reason}")
    try:
        return _size(reference.target, options, metadata_only=False)
    except CryptoError:
        return _size(reference.target, options, metadata_only=True)


def _size(path: str, options: CreateOptions, *, metadata_only: bool) -> int:
    how = OpenOptions(format=options.backing_format, gate=options.gate, metadata_only=metadata_only)
    chain = open_chain(path, how, options.on_warning or _ignore)
    with ExitStack() as stack:
        stack.enter_context(chain.stack)
        return chain.layers[0].size


def _ignore(message: str) -> None:
    """Nobody asked to hear it."""
