"""Starts the ordeal in a process of its own and judges how it ended. It does not know what the mutations are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from cowslice.testing import ordeal
from cowslice.testing.mutations import Mutation


def put_through(path: Path, mutations: Iterable[Mutation], secret: str | None = None) -> list[dict[str, str]]:
    """Let a limited process read the image at `path`, spoiled in each of these ways; say how each step ended.

    Raises AssertionError, with the mutation's name, unless it answers for every one.
    """
    told = list(mutations)
    done = subprocess.run(
        [sys.executable, "-m", ordeal.__name__, str(path), *([secret] if secret else [])],
        input="".join(mutation.encode() + "\n" for mutation in told),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(ordeal.__file__).parents[2]), "MALLOC_ARENA_MAX": "2"},
    )
    answers: list[dict[str, str]] = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or len(answers) != len(told):
        culprit = told[min(len(answers), len(told) - 1)].name if told else "nothing"
        raise AssertionError(f"{culprit}: ended with {done.returncode}\n{done.stderr[-4000:]}")
    return answers
