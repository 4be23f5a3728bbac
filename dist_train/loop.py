"""The loop: fetch, forward, backward, reduce, step. Everything else is a callback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_train import randomness, unfinished
from dist_train.callbacks import Hook
from dist_train.data_shards.loader import MicroBatch
from dist_train.errors import Interrupted
from dist_train.faults import faultpoint
from dist_train.objectives import Turn

if TYPE_CHECKING:
    from dist_train.trainer import Trainer

HOOKS = ("step_begins", "gradients_ready", "turn_ends", "step_ends")
"""Those of every step: which callbacks have them is looked up when `train` begins."""


class Loop:
    """Takes a run from step to step, and ends it early where a signal says so.

    Args:
        micro_order: "reversed" takes the micro-batches of each step from the last to the first.
    """

    def __init__(self, run: Trainer, micro_order: str) -> None:
        self.run = run
        self._reversed = micro_order == "reversed"
        self._losses: dict[str, list[tuple[Tensor, float | Tensor]]] = {}
        self._ending = ""  # the callback whose `step_ends` runs

    @property
    def losses(self) -> dict[str, Tensor]:
        """This rank's share of the present step's loss, by player."""
        return {
            player: torch.stack([loss * share for loss, share in parts]).sum()
            for player, parts in self._losses.items()
        }

    def train(self, until: int | None = None) -> None:
        """Run from the present step to the end; or to step `until`, and end there as at the end."""
        run = self.run
        run.until = min(run.total_steps, until or run.total_steps)
        self._finish_step()
        if run.stopping:
            return
        step_begins, gradients_ready, turn_ends, step_ends = map(run.callbacks.of, HOOKS)
        for step, batch in self._fetch():
            run.heartbeat.enter("callbacks")
            run.batch, run.turns, self._losses = batch, [], {}
            if len(batch) > 1:
                run.meter.mark()
            for micro in batch:
                run.memory.lend(micro)
            for hook in step_begins.values():
                hook(run)
            for turn in run.objective.turns(step):
                run.turns.append(turn)
                engine, total = run.engines[turn.player], run.batch_weight(batch)
                engine.begin_turn(turn.index)
                for micro in batch:
                    if micro is not batch[0] and run.interruption.reached():
                        self._abandon_step(turn)
                    run.heartbeat.enter("forward")
                    randomness.reseed(run.seed, step, turn.index, micro.index)
                    seen = run.seen_by(turn)
                    with engine.loss_context():
                        loss, logged = run.objective.loss(turn, seen, micro, run.scalars)
                    run.memory.check(micro)
                    run.heartbeat.enter("backward")
                    share = run.objective.weight(micro) / total
                    engine.backward(loss, share, last=micro is batch[-1])
                    self._note(turn, loss, logged, share)
                    faultpoint("backward")
                run.heartbeat.enter("reduce")
                engine.reduce()
                run.heartbeat.enter("step")
                faultpoint("reduce")
                for hook in gradients_ready.values():
                    hook(run, turn)
                engine.step()
                faultpoint("step")
                for hook in turn_ends.values():
                    hook(run, turn)
            run.step += 1
            self._end_step(step_ends)
            if run.stopping:
                break

    def _end_step(self, step_ends: Mapping[str, Hook], first: str | None = None) -> None:
        """Call `step_ends` of all callbacks, or of those from `first` on."""
        run = self.run
        run.heartbeat.enter("callbacks")
        for name, hook in step_ends.items():
            if first in (None, name):
                first, self._ending = None, name
                hook(run)
        self._ending = ""

    def _finish_step(self) -> None:
        """End the step that an interruption has cut short."""
        run = self.run
        if run.cut_short is None:
            return
        run.heartbeat.enter("data", run.step)
        [(step, batch)] = run.data.from_(run.step - 1, run.step)
        run.batch = [micro.to(run.world.device) for micro in batch]
        run.turns = run.objective.turns(step)
        losses = unfinished.restore(run, run.cut_short)
        self._losses = {player: [(loss, 1.0)] for player, loss in losses.items()}
        first, run.cut_short = run.cut_short["callback"], None
        self._end_step(run.callbacks.of("step_ends"), first)

    def _fetch(self) -> Iterator[tuple[int, list[MicroBatch]]]:
        run = self.run
        batches = iter(run.data.from_(run.step, run.until))
        while True:
            if run.step < run.until and run.interruption.reached():
                self._save_and_leave()
            run.heartbeat.enter("data", run.step + 1)
            try:
                step, batch = next(batches)
            except StopIteration:
                run.heartbeat.enter("callbacks")  # what is done before the next `train` is no wait
                return
            if run.world.device != "cpu":
                batch = [micro.to(run.world.device) for micro in batch]
            yield step, batch[::-1] if self._reversed else batch

    def _abandon_step(self, turn: Turn) -> None:
        """End in the middle of a turn: this step begins again at the next start. Not after a turn that has changed the
        weights, nor where an objective remembers: then the run ends after this step."""
        run = self.run
        if turn.index == 0 and run.memory.is_empty:
            run.meter.back_to_mark()
            self._save_and_leave()

    def leave_if_told(self) -> None:
        """Within a `step_ends` that takes long: end here, if a signal has told the run to end (on all ranks alike, so
        all must ask equally often). The next start calls this `step_ends` again, and those after it."""
        run = self.run
        if self._ending and run.interruption.reached():
            run.cut_short = unfinished.record(run, self._ending)
            self._save_and_leave()

    def _save_and_leave(self) -> None:
        run = self.run
        if run.step != run.saved:
            run.save()
        raise Interrupted(
            f"{run.interruption.reason}: saved at step {run.step} of {run.total_steps},"
            f" go on with: dist-train train {run.directory.path} --resume {run.directory.path}",
            run.interruption.code,
        )

    def _note(
        self, turn: Turn, loss: Tensor, logged: Mapping[str, Tensor], share: float | Tensor
    ) -> None:
        run = self.run
        self._losses.setdefault(turn.player, []).append((loss.detach(), share))
        for name, value in logged.items():
            run.meter.add(run.named(turn.player, name), value, share)
