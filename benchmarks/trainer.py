"""What the trainer costs over a raw torch loop: the same model, batches and fused optimiser, interleaved.

    python benchmarks/trainer.py [--json]

Ours runs with console, journal, clipping by norm, cosine decay and an average of the weights; the raw loop has none of
them (`bare`), or does the same by hand (`by hand`: clip_grad_norm_, CosineAnnealingLR, AveragedModel, a line each 10
steps), or by hand with Accelerate around model, optimiser and schedule (`accelerate`). One model is tiny, so that a
step costs little and the trainer shows; the other is not. One thread, in CPU time, which other processes disturb less
than they do a clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from dist_train import assembly
from dist_train.data_shards.loader import MicroBatch
from dist_train.data_shards.write import write_shards
from dist_train.optimizers import adamw
from dist_train.parameter_groups import parameter_groups
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.trainer import Trainer
from dist_train.world import World

BATCH, ROUNDS = 32, 7
SIZES = {"tiny": (64, 1, 400), "small": (512, 4, 40)}
"""{model: (width, hidden layers, steps of a round)}: 4,810 and 826,378 weights."""


class MLP(nn.Module):
    """Images (B, 1, 8, 8) -> logits (B, 10)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        hidden = (
            layer
            for i in range(depth)
            for layer in (nn.Linear(width if i else 64, width), nn.ReLU())
        )
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)


class Prepared:
    """Batches that are in memory already, so that only the trainer is measured."""

    def __init__(self, count: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.micro = [
            MicroBatch(
                0,
                np.arange(BATCH),
                {
                    "image": torch.randn(BATCH, 1, 8, 8, generator=generator),
                    "label": torch.randint(0, 10, (BATCH,), generator=generator),
                },
                BATCH,
            )
            for _ in range(count)
        ]

    def from_(self, step: int, stop: int) -> Any:
        for now in range(step, stop):
            yield now, [self.micro[now % len(self.micro)]]


def make_trainer(folder: Path, model: nn.Module, steps: int) -> Trainer:
    """A trainer of the MLP with the callbacks that the figure names."""
    images = (
        (("train"), f"{i:04d}", {"image.npy": np.zeros((8, 8), np.uint8), "cls": i % 10})
        for i in range(64)
    )
    write_shards(folder / "data", "zeros", images, classes=list("0123456789"))
    recipe = Recipe(
        duration=f"{2 * steps * (ROUNDS + 1)} steps",
        strategy="single",
        threads=1,
        data={"path": str(folder / "data"), "global_batch": BATCH, "micro_batch": BATCH},
        model={"name": "benchmarks.trainer:MLP", "width": 64, "depth": 1},
        objective={"name": "classification"},
        optimizer={"name": "adamw", "learning_rate": 1e-3},
        callbacks={
            "learning_rate_decay": {"schedule": "cosine"},
            "clip_gradients": {"norm": 1.0},
            "ema": {"decay": 0.999},
            "console": {},
        },
    )
    directory = RunDirectory.create_at(folder / "run")
    trainer = assembly.build(recipe, World(), directory, model=model)
    trainer.data = Prepared()
    trainer.callbacks.call("run_begins", trainer)
    return trainer


def bare_loop(model: nn.Module, batches: list[MicroBatch], steps: int) -> Callable[[], None]:
    optimizer = adamw(parameter_groups(model.named_parameters()), 1e-3)

    def loop() -> None:
        for step in range(steps):
            micro = batches[step % len(batches)]
            loss = nn.functional.cross_entropy(model(micro["image"]), micro["label"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return loop


def by_hand_loop(
    model: nn.Module, batches: list[MicroBatch], steps: int, log: Path, accelerated: bool = False
) -> Callable[[], None]:
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    optimizer: Any = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * ROUNDS)
    parameters, live = list(model.parameters()), model
    backward, clip = torch.Tensor.backward, nn.utils.clip_grad_norm_
    if accelerated:
        accelerator = Accelerator(cpu=True)
        live, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        backward, clip = accelerator.backward, accelerator.clip_grad_norm_

    def loop() -> None:
        with log.open("a") as file:
            for step in range(steps):
                micro = batches[step % len(batches)]
                loss = nn.functional.cross_entropy(live(micro["image"]), micro["label"])
                backward(loss)
                norm = clip(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                average.update_parameters(model)
                if (step + 1) % 10 == 0:
                    row = {"step": step, "loss": loss.item(), "norm": norm.item()}
                    file.write(json.dumps(row) + "\n")

    return loop


def measure(width: int, depth: int, steps: int) -> dict[str, float]:
    """Microseconds a step of each loop."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), MLP(width, depth), steps)

        def ours() -> None:
            trainer.train(until=trainer.step + steps)

        def alone() -> None:
            callbacks, trainer.callbacks.by_name = trainer.callbacks.by_name, {}
            ours()
            trainer.callbacks.by_name = callbacks
            trainer.meter.flush(trainer.world)

        batches = trainer.data.micro
        loops = {
            "bare": bare_loop(MLP(width, depth), batches, steps),
            "by hand": by_hand_loop(MLP(width, depth), batches, steps, Path(folder) / "log.jsonl"),
            "accelerate": by_hand_loop(
                MLP(width, depth), batches, steps, Path(folder) / "other.jsonl", accelerated=True
            ),
            "ours": ours,
            "ours, no callbacks": alone,
        }
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for round_ in range(ROUNDS + 1):
            for name, loop in loops.items():
                began = time.process_time()
                loop()
                if round_:  # the first warms up
                    seconds[name].append(time.process_time() - began)
    return {name: statistics.median(times) / steps * 1e6 for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: measure(*size) for name, size in SIZES.items()}
    if arguments.json:
        print(json.dumps(found))
        return
    for model, step in found.items():
        print(f"{model} model, microseconds a step:")
        for name, value in step.items():
            print(f"  {name:26} {value:8.1f}")
        print(f"  {'ours over bare':26} {step['ours'] - step['bare']:8.1f}")
        print(f"  {'ours / by hand':26} {step['ours'] / step['by hand']:8.3f}")
        print(f"  {'ours / accelerate':26} {step['ours'] / step['accelerate']:8.3f}")


if __name__ == "__main__":
    main()
