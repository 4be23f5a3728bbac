"""The tools that our own tests use, for tests of your own parts.

from dist_train.testing import assert_same_run, tiny_run

def test_my_model_resumes_exactly(tmp_path):
    whole = tiny_run("my-recipe.yaml", tmp_path / "whole", steps=6)
    tiny_run("my-recipe.yaml", tmp_path / "halves", steps=6, until=3)
    halves = tiny_run("my-recipe.yaml", tmp_path / "halves", steps=6, resume="auto")
    assert_same_run(whole, halves)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train import checkpoint
from dist_train.callbacks import Callback
from dist_train.ranks import RankFailed, start_ranks
from dist_train.recipe import Recipe

if TYPE_CHECKING:
    from dist_train.trainer import Trainer

__all__ = ["RankFailed", "Trace", "assert_same_run", "read_trace", "spawn_ranks", "tiny_run"]

spawn_ranks = start_ranks


class Trace(Callback):
    """Writes the ids of this rank's samples and the bits of its losses, every step, to `logs/trace-RANK.jsonl`."""

    priority = 5

    def run_begins(self, run: Trainer) -> None:
        self.file = (run.directory.logs / f"trace-{run.world.rank}.jsonl").open("a")

    def step_ends(self, run: Trainer) -> None:
        record = {
            "step": run.step,
            "ids": [[micro.index, micro.ids.tolist()] for micro in run.batch],
            "losses": {player: float(loss).hex() for player, loss in run.losses.items()},
        }
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def run_ends(self, run: Trainer) -> None:
        self.file.close()


def read_trace(run_dir: Path | str) -> dict[int, dict[int, Any]]:
    """{step: {rank: record}} of a run that had `Trace`; asserts that a step that was run twice was the same twice."""
    trace: dict[int, dict[int, Any]] = {}
    for path in sorted(Path(run_dir).glob("logs/trace-*.jsonl")):
        rank = int(path.stem.split("-")[1])
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):  # torn by a kill
                continue
            record = json.loads(line)
            before = trace.setdefault(record["step"], {}).get(rank)
            assert before in (None, record), (
                f"step {record['step']} of rank {rank} was not the same the second time"
            )
            trace[record["step"]][rank] = record
    return trace


def sample_ids(trace: Mapping[int, Mapping[int, Any]]) -> dict[int, list[list[int]]]:
    """{step: ids of each micro-batch in global order}, however many ranks there were."""
    return {
        step: [
            ids for _, ids in sorted(pair for record in ranks.values() for pair in record["ids"])
        ]
        for step, ranks in trace.items()
    }


def tiny_run(
    recipe: Recipe | str | Path,
    run_dir: Path | str,
    *,
    steps: int = 4,
    until: int | None = None,
    ranks: int | None = None,
    resume: str | None = None,
    **settings: Any,
) -> Path:
    """Train a recipe for a few steps, silently and traced; return the run directory.

    Args:
        steps: the length of the run. until: end after this step, as if interrupted there with a checkpoint.
        ranks: start so many; by default the run takes place in this process.
        settings: further settings, `optimizer__learning_rate=0.1` for `optimizer.learning_rate`.
    """
    from dist_train.run import train

    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    quiet = {
        k: v for k, v in recipe.callback_specs.items() if v["name"] not in ("console", "wandb")
    }
    recipe = (
        recipe.set("duration", f"{steps} steps")
        .set("threads", 1)
        .set("log.every", "1 step")
        .set("callbacks", quiet | {"trace": {"name": "dist_train.testing:Trace"}})
    )
    for key, value in settings.items():
        recipe = recipe.set(key.replace("__", "."), value)
    return Path(train(recipe, run_dir=run_dir, ranks=ranks, resume=resume, until=until)["run_dir"])


def assert_same_run(first: Path | str, second: Path | str) -> None:
    """Assert that two runs ended in the same bits, and took the same samples to the same losses on the way."""
    first, second = Path(first), Path(second)
    a, b = checkpoint.resolve(first), checkpoint.resolve(second)
    assert a.name == b.name, f"{first} is at {a.name}, {second} at {b.name}"
    if checkpoint.weights_digest(a) != checkpoint.weights_digest(b):
        found = checkpoint.diff(a, b)
        differ = {name: value for name, value in found["differences"].items() if value != 0}
        lacking = found["only_first"] + found["only_second"]
        if lacking and not differ:
            raise AssertionError(
                f"{len(lacking)} tensors are in one run only, the first is {lacking[0]}"
            )
        # where no difference can be measured, the bits differ all the same: 0.0 and -0.0
        differ = differ or {
            n: v for n, v in found["differences"].items() if not _same_bits(a, b, n)
        }
        name = next(iter(differ))
        raise AssertionError(f"{len(differ)} tensors differ, the first is {name}: {differ[name]}")
    traces = read_trace(first), read_trace(second)
    for step in sorted(set(traces[0]) | set(traces[1])):
        assert traces[1].get(step) == traces[0].get(step), (
            f"step {step} took other samples or had another loss"
        )


def _same_bits(first: Path, second: Path, name: str) -> bool:
    import torch

    x, y = (
        checkpoint.Reader(path).whole(name).view(-1).view(torch.uint8) for path in (first, second)
    )
    return torch.equal(x, y)
