"""Whatever can be known is checked before anything is queued (law 9)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dist_train.data_shards.index import Index
from dist_train.data_shards.sources import NAMED, locate
from dist_train.errors import UserError
from dist_train.launch.snapshot import MAX_BYTES
from dist_train.launch.spec import Spec
from dist_train.recipe import Recipe


def check_recipe(recipe: Recipe, spec: Spec, *, dry_run: bool) -> None:
    """Raise UserError for shards, batches or parts that cannot train on the ranks of `spec`.

    A dry run looks at files only: it packs nothing, and imports no part (and with them torch).
    """
    check_shares(recipe, spec)
    check_shards(recipe, dry_run=dry_run)
    if not dry_run:
        recipe.check_components()


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


def check_shards(recipe: Recipe, *, dry_run: bool) -> None:
    """The shards must be there, with an index, and with the splits that the recipe names."""
    data = recipe.data
    source = data.name or str(data.path)
    if dry_run and source in NAMED:
        return  # a named source is packed on first use, which a dry run is not
    index = Index.load(locate(source, recipe.root, **data.options))
    index.samples(data.split)
    if recipe.evaluate is not None:
        index.samples(recipe.evaluate.split)


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
