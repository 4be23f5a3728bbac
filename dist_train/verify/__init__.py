"""Proof, for the recipe at hand: one process = N ranks = every way to shard = killed and resumed.

The same code runs in our own tests. What equal means: docs/decisions/0003 and docs/verify.md.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train import assembly, checkpoint, components
from dist_train.data import data_folders
from dist_train.errors import UserError
from dist_train.objectives import Objective
from dist_train.ranks import RankFailed, start_ranks
from dist_train.recipe import Recipe
from dist_train.strategies import AUTO
from dist_train.testing import assert_same_run, read_trace, sample_ids
from dist_train.verify import rank, verdict
from dist_train.verify.parity import Differences, weight_differences
from dist_train.world import threads_a_rank

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "zero1": {"name": "zero1"},
    "zero2": {"name": "zero2"},
    "zero3": {"name": "zero3", "persistence_threshold": 0},  # else it keeps small tensors whole
    "fsdp2": {"name": "fsdp2"},
}
STEPS = 5
LONGEST = 100
"""A player whose turn does not come within so many steps is not waited for."""
KILLED = "a run is killed, and goes on from a checkpoint"
LOOKING_ON = (
    "checkpoint",
    "console",
    "early_stopping",
    "profiler",
    "samples",
    "throughput",
    "wandb",
)
"""Callbacks that only look on, or end a run, are left out."""
RECIPE = "the recipe's own"


def verify(
    recipe: Recipe,
    *,
    ranks: int = 2,
    steps: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train a few steps of a recipe in every way that must give the same, and judge the differences.

    Args:
        ranks: how many processes the parallel runs have, all on this machine.
        steps: how many steps, 2 or more; by default 5, or as many as it takes for every player to have a turn.
        report: is told what is going on, a line at a time.
    Returns: `{"passed", "rows": [...], "nondeterministic": [...], ...}`, plain data.
    Raises: UserError for a batch that the ranks cannot share, or a recipe that does not train at all.
    """
    recipe.check_components()
    assembly.make_callbacks(recipe)
    _check_ranks(recipe, ranks)
    objective: Objective = components.build(
        "objective", recipe.objective, "objective", root=recipe.root
    )
    if steps is None:
        steps = _steps_for_every_player(objective)
    if steps < 2:
        raise UserError(f"--steps {steps}: expected 2 or more: {KILLED}")
    data_folders(recipe)  # packed by this process, not by the ranks
    bare = _bare(recipe, ranks)
    chosen = _strategies(recipe)
    with tempfile.TemporaryDirectory(prefix="dist-train-verify-") as scratch:
        report(f"one process: {steps} steps, then again, then in another order of summing")
        (one,) = start_ranks(1, rank.reference, _plain(bare), scratch, steps)
        steps, floor = one["steps"], one["floor"]
        if steps < 2:
            raise UserError(f"duration: {recipe.duration}, expected 2 steps or more: {KILLED}")
        rows = [
            _row("one process, again", 1, verdict.judge_repeat(one["repeat"])),
            _row("one process: the floor", 1, verdict.judge_floor(floor)),
        ]
        report(f"{ranks} ranks: {', '.join(chosen)}")
        losses = one["losses"]
        found = start_ranks(ranks, rank.strategies, _plain(bare), scratch, steps, losses, chosen)[0]
        for name, result in found.items():
            if "refused" in result:
                rows.append({"run": name, "ranks": ranks, "verdict": "refused"} | result)
            else:
                rows.append(_row(name, ranks, verdict.judge(result["differences"], floor)))
        report(f"{ranks} ranks: killed, and brought back")
        rows += _killed_and_resumed(bare, objective, ranks, steps, floor, chosen, Path(scratch))
    own = [row for row in rows if row["run"] == RECIPE]
    return {
        "recipe": recipe.name,
        "passed": all(row["verdict"] == "pass" for row in own)
        and all(row["verdict"] != "fail" for row in rows),
        "ranks": ranks,
        "steps": steps,
        "precision": recipe.precision,
        "device": one["device"],
        "threads": bare.threads,
        "nondeterministic": one["nondeterministic"],
        "rows": rows,
    }


def _check_ranks(recipe: Recipe, ranks: int) -> None:
    if ranks < 2:
        raise UserError(f"--ranks {ranks}: expected 2 or more: one process is the reference")
    batch, micro = recipe.data.global_batch, recipe.data.micro_batch
    count = batch // micro
    if count % ranks:
        fitting = [str(n) for n in range(2, count + 1) if count % n == 0]
        sizes = [str(n) for n in range(1, micro + 1) if batch % (n * ranks) == 0]
        raise UserError(
            f"--ranks {ranks}: {count} micro-batches ({batch} / {micro}) do not share out over {ranks} ranks;"
            f" ranks that divide them: {', '.join(fitting) or 'none'};"
            f" data.micro_batch for {ranks} ranks: {', '.join(sizes) or 'none'}"
        )


def _steps_for_every_player(objective: Objective) -> int:
    waiting = set(objective.players)
    for step in range(LONGEST):
        waiting -= {turn.player for turn in objective.turns(step)}
        if not waiting:
            return max(STEPS, step + 1)
    return STEPS


def _bare(recipe: Recipe, ranks: int) -> Recipe:
    """The recipe without callbacks that only look on, on as many threads whether one process runs or several."""
    kept = {k: v for k, v in recipe.callback_specs.items() if v["name"] not in LOOKING_ON}
    recipe = recipe.set("callbacks", kept).set("placement", {})
    return recipe.set("threads", threads_a_rank(recipe.threads, ranks))


def _strategies(recipe: Recipe) -> dict[str, Any]:
    """What is compared: plain data parallelism, the stages of ZeRO, fsdp2, and what the recipe itself asks for, where
    that is another; what depends on the machine counts as ddp."""
    chosen: dict[str, Any] = {
        name: strategy
        for name, strategy in STRATEGIES.items()
        if not name.startswith("zero") or importlib.util.find_spec("deepspeed")
    }
    own = {
        player: {"name": "ddp"} if strategy["name"] in ("single", AUTO) else strategy
        for player, strategy in recipe.strategies.items()
    }
    first, *others = own.values()
    if len(first) > 1 or any(other != first for other in others):
        chosen[RECIPE] = own
    return chosen


def _plain(recipe: Recipe) -> rank.Plain:
    return recipe.as_dict(), recipe.source, recipe.root


def _row(name: str, ranks: int, judged: list[verdict.Judged]) -> dict[str, Any]:
    found = verdict.summary(judged, ranks)
    return {
        "run": name,
        "ranks": ranks,
        "verdict": "pass" if found.pop("passed") else "fail",
    } | found


def _killed_and_resumed(
    recipe: Recipe,
    objective: Objective,
    ranks: int,
    steps: int,
    floor: Differences,
    chosen: dict[str, Any],
    scratch: Path,
) -> list[dict[str, Any]]:
    """The last rank is killed within a step, with a step since the last checkpoint already lost where there is time
    for one; the run goes on under its own strategy, which must be exact, and from a copy under another."""
    saved = max(1, steps // 2)
    killed_in = min(steps - 1, saved + 1)
    turns = sum(len(objective.turns(step)) for step in range(killed_in))
    fault = f"kill@reduce:{ranks - 1}:{turns}"
    recipe = recipe.set("callbacks.checkpoint", {"every": f"{saved} steps", "keep": 2})
    recipe = recipe.set("callbacks.trace", {"name": "dist_train.testing:Trace"})
    names = (RECIPE, next(iter(recipe.strategies.values()))["name"])
    own = next((name for name in names if name in chosen), "ddp")
    other = next((n for n in ("zero2", "ddp") if n in chosen and n != own), None)
    whole, killed, moved = (scratch / name for name in ("whole", "killed", "moved"))
    train = lambda *runs: start_ranks(ranks, rank.train, _plain(recipe), list(runs), steps)
    try:
        train((str(whole), chosen[own], "", None), (str(killed), chosen[own], fault, None))
    except RankFailed as failure:
        if "SIGKILL" not in str(failure):
            raise
    else:
        raise AssertionError(f"{fault} killed nobody")
    again: list[Any] = [(str(killed), chosen[own], "", "auto")]
    if other is not None:
        shutil.copytree(killed, moved, ignore=shutil.ignore_patterns("trace-*"))
        again.append((str(moved), chosen[other], "", "auto"))
    train(*again)
    rows = [{"run": f"killed, resumed ({own})", "ranks": ranks} | _same(whole, killed)]
    if other is not None:
        differences = _moved(whole, moved)
        rows.append(
            _row(f"killed, resumed ({own} to {other})", ranks, verdict.judge(differences, floor))
        )
    return rows


def _same(whole: Path, killed: Path) -> dict[str, Any]:
    try:
        assert_same_run(whole, killed)
    except AssertionError as error:
        return {"verdict": "fail", "first": str(error), "broken": 1, "cause": _STATE}
    return {"verdict": "pass", "exact": True}


_STATE = (
    "something that the run depends on is in no checkpoint (a generator, a counter, a cache of the model's or a"
    " callback's own), or an operation has no deterministic kernel"
)


def _moved(whole: Path, moved: Path) -> Differences:
    """How far the resumed run's last state is from the unbroken one's, and whether it took the same samples."""
    ends = [checkpoint.Reader(checkpoint.resolve(path)) for path in (whole, moved)]
    names = {name.partition("/")[2]: name for name in ends[1].tensors if "callbacks/" not in name}
    weights = {
        short: ends[1].whole(name)
        for short, name in names.items()
        if name.startswith(("weights/", "buffers/"))
    }
    due, taken = (sample_ids(read_trace(path)) for path in (whole, moved))
    found: Differences = {
        f"{step - 1}/samples/any": [float(ids != due[step]), 1.0] for step, ids in taken.items()
    }
    return found | weight_differences("free/weights", weights, ends[0])
