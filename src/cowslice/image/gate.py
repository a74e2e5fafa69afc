"""Who may be opened because an image says so: every file that an image names passes a gate first.

The attack: a stranger's image names `/etc/shadow`, a link to it, or a server inside your network as its backing file,
and whoever reads the disk copies that out. This file judges names; it opens nothing and knows no file's content.
"""

from __future__ import annotations

import os
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from cowslice.errors import ReferenceRefused
from cowslice.format.findings import escaped

_URL_MEANING = set("%?#\\")  # a server may read `%2e%2e` as `..`


class Role(Enum):
    """What a named file is to the image that names it."""

    BACKING = "backing file"
    DATA = "data file"


@dataclass(frozen=True, slots=True)
class Reference:
    """One name that an image holds. All text comes from the image: escape it before you show it.

    `target` is where the name leads: a path with every link resolved, or a URL when `local` is false.
    `root` is the folder, links resolved, of the image that the caller named himself; `format` what the image says.
    """

    role: Role
    name: str
    format: str | None
    image: str
    root: str
    target: str
    local: bool


@dataclass(frozen=True, slots=True)
class Permit:
    """The verdict that the target may be opened for reading."""


@dataclass(frozen=True, slots=True)
class Deny:
    """The verdict that it may not. `reason` ends the sentence "... is refused: "."""

    reason: str


Verdict = Permit | Deny


class Gate(ABC):
    """Judge each reference before anything is opened. May be called by several threads."""

    @abstractmethod
    def judge(self, reference: Reference) -> Verdict:
        """Return Permit() or Deny(reason)."""


class FolderGate(Gate):
    """Permit local files under the image's own folder, and under the folders given; links and '..' do not get out.

    URLs too when `network` is true.
    """

    def __init__(self, also: Iterable[str | os.PathLike[str]] = (), *, network: bool = False) -> None:
        self._network = network
        self._also = tuple(os.path.realpath(folder) for folder in also)

    def judge(self, reference: Reference) -> Verdict:
        if not reference.local:
            beside = not has_protocol(reference.name) and _is_url(reference.root)
            if self._network or (beside and _beneath(reference.target, reference.root)):
                return Permit()
            return Deny("network and protocol names are not followed")
        if any(_beneath(reference.target, folder) for folder in (reference.root, *self._also) if folder):
            return Permit()
        return Deny(f"it leads to '{shown(reference.target)}', outside the folder '{shown(reference.root)}'")


class PermitGate(Gate):
    """Permit every local file, and URLs too when `network` is true. Only for images whose maker you trust."""

    def __init__(self, *, network: bool = False) -> None:
        self._network = network

    def judge(self, reference: Reference) -> Verdict:
        if reference.local or self._network:
            return Permit()
        return Deny("network and protocol names are not followed")


class DenyGate(Gate):
    """Permit nothing: only what the caller names is opened."""

    def judge(self, reference: Reference) -> Verdict:
        return Deny("nothing that an image names is followed")


def pass_gate(gate: Gate, reference: Reference) -> None:
    """Return if the gate permits the reference. Raises ReferenceRefused with the reason and both names escaped."""
    verdict = gate.judge(reference)
    if isinstance(verdict, Deny):
        raise refused(reference.role, reference.name, reference.image, verdict.reason)


def resolve(role: Role, name: str, format_name: str | None, *, image: str, root: str) -> Reference:
    """Say where a name that `image` holds leads: `image` is a path or URL, or '' when it has no place.

    Raises ReferenceRefused for names that lead nowhere: empty, with zero bytes, `json:`, relative to no place.
    """
    if not name or "\0" in name:
        raise refused(role, name, image, "it is not a file name")
    if name.startswith("json:"):
        raise refused(role, name, image, "json: descriptions are never followed")
    if has_protocol(name):
        return Reference(role, name, format_name, image, root, name, local=False)
    if os.path.isabs(name):
        return Reference(role, name, format_name, image, root, os.path.realpath(name), local=True)
    if not image:
        raise refused(role, name, image, "it is relative, but the image was not opened by a name")
    if _is_url(image):
        if image.lower().startswith("nbd"):
            raise refused(role, name, image, "it is relative, and NBD exports have no folder")
        if set(name) & _URL_MEANING:
            raise refused(role, name, image, "it has characters that mean something else in a URL")
        return Reference(role, name, format_name, image, root, _join_url(image, name), local=False)
    joined = os.path.join(os.path.dirname(os.path.abspath(image)), name)
    return Reference(role, name, format_name, image, root, os.path.realpath(joined), local=True)


def root_of(place: str) -> str:
    """The folder, links resolved, that holds the image at this path or URL; '' for an image without a place."""
    if not place:
        return ""
    if _is_url(place):
        return place.split("?", 1)[0].rsplit("/", 1)[0]
    return os.path.realpath(os.path.dirname(os.path.abspath(place)))


def has_protocol(name: str) -> bool:
    """Whether a colon comes before any slash, which is how QEMU tells `nbd:...` from a path."""
    return ":" in name.split("/", 1)[0]


def shown(text: str) -> str:
    """Text that came from an image, safe to print."""
    return escaped(os.fsencode(text))


def refused(role: Role, name: str, image: str, reason: str) -> ReferenceRefused:
    """The error that says which name was not followed and why."""
    return ReferenceRefused(f"the {role.value} '{shown(name)}' that '{shown(image)}' names is refused: {reason}",
                            hint="Name the file yourself if you trust it, or choose another gate.")


def _is_url(place: str) -> bool:
    return has_protocol(place) and "://" in place


def _join_url(image: str, name: str) -> str:
    """A name beside a remote image. The query (a signature, say) belongs to the image alone."""
    scheme, rest = image.split("?", 1)[0].split("://", 1)
    host, slash, path = rest.partition("/")
    joined = posixpath.normpath(posixpath.join("/", posixpath.dirname(path), name))
    return f"{scheme}://{host}{joined}" if slash else f"{scheme}://{host}/{name}"


def _beneath(target: str, folder: str) -> bool:
    return target.startswith(folder.rstrip("/") + "/")
