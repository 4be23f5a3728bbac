"""Whatever can be known is checked before anything is queued (law 9)."""

from __future__ import annotations

import logging
import math
import os
import shutil
from pathlib import Path

from dist_train.data_shards.index import Index
from dist_train.errors import UserError
from dist_train.forecast.hardware import device
from dist_train.launch.snapshot import MAX_BYTES
from dist_train.launch.spec import Spec
from dist_train.recipe import Recipe
from dist_train.recipe.checks import check_shard_degrees


def check_recipe(recipe: Recipe, spec: Spec, *, dry_run: bool) -> None:
    """Raise UserError for shards, batches or parts that cannot train on the ranks of `spec`.

    A dry run looks at files only: it packs nothing, asks no network, and imports no part (and with them torch).
    """
    check_shares(recipe, spec)
    check_placement(recipe, spec)
    if spec.gpu is not None:
        device(spec.gpu)
    if dry_run:
        check_folders(recipe)
        return
    recipe.check_components()

    from dist_train.data import describe, evaluation_batches
    from dist_train.world import World

    describe(recipe)  # which opens every index, near or far, and packs what is named
    if recipe.evaluate is not None:
        evaluation_batches(recipe, World(), recipe.evaluate.split)


def check_room(recipes: list[Recipe], spec: Spec, run_dir: Path) -> None:
    """Raise UserError where a rank's memory, or the disk for the checkpoints, is too small; where that cannot be known
    here, say so. Members of an array seldom differ in what a step holds: the first stands for all of them."""
    from dist_train.forecast.plan import check_fit
    from dist_train.forecast.tracing import Unforeseeable

    log = logging.getLogger("dist_train")
    limit, where = rank_limit(spec)
    if math.isinf(limit):
        log.warning("memory is not checked: %s", where)
    try:
        saved = check_fit(recipes[0], spec.ranks, limit, where)
    except UserError as error:
        if not isinstance(error, Unforeseeable):
            raise
        log.warning("memory is not checked: %s", error)
        return
    except Exception as error:  # what fake tensors cannot run may train all the same
        log.warning("memory is not checked: %s: %s", type(error).__name__, error)
        return
    kept = [
        s.get("keep", 2) for s in recipes[0].callback_specs.values() if s["name"] == "checkpoint"
    ]
    count = len(recipes) * (max(kept, default=0) + 1)  # a new one is whole before an old one goes
    free = free_bytes(run_dir)
    if free < count * saved:
        raise UserError(
            f"--run-dir {run_dir}: {free:,} bytes free, expected {count * saved:,}: {count} checkpoints of {saved:,}"
        )


def rank_limit(spec: Spec) -> tuple[float, str]:
    """Bytes that a rank of this launch may use, and of what; infinite, and why, where it is not known here."""
    import torch

    from dist_train.forecast.auto import GIB
    from dist_train.forecast.auto import rank_limit as here
    from dist_train.forecast.footprint import RESERVED
    from dist_train.world import World

    if spec.gpu is not None:
        return device(spec.gpu).memory * GIB * (1 - RESERVED), f"a GPU ({spec.gpu})"
    if spec.on in ("local", "accelerate") and spec.nodes == 1:
        if torch.cuda.is_available():
            return here(World(device="cuda:0")), "a GPU of this machine"
        return here(World(local_size=spec.local_ranks)), "a rank's share of this machine"
    unit = 2 ** {"K": 10, "G": 30, "T": 40}.get((spec.mem or "")[-1:], 20)
    size = int((spec.mem or "0").rstrip("KMGT")) * unit  # to Slurm 0 is all that the node has
    if size and not spec.gpus_per_node:
        return size * (1 - RESERVED) / spec.local_ranks, f"a rank's share of {spec.mem} a node"
    missing = (
        "--gpu NAME" if spec.gpus_per_node else "--mem" if spec.on == "slurm" else "the machine"
    )
    return math.inf, f"{missing} is not known"


def check_shares(recipe: Recipe, spec: Spec) -> None:
    """Every rank must get as many micro-batches as the others (law 3), and stand in a whole group of its strategy."""
    check_shard_degrees(recipe, spec.ranks)
    micro_batches = recipe.data.global_batch // recipe.data.micro_batch
    if micro_batches % spec.ranks:
        fitting = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
        shown = [n for n in fitting if n <= 4 * spec.ranks][-12:]
        raise UserError(
            f"{spec.nodes} nodes x {spec.local_ranks} ranks = {spec.ranks} ranks: data.global_batch"
            f" {recipe.data.global_batch} has {micro_batches} micro-batches of {recipe.data.micro_batch},"
            f" expected ranks that divide them: {', '.join(map(str, shown))}"
        )


def check_placement(recipe: Recipe, spec: Spec) -> None:
    """A node must have the GPUs that its ranks take."""
    needed = spec.local_ranks * recipe.devices
    if spec.gpus_per_node and needed > spec.gpus_per_node and recipe.devices > 1:
        raise UserError(
            f"placement: {spec.local_ranks} ranks a node of {recipe.devices} GPUs each need {needed}, got"
            f" {spec.gpus_per_node}; give --ranks-per-node {max(1, spec.gpus_per_node // recipe.devices)}"
        )


def check_folders(recipe: Recipe) -> None:
    """Folders of shards on this machine must be there; where they have an index, with the splits of the recipe."""
    splits = [recipe.evaluate.split] if recipe.evaluate is not None else []
    for stream, where in recipe.data.located():
        for source in stream.origins:
            if source.path is None or source.is_remote:
                continue
            folder = recipe.root / Path(source.path).expanduser()
            if not any(folder.glob("*.tar")):
                raise UserError(
                    f"{where}.path: {folder} holds no .tar shards, expected a folder of them"
                )
            if (folder / "index.json").is_file():
                index = Index.read(folder)
                for split in (stream.split, *splits):
                    index.samples(split)


def free_bytes(path: Path) -> int:
    """Of the disk that a path lies on, or will."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def check_directory(path: Path) -> None:
    """A run directory must be writable, and its disk must have room for the code and a first checkpoint."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--run-dir {path}: {there} is no folder that one can write to")
    free = free_bytes(path)
    if free < 2 * MAX_BYTES:
        raise UserError(
            f"--run-dir {path}: {free:,} bytes free, expected {2 * MAX_BYTES:,} at the least"
        )
