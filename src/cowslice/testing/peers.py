"""The other programs that cowslice is compared with: found, run, and judged by their exit status.

It knows how each peer is started and nothing of what a test wants from it.
A missing peer skips the test and says which; with COWSLICE_REQUIRE_PEERS=1 it fails instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

MISSING = "peer missing: "
PACKAGES = {
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "fio": "fio",
    "nbdkit": "nbdkit",
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "nginx": "nginx-light",
    "chromium": "chromium",
}

_SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_START_SECONDS = 20.0
# QEMU measures how fast a LUKS key is derived, and on a busy machine often gives up: then it is asked again.
_GAVE_UP = b"Unable to get accurate CPU usage"
_PATIENCE = 60

Argument = str | os.PathLike[str] | int


def needs(*tools: str) -> pytest.MarkDecorator:
    """Mark a test, a class or (as `pytestmark`) a module that runs these peers."""
    for tool in tools:
        if tool not in PACKAGES:
            raise LookupError(f"no peer is called '{tool}', expected one of {', '.join(PACKAGES)}")
    return pytest.mark.needs(*tools)


def find(tool: str) -> str | None:
    """Path of the program, or None. System directories that are not on a user's PATH are searched too."""
    return shutil.which(tool, path=_SYSTEM_PATH)


def require(*tools: str) -> None:
    """Skip the running test unless every peer is here; fail it instead when COWSLICE_REQUIRE_PEERS=1."""
    missing = [tool for tool in tools if find(tool) is None]
    if not missing:
        return
    reason = MISSING + ", ".join(f"{tool} (package {PACKAGES.get(tool, 'unknown')})" for tool in missing)
    if os.environ.get("COWSLICE_REQUIRE_PEERS") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def require_version(tool: str, *least: int) -> None:
    """Skip the running test where a peer is older than this: it is what its system has, so that is never a failure."""
    require(tool)
    said = run(tool, "--version").stdout.decode()
    found = re.search(r"\d+(?:\.\d+)+", said)
    if found is None or tuple(map(int, found[0].split("."))) < least:
        pytest.skip(f"{tool} {found[0] if found else said!r} is older than {'.'.join(map(str, least))}")


def run(
    tool: str,
    *arguments: Argument,
    expect: int | Collection[int] | None = 0,
    stdin: bytes | None = None,
    timeout: float = 120.0,
) -> subprocess.CompletedProcess[bytes]:
    """Run a peer to its end and return what it said.

    `expect` is the exit status or the statuses that are right, None for any; another one is an AssertionError
    with the command and its output. `timeout` is in seconds.
    """
    require(tool)
    command = [find(tool) or tool, *map(_text, arguments)]
    for _ in range(_PATIENCE):
        done = subprocess.run(command, input=stdin or b"", capture_output=True, timeout=timeout, env=_environment())
        if _GAVE_UP not in done.stderr:
            break
    allowed = {expect} if isinstance(expect, int) else expect
    if allowed is not None and done.returncode not in allowed:
        said = (done.stdout[-2000:] + done.stderr[-2000:]).decode(errors="replace")
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}, expected {expect}:\n{said}")
    return done


def qemu_img(*arguments: Argument, expect: int | Collection[int] | None = 0, timeout: float = 120.0) -> str:
    """Run `qemu-img` and return its standard output."""
    return run("qemu-img", *arguments, expect=expect, timeout=timeout).stdout.decode()


def qemu_img_json(verb: str, *arguments: Argument, expect: int | Collection[int] | None = 0) -> Any:
    """Run `qemu-img VERB --output=json` and return what it printed, parsed."""
    return json.loads(qemu_img(verb, "--output=json", *arguments, expect=expect))


def qemu_io(
    path: Argument,
    *commands: str,
    image_format: str | None = "qcow2",
    options: Sequence[Argument] = (),
    expect: int | Collection[int] | None = 0,
) -> str:
    """Run `qemu-io` commands one after another on one image and return what they printed.

    `image_format` None leaves the format to `options` (for `--image-opts`). A `read -P` that finds
    another pattern is an AssertionError, whatever the exit status, unless `expect` is None.
    """
    chosen: list[Argument] = [*options] if image_format is None else ["-f", image_format, *options]
    for command in commands:
        chosen += ["-c", command]
    printed = run("qemu-io", *chosen, path, expect=expect).stdout.decode(errors="replace")
    if expect is not None and "Pattern verification failed" in printed:
        raise AssertionError(f"qemu-io found other bytes in {path}:\n{printed}")
    return printed


def fio_json(*arguments: Argument, timeout: float = 120.0) -> Any:
    """Run `fio` and return its JSON report, parsed."""
    printed = run("fio", "--output-format=json", *arguments, timeout=timeout).stdout
    return json.loads(printed[printed.index(b"{") :])


def nbdinfo_json(uri: str, *arguments: Argument) -> Any:
    """Run `nbdinfo --json` on an export and return what it printed, parsed."""
    return json.loads(run("nbdinfo", "--json", *arguments, uri).stdout)


def nbdcopy(*arguments: Argument, timeout: float = 120.0) -> None:
    """Copy between NBD exports and files with `nbdcopy`."""
    run("nbdcopy", *arguments, timeout=timeout)


@contextlib.contextmanager
def qemu_nbd(path: Argument, *arguments: Argument, image_format: str | None = "qcow2") -> Iterator[str]:
    """Serve an image with `qemu-nbd` on a socket of its own; the value is the NBD URI."""
    chosen: list[Argument] = [] if image_format is None else ["-f", image_format]
    with _socket_directory() as place:
        command = ["--persistent", "--shared=0", f"--socket={place}", *chosen, *arguments, path]
        with _served("qemu-nbd", command, place):
            yield f"nbd+unix:///?socket={place}"


@contextlib.contextmanager
def nbdkit(*arguments: Argument) -> Iterator[str]:
    """Serve a plugin (with its filters) with `nbdkit` on a socket of its own; the value is the NBD URI."""
    with _socket_directory() as place, _served("nbdkit", ["--foreground", "--unix", place, *arguments], place):
        yield f"nbd+unix:///?socket={place}"


@contextlib.contextmanager
def nginx(root: Path, *, directives: str = "") -> Iterator[str]:
    """Serve the files under `root` over HTTP on the loopback address; the value is the URL without a final slash.

    `directives` are added to the location, each ended by a semicolon.
    """
    require("nginx")
    with tempfile.TemporaryDirectory(prefix="cowslice-nginx-") as scratch:
        port = _free_port()
        configuration = Path(scratch, "nginx.conf")
        configuration.write_text(_nginx_configuration(Path(scratch), root.resolve(), port, directives))
        with _served("nginx", ["-p", scratch, "-c", configuration, "-e", f"{scratch}/error.log"], ("127.0.0.1", port)):
            yield f"http://127.0.0.1:{port}"


def _nginx_configuration(scratch: Path, root: Path, port: int, directives: str) -> str:
    """One worker in the foreground that writes nowhere but in `scratch`, and can read what we can."""
    bodies = "".join(
        f"{kind}_temp_path {scratch}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""
{"user root;" if os.geteuid() == 0 else ""}
daemon off; worker_processes 1; pid {scratch}/pid; error_log {scratch}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log {scratch}/access.log; {bodies}
  server {{ listen 127.0.0.1:{port}; location / {{ root {root}; {directives} }} }}
}}
"""


@contextlib.contextmanager
def _served(tool: str, arguments: Sequence[Argument], address: Path | tuple[str, int]) -> Iterator[None]:
    """Run a server until the block ends. It is up when its address takes a connection, a socket also greets."""
    require(tool)
    command = [find(tool) or tool, *map(_text, arguments)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, env=_environment()
        )
        try:
            if not _comes_up(process, address):
                said.seek(0)
                raise AssertionError(f"{' '.join(command)} does not serve:\n{said.read().decode(errors='replace')}")
            yield
        finally:
            _end(process)


def _comes_up(process: subprocess.Popen[bytes], address: Path | tuple[str, int]) -> bool:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if _answers(address):
            return True
        time.sleep(0.01)
    return False


def _answers(address: Path | tuple[str, int]) -> bool:
    if isinstance(address, Path):
        return _greets(address)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(address) == 0


def _greets(place: Path) -> bool:
    """Whether an NBD server says its first word: qemu-nbd listens before it has opened, and locked, the image."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_START_SECONDS)
        try:
            probe.connect(str(place))
            return probe.recv(8) == b"NBDMAGIC"
        except OSError:
            return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _socket_directory() -> Iterator[Path]:
    """A place for a socket with a short path: the kernel takes 107 bytes, pytest's directories can be longer."""
    with tempfile.TemporaryDirectory(prefix="cowslice-") as scratch:
        yield Path(scratch, "s")


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _text(argument: Argument) -> str:
    return str(argument) if isinstance(argument, int) else os.fspath(argument)


def _environment() -> dict[str, str]:
    """Messages in one language, so that a test may look at them."""
    return {**os.environ, "LC_ALL": "C"}
