"""Stochastic weight averaging: the equal average of the weights at the end of each cycle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_train import randomness
from dist_train.callbacks import Callback
from dist_train.callbacks.average import Average, Averages
from dist_train.duration import Duration
from dist_train.engine import Engine, Slice
from dist_train.errors import UserError
from dist_train.networks import Networks
from dist_train.objectives import Turn

if TYPE_CHECKING:
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer

TURNS_SEARCHED = 1000


class StochasticWeightAverage(Callback):
    """average <- (n average + weights) / (n + 1) at `start` and at the end of each `cycle` from there (Izmailov et al.
    2018, arXiv:1803.05407, algorithm 1); the schedule `swa` has the rates of the paper.

    Then running statistics are those of the averaged weights: the mean over a set of training batches that is the same
    on any number of ranks. Evaluate with it by `evaluate: {weights: swa}`; before `start` that is the live weights.

    Args:
        start: the first weights that are averaged: "15 epochs"; the paper's is 75 % of a run.
        cycle: how long it is from one to the next.
        statistics: over how many training samples running statistics are taken anew, the first of the run's order; at
            most an epoch of them. Networks without running statistics need none.
        players: whose weights; all players by default.
    """

    priority = 20

    def __init__(
        self,
        start: str,
        cycle: str = "1 epoch",
        statistics: str = "10000 samples",
        players: list[str] | None = None,
    ) -> None:
        self.start, self.cycle, self.statistics = start, cycle, statistics
        self.players = players
        self.taken = self.last = 0
        self.averages = Averages()

    def configure(self, recipe: Recipe) -> None:
        for name in ("start", "cycle", "statistics"):
            try:
                duration = Duration.parse(getattr(self, name))
                if duration.unit == "turns":
                    raise UserError(f"got '{duration}', expected steps, epochs, samples or tokens")
            except UserError as error:
                raise UserError(f"callbacks.swa.{name}: {error}") from None

    def run_begins(self, run: Trainer) -> None:
        self.first, self.period = _steps(self.start, run), _steps(self.cycle, run)
        self.batches = min(_steps(self.statistics, run), _steps("1 epoch", run))
        if self.first > run.total_steps:
            raise UserError(
                f"callbacks.swa.start: '{self.start}' is step {self.first}, expected one of the run's {run.total_steps}"
            )
        for player in self.players or run.engines:
            self.averages[player] = Average(run.engines[player])

    def step_ends(self, run: Trainer) -> None:
        if run.step < self.first or (run.step - self.first) % self.period:
            return
        if self.last != run.step:  # else an interruption has cut the statistics short
            for average in self.averages.values():
                average.move(1 / (self.taken + 1))
            self.taken, self.last = self.taken + 1, run.step
        self._take_statistics(run)

    def weights(self, run: Trainer) -> dict[str, dict[str, Tensor]]:
        if not self.taken:
            return {player: run.full_weights(player) for player in self.averages}
        return self.averages.weights()

    def slices(self) -> Iterator[tuple[str, Slice]]:
        return self.averages.slices()

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.taken, self.last = state["taken"], state["last"]

    def _take_statistics(self, run: Trainer) -> None:
        """Replace the averaged buffers by those that the averaged weights have over the set of batches (collective)."""
        having = {p: average for p, average in self.averages.items() if average.buffers}
        watched = {
            player: _Statistics(run.engines[player], average) for player, average in having.items()
        }
        for number in range(self.batches if watched else 0):
            run.leave_if_told()
            for micro in run.data.batch(number):
                micro = micro.to(run.world.device)
                for player, statistics in watched.items():
                    run.heartbeat.enter("evaluate")
                    turn = _turn_of(run, player)
                    randomness.reseed(run.seed, number, randomness.STATISTICS, micro.index)
                    seen = run.seen_by(turn)
                    networks = Networks({n: statistics.watching(n, seen[n]) for n in seen})
                    run.objective.loss(turn, networks, micro, run.scalars)
        for player, statistics in watched.items():
            statistics.write(having[player], run)


class _Statistics:
    """What forwards in training mode make of a player's buffers, each from the same ones, summed over the forwards."""

    def __init__(self, engine: Engine, average: Average) -> None:
        self.engine = engine
        self.weights = average.weights()
        self.sums = {name: torch.zeros_like(b).double() for name, b in average.buffers.items()}
        self.calls = dict.fromkeys(engine.player.networks, 0)

    def watching(self, network: str, seen: Callable[..., Any]) -> Callable[..., Any]:
        """The network with the averaged weights, watched; `seen`, as it is, for one of another player."""
        if network not in self.calls:
            return seen

        def call(*inputs: Any) -> Any:
            buffers = {name: buffer.clone() for name, buffer in self.engine.buffers.items()}
            output = self.engine.views.training(network, self.weights, buffers)(*inputs)
            for name in self.sums:
                if name.startswith(f"{network}."):
                    self.sums[name] += buffers[name]
            self.calls[network] += 1
            return output

        return call

    def write(self, average: Average, run: Trainer) -> None:
        """Give the average the means over all ranks, of the networks that were called."""
        calls = run.world.gather(self.calls)
        for name, buffer in average.buffers.items():
            count = sum(rank[name.partition(".")[0]] for rank in calls)
            if count:
                buffer.copy_(run.world.sum_(self.sums[name]) / count)


def _turn_of(run: Trainer, player: str) -> Turn:
    turns = (turn for step in range(TURNS_SEARCHED) for turn in run.objective.turns(step))
    return next(turn for turn in turns if turn.player == player)


def _steps(duration: str, run: Trainer) -> int:
    return Duration.parse(duration).steps(
        samples=run.samples_per_epoch, global_batch=run.global_batch, tokens=run.tokens_per_epoch
    )
