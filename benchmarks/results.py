"""The results of the course: trains each row's recipe, on 2 ranks by default; rewrites a table of docs/RESULTS.md.

    python benchmarks/results.py [ROW ...] [--runs runs/results] [--read]

A recipe evaluates the validation split while it trains: by that one may choose settings. The figure of a row is that
of the last weights on the test split, read once, after training. It also draws the plots of docs/course. The rows and
plots are data: benchmarks/results.yaml. Without a row it trains all of them, one after the other. `--read` trains
nothing: it reads the runs that are there. Rows without a run keep the line that they have.
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
from dist_train.yaml_text import read_yaml

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "RESULTS.md"
BEGIN, END = "<!-- results: make results writes this table -->", "<!-- end of results -->"
HEAD = """\
| row | `dist-train train ...` | data | figure | floor | seconds | load | published |
|---|---|---|---|---|---|---|---|
"""


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
    judge: str = ""
    """The row whose classifier judges samples."""
    ranks: int = 2

    @property
    def command(self) -> str:
        settings = [f"--set {shlex.quote(setting)}" for setting in self.settings]
        trunk = ["--set weights.from=RUN"] if self.trunk else []
        judge = ["--set objective.judge=RUN"] if self.judge else []
        ranks = [f"--ranks {self.ranks}"] if self.ranks != 2 else []
        return " ".join([self.recipe, *ranks, *settings, *trunk, *judge])


FILE = Path(__file__).with_suffix(".yaml")
DATA = read_yaml(FILE.read_bytes(), FILE.name)
ROWS = [Row(**entry | {"settings": tuple(entry.get("settings", ()))}) for entry in DATA["rows"]]
PLOTS = DATA["plots"]


def folder_of(row: Row, runs: Path, seed: int = 0) -> Path:
    """Rows with the same command share a run."""
    name = "+".join([row.recipe, *row.settings]).replace("=", "-").replace("/", "-")
    return runs / (f"{name}+seed-{seed}" if seed else name)


def train(row: Row, folder: Path, seed: int, runs: Path) -> None:
    """Train one row anew and read its test split; note how busy the machine was. Until then the run before stays."""
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    command = [sys.executable, "-m", "dist_train", "train", row.recipe, "--ranks", str(row.ranks)]
    command += ["--run-dir", str(new), "--set", "threads=1", "--set", f"seed={seed}"]
    for setting in row.settings:
        command += ["--set", setting]
    for key, name in (("weights.from", row.trunk), ("objective.judge", row.judge)):
        if name:
            source = next(other for other in ROWS if other.name == name)
            command += ["--set", f"{key}={folder_of(source, runs)}"]
    load = os.getloadavg()[0]
    subprocess.run(command, check=True, cwd=ROOT)
    (new / "load.txt").write_text(f"{load:.1f}")
    command = [sys.executable, "-m", "dist_train", "evaluate", str(new), "--split", "test"]
    found = subprocess.run([*command, "--json"], check=True, cwd=ROOT, capture_output=True)
    (new / "test.json").write_bytes(found.stdout)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def line(row: Row, folders: list[Path]) -> str:
    """The line of the table."""
    records = [RunRecord.read(folder) for folder in folders]
    tests = [json.loads((folder / "test.json").read_text())["results"] for folder in folders]
    values = [found[row.metric] for found in tests]
    share = row.metric in ("accuracy", "error", "label_agreement")
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
    for name, wanted in PLOTS.items():
        x, rows = wanted["x"], wanted["rows"]
        if not all((by_name[row] / "metrics.jsonl").exists() for row in rows):
            continue
        records = {row: RunRecord.read(by_name[row]) for row in rows}
        shown = []
        for figure, label in wanted["panels"].items():
            curves = {}
            for row, record in records.items():
                at = {entry["step"]: entry.get(x, entry["step"]) for entry in record.rows}
                points = record.curve(figure)
                curves[row] = ([at[step] for step, _ in points], [value for _, value in points])
            shown.append((label, curves))
        file = ROOT / "docs" / "images" / f"{name}.png"
        plots.line_plot(file, shown, x_label=x, log_y=wanted.get("log", False))


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
