"""The three models in tiny, and what ranks do with them in tests. Ranks import this file by name."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dist_train import faults, heartbeat, run
from dist_train.callbacks import Callback, stragglers
from dist_train.models.mlp import MLP
from dist_train.objectives.classification import Classification
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.testing import Trace
from dist_train.trainer import Trainer
from dist_train.verify import parity, rank, verdict
from dist_train.world import World

os.fsync = lambda handle: None  # in ranks, too: see conftest.py
MODELS = ("resnet", "transformer", "wgan_gp")
STEPS = 20


def pack_tiny_data(folder: Path) -> None:
    """`folder/digits`: 600 images of 8x8. `folder/text`: 500 pieces of prose, most of 33 bytes, some shorter."""
    from pydoc_data.topics import topics

    from sklearn.datasets import load_digits

    from dist_train.data_shards.write import write_shards

    digits = load_digits()

    def images() -> Iterator[Any]:
        for i in range(600):
            image = (digits.images[i] * 15).astype("uint8")
            split = "test" if i % 10 == 0 else "train"
            yield split, f"{i:05d}", {"image.npy": image, "cls": int(digits.target[i])}

    def pieces() -> Iterator[Any]:
        import numpy as np

        text = topics["assert"].encode() + topics["class"].encode() + topics["function"].encode()
        for i in range(500):
            size = 33 if i % 3 else 5 + i % 29  # unequal lengths in every batch
            piece = np.frombuffer(text[i * 20 : i * 20 + size], dtype=np.uint8)
            yield "test" if i % 10 == 0 else "train", f"{i:05d}", {"tokens.npy": piece}

    write_shards(folder / "digits", "digits", images(), shard_size=150, classes=list("0123456789"))
    write_shards(folder / "text", "text", pieces(), shard_size=120, vocabulary=256)


def tiny_recipe(model: str, data: Path | str, *, micro_batches: int = 4, **settings: Any) -> Recipe:
    """One of MODELS, at a size where a step takes milliseconds, with clipping, decay and an average."""
    recipe: dict[str, Any] = {
        "project": "tests",
        "name": model,
        "seed": 7,
        "duration": f"{STEPS} steps",
        "strategy": "ddp",
        "threads": 1,
        "log": {"every": "3 steps"},
        "data": {
            "path": str(Path(data) / ("text" if model == "transformer" else "digits")),
            "global_batch": 24,
            "micro_batch": 24 // micro_batches,
        },
        "callbacks": {
            "clip_gradients": {"norm": 0.5},
            "learning_rate_decay": {"schedule": "cosine", "warmup": "3 steps"},
            "ema": {"decay": 0.9},
            "checkpoint": {"every": "6 steps", "keep": 2},
        },
    }
    if model == "resnet":
        recipe |= {
            "model": {
                "name": "resnet",
                "depth": 8,
                "width": 4,
                "in_channels": "auto",
                "num_classes": "auto",
            },
            "objective": {"name": "classification"},
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.01,
                "momentum": 0.9,
                "weight_decay": 5e-4,
            },
        }
        recipe["data"]["transforms"] = {"train": [{"name": "random_crop", "size": 8, "padding": 1}]}
    elif model == "transformer":
        recipe |= {
            "model": {
                "name": "transformer",
                "vocab_size": "auto",
                "dim": 16,
                "depth": 2,
                "num_heads": 2,
                "max_length": 32,
                "dropout": 0.1,
            },
            "objective": {"name": "language_modelling"},
            "optimizer": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1},
        }
    else:
        recipe |= {
            "model": {
                "generator": {
                    "name": "conv_generator",
                    "latent_dim": 8,
                    "width": 8,
                    "channels": "auto",
                    "image_size": "auto",
                },
                "critic": {
                    "name": "conv_critic",
                    "width": 8,
                    "channels": "auto",
                    "image_size": "auto",
                },
            },
            "objective": {"name": "wgan_gp", "latent_dim": 8, "critic_steps": 2},
            "optimizer": {"name": "adam", "learning_rate": 1e-4, "betas": [0.5, 0.9]},
        }
        recipe["data"]["scale"] = "signed"
        recipe["callbacks"]["clip_gradients"] = {"norm": 5.0}
    made = Recipe(**recipe)
    for key, value in settings.items():
        made = made.set(key.replace("__", "."), value)
    return made


def strategy(name: str) -> dict[str, Any]:
    """A strategy that really shards tiny tensors, and whose views gather them layer by layer."""
    if name == "fsdp2-hybrid":  # for four ranks
        return {"name": "fsdp2", "shard_degree": 2}
    tiny = {"persistence_threshold": 0, "view_elements": 0} if name == "zero3" else {}
    return {"name": name, **tiny}


def trainer_of(
    recipe: Recipe, world: World, directory: Path, micro_order: str = "forward"
) -> contextlib.AbstractContextManager[Trainer]:
    """A trainer at step 0 with the trace of its losses."""
    traced = recipe.set("callbacks.trace", {"name": "dist_train.testing:Trace"})
    return parity.trainer_of(traced, world, directory, micro_order)


class Interrupted(Classification):
    """Classification with a fault point within the backward pass."""

    def loss(self, *arguments: Any) -> Any:
        loss, logged = super().loss(*arguments)
        loss.register_hook(lambda _: faults.faultpoint("within-backward"))
        return loss, logged


class Mismatched(Callback):
    """After step 5, rank 1 waits for what rank 0 does not send. (Sums of unequal size make gloo abort by itself.)"""

    def step_ends(self, run: Trainer) -> None:
        if run.step == 5 and run.world.rank == 1:
            torch.distributed.recv(torch.zeros(3), src=0)


class StopsOnce(Callback):
    """Rank 0 stops itself after step 9, but not a second time."""

    def __init__(self, mark: str) -> None:
        self.mark = Path(mark)

    def step_ends(self, run: Trainer) -> None:
        if run.step == 9 and run.world.is_main and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)


class Late(Callback):
    """A forward takes 10 ms, and 40 ms on rank 1 from step 10 on; all else takes no time. The clock says so."""

    def run_begins(self, run: Trainer) -> None:
        loss: Any = run.objective.loss
        now = time.perf_counter()

        def late(*arguments: Any) -> Any:
            nonlocal now
            now += 0.04 if run.step >= 10 and run.world.rank == 1 else 0.01
            return loss(*arguments)

        run.objective.loss = late  # type: ignore[method-assign]
        heartbeat.time = stragglers.time = SimpleNamespace(perf_counter=lambda: now)  # type: ignore[assignment]


def bare(recipe: Recipe) -> Recipe:
    """Without checkpoints of its own, as `verify` runs it."""
    return recipe.set("callbacks.checkpoint", None)


def references(cases: dict[str, dict[str, Any]], folder: str, steps: int) -> dict[str, Any]:
    """The losses and the floor of one process, for each {name: recipe's settings}."""
    found = {}
    for name, settings in cases.items():
        plain = (bare(Recipe(**settings)).as_dict(), name, Path.cwd())
        found[name] = rank.reference(plain, str(Path(folder) / name), steps)
    return found


def parity_grid(
    cases: list[list[Any]], truth: dict[str, Any], data: str, folder: str
) -> dict[str, Any]:
    """The differences of every (model, strategy, accumulation) of `cases` in this world, all judged."""
    world = World.join(group=True)
    found = {}
    for model, name, accumulation in cases:
        count = accumulation * world.size
        recipe = tiny_recipe(model, data, micro_batches=count, strategy=strategy(name))
        one = truth[f"{model}-{count}"]
        reference = Path(folder) / f"{model}-{count}" / "reference"
        case = f"{model}-{name}-{accumulation}"
        with parity.trainer_of(bare(recipe), world, Path(folder) / case) as trainer:
            differences = parity.free_running(trainer, reference, one["steps"], one["losses"])
            differences |= parity.step_locked(trainer, reference, one["steps"])
        found[case] = verdict.summary(verdict.judge(differences, one["floor"]), world.size)
    world.leave()
    return found


def planted_grid(cases: list[list[Any]], truth: dict[str, Any], folder: str) -> dict[str, Any]:
    """The verdict on each ("BUG-STRATEGY", name of its reference, settings): the bug is a callback of planted.py."""
    world = World.join(group=True)
    found = {}
    for case, name, settings in cases:
        bug = case.partition("-")[0]
        recipe = bare(Recipe(**settings)).set("callbacks.bug", {"name": f"planted:{bug}"})
        reference = Path(folder) / name / "reference"
        with parity.trainer_of(recipe, world, Path(folder) / f"broken-{case}") as trainer:
            differences = parity.step_locked(trainer, reference, truth[name]["steps"])
        found[case] = verdict.summary(verdict.judge(differences, truth[name]["floor"]), world.size)
    world.leave()
    return found


class Doubled:
    """Batches with every float tensor in float64."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def from_(self, step: int, stop: int) -> Iterator[tuple[int, list[Any]]]:
        for now, batch in self.batches.from_(step, stop):
            yield now, [m._map(lambda t: t.double() if t.is_floating_point() else t) for m in batch]


def in_float64(name: str, data: str, folder: str) -> dict[str, list[float]]:
    """The losses of STEPS steps in float64, by model, under one strategy in this world."""
    world = World.join()
    torch.set_default_dtype(torch.float64)
    found = {}
    for model in MODELS:
        recipe = tiny_recipe(model, data, strategy=name).set("callbacks.checkpoint", None)
        with trainer_of(recipe, world, Path(folder) / f"{name}-{model}") as trainer:
            trainer.data = Doubled(trainer.data)
            kept = parity.Losses()
            parity.watch(trainer, kept)
            trainer.train()
        found[model] = kept.losses
    world.leave()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Runs that are killed and brought back


def train_case(
    settings: dict[str, Any], run_dir: str, fault: str, resume: str | None
) -> dict[str, Any]:
    """Train in this world as the command line does, perhaps with a fault."""
    faults.plan(fault)
    recipe = Recipe(**settings).set("callbacks.trace", {"name": "dist_train.testing:Trace"})
    return run.train(recipe, run_dir=run_dir, resume=resume)


def train_cases(cases: list[list[Any]]) -> None:
    """Several runs one after the other in this world: [settings, run_dir, resume] each."""
    for settings, run_dir, resume in cases:
        train_case(settings, run_dir, "", resume)


def alive() -> MLP:
    """For 8 x 8 digits."""
    return MLP(64, 10, depth=1, width=16)


def half_dead() -> MLP:
    """The same, but half of the hidden units are never above 0."""
    model = alive()
    with torch.no_grad():
        model.hidden[0][0].bias[:8] = -1e3
    return model


def confusion_run(data: str, folder: str) -> None:
    """A few steps and one evaluation with its confusion matrix."""
    recipe = tiny_recipe("resnet", data, duration="3 steps", callbacks__confusion={})
    recipe = recipe.set("callbacks.console", {})
    evaluate = {"split": "test", "every": "3 steps", "metrics": ["accuracy"], "micro_batch": 7}
    run.train(recipe.set("evaluate", evaluate), run_dir=folder)


__all__ = ["RunDirectory", "Trace"]


def scales_in_ranks(data: str, folder: str) -> float:
    """The deviation of the first layer's output over the first micro-batch, at step 0 of a run that plots it."""
    recipe = tiny_recipe("resnet", data, strategy=strategy("zero3"))
    recipe = recipe.set("callbacks.activation_scale", {"every": "100 steps"})
    world = World.join(group=True)
    with trainer_of(recipe, world, Path(folder) / "run") as trainer:
        weight = trainer.full_weights("model")["model.stem.0.weight"]
        trainer.train(until=1)
        first = min(trainer.batch, key=lambda micro: micro.index)
        images = world.agree(first["image"].tolist())
        output = torch.nn.functional.conv2d(torch.tensor(images), weight, padding=1)
        return float(output.std())


class FailsAt(Callback):
    """Raises after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def step_ends(self, run: Trainer) -> None:
        if run.step == self.step:
            raise RuntimeError(f"told to fail at step {self.step}")


class Gate(Callback):
    """Holds some trials of a sweep, each once it has saved `step`, until there is a file `open` or a signal tells it to
    end."""

    priority = 99

    def __init__(self, step: int, trials: list[str], open: str) -> None:
        self.step, self.trials, self.open = step, trials, Path(open)

    def step_ends(self, run: Trainer) -> None:
        if run.step >= self.step and run.directory.path.name[:4] in self.trials:
            while not (self.open.exists() or run.interruption.reason):
                time.sleep(0.02)
