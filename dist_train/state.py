"""What of a run a checkpoint holds: all that the next step depends on (laws 4 and 6)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from dist_train import checkpoint
from dist_train.engine import Slice
from dist_train.errors import CheckpointError

if TYPE_CHECKING:
    from dist_train.trainer import Trainer


def save(run: Trainer) -> None:
    """Write a checkpoint of this moment (collective). Refused when the last gradients were not finite."""
    run.heartbeat.enter("save")
    for player, engine in run.engines.items():
        if not torch.isfinite(engine.norm):
            run.refuse_to_go_on(player)
    values = {
        "seconds": run.seconds,
        "meter": run.meter.totals(run.world),
        "best": run.best,
        "stopping": run.stopping,
        "unfinished": run.cut_short,
        "players": {
            name: {"optimizer_steps": e.optimizer_steps()}
            | ({"loss_scale": e.loss_scale.state_dict()} if e.loss_scale else {})
            for name, e in run.engines.items()
        },
        "callbacks": {name: c.state_dict() for name, c in run.callbacks.by_name.items()},
        "data": {"step": run.step, "index": run.fingerprint},
    }
    pairs = list(slices(run))
    # the same on every rank, so each writes a part of them
    shared = [pair for pair in pairs if pair[1].replicated]
    mine = [pair for pair in pairs if not pair[1].replicated and pair[1].written]
    mine += shared[run.world.rank :: run.world.size]
    checkpoint.save(run.directory.checkpoints, run.step, mine, values, run.world)
    run.saved = run.step


def load(run: Trainer, reader: checkpoint.Reader) -> None:
    """Become the run that the checkpoint holds; callbacks' tensors follow in `load_callbacks`."""
    values = reader.values
    if values["data"]["index"] != run.fingerprint:
        raise CheckpointError(
            f"{reader.path}: was trained on other shards (index {values['data']['index'][:12]},"
            f" now {run.fingerprint[:12]})"
        )
    load_weights(run, reader)
    run.memory.load(reader)
    run.step = run.saved = reader.step
    run.seconds, run.best, run.stopping = (
        values["seconds"],
        values["best"],
        values["stopping"],
    )
    run.cut_short = values.get("unfinished")
    run.meter.restore(values["meter"], run.world)
    for name, callback in run.callbacks.by_name.items():
        if name not in values["callbacks"]:
            raise CheckpointError(f"{reader.path}: holds no state of callback '{name}'")
        callback.load_state_dict(values["callbacks"][name])


def load_weights(run: Trainer, reader: checkpoint.Reader) -> None:
    """Take every player's weights, optimiser and buffers from a checkpoint."""
    for name, engine in run.engines.items():
        for full_name, part in engine.slices():
            reader.fill(full_name, part)
        values = reader.values["players"][name]
        engine.set_optimizer_steps(values["optimizer_steps"])
        if engine.loss_scale and "loss_scale" in values:  # not after a run in another precision
            engine.loss_scale.load_state_dict(values["loss_scale"])
        engine.publish()


def load_callbacks(run: Trainer, reader: checkpoint.Reader) -> None:
    """Take the callbacks' tensors from a checkpoint; after `run_begins`, which made room for them."""
    for instance, callback in run.callbacks.by_name.items():
        for name, part in callback.slices():
            reader.fill(f"callbacks/{instance}/{name}", part)


def slices(run: Trainer) -> Iterator[tuple[str, Slice]]:
    for engine in run.engines.values():
        yield from engine.slices()
    yield from run.memory.slices()
    for instance, callback in run.callbacks.by_name.items():
        for name, part in callback.slices():
            yield f"callbacks/{instance}/{name}", part
