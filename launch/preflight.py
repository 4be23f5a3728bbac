"""Whatever can be known is checked before anything is queued (law 9)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dist_train.data_shards.index import Index
from dist_train.errors import UserError
from dist_train.launch.snapshot import MAX_BYTES
from dist_train.launch.spec import Spec
from dist_train.recipe import Recipe


def check_recipe(recipe: Recipe, spec: Spec, *, dry_run: bool) -> None:
    """Raise UserError for shards, batches or parts that cannot train on the ranks of `spec`.

    A dry run looks at files only: it packs nothing, asks no network, and imports no part (and with them torch).
    """
    check_shares(recipe, spec)
    if dry_run:
        check_folders(recipe)
        return
    recipe.check_components()

    from dist_train.data import describe, evaluation_batches
    from dist_train.world import World

    describe(recipe)  # which opens every index, near or far, and packs what is named
    if recipe.evaluate is not None:
        evaluation_batches(recipe, World(), recipe.evaluate.split)


def check_shares(recipe: Recipe, spec: Spec) -> None:
    """Every rank must get as many micro-batches as the others (law 3)."""
    micro_batches = recipe.data.global_batch // recipe.data.micro_batch
    if micro_batches % spec.ranks:
        fitting = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
        shown = [n for n in fitting if n <= 4 * spec.ranks][-12:]
        raise UserError(
            f"{spec.nodes} nodes x {spec.local_ranks} ranks = {spec.ranks} ranks: data.global_batch"
            f" {recipe.data.global_batch} has {micro_batches} micro-batches of {recipe.data.micro_batch},"
            f" expected ranks that divide them: {', '.join(map(str, shown))}"
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


def check_directory(path: Path) -> None:
    """A run directory must be writable, and its disk must have room for the code and a first checkpoint."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--run-dir {path}: {there} is no folder that one can write to")
    free = shutil.disk_usage(there).free
    if free < 2 * MAX_BYTES:
        raise UserError(
            f"--run-dir {path}: {free:,} bytes free, expected {2 * MAX_BYTES:,} at the least"
        )
