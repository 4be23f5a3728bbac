"""Named points where tests make a rank fail. Without DIST_TRAIN_FAULT in the environment they do nothing."""

from __future__ import annotations

import os
import signal

_PLAN = os.environ.get("DIST_TRAIN_FAULT", "")
"""`kill@POINT:RANK:COUNT`: SIGKILL rank RANK the COUNT-th time that it passes POINT (from 0)."""
_passed: dict[str, int] = {}


def plan(text: str) -> None:
    """Arm a fault in this process (tests that fork from a server set it here)."""
    global _PLAN
    _PLAN = text
    _passed.clear()


def faultpoint(name: str) -> None:
    """Die here, if the plan says so."""
    if not _PLAN:
        return
    kind, _, place = _PLAN.partition("@")
    point, rank, count = place.rsplit(":", 2)
    if name != point or os.environ.get("RANK", "0") != rank:
        return
    seen = _passed.get(name, 0)
    _passed[name] = seen + 1
    if kind == "kill" and seen == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
