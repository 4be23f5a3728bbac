"""What a rank measures: a reference that one process writes, and how far a run is from it (docs/decisions/0003).

Differences come back as `{"STEP/KIND/NAME": [difference, factor]}`, relative to a scale, in the order in which a step
makes them: its samples, then of each turn the loss and every gradient, then the state that the step leaves behind
(weights, optimiser, buffers, averages). `factor` is what the reference has to be multiplied by to come closest.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_train import assembly, checkpoint, run
from dist_train.callbacks import Callback
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.trainer import Trainer
from dist_train.world import World, pin_threads

Differences = dict[str, list[float]]

SMALL = 0.01
"""Below this share of the whole a tensor is measured against that share: what cancels to almost 0 is rounding."""
OVERFLOWS = 20
"""So many steps at most are added because fp16 gradients overflow while the loss scale finds its place."""
ROUNDING = 2.0**-23
"""Storing a weight in fp32 rounds it by at most half of this, relative to its size."""


@contextlib.contextmanager
def trainer_of(
    recipe: Recipe,
    world: World,
    directory: Path,
    micro_order: str = "forward",
    resume: str | None = None,
) -> Iterator[Trainer]:
    """A trainer of this recipe, at step 0 or where `directory` was interrupted, which never evaluates."""
    pin_threads(recipe.threads, 1)
    if world.is_main and not directory.exists():
        RunDirectory.create_at(directory)
    world.barrier()
    trainer = assembly.build(recipe, world, RunDirectory(directory), micro_order=micro_order)
    trainer.callbacks.by_name.pop("evaluate", None)
    run.begin(trainer, resume)
    yield trainer
    trainer.callbacks.call("run_ends", trainer)
    trainer.directory.close()


@dataclass
class Taken:
    """What a turn computed: its loss over all ranks, and every gradient whole, before clipping."""

    player: str
    loss: float
    gradients: dict[str, Tensor]


class Gradients(Callback):
    """Keeps the whole gradients and the global loss of every turn."""

    priority = 1  # before clipping is decided; it is done later, in the engine's step

    def __init__(self) -> None:
        self.turns: list[Taken] = []

    def gradients_ready(self, run: Trainer, turn: Any) -> None:
        loss = run.world.sum_(run.losses[turn.player].double().clone())
        gradients = run.engines[turn.player].full_gradients()
        kept = {name: g.detach().float().clone() for name, g in gradients.items()}
        self.turns.append(Taken(turn.player, float(loss), kept))

    def take(self) -> list[Taken]:
        """The turns since the last call."""
        turns, self.turns = self.turns, []
        return turns


class Losses(Callback):
    """Keeps the global loss of every player of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def step_ends(self, run: Trainer) -> None:
        for player in sorted(run.losses):
            self.losses.append(float(run.world.sum_(run.losses[player].double().clone())))


class Rounded(Callback):
    """Moves every gradient by a rounding of what it is measured against: what sums in another order do to it.

    Where terms cancel, the rounding is that of the terms, so all elements of a tensor move alike. Adam, which divides
    by the size of a gradient, makes much of it where the true gradient is 0 (an attention's key bias).
    """

    priority = 2

    def __init__(self, seed: int | None = None) -> None:
        """Up and down in turn, or at random by a seed."""
        self._random = None if seed is None else torch.Generator().manual_seed(seed)

    def gradients_ready(self, run: Trainer, turn: Any) -> None:
        trained = run.engines[turn.player].trained.values()
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        norms = [float(gradient.norm()) for gradient in gradients]
        least = SMALL * math.hypot(*norms)
        for gradient, norm in zip(gradients, norms, strict=True):
            up = torch.arange(gradient.numel()) % 2
            if self._random is not None:
                up = torch.randint(0, 2, (gradient.numel(),), generator=self._random)
            signs = (2 * up - 1).view(gradient.shape).to(gradient)
            size = ROUNDING / 2 * max(norm, least) / math.sqrt(gradient.numel())
            gradient.add_(signs, alpha=size)


def watch(trainer: Trainer, callback: Callback) -> None:
    """Add a callback that no recipe names, before all others."""
    trainer.callbacks.by_name = {type(callback).__name__: callback, **trainer.callbacks.by_name}


def write_reference(trainer: Trainer, steps: int) -> list[float]:
    """Train `steps` steps; keep each state and what was computed from it. Returns the losses, player by player.

    Steps in which fp16 gradients overflow prove little and come beside those. `checkpoints/` then holds the states 0 to
    `trainer.step`, `step-N.safetensors` the samples, losses and gradients of step N.
    """
    kept, losses = Gradients(), Losses()
    watch(trainer, losses)
    watch(trainer, kept)
    longest = min(trainer.total_steps, steps + OVERFLOWS)
    while trainer.step < min(longest, steps + _overflows(trainer)):
        step = trainer.step
        trainer.save()
        trainer.train(until=step + 1)
        tensors: dict[str, Tensor] = {
            f"ids/{micro.index}": torch.from_numpy(micro.ids.copy()) for micro in trainer.batch
        }
        for i, turn in enumerate(kept.take()):
            tensors[f"{i}/loss"] = torch.tensor(turn.loss, dtype=torch.float64)
            for name, gradient in turn.gradients.items():
                tensors[f"{i}/gradient/{name}"] = gradient.cpu().contiguous()
        save_file(tensors, trainer.directory.path / f"step-{step}.safetensors")
    trainer.save()
    return losses.losses


def _overflows(trainer: Trainer) -> int:
    """In how many turns so far gradients overflowed, of the player who had most of them."""
    scales = (engine.loss_scale for engine in trainer.engines.values())
    return max((scale.skipped for scale in scales if scale), default=0)


def state_at(reference: Path, step: int) -> checkpoint.Reader:
    """The reference's state before step `step`."""
    return checkpoint.Reader(checkpoint.at(reference / "checkpoints", step))


def go_to(trainer: Trainer, state: checkpoint.Reader) -> None:
    """Become what the state holds; callbacks that only watch are in none."""
    everyone = trainer.callbacks.by_name
    saved = state.values["callbacks"]
    trainer.callbacks.by_name = {name: c for name, c in everyone.items() if name in saved}
    trainer.load(state)
    trainer.load_callbacks(state)
    trainer.callbacks.by_name = everyone


def step_locked(
    trainer: Trainer, reference: Path, steps: int, *, backwards: bool = False
) -> Differences:
    """From each reference state take one step, and compare all that it computes and leaves (collective).

    Args:
        backwards: whether to begin with the last state, so that what a model keeps to itself is not as it was.
    """
    found: Differences = {}
    kept = Gradients()
    watch(trainer, kept)
    for step in sorted(range(steps), reverse=backwards):
        before = state_at(reference, step)
        go_to(trainer, before)
        trainer.train(until=step + 1)
        expected = load_file(reference / f"step-{step}.safetensors")
        mine: Differences = {}
        for micro in trainer.batch:
            same = expected[f"ids/{micro.index}"].tolist() == micro.ids.tolist()
            mine[f"{step}/samples/micro-batch {micro.index}"] = [0.0 if same else 1.0, 1.0]
        for i, turn in enumerate(kept.take()):
            # a player may have several turns
            mine = _largest([mine, _turn_differences(f"{step}", i, turn, expected)])
        found |= _largest(trainer.world.gather(mine))
        found |= _state_differences(trainer, f"{step}", before, state_at(reference, step + 1))
    del trainer.callbacks.by_name["Gradients"]
    return dict(sorted(found.items(), key=lambda entry: int(entry[0].partition("/")[0])))


def free_running(trainer: Trainer, reference: Path, steps: int, losses: list[float]) -> Differences:
    """Train `steps` steps and compare every loss, and the weights at the end (collective).

    Weights and buffers at the start are compared too: they must be those of one process, bit for bit.
    """
    found = _all_weights(trainer, "0/start", state_at(reference, 0))
    kept = Losses()
    watch(trainer, kept)
    trainer.train(until=steps)
    del trainer.callbacks.by_name["Losses"]
    names = [f"loss {i}" for i in range(len(losses))]
    for name, mine, truth in zip(names, kept.losses, losses, strict=True):
        found[f"free/loss/{name}"] = [abs(mine - truth) / max(abs(truth), 1.0), 1.0]
    return found | _all_weights(trainer, "free/weights", state_at(reference, steps))


def nondeterministic_operations(step: Callable[[], None]) -> list[str]:
    """Which operations of a training step have no deterministic kernel on this device."""
    before = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned_only)
    lines = [str(warning.message) for warning in caught]
    said = (re.split(" does not have | defaults to ", line) for line in lines)
    return sorted({words[0] for words in said if "deterministic" in words[-1]})


# ---------------------------------------------------------------------------------------------------------------------


def _turn_differences(step: str, i: int, turn: Taken, expected: dict[str, Tensor]) -> Differences:
    truth = float(expected[f"{i}/loss"])
    ratio = turn.loss / truth if truth else 1.0
    found = {f"{step}/loss/{turn.player}": [abs(turn.loss - truth) / max(abs(truth), 1.0), ratio]}
    truths = {
        name: expected[f"{i}/gradient/{name}"].to(gradient.device)
        for name, gradient in turn.gradients.items()
    }
    norms = {name: float(true.norm()) for name, true in truths.items()}
    if not all(map(math.isfinite, norms.values())):  # which under fp16 only changes the loss scale
        finite = all(bool(gradient.isfinite().all()) for gradient in turn.gradients.values())
        return found | {f"{step}/gradient/{turn.player}, overflowed": [float(finite), 1.0]}
    for name, gradient in turn.gradients.items():
        true = truths[name]
        scale = max(norms[name], SMALL * math.hypot(*norms.values()))
        factor = float((gradient * true).sum()) / max(float((true * true).sum()), 1e-30)
        found[f"{step}/gradient/{name}"] = [_over(float((gradient - true).norm()), scale), factor]
    return found


def _over(difference: float, scale: float) -> float:
    return difference / scale if scale > 0 else float(difference > 0)


def _largest(several: Iterable[Differences]) -> Differences:
    """The largest of each difference."""
    found: Differences = {}
    for one in several:
        for name, pair in one.items():
            if name not in found or not pair[0] <= found[name][0]:  # not a number is the largest
                found[name] = pair
    return found


def _state_differences(
    trainer: Trainer, step: str, before: checkpoint.Reader, after: checkpoint.Reader
) -> Differences:
    """Of everything that a checkpoint holds, relative to what the reference's step changed."""
    sums: dict[str, list[float]] = {}
    for name, part in trainer.slices():
        due = after.read(name, part.start, part.stop).to(part.tensor)
        was = torch.zeros_like(due)  # before a memory's first step there is none
        if name in before.tensors:
            was = before.read(name, part.start, part.stop).to(part.tensor)
        changed, wrong = due - was, part.tensor - due
        products = [(wrong * wrong), (due * due), (changed * changed), changed * (changed + wrong)]
        sums[name] = [float(product.double().sum()) for product in products]
        if part.replicated:
            sums[name] = [value / trainer.world.size for value in sums[name]]
    total: dict[str, list[float]] = {}
    for theirs in trainer.world.gather(sums):
        for name, values in theirs.items():
            entry = total.setdefault(name, [0.0] * 4)
            total[name] = [a + b for a, b in zip(entry, values, strict=True)]
    groups: dict[str, float] = {}
    for name, values in total.items():
        groups[_group(name)] = groups.get(_group(name), 0.0) + values[2]
    found: Differences = {}
    for name, (off, size, change, along) in total.items():
        scale = max(math.sqrt(change), SMALL * math.sqrt(groups[_group(name)]))
        beyond = max(0.0, math.sqrt(off) - ROUNDING * math.sqrt(size))
        found[f"{step}/state/{name}"] = [_over(beyond, scale), along / max(change, 1e-30)]
    return found


def _group(name: str) -> str:
    """The tensors of one kind in one network: `optimizer/exp_avg/critic`."""
    return name.partition(".")[0]


def weight_differences(
    where: str, weights: Mapping[str, Tensor], reader: checkpoint.Reader
) -> Differences:
    """Of whole weights and buffers from those of a checkpoint, relative to their size."""
    truths = {
        name: reader.whole(f"{kind}/{name}").to(tensor.device).float()
        for name, tensor in weights.items()
        for kind in ("weights", "buffers")
        if f"{kind}/{name}" in reader.tensors
    }
    norms = {name: float(true.norm()) for name, true in truths.items()}
    found: Differences = {}
    for name, true in truths.items():
        scale = max(norms[name], SMALL * math.hypot(*norms.values()))
        wrong = float((weights[name].float() - true).norm())
        found[f"{where}/{name}"] = [_over(wrong, scale), 1.0]
    return found


def _all_weights(trainer: Trainer, where: str, reader: checkpoint.Reader) -> Differences:
    mine: Differences = {}
    for player in trainer.engines:
        mine |= weight_differences(where, trainer.full_weights(player), reader)
    return _largest(trainer.world.gather(mine))
