"""The results of the course: trains each row's recipe on 2 ranks, and rewrites a table of docs/RESULTS.md.

    python benchmarks/results.py [ROW ...] [--runs runs/results] [--read]

A recipe evaluates the validation split while it trains: by that one may choose settings. The figure of a row is that
of the last weights on the test split, read once, after training. It also draws the plots of docs/course. Without a row
it trains all of them, one after the other. `--read` trains nothing: it reads the runs that are there. Rows without a
run keep the line that they have.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dist_train.pictures import plots
from dist_train.report import RunRecord

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "RESULTS.md"
BEGIN, END = "<!-- results: make results writes this table -->", "<!-- end of results -->"
HEAD = """\
| row | `dist-train train ...` | data | figure | floor | seconds | load | published |
|---|---|---|---|---|---|---|---|
"""
PLAIN, DEEP, UNIT = "model.shortcut=none", "model.depth=56", "objective.variance=fixed"

SCRATCH = ("weights=null", "optimizer.groups=[]")
WHOLE = ("data.global_batch=4096", "data.micro_batch=1024")
OPTIMISERS: dict[str, tuple[str, ...]] = {
    "gradient descent, all samples a step": (*WHOLE, "optimizer.learning_rate=0.1"),
    "mini-batch SGD": ("optimizer.learning_rate=0.3",),
    "momentum": ("optimizer.learning_rate=0.03", "optimizer.momentum=0.9"),
    "Nesterov": (
        "optimizer.learning_rate=0.03",
        "optimizer.momentum=0.9",
        "optimizer.nesterov=true",
    ),
    "RMSProp": ("optimizer.name=rmsprop", "optimizer.learning_rate=1e-3"),
    "AdaGrad": ("optimizer.name=adagrad", "optimizer.learning_rate=0.03"),
    "Adam": ("optimizer.name=adam", "optimizer.learning_rate=1e-3"),
    "AdamW": (
        "optimizer.name=adamw",
        "optimizer.learning_rate=3e-3",
        "optimizer.weight_decay=0.1",
    ),
    "Muon": ("optimizer.name=muon", "optimizer.learning_rate=1e-3"),
}
"""Each with the best of two to four rates by the error of the validation split."""


@dataclass(frozen=True)
class Row:
    """A recipe with settings, and the metric of its test split that is the result: its mean over some seeds."""

    id: str
    name: str
    recipe: str
    data: str
    metric: str
    settings: tuple[str, ...] = ()
    floor: str = "-"
    published: str = "-"
    seeds: int = 1
    trunk: str = ""
    """The row from whose run the weights start."""

    @property
    def command(self) -> str:
        settings = [f"--set {shlex.quote(setting)}" for setting in self.settings]
        return " ".join(
            [self.recipe, *settings, *(["--set weights.from=RUN"] if self.trunk else [])]
        )


ROWS = (
    Row("F1", "softmax", "softmax-digits", "digits", "error", floor="<= 5 %"),
    Row(
        "F2",
        "predicted variance",
        "regression-diabetes",
        "diabetes",
        "nll",
        floor="below the constant variance",
    ),
    Row(
        "F2",
        "constant variance",
        "regression-diabetes",
        "diabetes",
        "constant_variance_nll",
        (UNIT, "model.num_outputs=1"),
    ),
    Row("F2", "R2", "regression-diabetes", "diabetes", "r2", floor=">= 0.40"),
    Row(
        "F3",
        "MLP",
        "mlp-fashion",
        "fashion-mnist",
        "accuracy",
        floor=">= 88 %",
        published="90.0 %: MLP 256-128-64",
    ),
    *(
        Row("F5", name, "optimisers-mnist", "mnist5k", "error", settings, seeds=3)
        for name, settings in OPTIMISERS.items()
    ),
    Row("F4", "no regularisation", "regularisation-mnist", "mnist5k", "error", seeds=3),
    Row(
        "F4",
        "weight decay",
        "regularisation-mnist",
        "mnist5k",
        "error",
        ("optimizer.weight_decay=3e-3",),
        seeds=3,
    ),
    Row(
        "F4", "l1 term", "regularisation-mnist", "mnist5k", "error", ("optimizer.l1=3e-4",), seeds=3
    ),
    Row(
        "F4", "dropout", "regularisation-mnist", "mnist5k", "error", ("model.dropout=0.3",), seeds=3
    ),
    Row(
        "F8",
        "early stopping",
        "regularisation-mnist",
        "mnist5k",
        "error",
        ("callbacks.early_stopping.patience=5",),
        seeds=3,
    ),
    Row(
        "C1",
        "LeNet-5",
        "lenet-fashion",
        "fashion-mnist",
        "accuracy",
        floor=">= 89 %",
        published="87.6 %: 2 convolutions with pooling",
    ),
    Row("C2", "AlexNet", "alexnet-emoji", "emoji-google", "accuracy", floor="trains"),
    Row(
        "C3",
        "VGG-11",
        "vgg-fashion",
        "fashion-mnist",
        "accuracy",
        floor=">= 91 %",
        published="93.5 %: VGG-16, 26 M weights",
    ),
    Row(
        "C4",
        "ResNet-20",
        "resnet20-fashion",
        "fashion-mnist",
        "accuracy",
        floor=">= 92 %",
        published="94.9 %: ResNet-18, more augmentation",
    ),
    Row("C4", "plain 20", "depth-fashion", "fashion-mnist", "error", (PLAIN,)),
    Row(
        "C4",
        "plain 56",
        "depth-fashion",
        "fashion-mnist",
        "error",
        (PLAIN, DEEP),
        floor="worse than plain 20",
    ),
    Row("C4", "residual 20", "depth-fashion", "fashion-mnist", "error"),
    Row(
        "C4",
        "residual 56",
        "depth-fashion",
        "fashion-mnist",
        "error",
        (DEEP,),
        floor="not worse than residual 20",
    ),
    Row("C6", "batch norm, rate 1.0", "batchnorm-digits", "digits", "error"),
    Row(
        "C6",
        "no norm, rate 0.1",
        "batchnorm-digits",
        "digits",
        "error",
        ("model.norm=none", "optimizer.learning_rate=0.1"),
    ),
    Row("use", "fine-tuned", "fine-tune-emoji", "emoji-twitter", "accuracy", trunk="AlexNet"),
    Row(
        "use",
        "fine-tuned, nothing frozen",
        "fine-tune-emoji",
        "emoji-twitter",
        "accuracy",
        ("optimizer.groups=[]",),
        trunk="AlexNet",
    ),
    Row("use", "from scratch, as long", "fine-tune-emoji", "emoji-twitter", "accuracy", SCRATCH),
    Row(
        "use",
        "from scratch, five times as long",
        "fine-tune-emoji",
        "emoji-twitter",
        "accuracy",
        (*SCRATCH, "duration=10 epochs"),
    ),
)

PLOTS: dict[str, tuple[str, tuple[str, ...], tuple[tuple[str, str], ...]]] = {
    "course-softmax": (
        "step",
        ("softmax",),
        (("loss", "loss"), ("evaluate/error", "validation error")),
    ),
    "course-regression": (
        "step",
        ("predicted variance", "constant variance"),
        (
            ("evaluate/r2", "validation R2"),
            ("evaluate/nll", "validation negative log-likelihood"),
        ),
    ),
    "course-optimisers": (
        "epoch",
        tuple(OPTIMISERS),
        (("loss", "training loss"), ("evaluate/error", "validation error")),
    ),
    "course-regularisation": (
        "epoch",
        ("no regularisation", "weight decay", "l1 term", "dropout", "early stopping"),
        (("loss", "training loss"), ("evaluate/loss", "validation loss")),
    ),
    "course-fine-tuning": (
        "epoch",
        ("fine-tuned", "fine-tuned, nothing frozen", "from scratch, as long"),
        (("loss", "training loss"), ("evaluate/accuracy", "validation accuracy")),
    ),
    "course-fashion": (
        "seconds",
        ("MLP", "LeNet-5", "VGG-11", "ResNet-20"),
        (("loss", "training loss"), ("evaluate/accuracy", "validation accuracy")),
    ),
    "course-alexnet": (
        "step",
        ("AlexNet",),
        (("loss", "training loss"), ("evaluate/accuracy", "validation accuracy")),
    ),
    "course-clipping": (
        "step",
        ("AlexNet",),
        (("gradient_norm", "norm of the gradient"), ("suggested_norm", "suggested bound")),
    ),
    "course-depth": (
        "epoch",
        ("plain 20", "plain 56", "residual 20", "residual 56"),
        (("loss", "training loss"), ("evaluate/error", "validation error")),
    ),
    "course-normalisation": (
        "step",
        ("batch norm, rate 1.0", "no norm, rate 0.1"),
        (("loss", "loss"), ("evaluate/error", "validation error")),
    ),
}
"""A plot: the x axis, the rows whose runs it shows, and its panels (figure, label)."""
LOGARITHMIC = ("course-optimisers", "course-regularisation")


def folder_of(row: Row, runs: Path, seed: int = 0) -> Path:
    """Rows with the same command share a run."""
    name = "+".join([row.recipe, *row.settings]).replace("=", "-").replace("/", "-")
    return runs / (f"{name}+seed-{seed}" if seed else name)


def train(row: Row, folder: Path, seed: int, runs: Path) -> None:
    """Train one row anew and read its test split; note how busy the machine was."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "dist_train", "train", row.recipe, "--ranks", "2"]
    command += ["--run-dir", str(folder), "--set", "threads=1", "--set", f"seed={seed}"]
    for setting in row.settings:
        command += ["--set", setting]
    if row.trunk:
        source = next(other for other in ROWS if other.name == row.trunk)
        command += ["--set", f"weights.from={folder_of(source, runs)}"]
    load = os.getloadavg()[0]
    subprocess.run(command, check=True, cwd=ROOT)
    (folder / "load.txt").write_text(f"{load:.1f}")
    command = [sys.executable, "-m", "dist_train", "evaluate", str(folder), "--split", "test"]
    found = subprocess.run([*command, "--json"], check=True, cwd=ROOT, capture_output=True)
    (folder / "test.json").write_bytes(found.stdout)


def line(row: Row, folders: list[Path]) -> str:
    """The line of the table."""
    records = [RunRecord.read(folder) for folder in folders]
    tests = [json.loads((folder / "test.json").read_text())["results"] for folder in folders]
    values = [found[row.metric] for found in tests]
    share = row.metric in ("accuracy", "error")
    scale, digits, unit = (100, 2, " %") if share else (1, 3, "")
    figure = f"{scale * statistics.mean(values):.{digits}f}{unit}"
    if len(values) > 1:
        figure += (
            f" (deviation {scale * statistics.stdev(values):.{digits}f} of {len(values)} seeds)"
        )
    seconds = statistics.mean(record.rows[-1]["seconds"] for record in records)
    cells = [
        row.id,
        f"`{row.command}`",
        row.data,
        f"{row.name}: {row.metric.replace('_', ' ')} {figure}",
        row.floor,
        f"{seconds:.0f}",
        f"{max(float((folder / 'load.txt').read_text()) for folder in folders):g}",
        row.published,
    ]
    return f"| {' | '.join(cells)} |"


def rewrite(lines: dict[str, str], kept: str) -> str:
    """The page with each row's new line, or the one that it had."""
    before, _, rest = kept.partition(BEGIN)
    table, _, after = rest.partition(END)
    old = {key(text): text for text in table.splitlines() if text.startswith("| ")}
    names = [f"{row.id} {row.name}" for row in ROWS]
    shown = [lines.get(name) or old.get(name) for name in names]
    body = "\n".join(text for text in shown if text)
    return f"{before}{BEGIN}\n\n{HEAD}{body}\n\n{END}{after}"


def key(text: str) -> str:
    """Which row a line is: its id and name."""
    cells = [cell.strip() for cell in text.split("|")]
    return f"{cells[1]} {cells[4].partition(':')[0]}"


def plot(runs: Path) -> None:
    """Write the plots of which every run is there."""
    by_name = {row.name: folder_of(row, runs) for row in ROWS}
    for name, (x, rows, panels) in PLOTS.items():
        if not all((by_name[row] / "metrics.jsonl").exists() for row in rows):
            continue
        records = {row: RunRecord.read(by_name[row]) for row in rows}
        shown = []
        for figure, label in panels:
            curves = {}
            for row, record in records.items():
                at = {entry["step"]: entry.get(x, entry["step"]) for entry in record.rows}
                points = record.curve(figure)
                curves[row] = ([at[step] for step, _ in points], [value for _, value in points])
            shown.append((label, curves))
        file = ROOT / "docs" / "images" / f"{name}.png"
        plots.line_plot(file, shown, x_label=x, log_y=name in LOGARITHMIC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", help="ids like F1, C4; all by default")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "results")
    parser.add_argument("--read", action="store_true", help="train nothing, read the runs")
    options = parser.parse_args()
    chosen = [row for row in ROWS if not options.rows or row.id in options.rows]
    lines, runs = {}, options.runs.resolve()
    done: set[Path] = set()
    for row in chosen:
        folders = [folder_of(row, runs, seed) for seed in range(row.seeds)]
        for seed, folder in enumerate(folders):
            if not options.read and folder not in done:
                train(row, folder, seed, runs)
            done.add(folder)
        finished = [folder for folder in folders if (folder / "test.json").exists()]
        if finished:
            lines[f"{row.id} {row.name}"] = line(row, finished)
            print(lines[f"{row.id} {row.name}"])
    PAGE.write_text(rewrite(lines, PAGE.read_text()))
    plot(runs)
    print(f"{PAGE}, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
