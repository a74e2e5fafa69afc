"""The gate: what an image names is opened only where the caller would expect it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowslice.errors import ReferenceRefused
from cowslice.image.gate import (
    Deny,
    DenyGate,
    FolderGate,
    Gate,
    Permit,
    PermitGate,
    Reference,
    Role,
    Verdict,
    has_protocol,
    pass_gate,
    resolve,
    root_of,
)


def named(name: str, image: str | Path, root: str | None = None) -> Reference:
    return resolve(Role.BACKING, name, None, image=str(image), root=root_of(str(image)) if root is None else root)


def permits(gate: Gate, reference: Reference) -> bool:
    return isinstance(gate.judge(reference), Permit)


@pytest.mark.parametrize("name", ["base.qcow2", "./base.qcow2", "sub/base.qcow2", "sub/../base.qcow2", "a b\nc"])
def test_a_name_inside_the_folder_is_permitted(tmp_path: Path, name: str) -> None:
    assert permits(FolderGate(), named(name, tmp_path / "top.qcow2"))


@pytest.mark.parametrize("name", ["../base.qcow2", "/etc/passwd", "sub/../../x", "..", "."])
def test_a_name_that_leads_out_of_the_folder_is_denied(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    verdict = FolderGate().judge(named(name, folder / "top.qcow2"))
    assert isinstance(verdict, Deny)
    assert str(folder) in verdict.reason


def test_a_folder_whose_name_merely_begins_alike_is_outside(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images-secret").mkdir()
    assert not permits(FolderGate(), named("../images-secret/x", tmp_path / "images" / "top.qcow2"))


def test_an_absolute_name_inside_the_folder_is_permitted(tmp_path: Path) -> None:
    assert permits(FolderGate(), named(str(tmp_path / "base.raw"), tmp_path / "top.qcow2"))


def test_a_link_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "base.raw").symlink_to(tmp_path / "secret")
    (folder / "deep").symlink_to(tmp_path)
    assert not permits(FolderGate(), named("base.raw", folder / "top.qcow2"))
    assert not permits(FolderGate(), named("deep/secret", folder / "top.qcow2"))


def test_the_folder_itself_may_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    assert permits(FolderGate(), named("base.raw", tmp_path / "link" / "top.qcow2"))


def test_further_folders_are_permitted_when_given(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "bases").mkdir()
    reference = named("../bases/base.raw", tmp_path / "images" / "top.qcow2")
    assert not permits(FolderGate(), reference)
    assert permits(FolderGate([tmp_path / "bases"]), reference)


@pytest.mark.parametrize(
    "name", ["nbd://host/x", "NBDS://host/x", "nbd+unix:///?socket=/run/s", "nbd:host:10809", "https://host/x",
             "file:///etc/passwd", "file:x", "ssh:x", "fat:dir"])
@pytest.mark.parametrize("gate", [FolderGate(), PermitGate(), DenyGate()])
def test_protocol_names_are_denied_by_every_gate_that_does_not_name_them(
        tmp_path: Path, name: str, gate: Gate) -> None:
    assert not permits(gate, named(name, tmp_path / "top.qcow2"))


def test_a_network_gate_permits_protocol_names(tmp_path: Path) -> None:
    reference = named("https://host/x", tmp_path / "top.qcow2")
    assert (reference.local, reference.target) == (False, "https://host/x")
    assert permits(PermitGate(network=True), reference)


def test_a_permitting_gate_permits_any_local_file(tmp_path: Path) -> None:
    assert permits(PermitGate(), named("/etc/passwd", tmp_path / "top.qcow2"))


def test_a_denying_gate_denies_the_neighbour_too(tmp_path: Path) -> None:
    assert not permits(DenyGate(), named("base.raw", tmp_path / "top.qcow2"))


@pytest.mark.parametrize("name", ["", "a\0b", 'json:{"file.filename": "/etc/passwd"}', "json:x"])
def test_some_names_are_refused_before_any_gate(tmp_path: Path, name: str) -> None:
    with pytest.raises(ReferenceRefused):
        named(name, tmp_path / "top.qcow2")


def test_a_relative_name_needs_a_place_to_start_from() -> None:
    with pytest.raises(ReferenceRefused, match="not opened by a name"):
        named("base.raw", "", root="")


def test_a_relative_name_beside_a_remote_image_stays_beside_it() -> None:
    reference = named("sub/base.raw", "https://host/images/top.qcow2?token=secret")
    assert (reference.target, reference.local) == ("https://host/images/sub/base.raw", False)
    assert permits(FolderGate(), reference)


@pytest.mark.parametrize("name", ["../base.raw", "/../../x/../../base.raw", "../../../../../base.raw"])
def test_a_relative_name_does_not_climb_out_of_a_remote_folder(name: str) -> None:
    try:
        reference = named(name, "https://host/images/top.qcow2")
    except ReferenceRefused:
        return
    assert not permits(FolderGate(), reference)


@pytest.mark.parametrize("name", ["%2e%2e/base.raw", "a?b", "a#b", "..\\base.raw"])
def test_characters_that_a_server_may_read_otherwise_are_refused(name: str) -> None:
    with pytest.raises(ReferenceRefused, match="URL"):
        named(name, "https://host/images/top.qcow2")


@pytest.mark.parametrize("image", ["nbd://host/top", "nbd://host", "nbd+unix:///?socket=/run/images/s", "NBDS://host/x"])
def test_a_relative_name_leads_nowhere_from_an_nbd_export(image: str) -> None:
    with pytest.raises(ReferenceRefused, match="no folder"):
        named("base.raw", image)


def test_an_image_behind_an_nbd_server_reaches_no_local_file() -> None:
    assert not permits(FolderGate(), named("/etc/passwd", "nbd+unix:///?socket=/etc/s"))


def test_an_absolute_url_is_denied_even_if_it_begins_like_the_folder() -> None:
    assert not permits(FolderGate(), named("https://host/images/../secret", "https://host/images/top.qcow2"))


def test_a_refusal_shows_names_escaped(tmp_path: Path) -> None:
    with pytest.raises(ReferenceRefused) as refusal:
        pass_gate(DenyGate(), named("evil\x1b[2J\nname", tmp_path / "top.qcow2"))
    assert "\x1b" not in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "evil" in str(refusal.value)
    assert "backing file" in str(refusal.value)


def test_a_gate_of_ones_own_sees_what_the_name_means(tmp_path: Path) -> None:
    seen: list[Reference] = []

    class Recording(Gate):
        def judge(self, reference: Reference) -> Verdict:
            seen.append(reference)
            return Permit()

    pass_gate(Recording(), named("base.raw", tmp_path / "top.qcow2"))
    assert seen[0].target == str(tmp_path.resolve() / "base.raw")
    assert seen[0].root == str(tmp_path.resolve())


@pytest.mark.parametrize("name, protocol", [("a:b", True), ("./a:b", False), ("/a:b", False), ("a", False)])
def test_a_colon_before_any_slash_makes_a_protocol(name: str, protocol: bool) -> None:
    assert has_protocol(name) is protocol
