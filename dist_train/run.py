"""A recipe becomes a run: started, watched, resumed, ended."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train import assembly, checkpoint, heartbeat, starting_weights
from dist_train.data import data_folders
from dist_train.duration import Duration
from dist_train.errors import CheckpointError, Interrupted, UserError
from dist_train.forecast import auto
from dist_train.ranks import RankFailed, start_ranks
from dist_train.recipe import Recipe
from dist_train.recipe.checks import check_same_run, check_shard_degrees
from dist_train.restarts import begin_to_count, may_restart
from dist_train.run_directory import RUNS, RunDirectory, environment
from dist_train.strategies import AUTO, SHARDED
from dist_train.trainer import Trainer
from dist_train.world import COLLECTIVE_TIMEOUT, World, pin_threads

if TYPE_CHECKING:
    from torch import nn


def train(
    recipe: Recipe | str | Path,
    *,
    run_dir: str | Path | None = None,
    resume: str | Path | None = None,
    ranks: int | None = None,
    max_restarts: int = 0,
    quick: bool = False,
    until: int | str | None = None,
    overfit: int | None = None,
    micro_order: str = "forward",
    model: nn.Module | Mapping[str, nn.Module] | None = None,
    alone: bool = False,
) -> dict[str, Any]:
    """Train a recipe, and return `{"run_dir", "steps", "seconds", "results", "best", "stopped"}`.

    Args:
        run_dir: the exact directory; by default a new one, `runs/PROJECT/NAME-ID`.
        resume: "auto" goes on with `run_dir` if there is something to go on with; a path names the run to go on with.
        ranks: start so many ranks on this machine; by default this process takes part as its launcher says.
        max_restarts: start failed `ranks` again from the last checkpoint, so often in a row without a newer one.
        quick: two steps, with a save and a resume between them, and an evaluation.
        until: end after this step, or this long ("2 epochs"), as if it were the last; a resume can go on from there.
        overfit: train on the first so many batches again and again.
        micro_order: "reversed" sums a step's micro-batches from the last to the first, which measures the noise floor
            of floating-point summation and changes nothing else.
        model: a module (or one by network name) to train instead of building the recipe's; this process only.
        alone: this process is the whole run, even if it is one of several ranks.
    Raises: UserError for what the user can mend, before any rank is started where that is possible.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    recipe.check_components()
    assembly.make_callbacks(recipe)
    if resume is not None and str(resume) != "auto":
        if run_dir is not None and Path(run_dir) != Path(resume):
            raise UserError(f"--resume {resume}: and --run-dir {run_dir}? Give one of the two")
        run_dir = resume
    if resume is not None and run_dir is None:
        raise UserError("--resume auto: needs --run-dir, the directory to look in")
    if isinstance(until, str):
        Duration.parse(until)
    options = Options(
        None if run_dir is None else str(run_dir),
        None if resume is None else str(resume),
        2 if quick else until,
        quick,
        overfit,
        micro_order,
        alone,
    )
    if resume is None:
        starting_weights.check(recipe)
    if ranks is not None:
        if "WORLD_SIZE" in os.environ:
            raise UserError(
                f"--ranks {ranks}: a launcher has started {os.environ['WORLD_SIZE']} ranks already"
            )
        if model is not None:
            raise UserError(
                "train(model=...): a module of this process cannot be sent to new ranks; name it in the recipe"
            )
        check_shard_degrees(recipe, ranks)
        data_folders(recipe)  # packed by this process, not by the ranks
        return _train_supervised(recipe, options, ranks, max_restarts)
    return _train_here(recipe, options, model)


@dataclass(frozen=True)
class Options:
    """What `train` was asked for beyond the recipe."""

    run_dir: str | None
    resume: str | None
    until: int | str | None
    quick: bool
    overfit: int | None
    micro_order: str
    alone: bool


def _train_supervised(
    recipe: Recipe, options: Options, ranks: int, max_restarts: int
) -> dict[str, Any]:
    """Start ranks of this machine; start them again after a failure, as long as that leads on."""
    if max_restarts and options.run_dir is None:
        fresh = RunDirectory.fresh(RUNS, recipe.project, recipe.name)
        options = replace(options, run_dir=str(fresh))
    if options.run_dir is not None and (Path(options.run_dir) / "recipe.yaml").is_file():
        begin_to_count(Path(options.run_dir))
    while True:
        try:
            return start_ranks(
                ranks, _train_rank, recipe.as_dict(), recipe.source, recipe.root, options
            )[0]
        except RankFailed as failure:
            if not max_restarts or not may_restart(Path(options.run_dir or ""), max_restarts):
                raise
            logging.getLogger("dist_train").warning("starting again after: %s", failure)
            options = replace(options, resume="auto")


def _train_rank(
    settings: dict[str, Any], source: str, root: Path, options: Options
) -> dict[str, Any]:
    return _train_here(Recipe.restore(settings, source, root), options)


def _train_here(recipe: Recipe, options: Options, model: Any = None) -> dict[str, Any]:
    recipe.importable()
    world = (
        World.alone(devices=recipe.devices)
        if options.alone
        else World.join(
            group=needs_group(recipe), timeout=_collective_timeout(recipe), devices=recipe.devices
        )
    )
    threads = pin_threads(recipe.threads, world.local_size)
    recipe = auto.resolve(recipe, world, partial(assembly.build_one, model=model))
    directory = _directory(recipe, world, options)
    resume = options.resume
    try:
        if world.is_main:
            directory.lock()
            heartbeat.clear(directory.path)
            found = environment(
                device=world.device, world_size=world.size, threads=threads, folder=recipe.root
            )
            for change in directory.environment_changes(found):
                logging.getLogger("dist_train").info("since the last start: %s", change)
            directory.write_environment(found | {"project_root": str(recipe.root)})
            directory.write_recipe(recipe.to_yaml())
            directory.write_command(sys.argv)
        _log_to(directory.logs / f"rank-{world.rank}.log")
        if options.quick:
            first = assembly.build(
                recipe, world, directory, options.overfit, options.micro_order, model
            )
            begin(first, resume)
            with _watched(first):
                first.train(until=1)
                first.save()
            first.callbacks.call("run_ends", first)
            resume = "auto"
        trainer = assembly.build(
            recipe, world, directory, options.overfit, options.micro_order, model
        )
        try:
            with trainer.interruption.heeded():
                _go(trainer, _step(trainer, options.until), resume)
        except Interrupted:
            raise
        except BaseException as error:
            trainer.callbacks.call("failed", trainer, error)
            raise
        return _summary(trainer)
    finally:
        directory.unlock()
        directory.close()


def _collective_timeout(recipe: Recipe) -> timedelta:
    """What DIST_TRAIN_TIMEOUT says, else long enough that the watchers find a hang first."""
    if "DIST_TRAIN_TIMEOUT" in os.environ:
        return COLLECTIVE_TIMEOUT
    return timedelta(seconds=2 * recipe.watch.hang_after)


def _step(trainer: Trainer, until: int | str | None) -> int | None:
    """`until` in steps of this run."""
    if not isinstance(until, str):
        return until
    return Duration.parse(until).steps(
        samples=trainer.samples_per_epoch,
        global_batch=trainer.global_batch,
        tokens=trainer.tokens_per_epoch,
        turns=lambda player, step: sum(t.player == player for t in trainer.objective.turns(step)),
    )


def _go(trainer: Trainer, until: int | None, resume: str | None) -> None:
    """From where the run is to its end, or to where it is told to end."""
    begin(trainer, resume)
    try:
        with _watched(trainer):
            trainer.train(until=until)
    except Interrupted:
        trainer.callbacks.call("run_ends", trainer)
        raise
    trainer.callbacks.call("run_ends", trainer)


def _watched(trainer: Trainer) -> AbstractContextManager[None]:
    world, limit = trainer.world, trainer.recipe.watch.hang_after
    return trainer.heartbeat.watched(trainer.directory.path, world.rank, world.size, limit)


def needs_group(recipe: Recipe) -> bool:
    """Whether even one process needs a process group: what shards does."""
    return any(s["name"] in (AUTO, *SHARDED) for s in recipe.strategies.values())


def _directory(recipe: Recipe, world: World, options: Options) -> RunDirectory:
    """Make or take the run's directory; all ranks get the same."""
    run_dir, resume = options.run_dir, options.resume
    path = None
    if world.is_main:
        if run_dir is None:
            path = RunDirectory.create(RUNS, recipe.project, recipe.name).path
        elif resume is not None and (Path(run_dir) / "recipe.yaml").exists():
            path = RunDirectory.open(run_dir).path
            check_same_run(recipe, Recipe.load(path), path)
        elif resume is not None and resume != "auto":
            raise UserError(f"--resume {resume}: is no run directory (it has no recipe.yaml)")
        else:
            path = RunDirectory.create_at(run_dir).path
    return RunDirectory(Path(world.agree(str(path.resolve()) if path else None)))


def begin(trainer: Trainer, resume: str | None) -> None:
    """Bring the trainer to where the run is: its last whole checkpoint, or the start."""
    world, directory = trainer.world, trainer.directory
    reader = None
    if resume is not None:
        found: dict[str, Any] = {"step": None, "skipped": [], "error": None}
        if world.is_main:
            checkpoint.put_back(directory.checkpoints)
            try:
                path, found["skipped"] = checkpoint.last_good(directory.checkpoints)
                found["step"] = (
                    None if path is None else int(path.name.removeprefix(checkpoint.PREFIX))
                )
            except CheckpointError as error:
                found["error"] = str(error)
        found = world.agree(found)
        if found["error"]:
            raise CheckpointError(found["error"])
        for line in found["skipped"] if world.is_main else []:
            logging.getLogger("dist_train").warning("passed over a damaged checkpoint: %s", line)
        if found["step"] is not None:
            reader = checkpoint.Reader(checkpoint.at(directory.checkpoints, found["step"]))
        elif resume != "auto":
            raise CheckpointError(
                f"--resume {resume}: no checkpoint to go on from in {directory.checkpoints}"
            )
    if reader is not None:
        trainer.load(reader)
    else:
        starting_weights.load(trainer.recipe, trainer.engines, world, directory)
    if world.is_main:
        directory.cut(trainer.last_row)
    world.barrier()
    trainer.callbacks.call("run_begins", trainer)
    if reader is not None:
        trainer.load_callbacks(reader)


def _summary(trainer: Trainer) -> dict[str, Any]:
    rows = trainer.directory.rows() if trainer.world.is_main else []
    results: dict[str, float] = {}
    for row in rows:
        results |= {key: value for key, value in row.items() if key.startswith("evaluate/")}
    return {
        "run_dir": str(trainer.directory.path),
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 2),
        "results": results,
        "best": trainer.best,
        "stopped": trainer.stopping,
    }


def _log_to(path: Path) -> None:
    """Warnings and notes of this rank go to its own file, whatever the console shows."""
    logger = logging.getLogger("dist_train")
    for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
        logger.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
