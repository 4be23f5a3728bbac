"""Bias and variance, measured: the same recipe on resampled training sets, and what its error is made of (F10)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_train import assembly, run, trained
from dist_train.data import data_folders
from dist_train.errors import UserError
from dist_train.ranks import start_ranks
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.world import World, pin_threads

SILENT = (*trained.SILENT, "checkpoint", "early_stopping")
"""Callbacks that a member does without: it is thrown away."""
PREDICTIONS = "predictions.safetensors"


def decompose(predictions: Tensor, target: Tensor) -> dict[str, float]:
    """What the mean squared error of R models is made of: predictions (R, N, D), target (N, D).

    error = bias2 + variance, exactly, where both are free of the bias that a small R brings. What of the target nobody
    could predict (its noise) is in `bias2`. Squared errors are summed over D and averaged over N.
    """
    members = len(predictions)
    if members < 2:
        raise UserError(f"resamples: variance needs 2 or more, got {members}")
    predictions, target = predictions.double(), target.double()
    mean = predictions.mean(dim=0)
    variance = predictions.var(dim=0).sum(dim=-1).mean()
    off = (mean - target).square().sum(dim=-1).mean()
    bias2 = off - variance / members  # the mean of R models is itself off by its own variance
    return {
        "error": float(bias2 + variance),
        "bias2": float(bias2),
        "variance": float(variance),
    }


def measure(
    recipe: Recipe, *, resamples: int = 20, parallel: int = 1, run_dir: Path | None = None
) -> dict[str, Any]:
    """Train `resamples` members, each on N draws of the N training samples, and decompose the error on the evaluation
    split: of the regression's prediction in the target's own units, or of a classifier's probabilities.

    Members differ by their training set alone: the seed of weights and order is the recipe's. They are single
    processes, `parallel` at a time.
    """
    if recipe.evaluate is None:
        raise UserError(
            "bias-variance: the recipe has no evaluate section, so no split to judge on"
        )
    if recipe.model.get("name") is None:
        raise UserError("bias-variance: expected a recipe of one player")
    callbacks = {k: v for k, v in recipe.callback_specs.items() if v["name"] not in SILENT}
    member = (
        recipe.set("callbacks", callbacks)
        .set("strategy", "single")
        .set("placement", {})
        .set("threads", 1)
    )
    member.check_components()
    data_folders(member)  # packed by this process, not by the members
    folder = _folder(recipe, run_dir)
    start_ranks(
        min(parallel, resamples),
        _train_members,
        (member.as_dict(), member.source, member.root),
        str(folder),
        resamples,
    )
    found = [load_file(folder / _member(number) / PREDICTIONS) for number in range(resamples)]
    parts = decompose(torch.stack([one["prediction"] for one in found]), found[0]["target"])
    return {"run_dir": str(folder), "resamples": resamples, **parts, "advice": advice(parts)}


def advice(parts: Mapping[str, float]) -> str:
    """What the larger part asks for."""
    if parts["variance"] > parts["bias2"]:
        return "variance is the larger part: more data, regularise more, average models, or a smaller model"
    return "bias (with the noise of the targets) is the larger part: a larger model, train longer, or better inputs"


def _folder(recipe: Recipe, run_dir: Path | None) -> Path:
    if run_dir is None:
        return RunDirectory.create(run.RUNS, recipe.project, f"{recipe.name}-bias-variance").path
    return RunDirectory.create_at(run_dir).path


def _member(number: int) -> str:
    return f"member-{number:03d}"


def _train_members(plain: tuple[dict[str, Any], str, Path], folder: str, resamples: int) -> None:
    """This rank's share of the members, each a world of its own."""
    recipe, world = Recipe.restore(*plain), World.join(group=False)
    recipe.importable()
    pin_threads(1, 1)
    for number in range(world.rank, resamples, world.size):
        mine = recipe.set("data.resample", {"name": "bootstrap", "seed": number})
        path = Path(folder) / _member(number)
        trainer = assembly.build(mine, World(), RunDirectory.create_at(path))
        trainer.callbacks.by_name.pop("evaluate", None)
        run.begin(trainer, None)
        trainer.train()
        save_file(_predictions(trainer), path / PREDICTIONS)
        trainer.callbacks.call("run_ends", trainer)
        trainer.directory.close()


def _predictions(trainer: Any) -> dict[str, Tensor]:
    """Of every sample of the evaluation split in its order: {prediction (N, D), target (N, D)}."""
    networks = trainer.view(trainer.recipe.evaluate.weights)
    parts: dict[str, list[Tensor]] = {"prediction": [], "target": []}
    with torch.no_grad():
        for micro in trainer.evaluation:
            outputs = trainer.objective.evaluate(networks, micro)
            if "logits" in outputs:
                prediction = outputs["logits"].softmax(dim=-1)
                target = torch.nn.functional.one_hot(micro["label"], prediction.shape[-1])
            elif "prediction" in outputs:
                prediction, target = outputs["prediction"], outputs["target"]
            else:
                name = trainer.recipe.objective["name"]
                raise UserError(
                    f"bias-variance: objective '{name}' gives neither 'prediction' nor 'logits'"
                )
            parts["prediction"].append(prediction[: micro.real].float())
            parts["target"].append(target[: micro.real].float())
    return {name: torch.cat(values).contiguous() for name, values in parts.items()}
