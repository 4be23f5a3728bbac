"""Named points where tests make a rank fail. Without DIST_TRAIN_FAULT in the environment they do nothing."""

from __future__ import annotations

import os
import re
import signal

_PLAN = os.environ.get("DIST_TRAIN_FAULT", "")
"""`KIND@POINT:RANK:COUNT`: what befalls rank RANK the COUNT-th time that it passes POINT (from 0).

KIND is a signal to itself (kill, stop, term, ...) or hold (the interpreter is held for ever).
"""
_passed: dict[str, int] = {}


def plan(text: str) -> None:
    """Arm a fault in this process (tests that fork from a server set it here)."""
    global _PLAN
    _PLAN = text
    _passed.clear()


def faultpoint(name: str) -> None:
    """Die or hang here, if the plan says so."""
    if not _PLAN:
        return
    kind, _, place = _PLAN.partition("@")
    point, rank, count = place.rsplit(":", 2)
    if name != point or os.environ.get("RANK", "0") != rank:
        return
    seen = _passed.get(name, 0)
    _passed[name] = seen + 1
    if seen != int(count):
        return
    if kind == "hold":
        re.match("(a?){40}a{40}", "a" * 40)  # exponential, and deaf to other threads
    else:
        os.kill(os.getpid(), signal.Signals[f"SIG{kind.upper()}"])
