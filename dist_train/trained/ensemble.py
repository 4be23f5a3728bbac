"""Members that were trained apart, judged together: runs, snapshots of a run, or the members within a network.

Shapes: M members, N samples of a split, K classes, D numbers a sample.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train import components, ensembles, randomness, trained
from dist_train.data import data_folders, evaluation_batches
from dist_train.data_shards.index import Index
from dist_train.data_shards.loader import MicroBatch
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.sources import locate
from dist_train.errors import UserError, writing
from dist_train.metrics import Metric
from dist_train.objectives import Objective
from dist_train.pictures import plots
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory, write_file
from dist_train.trained.predict import cells
from dist_train.trainer import Trainer

METRICS = {
    "logits": ("accuracy", "error", "nll", "brier", "calibration_error"),
    "prediction": ("rmse", "r2", "nll"),
}
"""The figures of an ensemble, by what its objective puts out."""


@dataclass
class Member:
    """What one member puts out for every sample of a split: (N, ...) by name."""

    name: str
    outputs: dict[str, Tensor]


def ensemble(
    runs: Sequence[str | Path],
    *,
    how: str = "mean",
    data: str | None = None,
    split: str | None = None,
    weights: str | None = None,
    out: str | Path | None = None,
    plot: str | Path | None = None,
) -> dict[str, Any]:
    """Judge trained members together on an evaluation split: their mean probability (for numbers, their mixture), or
    the majority's vote.

    Args:
        runs: run directories, or checkpoints of them (`RUN/checkpoints/step-00000100`, the members of a snapshot
            ensemble). A network that holds members itself brings all of them.
        data, split: other data, or another split, than the first run's recipe evaluates.
        weights: "live", or the callback whose average to take; by default what each run's recipe evaluates with.
        out: a CSV file to write, with a line for each sample. plot: a PNG with the reliability diagram.
    Raises: UserError for runs that do not judge the same samples, or whose objective combines no members.
    """
    ensembles.check_way(how)
    if plot is not None:
        plots.need_matplotlib("plot")
    for path in (Path(path) for path in (out, plot) if path is not None):
        if path.exists():
            raise UserError(f"{path}: exists already; name a new file")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    members: list[Member] = []
    for path in map(Path, runs):
        directory, checkpoint = _parts(path)
        recipe = Recipe.load(directory)
        if recipe.evaluate is None:
            raise UserError(f"{path}: its recipe has no evaluate section, so no split to judge on")
        trainer = trained.restore(directory, recipe, checkpoint)
        where = split or recipe.evaluate.split
        folder = None if data is None else locate(data, Path.cwd())
        batches = evaluation_batches(recipe, trainer.world, where, folder)
        found, rows = collect(trainer, batches, weights or recipe.evaluate.weights)
        if not members:
            objective, name, first = trainer.objective, recipe.objective["name"], rows
            own = data_folders(recipe)
            place = folder or (own[0] if own else None)
        _same_samples(path, recipe.objective["name"], name, found[0], members[:1], rows, first)
        several = len(found) > 1
        members += [
            Member(f"{path}:{number}" if several else str(path), outputs)
            for number, outputs in enumerate(found)
        ]
    result = judge(objective, members, first, how) | {"split": where}
    if out is not None:
        if place is None:
            raise UserError(f"{out}: the data of {runs[0]} are elsewhere, and so are their keys")
        table = _table(objective, members, first, how, Shards(place, where))
        with writing(Path(out)):
            write_file(Path(out), table.encode())
        result["out"] = str(out)
    if plot is not None:
        if "reliability" not in result:
            raise UserError(f"{plot}: a reliability diagram is of classes")
        with writing(Path(plot)):
            plots.reliability_plot(Path(plot), result["reliability"])
        result["plot"] = str(plot)
    return result


def collect(
    trainer: Trainer, batches: Any, weights: str
) -> tuple[list[dict[str, Tensor]], MicroBatch]:
    """What each member of a run's network puts out for each sample, and the samples with their labels, on the CPU."""
    networks = trainer.view(weights)
    parts: list[list[dict[str, Tensor]]] = []
    labels, ids = [], []
    for micro in batches:
        micro = micro.to(trainer.world.device)
        randomness.reseed(trainer.seed, trainer.step, randomness.EVALUATION, micro.index)
        with torch.no_grad():
            members = trainer.objective.evaluate_members(networks, micro)
        parts.append([_rows(outputs, micro) for outputs in members])
        ids += micro.ids[: micro.real].tolist()
        if "label" in micro.tensors:
            labels.append(micro["label"][: micro.real].cpu())
    outputs = [
        {name: torch.cat([part[member][name] for part in parts]) for name in parts[0][member]}
        for member in range(len(parts[0]))
    ]
    tensors = {"label": torch.cat(labels)} if labels else {}
    return outputs, MicroBatch(0, torch.tensor(ids).numpy(), tensors, len(ids))


def judge(
    objective: Objective, members: Sequence[Member], rows: MicroBatch, how: str = "mean"
) -> dict[str, Any]:
    """The figures of each member, their mean, and those of all together; how far they are from each other.

    A figure that is not finite (the likelihood of a class without a vote) is None.
    """
    together = objective.combine([member.outputs for member in members], rows, how)
    each = [_figures(objective.combine([member.outputs], rows), rows) for member in members]
    result: dict[str, Any] = {
        "how": how,
        "samples": rows.real,
        "members": [
            {"member": m.name, **figures} for m, figures in zip(members, each, strict=True)
        ],
        "mean_of_members": {
            name: None
            if None in [one[name] for one in each]
            else _mean([one[name] for one in each])
            for name in each[0]
        },
        "together": _figures(together, rows),
    }
    if "logits" in together:
        classes = torch.stack([m.outputs["logits"].argmax(dim=-1) for m in members])
        if len(members) > 1:
            result["disagreement"] = ensembles.disagreement(classes)
        probability = together["logits"].softmax(dim=-1)
        result["reliability"] = ensembles.reliability(probability, rows["label"])
    else:
        result["ambiguity"] = ensembles.ambiguity(
            torch.stack([m.outputs["prediction"].double() for m in members])
        )
    return result


def _figures(outputs: dict[str, Tensor], rows: MicroBatch) -> dict[str, float | None]:
    names = next(names for kind, names in METRICS.items() if kind in outputs)
    found = {}
    for name in names:
        metric = Metric.wrap(components.resolve("metric", name), name)
        metric.update(outputs, rows)
        value = metric.finish(*metric.sums().tolist())
        found[name] = value if math.isfinite(value) else None
    return found


def _mean(values: Sequence[Any]) -> float:
    return sum(values) / len(values)


def _rows(outputs: dict[str, Tensor], micro: MicroBatch) -> dict[str, Tensor]:
    """What has a row for each sample, without padding."""
    size = len(micro.ids)
    return {n: t[: micro.real].cpu() for n, t in outputs.items() if t.ndim and len(t) == size}


def _parts(path: Path) -> tuple[Path, Path | None]:
    """The run directory, and the checkpoint in it that is meant, if it is a certain one."""
    if (path / "manifest.json").is_file():
        return RunDirectory.open(path.parent.parent).path, path
    return RunDirectory.open(path).path, None


def _same_samples(
    path: Path,
    name: str,
    first_name: str,
    outputs: dict[str, Tensor],
    before: Sequence[Member],
    rows: MicroBatch,
    first: MicroBatch,
) -> None:
    """UserError: what this run says cannot be combined with what the first one says."""
    if name != first_name:
        raise UserError(f"{path}: its objective is '{name}', expected '{first_name}' as the first")
    pairs = [(rows.tensors.get("label"), first.tensors.get("label"))]
    if before:
        pairs.append((outputs.get("target"), before[0].outputs.get("target")))
        for kind in METRICS:
            mine, theirs = outputs.get(kind), before[0].outputs.get(kind)
            if mine is not None and theirs is not None and mine.shape != theirs.shape:
                raise UserError(
                    f"{path}: puts out {tuple(mine.shape)}, expected {tuple(theirs.shape)} as the first"
                )
    for mine, theirs in pairs:
        if (mine is None) != (theirs is None) or (mine is not None and not _equal(mine, theirs)):
            raise UserError(f"{path}: judges other samples than the first run")


def _equal(mine: Tensor, theirs: Any) -> bool:
    return mine.shape == theirs.shape and torch.equal(mine, theirs)


def _table(
    objective: Objective, members: Sequence[Member], rows: MicroBatch, how: str, shards: Shards
) -> str:
    """CSV: the key of each sample, what the members say together, and the label or target."""
    classes = Index.load(shards.folder).classes
    together = objective.combine([member.outputs for member in members], rows, how)
    text = io.StringIO()
    lines = list(_lines(together, rows, shards, classes))
    table = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    return text.getvalue()


def _lines(
    together: dict[str, Tensor], rows: MicroBatch, shards: Shards, classes: list[str]
) -> Iterator[dict[str, Any]]:
    if "logits" in together:
        columns = {
            "class": together["logits"].argmax(dim=-1),
            "probability": together["logits"].softmax(dim=-1),
            "label": rows["label"],
        }
    else:
        columns = {name: together[name] for name in ("prediction", "deviation", "target")}
    values = {name: column.tolist() for name, column in columns.items()}
    for row in range(rows.real):
        line: dict[str, Any] = {"key": shards.key(int(rows.ids[row]))}
        for name, column in values.items():
            value = column[row]
            if name == "label" and classes:
                value = classes[value]
            line |= cells(name, value, classes)
        yield line
