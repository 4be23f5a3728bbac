"""The journal: one row a log interval into metrics.jsonl, the truth that console and trackers mirror (law 8)."""

from __future__ import annotations

import logging
import math
import resource
import time
from typing import TYPE_CHECKING, Any

import torch

from dist_train.callbacks import Callback
from dist_train.duration import Every

if TYPE_CHECKING:
    from dist_train.objectives import Turn
    from dist_train.trainer import Trainer

SLOW, SLOW_AFTER = 0.5, 5.0
"""Waiting for data for more than this share of the time, over so many seconds, is worth a warning."""


class Journal(Callback):
    """Writes this step's row when the log interval is due or something was recorded, then calls `logged` on all."""

    priority = 80

    def __init__(self, every: str) -> None:
        self.every = Every.parse(every)
        self.warned = False

    def run_begins(self, run: Trainer) -> None:
        self.window = self.last = time.perf_counter()
        self.window_step = run.step
        self.waited = run.heartbeat.spent["data"]

    def turn_ends(self, run: Trainer, turn: Turn) -> None:
        run.log(run.named(turn.player, "gradient_norm"), run.engines[turn.player].norm)

    def step_ends(self, run: Trainer) -> None:
        if not (run.every(self.every) or run.is_last or run.row):
            return
        means = run.meter.flush(run.world)
        now = time.perf_counter()
        run.seconds += now - self.last
        waited = run.heartbeat.spent["data"]
        elapsed = max(now - self.window, 1e-9)
        rate = (run.step - self.window_step) / elapsed
        row: dict[str, Any] = {
            "step": run.step,
            "epoch": round(run.epoch, 6),
            "samples": run.step * run.global_batch,
            "seconds": round(run.seconds, 3),
            **means,
            **{
                run.named(player, "learning_rate"): engine.param_groups[0]["lr"]
                for player, engine in run.engines.items()
            },
            **run.scalars,
            "samples_per_second": round(rate * run.global_batch, 3),
            **self._tokens(run, rate),
            "data_wait": round(min(1.0, (waited - self.waited) / elapsed), 4),
            "memory_mb": round(peak_memory(run.world.device) / 2**20, 1),
            **{
                run.named(player, name): value
                for player, engine in run.engines.items()
                if engine.loss_scale
                for name, value in (
                    ("loss_scale", engine.loss_scale.value),
                    ("skipped_turns", engine.loss_scale.skipped),
                )
            },
            **run.row,
        }
        if row["data_wait"] > SLOW and elapsed > SLOW_AFTER and not self.warned:
            self.warned = True
            logging.getLogger("dist_train").warning(
                "%.0f %% of the time to step %d was waiting for data: raise data.workers (now %d)",
                100 * row["data_wait"],
                run.step,
                run.recipe.data.workers,
            )
        self.window, self.last, self.window_step, self.waited = now, now, run.step, waited
        run.row = {}
        if run.world.is_main:
            run.directory.append_row(row)
            run.callbacks.call("logged", run, row)
        for player in run.engines:
            if not math.isfinite(means.get(run.named(player, "gradient_norm"), 0.0)):
                run.refuse_to_go_on(player)

    @staticmethod
    def _tokens(run: Trainer, steps_per_second: float) -> dict[str, float]:
        """Tokens a second, at the mean tokens of a sample, where samples have tokens."""
        if run.tokens_per_epoch is None:
            return {}
        tokens_per_step = run.global_batch * run.tokens_per_epoch / run.samples_per_epoch
        return {"tokens_per_second": round(steps_per_second * tokens_per_step, 1)}


def peak_memory(device: str) -> int:
    """Bytes at most in use: of the GPU where there is one, else resident memory of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
