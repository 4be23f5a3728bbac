"""Steps whose memory is measured, in this process and in two ranks; ranks import this file by name."""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import time
from collections import deque
from pathlib import Path
from typing import Any, ClassVar

import cases
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dist_train import assembly
from dist_train.data import RunData
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.verify.payload import Payload
from dist_train.world import World, pin_threads

NOWHERE = RunDirectory(Path("nowhere"))


def large(
    data: Path | str, model: str, micro_batches: int, strategy: str, dim: int = 256
) -> Recipe:
    """A tiny recipe made large enough that what it holds dominates."""
    recipe = cases.tiny_recipe(model, data, micro_batches=micro_batches, strategy=strategy)
    recipe = recipe.set("callbacks", {})
    if model == "transformer":
        return recipe.set("model.dropout", 0.0).set("model.dim", dim).set("model.depth", 6)
    if model == "resnet":
        return recipe.set("model.width", 32).set("model.depth", 20)
    return recipe.set("model.generator.width", 64).set("model.critic.width", 64)


class Read:
    """Batches that lie there already."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def from_(self, step: int, stop: int) -> Any:
        yield from self.batches[step:stop]


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated() -> int:
    """Bytes that this process has of its allocator (Linux), whichever thread took or freed them."""
    mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo.restype = _MallInfo
    now = mallinfo()
    return int(now.uordblks + now.hblkhd)


def measured_peak(recipe: Recipe, world: World, steps: int = 3) -> int:
    """Bytes that torch holds at most within a step, but for the batches and for what was there before the build.

    In one process the profiler tells, less what oneDNN takes within a convolution, which is the CPU's affair. It does
    not see what the threads of gloo free: a tensor of a collective, whenever they let go of it last.
    So what the build leaves is the less of what profiler and allocator say, and what a step adds is that of the step
    with the fewest such tensors: of steps of even and of odd number, for a generator may have a turn each second one.
    """
    pin_threads(1, 1)
    batches = list(
        RunData(recipe, world).batches.from_(0, steps)
    )  # before we count: reading takes memory of the host
    gc.collect()  # what came before would be freed while we count
    before = allocated()
    marks = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = assembly.build(recipe, world, NOWHERE)
        trainer.callbacks.by_name = {}
        gc.collect()  # weights from before DeepSpeed flattened them hang in cycles
        trainer.data = Read(batches)
        built = allocated() - before
        for step in range(steps):
            marks.append(time.time_ns())
            trainer.train(until=step + 1)
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    if world.size == 1:
        changes = without_workspaces(events, changes)
        return max(itertools.accumulate(change for _, change in changes))
    added = []
    for begin, end in zip(marks, [*marks[1:], math.inf], strict=True):
        within = [change for at, change in changes if begin <= at < end]
        added.append(max(itertools.accumulate(within, initial=0)))
    built = min(built, sum(change for at, change in changes if at < marks[0]))
    return built + max(min(added[1::2]), min(added[2::2]))


def without_workspaces(events: Any, changes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The changes of memory but for what a convolution both takes and gives back: its library's room to work, which is
    of another size on another CPU."""
    spans = sorted(
        (e.start_ns(), e.start_ns() + e.duration_ns())
        for e in events
        if e.name() in ("aten::mkldnn_convolution", "aten::convolution_backward")
    )
    kept: list[tuple[int, int]] = []
    rest = deque(changes)
    for begin, end in spans:
        while rest and rest[0][0] < begin:
            kept.append(rest.popleft())
        within: list[tuple[int, int]] = []
        while rest and rest[0][0] <= end:
            at, change = rest.popleft()
            taken = next((pair for pair in within if pair[1] == -change), None)
            if taken and change < 0:
                within.remove(taken)
            else:
                within.append((at, change))
        kept += within
    return kept + list(rest)


def resolved_and_sent(plans: list[list[Any]], grid: dict[str, Any], steps: int) -> dict[str, float]:
    """Runs as of `cases.train_cases`; then bytes of payload that a rank hands to collectives in a step, the mean over
    the ranks and over `steps` steps after as many, of each {case: recipe's settings}."""
    cases.train_cases(plans)
    world = World.join(group=True)
    found = {}
    for case, settings in grid.items():
        recipe = Recipe(**settings)
        pin_threads(1, 1)
        batches = list(RunData(recipe, world).batches.from_(0, 2 * steps))
        trainer = assembly.build(recipe, world, NOWHERE)
        trainer.callbacks.by_name, trainer.data = {}, Read(batches)
        trainer.train(until=steps)
        with Payload() as payload:
            trainer.train(until=2 * steps)
        found[case] = sum(world.gather(payload.bytes)) / world.size / steps
    world.leave()
    return found


def measured_in_ranks(data: str, grid: list[list[Any]], steps: int) -> dict[str, int]:
    """The peak of rank 0 for each (model, micro-batches, strategy, width)."""
    world = World.join(group=True)
    found = {}
    for case in grid:
        found["-".join(map(str, case))] = measured_peak(large(data, *case), world, steps)
    world.leave()
    return found


class Undecided(nn.Module):
    """(B, 1, 8, 8) -> (B, 10), by a way that depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        flat = image.flatten(1)
        return self.linear(flat) if flat.mean() > 0 else -self.linear(flat)
