"""What a user can do something about: one line that says what, where, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a recipe, a command or the data. The command line prints it as one line, exit code 2."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, missing or does not fit the run."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the closest of `names`, or nothing when none is close."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f", did you mean '{close[0]}'?" if close else ""
