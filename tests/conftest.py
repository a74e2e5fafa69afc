"""What every test shares: signals, the hypothesis profiles, the `needs` marker, a last line about missing peers."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from hypothesis import HealthCheck, settings

from cowslice.testing import peers

_SLOW_MACHINE = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile("here", deadline=None, max_examples=60, suppress_health_check=_SLOW_MACHINE)
settings.register_profile("ci", settings.get_profile("here"), derandomize=True, print_blob=True)
settings.register_profile("long", settings.get_profile("ci"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "here"))


def pytest_configure() -> None:
    """Let what the tests start heed Ctrl-C and a lost terminal: commands in a shell's background are deaf to them."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number, heeded in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, heeded)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        peers.require(*marker.args)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests did not run for want of a peer, and what would make them run."""
    reasons = [_skip_reason(report) for report in terminalreporter.stats.get("skipped", [])]
    missing = [reason for reason in reasons if peers.MISSING in reason]
    if not missing:
        return
    names = sorted({name for reason in missing for name in reason.split(peers.MISSING, 1)[1].split(", ")})
    terminalreporter.write_line(
        f"{len(missing)} tests skipped because peers are missing: {', '.join(names)}", yellow=True, bold=True
    )


def _skip_reason(report: pytest.TestReport) -> str:
    where = report.longrepr
    return where[2] if isinstance(where, tuple) else str(where)
