"""The three models in tiny, and what ranks do with them in tests. Ranks import this file by name."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dist_train import checkpoint, faults, run
from dist_train.callbacks import Callback
from dist_train.objectives.classification import Classification
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.testing import Trace
from dist_train.trainer import Trainer
from dist_train.world import World, pin_threads

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
    """A strategy that really shards tiny tensors."""
    return {"name": name, "persistence_threshold": 0} if name == "zero3" else {"name": name}


@contextlib.contextmanager
def trainer_of(
    recipe: Recipe, world: World, directory: Path, micro_order: str = "forward"
) -> Iterator[Trainer]:
    """A trainer at step 0 with the trace of its losses."""
    pin_threads(1, 1)
    if world.is_main and not directory.exists():
        RunDirectory.create_at(directory)
    world.barrier()
    recipe = recipe.set("callbacks.trace", {"name": "dist_train.testing:Trace"})
    trainer = run.build(recipe, world, RunDirectory(directory), micro_order=micro_order)
    trainer.callbacks.call("run_begins", trainer)
    yield trainer
    trainer.callbacks.call("run_ends", trainer)
    trainer.directory.close()


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


class Late(Callback):
    """Rank 1 takes 60 ms longer from step 10 on."""

    def step_begins(self, run: Trainer) -> None:
        if run.step >= 10 and run.world.rank == 1:
            time.sleep(0.06)


class Gradients(Callback):
    """Keeps every turn's whole gradients and loss."""

    priority = 1  # before clipping is decided; it is done later, in the engine's step

    def __init__(self) -> None:
        self.turns: list[tuple[str, float, dict[str, torch.Tensor]]] = []

    def gradients_ready(self, run: Trainer, turn: Any) -> None:
        loss = run.world.sum_(run.losses[turn.player].double().clone())
        gradients = run.engines[turn.player].full_gradients()
        self.turns.append(
            (turn.player, float(loss), {n: g.float().clone() for n, g in gradients.items()})
        )


def reference(model: str, micro_batches: int, data: str, folder: str) -> None:
    """One process: STEPS steps, with a checkpoint and the gradients of every step, and the free-running losses."""
    recipe = tiny_recipe(model, data, micro_batches=micro_batches, strategy="single")
    recipe = recipe.set("callbacks.checkpoint", None)
    world = World()
    with trainer_of(recipe, world, Path(folder)) as trainer:
        kept = Gradients()
        trainer.callbacks.by_name = {"gradients": kept, **trainer.callbacks.by_name}
        for step in range(STEPS):
            trainer.save()
            trainer.train(until=step + 1)
            tensors = {
                f"{i}/{player}/{name}": gradient
                for i, (player, _, gradients) in enumerate(kept.turns)
                for name, gradient in gradients.items()
            }
            losses = {
                f"{i}/{player}/loss": torch.tensor(loss, dtype=torch.float64)
                for i, (player, loss, _) in enumerate(kept.turns)
            }
            save_file({**tensors, **losses}, Path(folder) / f"gradients-{step}.safetensors")
            kept.turns.clear()


def step_locked(
    recipe: Recipe, world: World, folder: Path, reference_folder: Path
) -> dict[str, Any]:
    """From each reference state take one step, and compare its losses and gradients with the reference's.

    Returns the largest differences: of a loss, relative to it, and of a gradient, relative to the tensor's norm, or to
    1 % of the global norm where that is more: what cancels to almost 0 (a bias before a norm) is mostly rounding.
    """
    worst = {"loss": 0.0, "gradient": 0.0, "where": ""}
    recipe = recipe.set("callbacks.checkpoint", None)
    with trainer_of(recipe, world, folder) as trainer:
        kept = Gradients()
        trainer.callbacks.by_name = {"gradients": kept, **trainer.callbacks.by_name}
        for step in range(STEPS):
            trainer.load_weights(
                checkpoint.Reader(checkpoint.at(reference_folder / "checkpoints", step))
            )
            trainer.step = step
            trainer.train(until=step + 1)
            expected = load_file(reference_folder / f"gradients-{step}.safetensors")
            for i, (player, loss, gradients) in enumerate(kept.turns):
                true_loss = float(expected[f"{i}/{player}/loss"])
                worst["loss"] = max(worst["loss"], abs(loss - true_loss) / max(abs(true_loss), 1.0))
                truth = {name: expected[f"{i}/{player}/{name}"] for name in gradients}
                whole = torch.stack([g.norm() for g in truth.values()]).norm()
                for name, gradient in gradients.items():
                    scale = torch.maximum(truth[name].norm(), 0.01 * whole)
                    difference = float((gradient - truth[name]).norm() / scale)
                    if difference > worst["gradient"]:
                        worst |= {"gradient": difference, "where": f"step {step}, {player}/{name}"}
            kept.turns.clear()
    return worst


def free_running(
    recipe: Recipe, world: World, folder: Path, micro_order: str = "forward"
) -> list[float]:
    """The global losses of STEPS steps, turn by turn."""
    with trainer_of(
        recipe.set("callbacks.checkpoint", None), world, folder, micro_order
    ) as trainer:
        kept = Losses()
        trainer.callbacks.by_name["losses"] = kept
        trainer.train()
    return kept.losses


class Losses(Callback):
    """Keeps the global loss of every turn."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def step_ends(self, run: Trainer) -> None:
        for player in sorted(run.losses):
            self.losses.append(float(run.world.sum_(run.losses[player].double().clone())))


def parity_grid(cases: list[list[Any]], data: str, folder: str) -> dict[str, Any]:
    """Every (model, strategy, accumulation) of `cases` in this world: step-locked and free-running."""
    world = World.join(group=True)
    found = {}
    for model, name, accumulation in cases:
        micro_batches = accumulation * world.size
        recipe = tiny_recipe(model, data, micro_batches=micro_batches, strategy=strategy(name))
        case = f"{model}-{name}-{accumulation}"
        truth = Path(folder) / f"{model}-{micro_batches}"
        locked = step_locked(recipe, world, Path(folder) / f"locked-{case}", truth)
        losses = free_running(recipe, world, Path(folder) / f"free-{case}")
        found[case] = {**locked, "losses": losses}
    world.leave()
    return found


@contextlib.contextmanager
def planted(bug: str) -> Iterator[None]:
    """Break the engine in a way that people have broken theirs."""
    from dist_train.buckets import Buckets
    from dist_train.engine.zero import ZeroEngine

    kept = ZeroEngine._stream, Buckets._launch, Buckets.finish
    if bug == "wrong loss scale":

        def _stream(self: Any, loss: Any, last: bool) -> None:
            kept[0](self, loss / self.world.size, last)

        ZeroEngine._stream = _stream  # type: ignore[method-assign]
    elif bug == "forgotten reduction":

        class Done:
            def wait(self) -> None: ...

        Buckets._launch = lambda self: self.work.append(Done())  # type: ignore[method-assign]
    elif bug == "local clip norm":

        def finish(self: Any) -> None:
            for flat in self.flat:
                flat.mul_(torch.clamp(0.5 / self.world.size / flat.norm(), max=1.0))
            kept[2](self)

        Buckets.finish = finish  # type: ignore[method-assign]
        Buckets._ready = lambda self, index: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        ZeroEngine._stream, Buckets._launch, Buckets.finish = kept  # type: ignore[method-assign]


def broken_grid(cases: list[list[str]], data: str, folder: str) -> dict[str, Any]:
    """Step-locked differences of each (bug, model, strategy)."""
    world = World.join(group=True)
    found = {}
    for number, (bug, model, name) in enumerate(cases):
        recipe = tiny_recipe(model, data, micro_batches=world.size, strategy=strategy(name))
        with planted(bug):
            found[f"{bug}-{model}-{name}"] = step_locked(
                recipe,
                world,
                Path(folder) / f"broken-{number}",
                Path(folder) / f"{model}-{world.size}",
            )
    world.leave()
    return found


def references(models: list[str], counts: list[int], data: str, folder: str) -> dict[str, Any]:
    """The reference runs, and the free-running losses of one process with its micro-batches in each order."""
    found = {}
    for model in models:
        for count in counts:
            path = Path(folder) / f"{model}-{count}"
            reference(model, count, data, str(path))
            for order in ("forward", "reversed"):
                recipe = tiny_recipe(model, data, micro_batches=count, strategy="single")
                free = Path(folder) / f"free-{model}-{count}-{order}"
                found[f"{model}-{count}-{order}"] = free_running(recipe, World(), free, order)
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
            kept = Losses()
            trainer.callbacks.by_name["losses"] = kept
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


__all__ = ["Trace"]


def confusion_run(data: str, folder: str) -> None:
    """A few steps and one evaluation with its confusion matrix."""
    recipe = tiny_recipe("resnet", data, duration="3 steps", callbacks__confusion={})
    evaluate = {"split": "test", "every": "3 steps", "metrics": ["accuracy"], "micro_batch": 7}
    run.train(recipe.set("evaluate", evaluate), run_dir=folder)
