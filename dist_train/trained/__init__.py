"""What was trained, in use again: load a run into this process, evaluate it, draw from it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_train import checkpoint, randomness
from dist_train.assembly import build
from dist_train.data import data_folders, evaluation_batches
from dist_train.data_shards import tokens
from dist_train.data_shards.index import Index
from dist_train.data_shards.sources import locate
from dist_train.errors import CheckpointError, UserError, writing
from dist_train.models.decoding import Decoding
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.trainer import Trainer
from dist_train.world import World, pin_threads

SILENT = (
    *("console", "wandb", "samples", "confusion"),
    *("activation_scale", "singular_values", "similarity", "mode_watch", "translations"),
)
"""Callbacks that only show what a run does."""


def restore(
    run_dir: str | Path,
    recipe: Recipe | None = None,
    path: Path | None = None,
    world: World | None = None,
) -> Trainer:
    """A finished or unfinished run, loaded whole into this process, ready to evaluate or to sample from; `path`: from
    this checkpoint instead of the last."""
    directory = RunDirectory.open(run_dir)
    recipe = recipe or Recipe.load(directory.path)
    silent = {k: v for k, v in recipe.callback_specs.items() if v["name"] not in SILENT}
    recipe = recipe.set("callbacks", silent).set("strategy", "single").set("placement", {})
    recipe.importable()
    world = world or World.join({})
    pin_threads(recipe.threads, world.local_size)
    trainer = build(recipe, world, directory)
    if path is None:
        path, _ = checkpoint.last_good(directory.checkpoints)
        if path is None:
            raise CheckpointError(f"{directory.path}: has no checkpoint yet")
        reader = checkpoint.Reader(path)
    else:
        reader = checkpoint.open_whole(path)
    trainer.load(reader)
    trainer.callbacks.call("run_begins", trainer)
    trainer.load_callbacks(reader)
    return trainer


@contextmanager
def shapes_told(recipe: Recipe, folder: Path | None, what: str | Path | None) -> Iterator[None]:
    """Where the shards of `folder` (`what` to the user) have other shapes than this recipe was trained on, a failure is
    a UserError that says so."""
    try:
        yield
    except (RuntimeError, UserError) as error:
        if folder is None:
            raise
        own, other = (
            {field.name: field.shape for field in Index.load(path).fields.values()}
            for path in (data_folders(recipe)[0], folder)
        )
        for name in own.keys() & other.keys():
            if other[name] != own[name]:
                raise UserError(
                    f"{what}: has '{name}' of shape {other[name]}, which the network does not take: it was trained on"
                    f" {own[name]} ({error})"
                ) from error
        raise


def evaluate(
    run_dir: str | Path, *, data: str | None = None, split: str | None = None
) -> dict[str, Any]:
    """The run's metrics on its own evaluation split, or on another split or other shards."""
    recipe = Recipe.load(RunDirectory.open(run_dir).path)
    if recipe.evaluate is None:
        raise UserError(f"{run_dir}: its recipe has no evaluate section, so no metrics are known")
    trainer = restore(run_dir, recipe)
    folder = None if data is None else locate(data, Path.cwd())
    with shapes_told(recipe, folder, data):
        if data is not None or split is not None:
            trainer.evaluation_sets = {}
            trainer.evaluation = evaluation_batches(
                recipe, trainer.world, split or recipe.evaluate.split, folder
            )
        results = trainer.measure(recipe.evaluate.weights)
    return {"run_dir": str(run_dir), "step": trainer.step, "results": results}


def generate(
    run_dir: str | Path,
    out: str | Path,
    *,
    count: int = 64,
    prompt: str | None = None,
    seed: int = 0,
    weights: str | None = None,
    prefix: str | None = None,
    decoding: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Draw from a trained model: a grid of images into `out` (PNG), or text that continues or translates `prompt`.

    Args:
        count: images, or tokens at most of a text.
        prefix: how a translation begins.
        decoding: arguments of `dist_train.models.decoding.Decoding`; the objective's own way where there are none.
    """
    import torch

    with writing(Path(out)):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {}
    if decoding:
        try:
            options["how"] = Decoding(**decoding)
        except (TypeError, ValueError) as error:
            raise UserError(f"generate: {error}") from error

    trainer = restore(run_dir)
    randomness.reseed(seed, trainer.step)
    networks = trainer.view(weights)
    with torch.no_grad():
        images = trainer.objective.samples(networks, count, trainer.world.device)
        if images:
            from dist_train.callbacks.samples import save_grid

            if decoding or prefix is not None:
                raise UserError(f"{run_dir}: draws images, expected no way to write text")
            with writing(Path(out)):
                save_grid(Path(out), torch.cat(list(images.values())))
            return {"out": str(out), "step": trainer.step, "images": count}
        model = trainer.engines[trainer.objective.players[0]].player.networks
        context = min(getattr(network, "max_length", 1) for network in model.values())
        tokenizer = tokens.load(data_folders(trainer.recipe)[0])
        start = tokenizer.encode((prompt or "\n").encode()).tolist()
        if prefix is not None:
            options["prefix"] = tokenizer.encode(prefix.encode()).tolist()
        if all(
            "state" in inspect.signature(network.forward).parameters for network in model.values()
        ):
            options["cached"] = True
        written = trainer.objective.continue_tokens(
            networks, start, count, context, trainer.world.device, **options
        )
    if written is None:
        raise UserError(
            f"{run_dir}: objective '{trainer.recipe.objective['name']}' generates nothing"
        )
    text = tokenizer.decode(written)
    with writing(Path(out)):
        Path(out).write_bytes(text)
    return {"out": str(out), "step": trainer.step, "text": text.decode(errors="replace")}
