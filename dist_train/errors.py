"""What a user can do something about: one line that says what, where, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake in a recipe, a command or the data. The command line prints it as one line, exit code 2."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, missing or does not fit the run."""


class Interrupted(Exception):
    """The run was told to end early, and ended as it should. `code`: 75 (start it again), or 130 after Ctrl-C."""

    def __init__(self, message: str, code: int = 75) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses of a path that the user has named is theirs to mend: one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from error


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the closest of `names`, or nothing when none is close."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f", did you mean '{close[0]}'?" if close else ""
