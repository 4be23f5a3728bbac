"""What a person sees of a run: a summary at its start, a line each logged step, a bar on a terminal."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console as Screen
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from dist_train.callbacks import Callback
from dist_train.duration import Every

if TYPE_CHECKING:
    from dist_train.trainer import Trainer

EVALUATE = "evaluate/"
Line = list[str | tuple[str, str]]
"""Pieces of text, with a style where they have one."""


class Console(Callback):
    """Report on rank 0 to the standard error stream, which leaves the standard output to results.

    Args:
        every: print a line at most so often ("1 epoch"); by default each logged step. Evaluations always show.
    """

    priority = 5

    def __init__(self, every: str | None = None) -> None:
        self.every = None if every is None else Every.parse(every)
        self._screen: Screen | None = None
        self._bar: Progress | None = None

    def run_begins(self, run: Trainer) -> None:
        if not run.world.is_main:
            return
        self._screen = Screen(stderr=True, highlight=False, soft_wrap=True)
        self._draws = self._screen.is_terminal
        self._notes = _Notes(self._screen)
        logging.getLogger("dist_train").addHandler(self._notes)
        for line in summary(run):
            self._screen.print(line)
        self._began, self._first, self._last = time.monotonic(), run.step, run.step
        if self._draws:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._screen,
                transient=True,
            )
            self._bar.start()
            name = run.recipe.name
            self._task = self._bar.add_task(name, total=run.total_steps, completed=run.step)

    def step_ends(self, run: Trainer) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=run.step)

    def logged(self, run: Trainer, row: dict[str, Any]) -> None:
        if self._screen is None:
            return
        if self.every is None or run.is_last or run.every(self.every):
            elapsed, done = time.monotonic() - self._began, run.step - self._first
            seconds = elapsed / max(done, 1) * (run.total_steps - run.step)
            self._say(progress_line(row, run.total_steps, list(run.engines), seconds))
        if any(name.startswith(EVALUATE) for name in row):
            self._say(evaluation_line(row, run.best.get("step") == run.step))

    def run_ends(self, run: Trainer) -> None:
        if self._screen is None:
            return
        screen = self._close()
        end = "done" if run.step >= run.total_steps else "paused"
        if run.stopping:
            end = f"stopped: {run.stopping}"
        if run.cut_short or not run.is_last:
            end = f"interrupted by {run.interruption.reason}, saved"
        line = Text.assemble((end, "bold green"), f"  step {run.step:,}  {clock(run.seconds)}")
        if run.best:
            best = f"  best {run.best['metric']} {number(run.best['value'])}"
            line.append(f"{best} at step {run.best['step']:,}")
        screen.print(line.append(f"  {run.directory.path}"))

    def failed(self, run: Trainer, error: BaseException) -> None:
        if self._screen is not None:
            screen = self._close()
            what = f"failed in step {run.step:,}: {type(error).__name__}"
            screen.print(Text.assemble((what, "bold red"), f"  {run.directory.path}"))

    def _say(self, line: Line) -> None:
        assert self._screen is not None
        if self._draws:
            self._screen.print(Text.assemble(*line))
        else:  # styles and layout would cost more than the rest of the row
            text = "".join(part if isinstance(part, str) else part[0] for part in line)
            self._screen.file.write(f"{text}\n")
            self._screen.file.flush()

    def _close(self) -> Screen:
        assert self._screen is not None
        screen, self._screen = self._screen, None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        logging.getLogger("dist_train").removeHandler(self._notes)
        return screen


class _Notes(logging.Handler):
    """Notes and warnings of the run, as one line each."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.INFO)
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        self.screen.print(Text(record.getMessage(), style=style))


def summary(run: Trainer) -> list[Text]:
    """What is about to run, one fact a line."""
    recipe, world = run.recipe, run.world
    share = recipe.data.global_batch // recipe.data.micro_batch // world.size
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    batch = f"{run.global_batch:,} = {recipe.data.micro_batch:,} x {ranks} x {share} accumulation"
    epochs = run.total_steps * run.global_batch / run.samples_per_epoch
    length = (
        f"{run.total_steps:,} steps = {epochs:,.4g} epochs of {run.samples_per_epoch:,} samples"
    )
    if run.evaluation is not None:
        length += f", evaluated on {run.evaluation.samples:,}"
    facts = [
        ("run", str(run.directory.path)),
        ("world", f"{ranks} on {world.device.partition(':')[0]}, {recipe.precision}"),
        ("batch", batch),
        ("length", length),
    ]
    for player, engine in run.engines.items():
        count = sum(engine.shape(parameter).numel() for parameter in engine.names.values())
        strategy = recipe.strategies[player]["name"]
        optimizer = recipe.optimizers[player]["name"]
        facts.append((player, f"{count:,} parameters, {strategy}, {optimizer}"))
    if run.step:
        facts.append(("resumed", f"at step {run.step:,}"))
    width = max(len(name) for name, _ in facts)
    head = Text.assemble((recipe.name, "bold"), f"  seed {recipe.seed}")
    return [head, *(Text.assemble((f"  {n:<{width}}  ", "dim"), value) for n, value in facts)]


def progress_line(row: dict[str, Any], total: int, players: list[str], seconds_left: float) -> Line:
    """`step 20/390  epoch 1.03  loss 0.512  lr 0.1  norm 1.8  5,120 samples/s ...`, one line a row."""
    parts: Line = [("step ", "dim"), f"{row['step']:,}/{total:,}"]
    parts += [("  epoch ", "dim"), f"{row['epoch']:.2f}"]
    for player in players:
        prefix = f"{player}/" if len(players) > 1 else ""
        if prefix:
            parts += [(f"  {player}:", "bold")]
        shown = (("loss", "loss"), ("learning_rate", "lr"), ("gradient_norm", "norm"))
        for name, label in shown:
            if prefix + name in row:
                gap = " " if prefix else "  "
                parts += [(f"{gap}{label} ", "dim"), number(row[prefix + name])]
    for name, label in (("tokens_per_second", "tokens/s"), ("samples_per_second", "samples/s")):
        if name in row:
            parts += [f"  {row[name]:,.0f}", (f" {label}", "dim")]
            break
    if "mfu" in row:
        parts += [("  mfu ", "dim"), f"{row['mfu']:.1%}"]
    parts += [("  wait ", "dim"), f"{row['data_wait']:.0%}", f"  {row['memory_mb']:,.0f}"]
    parts += [(" MB  eta ", "dim"), clock(seconds_left)]
    return parts


def evaluation_line(row: dict[str, Any], best: bool) -> Line:
    """The results of an evaluation, in colour; `best` so far or not."""
    results = {
        name.removeprefix(EVALUATE): v for name, v in row.items() if name.startswith(EVALUATE)
    }
    figures = "  ".join(f"{name} {number(value)}" for name, value in results.items())
    line: Line = [(f"evaluation at step {row['step']:,}  {figures}", "bold cyan")]
    return [*line, ("  best so far", "green")] if best else line


def number(value: Any) -> str:
    """Four significant digits, short."""
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `3:02:01`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
