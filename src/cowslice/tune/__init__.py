"""Numbers about caches: what a guest asks for, what each cache would answer, and which setting to take.

The door: `curves`, `replay`, `advice` and `fleet` do in one call what `cowslice tune` does; the rest is what they take
and give.
"""

from __future__ import annotations

TYPE_CHECKING = False  # what is public is imported when it is asked for: one room must not pay for another
if TYPE_CHECKING:
    from cowslice.tune.advise import Advice, Choice
    from cowslice.tune.calibrate import Calibration, parse_device
    from cowslice.tune.curve import Curve, Curves
    from cowslice.tune.door import advice, curves, fleet, replay
    from cowslice.tune.fleetlist import Broken, Member
    from cowslice.tune.fleetstudy import Studied
    from cowslice.tune.fleetsummary import Fleet, fleet_sentences
    from cowslice.tune.requests import Requests
    from cowslice.tune.simulate import Replayed
    from cowslice.tune.trace import open_trace
    from cowslice.tune.wording import Sentence, sentences

__all__ = [
    "advice", "curves", "fleet", "replay",
    "Advice", "Broken", "Calibration", "Choice", "Curve", "Curves", "Fleet", "Member", "Replayed", "Requests",
    "Sentence", "Studied",
    "fleet_sentences", "open_trace", "parse_device", "sentences",
]  # fmt: skip

_HOMES = {
    **dict.fromkeys(("advice", "curves", "fleet", "replay"), "door"),
    **dict.fromkeys(("Advice", "Choice"), "advise"),
    **dict.fromkeys(("Broken", "Member"), "fleetlist"),
    **dict.fromkeys(("Calibration", "parse_device"), "calibrate"),
    **dict.fromkeys(("Curve", "Curves"), "curve"),
    **dict.fromkeys(("Fleet", "fleet_sentences"), "fleetsummary"),
    **dict.fromkeys(("Sentence", "sentences"), "wording"),
    "Replayed": "simulate", "Requests": "requests", "Studied": "fleetstudy", "open_trace": "trace",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'cowslice.tune' has no attribute '{name}'")
    from importlib import import_module

    found: object = getattr(import_module(f"cowslice.tune.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
