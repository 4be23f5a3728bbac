"""What is changed of a run on purpose, while it stands still: `amendments.jsonl`, one row a change.

run = f(recipe, seed, step, amendments). `recipe.yaml` holds the settings in force; the rows say since which step, what
they were before, and whose checkpoint the run has taken over.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_train import checkpoint
from dist_train.errors import CheckpointError
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory, write_file

FILE, PENDING = "amendments.jsonl", "amendment.json"


def amend(
    run_dir: Path, changes: Mapping[str, Any], *, taken: Path | None = None, reason: str
) -> None:
    """Change settings of a run that stands still, from its last checkpoint on; the next `--resume` goes on with them.

    Whoever was cut off may repeat it: the same amendment at the same step is made once.

    Args:
        changes: values by recipe key; None removes one.
        taken: a checkpoint of another run (weights, optimiser, position: all of it) that takes the place of this run's
            own. What this run has from that step on is dropped.
    Raises: CheckpointError where there is no whole checkpoint to go on from; UserError while the run is being written.
    """
    directory = RunDirectory.open(run_dir)
    directory.lock()
    try:
        path = taken or checkpoint.last_good(directory.checkpoints)[0]
        if path is None or checkpoint.problems(path):
            raise CheckpointError(f"{path or run_dir}: no whole checkpoint to go on from")
        row: dict[str, Any] = {
            "step": checkpoint.Reader(path).step,
            "set": dict(changes),
            "weights_from": None if taken is None else str(taken),
            "reason": reason,
        }
        rows = read(run_dir)
        if rows and row == {key: rows[-1][key] for key in row}:
            return
        recipe = Recipe.load(run_dir)
        before = recipe.as_dict()
        row = _begun(run_dir, row | {"was": {key: _get(before, key) for key in changes}})
        if taken is not None:
            _take_over(path, directory.checkpoints, row["step"])
        for key, value in changes.items():
            recipe = recipe.set(key, value)
        directory.write_recipe(recipe.to_yaml())
        text = "".join(json.dumps(one) + "\n" for one in [*rows, row])
        write_file(run_dir / FILE, text.encode())
        (run_dir / PENDING).unlink()
    finally:
        directory.unlock()


def _begun(run_dir: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Note what is about to be done; if it was cut off before, what was noted then, which knows what was in force."""
    file = run_dir / PENDING
    if file.is_file():
        noted = json.loads(file.read_text())
        if {**noted, "was": None} == {**row, "was": None}:
            return noted
    write_file(file, json.dumps(row).encode())
    return row


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The amendments of a run, oldest first."""
    file = run_dir / FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _take_over(source: Path, folder: Path, step: int) -> None:
    """Put a checkpoint in the place of this run's own of the same step, and drop its later ones."""
    scratch = folder / f".writing-{step:08d}"
    shutil.rmtree(scratch, ignore_errors=True)
    link_tree(source, scratch)
    for later in checkpoint.steps(folder):
        if later >= step:
            shutil.rmtree(checkpoint.at(folder, later))
    scratch.rename(checkpoint.at(folder, step))


def link_tree(source: Path, target: Path) -> None:
    """A second name for a checkpoint, which outlives the first."""
    shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    """Checkpoints never change, so two runs may share a file; where a link cannot be, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _get(settings: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for part in key.split("."):
        if isinstance(settings, list) and part.isdigit() and int(part) < len(settings):
            settings = settings[int(part)]
        elif isinstance(settings, dict) and part in settings:
            settings = settings[part]
        else:
            return None
    return settings
