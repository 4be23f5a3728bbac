"""The loop: fetch, forward, backward, reduce, step. Everything else is a callback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_train import checkpoint, randomness, unfinished
from dist_train.callbacks import Callbacks, Hook
from dist_train.data_shards.loader import MicroBatch
from dist_train.duration import Every
from dist_train.engine import Engine, Slice
from dist_train.errors import CheckpointError, Interrupted, UserError, nearest
from dist_train.faults import faultpoint
from dist_train.heartbeat import Heartbeat
from dist_train.interruption import Interruption
from dist_train.memory import SlotMemory
from dist_train.meter import Meter
from dist_train.metrics import Metric, figures
from dist_train.networks import Networks
from dist_train.objectives import Objective, Turn
from dist_train.world import World

if TYPE_CHECKING:
    from dist_train.recipe import Recipe
    from dist_train.run_directory import RunDirectory


HOOKS = ("step_begins", "gradients_ready", "turn_ends", "step_ends")
"""Those of every step: which callbacks have them is looked up when `train` begins."""


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
        self._ending = ""  # the callback whose `step_ends` runs
        self.cut_short: dict[str, Any] | None = None
        self._networks = {
            name: player for player, specs in recipe.networks.items() for name in specs
        }
        slots = recipe.data.global_batch // recipe.data.micro_batch // world.size
        self.memory = SlotMemory(range(world.rank * slots, (world.rank + 1) * slots), world.device)
        self._losses: dict[str, list[tuple[Tensor, float | Tensor]]] = {}
        self._reversed = micro_order == "reversed"
        self._weight_is_constant = objective.constant_weight()

    # -- the loop ----------------------------------------------------------------------------------------------------

    def train(self, until: int | None = None) -> None:
        """Run from the present step to the end; or to step `until`, and end there as at the end."""
        self.until = min(self.total_steps, until or self.total_steps)
        self._finish_step()
        if self.stopping:
            return
        step_begins, gradients_ready, turn_ends, step_ends = map(self.callbacks.of, HOOKS)
        for step, batch in self._fetch():
            self.heartbeat.enter("callbacks")
            self.batch, self.turns, self._losses = batch, [], {}
            if len(batch) > 1:
                self.meter.mark()
            for micro in batch:
                self.memory.lend(micro)
            for hook in step_begins.values():
                hook(self)
            for turn in self.objective.turns(step):
                self.turns.append(turn)
                engine, total = self.engines[turn.player], self._batch_weight(batch)
                engine.begin_turn(turn.index)
                for micro in batch:
                    if micro is not batch[0] and self.interruption.reached():
                        self._abandon_step(turn)
                    self.heartbeat.enter("forward")
                    randomness.reseed(self.seed, step, turn.index, micro.index)
                    seen = self.seen_by(turn)
                    with engine.loss_context():
                        loss, logged = self.objective.loss(turn, seen, micro, self.scalars)
                    self.memory.check(micro)
                    self.heartbeat.enter("backward")
                    share = self.objective.weight(micro) / total
                    engine.backward(loss, share, last=micro is batch[-1])
                    self._note(turn, loss, logged, share)
                    faultpoint("backward")
                self.heartbeat.enter("reduce")
                engine.reduce()
                self.heartbeat.enter("step")
                faultpoint("reduce")
                for hook in gradients_ready.values():
                    hook(self, turn)
                engine.step()
                faultpoint("step")
                for hook in turn_ends.values():
                    hook(self, turn)
            self.step += 1
            self._end_step(step_ends)
            if self.stopping:
                break

    def _end_step(self, step_ends: Mapping[str, Hook], first: str | None = None) -> None:
        """Call `step_ends` of all callbacks, or of those from `first` on."""
        self.heartbeat.enter("callbacks")
        for name, hook in step_ends.items():
            if first in (None, name):
                first, self._ending = None, name
                hook(self)
        self._ending = ""

    def _finish_step(self) -> None:
        """End the step that an interruption has cut short."""
        if self.cut_short is None:
            return
        self.heartbeat.enter("data", self.step)
        [(step, batch)] = self.data.from_(self.step - 1, self.step)
        self.batch = [micro.to(self.world.device) for micro in batch]
        self.turns = self.objective.turns(step)
        losses = unfinished.restore(self, self.cut_short)
        self._losses = {player: [(loss, 1.0)] for player, loss in losses.items()}
        first, self.cut_short = self.cut_short["callback"], None
        self._end_step(self.callbacks.of("step_ends"), first)

    def _fetch(self) -> Iterator[tuple[int, list[MicroBatch]]]:
        batches = iter(self.data.from_(self.step, self.until))
        while True:
            if self.step < self.until and self.interruption.reached():
                self._save_and_leave()
            self.heartbeat.enter("data", self.step + 1)
            try:
                step, batch = next(batches)
            except StopIteration:
                return
            if self.world.device != "cpu":
                batch = [micro.to(self.world.device) for micro in batch]
            yield step, batch[::-1] if self._reversed else batch

    def _abandon_step(self, turn: Turn) -> None:
        """End in the middle of a turn: this step begins again at the next start. Not after a turn that has changed the
        weights, nor where an objective remembers: then the run ends after this step."""
        if turn.index == 0 and self.memory.is_empty:
            self.meter.back_to_mark()
            self._save_and_leave()

    def leave_if_told(self) -> None:
        """Within a `step_ends` that takes long: end here, if a signal has told the run to end (on all ranks alike, so
        all must ask equally often). The next start calls this `step_ends` again, and those after it."""
        if self._ending and self.interruption.reached():
            self.cut_short = unfinished.record(self, self._ending)
            self._save_and_leave()

    def _save_and_leave(self) -> None:
        if self.step != self.saved:
            self.save()
        raise Interrupted(
            f"{self.interruption.reason}: saved at step {self.step} of {self.total_steps},"
            f" go on with: dist-train train {self.directory.path} --resume {self.directory.path}",
            self.interruption.code,
        )

    def _batch_weight(self, batch: list[MicroBatch]) -> float | Tensor:
        """The weight of the global batch, known before backward on every rank (law 3)."""
        if self._weight_is_constant:
            return float(self.global_batch)
        self.heartbeat.enter("reduce")
        weights = [torch.as_tensor(self.objective.weight(micro)) for micro in batch]
        mine = torch.stack(weights).to(self.world.device).double().sum()
        return self.world.sum_(mine).float()

    def _note(
        self, turn: Turn, loss: Tensor, logged: Mapping[str, Tensor], share: float | Tensor
    ) -> None:
        self._losses.setdefault(turn.player, []).append((loss.detach(), share))
        for name, value in logged.items():
            self.meter.add(self.named(turn.player, name), value, share)

    # -- what objectives and callbacks see ---------------------------------------------------------------------------

    def seen_by(self, turn: Turn) -> Networks:
        """The networks as a turn may see them: its own player's live, the others' frozen."""
        return Networks(
            {
                name: self.engines[player].own(name)
                if player == turn.player
                else self.engines[player].frozen(name)
                for name, player in self._networks.items()
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
        averages: Mapping[str, Mapping[str, Tensor]] = {}
        if isinstance(weights, Mapping):
            averages = weights
        elif weights not in (None, "live"):
            averages = self.callback(weights).weights(self)
        return Networks(
            {
                name: torch.no_grad()(
                    self.engines[player].evaluated(name, averages.get(player), together=together)
                )
                for name, player in self._networks.items()
            }
        )

    @property
    def losses(self) -> dict[str, Tensor]:
        """This rank's share of the present step's loss, by player."""
        return {
            player: torch.stack([loss * share for loss, share in parts]).sum()
            for player, parts in self._losses.items()
        }

    def callback(self, name: str) -> Any:
        """The callback instance called `name`."""
        if name not in self.callbacks.by_name:
            names = self.callbacks.by_name
            raise UserError(
                f"callbacks: there is no '{name}'{nearest(name, names)} (there are {', '.join(names)})"
            )
        return self.callbacks.by_name[name]

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

    def images(self, name: str, images: Tensor, caption: str = "") -> None:
        """Write a grid of images (N, C, H, W) in [0, 1] to `samples/`, and name it in this step's row."""
        from dist_train.callbacks.samples import save_grid

        file = f"{name.replace('/', '-')}-{self.step:08d}.png"
        if self.world.is_main:
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

    def measure(self, weights: str | None = None) -> dict[str, float]:
        """The recipe's metrics over its evaluation split, each sample once, the same on any number of ranks; those of
        further sets as SET/METRIC."""
        networks = self.view(weights, together=True)
        results = self._measured(networks, self.evaluation, told=True)
        for name, batches in self.evaluation_sets.items():
            found = self._measured(networks, batches, told=False)
            results |= {f"{name}/{metric}": value for metric, value in found.items()}
        return results

    def _measured(self, networks: Networks, batches: Any, told: bool) -> dict[str, float]:
        """The metrics over one set; callbacks are told of each batch of the first."""
        for metric in self.metrics.values():
            metric.reset()
        for micro in batches:
            self.leave_if_told()
            self.heartbeat.enter("evaluate")
            micro = micro.to(self.world.device)
            randomness.reseed(self.seed, self.step, randomness.EVALUATION, micro.index)
            with torch.no_grad():
                outputs = self.objective.evaluate(networks, micro)
            for metric in self.metrics.values():
                metric.update(outputs, micro)
            if told:
                self.callbacks.call("evaluation_batch", self, outputs, micro)
            faultpoint("evaluate")
        return figures(self.metrics, self.world)

    # -- state -------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this moment (collective). Refused when the last gradients were not finite."""
        self.heartbeat.enter("save")
        for player, engine in self.engines.items():
            if not torch.isfinite(engine.norm):
                self.refuse_to_go_on(player)
        values = {
            "seconds": self.seconds,
            "meter": self.meter.totals(self.world),
            "best": self.best,
            "stopping": self.stopping,
            "unfinished": self.cut_short,
            "players": {
                name: {"optimizer_steps": e.optimizer_steps()}
                | ({"loss_scale": e.loss_scale.state_dict()} if e.loss_scale else {})
                for name, e in self.engines.items()
            },
            "callbacks": {name: c.state_dict() for name, c in self.callbacks.by_name.items()},
            "data": {"step": self.step, "index": self.fingerprint},
        }
        pairs = list(self.slices())
        # the same on every rank, so each writes a part of them
        shared = [pair for pair in pairs if pair[1].replicated]
        mine = [pair for pair in pairs if not pair[1].replicated and pair[1].written]
        mine += shared[self.world.rank :: self.world.size]
        checkpoint.save(self.directory.checkpoints, self.step, mine, values, self.world)
        self.saved = self.step

    def load(self, reader: checkpoint.Reader) -> None:
        """Become the run that the checkpoint holds; callbacks' tensors follow in `load_callbacks`."""
        values = reader.values
        if values["data"]["index"] != self.fingerprint:
            raise CheckpointError(
                f"{reader.path}: was trained on other shards (index {values['data']['index'][:12]},"
                f" now {self.fingerprint[:12]})"
            )
        self.load_weights(reader)
        self.memory.load(reader)
        self.step = self.saved = reader.step
        self.seconds, self.best, self.stopping = (
            values["seconds"],
            values["best"],
            values["stopping"],
        )
        self.cut_short = values.get("unfinished")
        self.meter.restore(values["meter"], self.world)
        for name, callback in self.callbacks.by_name.items():
            if name not in values["callbacks"]:
                raise CheckpointError(f"{reader.path}: holds no state of callback '{name}'")
            callback.load_state_dict(values["callbacks"][name])

    def load_weights(self, reader: checkpoint.Reader) -> None:
        """Take every player's weights, optimiser and buffers from a checkpoint."""
        for name, engine in self.engines.items():
            for full_name, part in engine.slices():
                reader.fill(full_name, part)
            values = reader.values["players"][name]
            engine.set_optimizer_steps(values["optimizer_steps"])
            if engine.loss_scale and "loss_scale" in values:  # not after a run in another precision
                engine.loss_scale.load_state_dict(values["loss_scale"])
            engine.publish()

    def load_callbacks(self, reader: checkpoint.Reader) -> None:
        """Take the callbacks' tensors from a checkpoint; after `run_begins`, which made room for them."""
        for instance, callback in self.callbacks.by_name.items():
            for name, part in callback.slices():
                reader.fill(f"callbacks/{instance}/{name}", part)

    def slices(self) -> Iterator[tuple[str, Slice]]:
        for engine in self.engines.values():
            yield from engine.slices()
        yield from self.memory.slices()
        for instance, callback in self.callbacks.by_name.items():
            for name, part in callback.slices():
                yield f"callbacks/{instance}/{name}", part
