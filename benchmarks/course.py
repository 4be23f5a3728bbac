"""The experiments of docs/course that are more than one figure of a recipe: prints their tables, draws their plots.

    python benchmarks/course.py [initialisation | landscape | modes | schedules | similarity | variance ...]

Without a name it does all; two minutes on two cores.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_train import run, schedules, trained
from dist_train.data import data_folders, evaluation_batches
from dist_train.data_shards.reader import Shards
from dist_train.diagnose.landscape import landscape as measure_landscape
from dist_train.diagnose.representations import half_times, mode_strengths, mode_times
from dist_train.pictures import plots
from dist_train.recipe import Recipe

IMAGES = Path(__file__).parents[1] / "docs" / "images"
STARTS = {
    "he": ["init.name=he"],
    "xavier": ["init.name=xavier"],
    "orthogonal": ["init.name=orthogonal"],
    "orthogonal, gain sqrt(2)": ["init.name=orthogonal", "init.gain=1.4142135"],
    "gaussian, std 0.01": ["init.name=gaussian"],
}
KEPT = "callbacks.checkpoint={every: 2 epochs, keep: 1000}"
LANDSCAPES = {
    "softmax": ("softmax-digits", [KEPT]),
    "deep": ("batchnorm-digits", [KEPT, "model.norm=none", "optimizer.learning_rate=0.1"]),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "step": {"every": 25},
    "exponential": {"end": 0.01},
    "linear": {},
    "cosine": {},
    "inverse_sqrt": {"timescale": 10},
    "one_cycle": {},
}


def train(recipe: str, settings: Sequence[str], folder: Path) -> Path:
    """Train a recipe silently in this process; returns its run directory."""
    made = Recipe.load(recipe, ["threads=1", "callbacks.console=null", *settings])
    run.train(made, run_dir=folder)
    return folder


def table(*rows: Sequence[str]) -> None:
    """Print rows, of which the first is the head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    print("\n".join([head, "|---" * len(rows[0]) + "|", *body, ""]))


def initialisation(scratch: Path) -> None:
    """C7: the variance of what each of 51 layers puts out before the first step, and of its gradient."""
    scales: dict[str, list[dict[str, float]]] = {}
    for number, (name, settings) in enumerate(STARTS.items()):
        folder = train("init-digits", settings, scratch / f"start-{number}") / "plots"
        (file,) = folder.glob("activation-scale-*.json")
        scales[name] = list(json.loads(file.read_text()).values())
    depths = list(range(1, 52))
    panels = [
        (
            f"variance of the {kind}",
            {
                name: (depths, [layer[kind] ** 2 for layer in found])
                for name, found in scales.items()
            },
        )
        for kind in ("activation", "gradient")
    ]
    plots.line_plot(IMAGES / "course-initialisation.png", panels, x_label="layer", log_y=True)
    rows = [
        [name, *(f"{found[layer]['activation'] ** 2:.2g}" for layer in (0, 9, 24, 49))]
        for name, found in scales.items()
    ]
    table(["`init`", "layer 1", "layer 10", "layer 25", "layer 50"], *rows)


def landscape(scratch: Path) -> None:
    """F12: softmax regression against ten layers on the same digits."""
    rows = []
    for key, (recipe, settings) in LANDSCAPES.items():
        folder = train(recipe, settings, scratch / key)
        plot = IMAGES / f"course-landscape-{key}.png"
        found = measure_landscape(folder, out=plot, batches=100, steps=40)
        largest, least = found["largest_eigenvalues"][0], found["smallest_eigenvalue"]
        figures = [found["loss"], found["gradient_norm"], largest, least]
        name = f"`{recipe}`" + (", without the norm, rate 0.1" if settings[1:] else "")
        rows.append([name, *(f"{figure:.3g}" for figure in figures), found["kind"]])
    head = ["network", "loss", "norm of the gradient", "largest eigenvalue", "smallest", "kind"]
    table(head, *rows)


def modes(scratch: Path) -> None:
    """F13: when a deep linear network learns the modes of digits, beside when theory says so."""
    recipe = Recipe.load("modes-digits")
    folder = train("modes-digits", [], scratch / "modes")
    found = json.loads((folder / "plots" / "singular-values-model.json").read_text())
    shards = Shards(data_folders(recipe)[0], "train")
    x, y = (
        torch.from_numpy(np.array(shards.column(name, np.arange(len(shards))))).double()
        for name in ("features", "target")
    )
    learnt = found["singular_values"]["product"]
    strengths = mode_strengths(x, y)[: len(learnt[0])]
    assert recipe.init is not None
    start = recipe.model["width"] * recipe.init["std"] ** 2 / 2
    rate = recipe.optimizer["learning_rate"]
    predicted = mode_times(strengths, start, y.shape[1] / (2 * rate)).tolist()
    measured = half_times(found["steps"], learnt, strengths.tolist())
    rows = [
        [str(mode), f"{strength:.2f}", f"{theory:.0f}", f"{step:.0f}", f"{step / theory:.2f}"]
        for mode, (strength, theory, step) in enumerate(
            zip(strengths.tolist(), predicted, measured, strict=True), start=1
        )
    ]
    table(["mode", "strength", "predicted step", "measured step", "ratio"], *rows)
    curves = {
        f"{row[0]}: {row[1]}": (found["steps"], [values[i] for values in learnt])
        for i, row in enumerate(rows)
    }
    marks = dict(zip(curves, predicted, strict=True))
    panels = [("singular value", curves)]
    plots.line_plot(IMAGES / "course-modes.png", panels, x_label="step", marks=marks)


def schedules_(scratch: Path) -> None:
    """F6: every schedule over a run of 100 steps, with a warm-up of 5 where it has none of its own."""
    curves = {}
    for name, given in SCHEDULES.items():
        value = schedules.build(name, 100, 0 if name == "one_cycle" else 5, **given)
        curves[name] = (list(range(100)), [value(step) for step in range(100)])
    plots.line_plot(IMAGES / "course-schedules.png", [("factor", curves)], x_label="% of the run")


def similarity(scratch: Path) -> None:
    """F13: the similarities of LeNet's layers after an epoch on clothes."""
    settings = ["duration=1 epochs", "callbacks.similarity={every: 1 epoch}"]
    folder = train("lenet-fashion", settings, scratch / "similarity") / "plots"
    shutil.copy(max(folder.glob("similarity-*.png")), IMAGES / "course-similarity.png")


def variance(scratch: Path) -> None:
    """F2: is a predicted variance better than one for all, patient by patient? That one is fitted to the very split."""
    constant = ["objective.variance=fixed", "model.num_outputs=1"]
    predicted = _outputs(train("regression-diabetes", [], scratch / "predicted"))["nll"]
    fixed = _outputs(train("regression-diabetes", constant, scratch / "constant"))
    squares = (fixed["prediction"] - fixed["target"]).square().squeeze(1)
    nll = 0.5 * ((2 * torch.pi * squares.mean()).log() + squares / squares.mean())
    gain = nll - predicted
    error = float(gain.std()) / len(gain) ** 0.5
    figures = [float(nll.mean()), float(predicted.mean()), float(gain.mean()), error]
    head = ["patients", "one variance", "predicted", "gain", "standard error"]
    table(head, [str(len(gain)), *(f"{figure:.3f}" for figure in figures)])


def _outputs(run_dir: Path) -> dict[str, torch.Tensor]:
    """What a trained regression says of each sample of the test split, in its own units, float64."""
    trainer = trained.restore(run_dir)
    networks = trainer.view()
    batches = evaluation_batches(trainer.recipe, trainer.world, "test")
    parts = [(trainer.objective.evaluate(networks, micro), micro.real) for micro in batches]
    return {
        name: torch.cat([part[name][:real] for part, real in parts]).double()
        for name in ("nll", "prediction", "target")
    }


EXPERIMENTS: dict[str, Callable[[Path], None]] = {
    "initialisation": initialisation,
    "landscape": landscape,
    "modes": modes,
    "schedules": schedules_,
    "similarity": similarity,
    "variance": variance,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *EXPERIMENTS], help="all by default")
    with tempfile.TemporaryDirectory() as scratch:
        for name in parser.parse_args().names or EXPERIMENTS:
            EXPERIMENTS[name](Path(scratch))


if __name__ == "__main__":
    main()
