"""What the trainer costs over a raw torch loop: the same model, batches and fused optimiser, interleaved.

    python benchmarks/trainer.py [--json]

Ours runs with console, journal, clipping by norm, cosine decay and an average of the weights; the raw loop has none of
them (`bare`), or does the same by hand (`by hand`: clip_grad_norm_, LambdaLR, AveragedModel, a line each 10 steps). The
model is small, so that a step costs little and the trainer shows. One thread.
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
from torch import nn

from dist_train import run
from dist_train.data_shards.loader import MicroBatch
from dist_train.data_shards.write import write_shards
from dist_train.optimizers import adamw
from dist_train.parameter_groups import parameter_groups
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.trainer import Trainer
from dist_train.world import World

STEPS, ROUNDS, BATCH = 400, 7, 32


class MLP(nn.Module):
    """Images (B, 1, 8, 8) -> logits (B, 10)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)
        )

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


def make_trainer(folder: Path) -> Trainer:
    """A trainer of the MLP with the callbacks that the figure names."""
    images = (
        (("train"), f"{i:04d}", {"image.npy": np.zeros((8, 8), np.uint8), "cls": i % 10})
        for i in range(64)
    )
    write_shards(folder / "data", "zeros", images, classes=list("0123456789"))
    recipe = Recipe(
        duration=f"{2 * STEPS * (ROUNDS + 1)} steps",
        strategy="single",
        threads=1,
        data={"path": str(folder / "data"), "global_batch": BATCH, "micro_batch": BATCH},
        model={"name": "benchmarks.trainer:MLP"},
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
    trainer = run.build(recipe, World(), directory, model=MLP())
    trainer.data = Prepared()
    trainer.callbacks.call("run_begins", trainer)
    return trainer


def bare_loop(batches: list[MicroBatch]) -> Callable[[], None]:
    model = MLP()
    optimizer = adamw(parameter_groups(model.named_parameters()), 1e-3)

    def loop() -> None:
        for step in range(STEPS):
            micro = batches[step % len(batches)]
            loss = nn.functional.cross_entropy(model(micro["image"]), micro["label"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return loop


def by_hand_loop(batches: list[MicroBatch], log: Path) -> Callable[[], None]:
    model = MLP()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS * ROUNDS)

    def loop() -> None:
        with log.open("a") as file:
            for step in range(STEPS):
                micro = batches[step % len(batches)]
                loss = nn.functional.cross_entropy(model(micro["image"]), micro["label"])
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                average.update_parameters(model)
                if (step + 1) % 10 == 0:
                    row = {"step": step, "loss": loss.item(), "norm": norm.item()}
                    file.write(json.dumps(row) + "\n")

    return loop


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder))

        def ours() -> None:
            trainer.train(until=trainer.step + STEPS)

        def alone() -> None:
            callbacks, trainer.callbacks.by_name = trainer.callbacks.by_name, {}
            ours()
            trainer.callbacks.by_name = callbacks
            trainer.meter.flush(trainer.world)

        loops = {
            "bare": bare_loop(trainer.data.micro),
            "by hand": by_hand_loop(trainer.data.micro, Path(folder) / "log.jsonl"),
            "ours": ours,
            "ours, no callbacks": alone,
        }
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for round_ in range(ROUNDS + 1):
            for name, loop in loops.items():
                began = time.perf_counter()
                loop()
                if round_:  # the first warms up
                    seconds[name].append(time.perf_counter() - began)
    step = {name: statistics.median(times) / STEPS * 1e6 for name, times in seconds.items()}
    found = {
        "microseconds_a_step": {name: round(value, 1) for name, value in step.items()},
        "cost_over_bare": round(step["ours"] - step["bare"], 1),
        "cost_over_by_hand": round(step["ours"] - step["by hand"], 1),
        "ratio_to_by_hand": round(step["ours"] / step["by hand"], 3),
    }
    if arguments.json:
        print(json.dumps(found))
        return
    for name, value in found["microseconds_a_step"].items():  # type: ignore[attr-defined]
        print(f"{name:18} {value:8.1f} us a step")
    print(f"the trainer costs {found['cost_over_bare']} us a step over the bare loop,")
    print(
        f"{found['cost_over_by_hand']} us over the loop that does the same by hand (ratio {found['ratio_to_by_hand']})"
    )


if __name__ == "__main__":
    main()
