"""Ensembles on fashion-mnist (C8): trains the members, judges them on the test split, rewrites the table of
docs/RESULTS.md and the plot of docs/course/ensembles.md.

    python benchmarks/ensembles.py [--runs runs/ensembles] [--read]

Choose settings on the validation split. `--read` trains nothing: it judges the runs that are there.
"""

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train import run
from dist_train.recipe import Recipe
from dist_train.trained.ensemble import ensemble
from dist_train.trained.seeds import train_seeds

ROOT = Path(__file__).parents[1]
PAGE, PLOT = ROOT / "docs" / "RESULTS.md", ROOT / "docs" / "images" / "course-ensembles.png"
BEGIN, END = (
    "<!-- ensembles: benchmarks/ensembles.py writes this table -->",
    "<!-- end of ensembles -->",
)
COLUMNS = (
    *("members", "combined by", "error, %", "NLL", "Brier", "ECE, %"),
    *("a member's error, NLL", "best member's error, NLL", "disagreement, %", "seconds"),
)
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"
RECIPE, COUNT, RANKS = "ensemble-fashion", 5, 2
SECONDS = "seconds.txt"
TRAINED: dict[str, tuple[str, ...]] = {
    "seeds": (),
    "bootstrap": ("data.resample=bootstrap",),
    "batched": (f"members={COUNT}",),
    "heads": (f"members={{count: {COUNT}, heads: output}}",),
    "snapshots": (
        "duration=20 epochs",
        "callbacks.learning_rate_decay={schedule: {name: cyclic_cosine, cycles: 5}, warmup: null}",
        "callbacks.snapshot_ensemble={cycles: 5}",
    ),
    "averages": (
        "callbacks.learning_rate_decay.schedule={name: swa, start: 6 epochs, end: 0.25}",
        "callbacks.swa={start: 6 epochs, cycle: 0.5 epochs}",
        "callbacks.ema={decay: 0.999}",
    ),
}
"""What is trained, as settings of the recipe."""
SEEDS = ("seeds", "bootstrap")


@dataclass(frozen=True)
class Row:
    """A line of the table: whose members, how they are combined, with which weights."""

    members: str
    trained: str
    how: str = "mean"
    weights: str = "live"
    by: str = "mean probability"


ROWS = (
    Row("5 seeds", "seeds"),
    Row("5 seeds", "seeds", how="vote", by="majority vote"),
    Row("5 bootstraps", "bootstrap"),
    Row("5 seeds, batched in one process", "batched"),
    Row("one trunk, 5 heads", "heads"),
    Row("5 snapshots of one run", "snapshots"),
    Row("one run, rate as for SWA", "averages", by="-"),
    Row("the same", "averages", weights="ema", by="average of weights: EMA"),
    Row("the same", "averages", weights="swa", by="average of weights: SWA"),
)


def train(name: str, folder: Path) -> None:
    settings = ["threads=1", "callbacks.console=null", *TRAINED[name]]
    recipe = Recipe.load(RECIPE, settings)
    began = time.monotonic()
    if name in SEEDS:
        train_seeds(recipe, COUNT, run_dir=folder, ranks=RANKS)
    else:
        run.train(recipe, run_dir=folder, ranks=RANKS)
    (folder / SECONDS).write_text(f"{time.monotonic() - began:.0f}\n")


def runs_of(name: str, folder: Path) -> list[Path]:
    """What `ensemble` takes of a row."""
    if name in SEEDS:
        return sorted(folder.glob("seed-*"))
    if name == "snapshots":
        return sorted((folder / "checkpoints").glob("step-*"))
    return [folder]


def line(row: Row, folder: Path, plot: Path | None) -> str:
    """Judge the members of a row on the test split."""
    found = ensemble(
        runs_of(row.trained, folder), how=row.how, split="test", weights=row.weights, plot=plot
    )
    together, mean, each = found["together"], found["mean_of_members"], found["members"]
    several = len(each) > 1
    cells: list[Any] = [
        row.members,
        row.by,
        percent(together["error"]),
        "-" if together["nll"] is None else f"{together['nll']:.4f}",
        f"{together['brier']:.4f}",
        percent(together["calibration_error"]),
        f"{percent(mean['error'])}, {mean['nll']:.4f}" if several else "-",
        f"{percent(best(each, 'error'))}, {best(each, 'nll'):.4f}" if several else "-",
        percent(found["disagreement"]) if several else "-",
        (folder / SECONDS).read_text().strip(),
    ]
    return f"| {' | '.join(map(str, cells))} |\n"


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def best(members: list[dict[str, Any]], metric: str) -> float:
    return min(member[metric] for member in members)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/ensembles"))
    parser.add_argument("--read", action="store_true", help="train nothing")
    given = parser.parse_args()
    lines = []
    for name in TRAINED:
        if not given.read:
            shutil.rmtree(given.runs / name, ignore_errors=True)
            train(name, given.runs / name)
    PLOT.unlink(missing_ok=True)
    for row in ROWS:
        lines.append(line(row, given.runs / row.trained, PLOT if row is ROWS[0] else None))
        print(lines[-1], end="", flush=True)
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{PAGE} has no lines {BEGIN} and {END}"
    PAGE.write_text(f"{before}{BEGIN}\n\n{HEAD}{''.join(lines)}\n{END}{after}")


if __name__ == "__main__":
    main()
