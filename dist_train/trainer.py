"""A run in progress: its parts, where it is, and what objectives and callbacks see and ask of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_train import checkpoint, evaluation, state
from dist_train.callbacks import Callback, Callbacks
from dist_train.data_shards.loader import MicroBatch
from dist_train.duration import Every
from dist_train.engine import Engine, Slice
from dist_train.errors import UserError, nearest
from dist_train.heartbeat import Heartbeat
from dist_train.interruption import Interruption
from dist_train.loop import Loop
from dist_train.memory import SlotMemory
from dist_train.meter import Meter
from dist_train.metrics import Metric
from dist_train.networks import Networks
from dist_train.objectives import Objective, Turn
from dist_train.world import World

if TYPE_CHECKING:
    from dist_train.recipe import Recipe
    from dist_train.run_directory import RunDirectory


class Trainer:
    """A run in progress, as callbacks see it.

    Attributes:
        step: completed steps: the index of the present step until its `step_ends`, which already counts it.
        engines: by player. scalars: scheduled values by name, as objectives see them.
        batch: this rank's micro-batches of the present step. turns: those of the step that have begun.
        best: `{"step", "value"}` of the best evaluation so far. stopping: why the run ends early, or "".
        saved: the step of the newest checkpoint. interruption: whether a signal has told the run to end.
        cut_short: what is left to do of the present step, where an interruption has cut it short.
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        engines: dict[str, Engine],
        objective: Objective,
        callbacks: Callbacks,
        data: Any,
        evaluation: Any,
        metrics: dict[str, Metric],
        directory: RunDirectory,
        *,
        total_steps: int,
        samples_per_epoch: int,
        tokens_per_epoch: int | None = None,
        fingerprint: str = "",
        micro_order: str = "forward",
        evaluation_sets: Mapping[str, Any] | None = None,
    ) -> None:
        self.recipe, self.world, self.engines, self.objective = recipe, world, engines, objective
        self.callbacks, self.directory = callbacks, directory
        self.data, self.evaluation, self.metrics = data, evaluation, metrics
        self.evaluation_sets = dict(evaluation_sets or {})
        self.total_steps, self.fingerprint = total_steps, fingerprint
        self.samples_per_epoch, self.tokens_per_epoch = samples_per_epoch, tokens_per_epoch
        self.global_batch: int = recipe.data.global_batch
        self.seed = recipe.seed
        self.step = 0
        self.until = total_steps
        self.seconds = 0.0
        self.scalars: dict[str, float] = {}
        self.meter = Meter()
        self.row: dict[str, Any] = {}
        self.batch: list[MicroBatch] = []
        self.turns: list[Turn] = []
        self.best: dict[str, Any] = {}
        self.stopping = ""
        self.heartbeat = Heartbeat()
        self.interruption = Interruption(world)
        self.saved = 0
        self.cut_short: dict[str, Any] | None = None
        self.networks = {
            name: player for player, specs in recipe.networks.items() for name in specs
        }
        slots = recipe.data.global_batch // recipe.data.micro_batch // world.size
        self.memory = SlotMemory(range(world.rank * slots, (world.rank + 1) * slots), world.device)
        self.loop = Loop(self, micro_order)

    def train(self, until: int | None = None) -> None:
        """Run from the present step to the end; or to step `until`, and end there as at the end."""
        self.loop.train(until)

    # -- what objectives and callbacks see ---------------------------------------------------------------------------

    def seen_by(self, turn: Turn) -> Networks:
        """The networks as a turn may see them: its own player's live, the others' frozen."""
        return Networks(
            {
                name: self.engines[player].own(name)
                if player == turn.player
                else self.engines[player].frozen(name)
                for name, player in self.networks.items()
            }
        )

    def view(
        self,
        weights: str | Mapping[str, Mapping[str, Tensor]] | None = None,
        *,
        together: bool = False,
    ) -> Networks:
        """All networks in evaluation mode, without gradients (collective). `weights`: None or "live" for the present
        ones, the name of a callback that averages them, or whole ones by player and name. `together`: all ranks will
        call them equally often, so that it may be gathered layer by layer."""
        return evaluation.view(self, weights, together=together)

    @property
    def losses(self) -> dict[str, Tensor]:
        """This rank's share of the present step's loss, by player."""
        return self.loop.losses

    def callback(self, name: str) -> Any:
        """The callback instance called `name`."""
        if name not in self.callbacks.by_name:
            names = self.callbacks.by_name
            raise UserError(
                f"callbacks: there is no '{name}'{nearest(name, names)} (there are {', '.join(names)})"
            )
        return self.callbacks.by_name[name]

    def check_weights(self, name: str, where: str) -> None:
        """UserError unless `name` is "live" or that of a callback that keeps weights."""
        if name != "live" and type(self.callback(name)).weights is Callback.weights:
            raise UserError(f"{where}: got '{name}', expected 'live' or a callback that averages")

    def full_weights(self, player: str) -> dict[str, Tensor]:
        """Weights and buffers of a player by name, whole, right under any strategy (collective)."""
        return self.engines[player].full_weights()

    def named(self, player: str, name: str) -> str:
        """`loss` for the only player, `critic/loss` where there are several."""
        return name if len(self.engines) == 1 else f"{player}/{name}"

    def log(self, name: str, value: float | Tensor, count: float | Tensor = 1.0) -> None:
        """Add a value to the mean that this log window's row will show (over all ranks, weighted by `count`)."""
        self.meter.add(name, value, count)

    def record(self, name: str, value: Any) -> None:
        """Put a value that all ranks agree on into this step's row."""
        self.row[name] = value

    def images(self, name: str, images: Tensor | None, caption: str = "") -> None:
        """Write a grid of images (N, C, H, W) in [0, 1] to `samples/`, and name it in this step's row. All ranks call
        it; those of rank 0 are written, others may have none."""
        from dist_train.callbacks.samples import save_grid

        file = f"{name.replace('/', '-')}-{self.step:08d}.png"
        if self.world.is_main:
            assert images is not None
            save_grid(self.directory.samples / file, images)
        self.row.setdefault("images", {})[name] = f"samples/{file}"
        if caption:
            self.row.setdefault("captions", {})[name] = caption

    def every(self, interval: Every | str) -> bool:
        """Whether an interval ("100 steps", "1 epoch") has a boundary at this step."""
        every = Every.parse(interval) if isinstance(interval, str) else interval
        return every.fires(
            self.step,
            samples=self.samples_per_epoch,
            global_batch=self.global_batch,
            tokens=self.tokens_per_epoch,
        )

    def stop(self, reason: str) -> None:
        """End the run after this step; all ranks must decide alike."""
        self.stopping = reason

    def refuse_to_go_on(self, player: str) -> None:
        """End the run, on all ranks alike, because a player's gradients were not finite."""
        last = checkpoint.steps(self.directory.checkpoints)
        back = (
            f"go back to the checkpoint of step {last[-1]}"
            if last
            else "there is no checkpoint yet"
        )
        raise RuntimeError(
            f"step {self.step}: the gradients of '{player}' are not finite; {back},"
            " with a lower learning rate or clip_gradients"
        )

    @property
    def last_row(self) -> int:
        """The step of the last row that an unbroken run would have at this point."""
        return self.cut_short["last_row"] if self.cut_short else self.step

    @property
    def is_last(self) -> bool:
        """Whether no step follows."""
        return self.step >= self.until or bool(self.stopping)

    @property
    def evaluation_counts(self) -> bool:
        """Whether an unbroken run evaluates at this step too. The evaluation with which an interrupted part ends must
        change nothing: neither the best, nor what counts evaluations."""
        section = self.recipe.evaluate
        return section is not None and (self.every(section.every) or self.step >= self.total_steps)

    @property
    def epoch(self) -> float:
        return self.step * self.global_batch / self.samples_per_epoch

    def evaluate(self, weights: str | None = None) -> dict[str, float]:
        """`measure`, and tell the callbacks, which know by it the best step and when to stop."""
        results = self.measure(weights)
        self.callbacks.call("evaluated", self, results)
        return results

    def leave_if_told(self) -> None:
        """Within a `step_ends` that takes long: end here, if a signal has told the run to end (on all ranks alike, so
        all must ask equally often). The next start calls this `step_ends` again, and those after it."""
        self.loop.leave_if_told()

    def batch_weight(self, batch: list[MicroBatch]) -> float | Tensor:
        """The weight of the global batch, known before backward on every rank (law 3)."""
        if self.objective.constant_weight():
            return float(self.global_batch)
        self.heartbeat.enter("reduce")
        weights = [torch.as_tensor(self.objective.weight(micro)) for micro in batch]
        mine = torch.stack(weights).to(self.world.device).double().sum()
        return self.world.sum_(mine).float()

    def measure(self, weights: str | None = None) -> dict[str, float]:
        """The recipe's metrics over its evaluation split, each sample once, the same on any number of ranks; those of
        further sets as SET/METRIC."""
        return evaluation.measure(self, weights)

    # -- state -------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this moment (collective). Refused when the last gradients were not finite."""
        state.save(self)

    def load(self, reader: checkpoint.Reader) -> None:
        """Become the run that the checkpoint holds; callbacks' tensors follow in `load_callbacks`."""
        state.load(self, reader)

    def load_weights(self, reader: checkpoint.Reader) -> None:
        """Take every player's weights, optimiser and buffers from a checkpoint."""
        state.load_weights(self, reader)

    def load_callbacks(self, reader: checkpoint.Reader) -> None:
        """Take the callbacks' tensors from a checkpoint; after `run_begins`, which made room for them."""
        state.load_callbacks(self, reader)

    def slices(self) -> Iterator[tuple[str, Slice]]:
        """All tensors of a checkpoint, by name."""
        return state.slices(self)
