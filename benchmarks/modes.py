"""F13: when a deep linear network learns the modes of digits, beside when theory says so.

    python benchmarks/modes.py

Trains the recipe modes-digits, prints the table of docs/RESULTS.md and draws docs/images/course-modes.png.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from dist_train import plots, run
from dist_train.data import data_folders
from dist_train.data_shards.reader import Shards
from dist_train.recipe import Recipe
from dist_train.representations import half_times, mode_strengths, mode_times

PLOT = Path(__file__).parents[1] / "docs" / "images" / "course-modes.png"


def main() -> None:
    recipe = Recipe.load("modes-digits", ["threads=1", "callbacks.console=null"])
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = run.train(recipe, run_dir=Path(scratch) / "run")["run_dir"]
        found = json.loads((Path(run_dir) / "plots" / "singular-values-model.json").read_text())
    train = Shards(data_folders(recipe)[0], "train")
    x, y = (
        torch.from_numpy(np.array(train.column(name, np.arange(len(train))))).double()
        for name in ("features", "target")
    )
    learnt = found["singular_values"]["product"]
    strengths = mode_strengths(x, y)[: len(learnt[0])]
    assert recipe.init is not None
    start = recipe.model["width"] * recipe.init["std"] ** 2 / 2
    rate = recipe.optimizer["learning_rate"]
    predicted = mode_times(strengths, start, y.shape[1] / (2 * rate)).tolist()
    measured = half_times(found["steps"], learnt, strengths.tolist())
    print("| mode | strength | predicted step | measured step | ratio |\n|---|---|---|---|---|")
    rows = zip(strengths.tolist(), predicted, measured, strict=True)
    for mode, (strength, theory, step) in enumerate(rows, start=1):
        ratio = f"{step / theory:.2f}"
        print(f"| {mode} | {strength:.2f} | {theory:.0f} | {step:.0f} | {ratio} |")
    curves = {
        f"{mode}: {strength:.2f}": (found["steps"], [row[mode - 1] for row in learnt])
        for mode, strength in enumerate(strengths.tolist(), start=1)
    }
    marks = dict(zip(curves, predicted, strict=True))
    plots.line_plot(PLOT, [("singular value", curves)], x_label="step", marks=marks)


if __name__ == "__main__":
    main()
