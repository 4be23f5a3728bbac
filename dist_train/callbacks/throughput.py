"""How fast a run is for what it runs on: FLOPs, the share of the peak (MFU), and where the time of a step goes."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from dist_train.callbacks import Callback
from dist_train.forecast.hardware import device_like
from dist_train.forecast.tracing import Live

if TYPE_CHECKING:
    from dist_train.trainer import Trainer

SHARES = {"data": ("data",), "communication": ("reduce",), "callbacks": ("callbacks",)}
"""The phases of the loop that each share of a step sums up; all else is computing."""
CEILING_SIZE, CEILING_SECONDS = 1024, 0.2


class Throughput(Callback):
    """Adds to each row `tflops_per_second` of all ranks, `mfu`, and `share/...` of a step.

    FLOPs are counted, not estimated: the first step of each sequence of turns runs under a counter of products,
    convolutions and attention, backward included, whatever the model. `mfu` is against the dense peak of a GPU that
    `hardware` names, else (a CPU) against matrix products measured at the start, by all ranks at once.

    Shares are host time, averaged over the ranks: `data`, waiting for the batch; `communication`, waiting in `reduce`
    for sums over the ranks, what backward did not hide (ZeRO also communicates within backward and step, a GPU waits on
    its own streams: both are in the rest; `profiler` tells them apart); `callbacks`, the host between two steps.
    """

    priority = 75  # before the row is written

    def __init__(self) -> None:
        self._flops: dict[tuple[Any, ...], int] = {}
        self._counting: tuple[tuple[Any, ...], Live] | None = None

    def run_begins(self, run: Trainer) -> None:
        self._peak, source = peak(run)
        if run.world.is_main:
            log = logging.getLogger("dist_train")
            log.info("mfu is against %.3g TFLOP/s a rank: %s", self._peak / 1e12, source)
        self._restart(run)

    def step_begins(self, run: Trainer) -> None:
        turns = tuple((turn.player, turn.index) for turn in run.objective.turns(run.step))
        if turns not in self._flops:
            counter = Live()
            counter.__enter__()
            self._counting = turns, counter

    def step_ends(self, run: Trainer) -> None:
        turns = tuple((turn.player, turn.index) for turn in run.objective.turns(run.step - 1))
        if self._counting is not None:
            turns, counter = self._counting
            counter.__exit__(None, None, None)
            self._counting = None
            self._flops[turns] = counter.work.flops
            self._restart(run)  # a step that was counted is slow
            return
        if turns not in self._flops:  # of a step that was cut short: another start has counted it
            return
        self._done += self._flops[turns]
        if run.every(run.recipe.log.every) or run.is_last or run.row:
            self._record(run)

    def failed(self, run: Trainer, error: BaseException) -> None:
        self.run_ends(run)

    def run_ends(self, run: Trainer) -> None:
        if self._counting is not None:  # within a step that is not to end
            self._counting[1].__exit__(None, None, None)

    def _record(self, run: Trainer) -> None:
        elapsed = time.perf_counter() - self._since
        spent = [
            sum(run.heartbeat.spent[phase] - self._spent[phase] for phase in phases) / elapsed
            for phases in SHARES.values()
        ]
        figures = torch.tensor([self._done / elapsed, *spent], dtype=torch.float64)
        rate, *shares = run.world.sum_(figures.to(run.world.device)).tolist()
        run.record("tflops_per_second", _short(rate / 1e12))
        if self._peak:
            run.record("mfu", _short(rate / self._peak / run.world.size))
        for name, share in zip(SHARES, shares, strict=True):
            run.record(f"share/{name}", round(share / run.world.size, 4))
        self._restart(run)

    def _restart(self, run: Trainer) -> None:
        self._since, self._done, self._spent = time.perf_counter(), 0, dict(run.heartbeat.spent)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def peak(run: Trainer) -> tuple[float, str]:
    """FLOP/s that this rank's device could do in this precision, and how that is known; 0 where it is not."""
    precision = run.recipe.precision
    if run.world.device.startswith("cuda"):
        name = torch.cuda.get_device_name(run.world.device)
        found = device_like(name)
        if found is None:
            return 0.0, f"{name} is not in dist_train/forecast/hardware.py"
        return found.flops_per_second(precision, run.recipe.tf32), f"the dense peak of {found.name}"
    run.world.barrier()
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return matmul_ceiling(
        dtype
    ), f"products of {CEILING_SIZE} x {CEILING_SIZE} measured at the start"


def matmul_ceiling(dtype: torch.dtype) -> float:
    """FLOP/s of the best of several matrix products on the CPU, with this process's threads."""
    a = torch.ones(CEILING_SIZE, CEILING_SIZE, dtype=dtype)
    best, until = 0.0, time.perf_counter() + CEILING_SECONDS
    while time.perf_counter() < until or not best:
        began = time.perf_counter()
        a @ a
        best = max(best, 2 * CEILING_SIZE**3 / (time.perf_counter() - began))
    return best
