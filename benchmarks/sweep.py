"""What a trial costs, and which search finds more for the same budget.

    python benchmarks/sweep.py cost [--trials 20]          # an empty trial: here, and by Ray Tune
    python benchmarks/sweep.py searches [--seeds 3]        # random, grid, Bayesian, ... on mnist5k; the table of F11

`searches` takes about 6 minutes on two quiet cores. Every search gets the same recipe and the same number of trials;
the validation split chooses, and the test split is asked once a sweep, about the one that was chosen.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from dist_train import trained
from dist_train.launch.sweep import sweep
from dist_train.ranks import Ranks, warm_up
from dist_train.ranks.parent import die_with_parent
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory

TRIALS = 27
SPACE = {
    "optimizer.learning_rate": {"log_uniform": [1e-4, 1.0]},
    "optimizer.momentum": {"uniform": [0.0, 0.99]},
    "optimizer.weight_decay": {"log_uniform": [1e-6, 1e-1]},
}
SEARCHES: dict[str, dict[str, Any]] = {
    "grid": {"points": 3},
    "random": {"trials": TRIALS},
    "bayesian": {"trials": TRIALS, "start": 9},
    "coarse_to_fine": {"trials": TRIALS},
    "asha": {"trials": TRIALS},
}


def empty_here() -> float:
    """Seconds from the start to the end of a trial that does nothing, on this machine."""
    before = time.perf_counter()
    ranks = Ranks(1, die_with_parent)
    ranks.start()
    ranks.wait()
    ranks.results()
    ranks.end()
    return time.perf_counter() - before


def empty_by_tune(trials: int) -> float:
    """Seconds a trial that does nothing, one at a time, by Ray Tune; the first is left out."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0"}
    import ray
    from ray import tune

    ends: list[float] = []

    class Ends(tune.Callback):
        def on_trial_complete(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    def nothing(config: dict[str, Any]) -> dict[str, int]:
        return {"value": 0}

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        run = tune.RunConfig(storage_path=folder, verbose=0, callbacks=[Ends()])
        config = tune.TuneConfig(num_samples=trials, max_concurrent_trials=1)
        tune.Tuner(nothing, tune_config=config, run_config=run).fit()
    ray.shutdown()
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


def cost(trials: int) -> None:
    warm_up()
    empty_here()
    here = statistics.median(empty_here() for _ in range(trials))
    tune = empty_by_tune(trials)
    print("| an empty trial | seconds |\n|---|---|")
    print(f"| here, in a process of its own | {here:.3f} |\n| Ray Tune | {tune:.3f} |")


def steps_of(path: Path) -> int:
    """All steps that the trials of a sweep have trained."""
    rows = [RunDirectory(run).rows() for run in path.glob("trials/*")]
    return sum(found[-1]["step"] for found in rows if found)


def one(name: str, options: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """A sweep, and what the network that it chose makes of the test split."""
    settings = ["duration=5 epochs", "threads=1", "callbacks.console=null", f"seed={seed}"]
    recipe = Recipe.load("optimisers-mnist", [*settings, "callbacks.checkpoint.keep=1"])
    space = {
        "search": {"name": name, **options},
        "objective": {"metric": "loss", "mode": "min", "at": "end"},
        "seed": seed,
        "max_failures": TRIALS,
        "space": SPACE,
    }
    before = time.perf_counter()
    found = sweep(recipe, space, run_dir=folder, at_once=os.cpu_count())
    seconds = time.perf_counter() - before
    test = trained.evaluate(found["best"]["run_dir"], split="test")["results"]
    return {
        "validation loss": found["best"]["loss"],
        "test loss": test["loss"],
        "test error, %": 100 * test["error"],
        "steps": steps_of(folder),
        "seconds": seconds,
    }


def searches(seeds: int) -> None:
    rows: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in SEARCHES.items():
            rows[name] = [
                one(name, options, seed, Path(folder) / f"{name}-{seed}") for seed in range(seeds)
            ]
    heads = list(next(iter(rows.values()))[0])
    print(f"| search, {TRIALS} trials | {' | '.join(heads)} |\n|---{'|---' * len(heads)}|")
    for name, found in rows.items():
        cells = []
        for head in heads:
            values = sorted(row[head] for row in found)
            middle = statistics.median(values)
            form = ",.0f" if head in ("steps", "seconds") else ".2f" if "%" in head else ".4f"
            cells.append(f"{middle:{form}} ({values[0]:{form}} to {values[-1]:{form}})")
        print(f"| `{name}` | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("cost", "searches"))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.what == "cost":
        cost(arguments.trials)
    else:
        searches(arguments.seeds)


if __name__ == "__main__":
    main()
