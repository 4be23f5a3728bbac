"""Which tensor of a file becomes which of the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.errors import UserError, nearest

if TYPE_CHECKING:
    from dist_train.recipe.sections import Rename, Weights

SHOWN = 3
"""So many names of each kind of misfit go into a message; all of them into the run's weights.json."""


@dataclass
class Match:
    """Pairs of (the network's name, the source's name), and what fits nothing, by the names of the network."""

    pairs: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    mismatched: dict[str, list[list[int]]] = field(
        default_factory=dict
    )  # [the network's, the source's]

    def described(self) -> dict[str, Any]:
        return {
            "loaded": len(self.pairs),
            "missing": self.missing,
            "extra": self.extra,
            "mismatched": self.mismatched,
        }

    def __str__(self) -> str:
        """`; missing: 2 (a, b)` and so on; empty when everything fits."""
        shapes = [
            f"{name} {ours} from {theirs}" for name, (ours, theirs) in self.mismatched.items()
        ]
        kinds = {"missing": self.missing, "extra": self.extra, "mismatched": shapes}
        return "".join(f"; {kind}: {_some(names)}" for kind, names in kinds.items() if names)

    def judge(self, weights: Weights, path: Path, where: str) -> None:
        """Raise UserError when something does not fit that `weights` does not allow for."""
        wrong = [
            kind
            for kind in ("missing", "extra", "mismatched")
            if getattr(self, kind) and getattr(weights, kind) == "error"
        ]
        if wrong:
            raise UserError(
                f"{where}: {path} does not fit the network{self}"
                f" (rename them, or allow it: {', '.join(f'{kind}: ignore' for kind in wrong)})"
            )
        if not self.pairs:
            raise UserError(f"{where}: {path} holds no tensor of the network{self}")


def fit(
    wanted: Mapping[str, tuple[int, ...]],
    offered: Mapping[str, tuple[int, ...]],
    renames: Sequence[Rename] = (),
    aliases: Mapping[str, str] | None = None,
    derived: Iterable[str] = (),
    where: str = "weights",
) -> Match:
    """Match the shapes by name that a network wants with those that a source offers.

    Args:
        renames: the first that matches an offered name gives it another; `*` on both sides is the same text.
        aliases: further names of wanted tensors (tied weights). derived: names that need not be there, nor count as
            extra.
    """
    match, used = Match(), [False] * len(renames)
    tied = {name for alias, name in (aliases or {}).items() if alias != name}
    for name, shape in offered.items():
        renamed = name
        for index, rename in enumerate(renames):
            found = _renamed(name, rename)
            if found is not None:
                renamed, used[index] = found, True
                break
        new = (aliases or {}).get(renamed, renamed)
        if new in match.pairs or new in match.mismatched:
            if new in tied:  # under another of its names
                continue
            raise UserError(f"{where}.rename: two tensors become '{new}', the second is '{name}'")
        if new not in wanted:
            if new not in derived:
                match.extra.append(new)
        elif wanted[new] != shape:
            match.mismatched[new] = [list(wanted[new]), list(shape)]
        else:
            match.pairs[new] = name
    for rename, was_used in zip(renames, used, strict=True):
        if not was_used:
            raise UserError(
                f"{where}.rename: '{rename.old}' matches no tensor{nearest(rename.old, offered)}"
            )
    match.missing = [n for n in wanted if n not in match.pairs and n not in match.mismatched]
    return match


def _renamed(name: str, rename: Rename) -> str | None:
    before, star, after = rename.old.partition("*")
    if not star:
        return rename.new if name == rename.old else None
    middle = len(name) - len(before) - len(after)
    if middle < 0 or not (name.startswith(before) and name.endswith(after)):
        return None
    return rename.new.replace("*", name[len(before) : len(before) + middle])


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} ({', '.join(names[:SHOWN])}{more})"
