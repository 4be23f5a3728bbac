"""F10: bias^2 and variance of polynomials of degree 1, 3 and 12, fitted to 50 noisy points of a sine.

    python benchmarks/bias_variance.py [--resamples 40]

The features are Legendre polynomials, of variance 1 each, so that gradient descent reaches the least squares solution.
What is judged has no noise: bias^2 is that of the model alone.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data_shards.write import write_shards
from dist_train.diagnose.bias_variance import measure
from dist_train.recipe import Recipe

TRAINED, JUDGED, NOISE = 50, 500, 0.5


def pack(folder: Path, degree: int) -> None:
    """y = sin(pi x) at uniform x in [-1, 1]; training targets with noise."""
    rng = np.random.default_rng(0)

    def samples() -> Iterator[Any]:
        for split, count, noise in (("train", TRAINED, NOISE), ("test", JUDGED, 0.0)):
            x = rng.uniform(-1, 1, count)
            powers = np.polynomial.legendre.legvander(x, degree)[:, 1:]
            features = powers * np.sqrt(2 * np.arange(1, degree + 1) + 1)
            y = np.sin(np.pi * x) + noise * rng.standard_normal(count)
            for i in range(count):
                fields = {"features.npy": np.float32(features[i]), "target.npy": np.float32([y[i]])}
                yield split, f"{split}-{i:04d}", fields

    write_shards(folder, f"degree-{degree}", samples())


def recipe_of(data: Path) -> Recipe:
    return Recipe(
        duration="300 steps",
        data={"path": str(data), "global_batch": TRAINED, "micro_batch": TRAINED},
        model={"name": "mlp", "depth": 0, "in_features": "auto", "num_outputs": 1},
        objective={"name": "regression"},
        optimizer={"name": "sgd", "learning_rate": 0.05, "momentum": 0.9},
        evaluate={"split": "test", "every": "300 steps", "metrics": ["rmse"], "micro_batch": 250},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--resamples", type=int, default=40)
    options = parser.parse_args()
    print("| degree | bias^2 | variance | error |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for degree in (1, 3, 12):
            data, run_dir = Path(scratch) / f"data-{degree}", Path(scratch) / f"run-{degree}"
            pack(data, degree)
            found = measure(
                recipe_of(data), resamples=options.resamples, parallel=2, run_dir=run_dir
            )
            parts = [f"{found[part]:.3f}" for part in ("bias2", "variance", "error")]
            print(f"| {degree} | {' | '.join(parts)} |")


if __name__ == "__main__":
    main()
