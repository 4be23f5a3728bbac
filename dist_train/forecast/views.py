"""What views send under zero3 and fsdp2: of networks that other players' turns see, and of given gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dist_train.engine.fsdp import SMALL
from dist_train.engine.layers import VIEW_ELEMENTS, Shards
from dist_train.engine.zero import PERSISTENCE_THRESHOLD
from dist_train.forecast.tracing import SEARCHED, after, on_fakes, turns_per_step
from dist_train.recipe.checks import SHARDED_WEIGHTS

if TYPE_CHECKING:
    from dist_train.objectives import Turn
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer


@dataclass(frozen=True)
class Seen:
    """Bytes of whole weights that views gather in a step, and of whole gradients that they scatter, on average.

    `given` are the players whose gradients are given, and `by_layer` those of them whose gradients `scattered` has.
    """

    gathered: float = 0.0
    scattered: float = 0.0
    given: frozenset[str] = frozenset()
    by_layer: frozenset[str] = frozenset()


NOTHING_SEEN = Seen()


def seen_in_a_step(
    recipe: Recipe,
    build: Callable[[Recipe], Trainer],
    trainer: Trainer,
    strategy: Mapping[str, Any],
    micro_batches: int,
) -> Seen:
    """What views send under a strategy.

    Args:
        build, trainer: as `foresee` takes and gives them. micro_batches: how many a rank takes in a step.
    """
    engines, turns = trainer.engines, trainer.objective.turns
    given = frozenset(player for player, engine in engines.items() if engine.given)
    if strategy["name"] not in SHARDED_WEIGHTS or (len(engines) == 1 and not given):
        return Seen(given=given)
    budget, small = strategy.get("view_elements", VIEW_ELEMENTS), small_of(strategy)
    shards = {player: Counted(engine.names, small) for player, engine in engines.items()}
    large = {player for player, counted in shards.items() if sum(counted.sizes.values()) > budget}
    times = times_gathered(turns, engines, given)
    gathered = sum(times[p] * shards[p].bytes for p in shards if p not in large)
    scattered = 0.0
    if large:
        trace = partial(_layers, players=large, budget=budget, small=small)
        traced, _ = on_fakes(recipe, build, trace, micro_batches=min(micro_batches, 2))
        for turn, often in turns_per_step(turns).items():
            first, *later = traced.get(turn, [(0, 0)])
            amounts = [first, *later * (micro_batches - 1)]
            gathered += often * sum(amount[0] for amount in amounts)
            scattered += often * sum(amount[1] for amount in amounts)
    return Seen(gathered, scattered, given, frozenset(given & large))


def small_of(strategy: Mapping[str, Any]) -> int:
    """Weights of up to so many elements views gather together."""
    if strategy["name"] == "fsdp2":
        return min(SMALL, strategy.get("view_elements", VIEW_ELEMENTS))
    return strategy.get("persistence_threshold", PERSISTENCE_THRESHOLD)


def times_gathered(
    turns: Callable[[int], list[Turn]], players: Iterable[str], given: Collection[str]
) -> dict[str, float]:
    """How often in a step each player's weights are gathered whole, on average: in the first turn that sees them after
    a change, be it another player's or a `given` one of its own."""
    players, there, times = list(players), set[str](), Counter[str]()
    for step in range(2 * SEARCHED):
        for turn in turns(step):
            looked = {p for p in players if p != turn.player or p in given} - there
            if step >= SEARCHED:  # the first steps gather what later ones find
                times.update(looked)
            there = (there | looked) - {turn.player}
    return {player: times[player] / SEARCHED for player in players}


def _layers(
    trainer: Trainer, batch: list[Any], *, players: Collection[str], budget: int, small: int
) -> dict[tuple[str, int], list[tuple[int, int]]]:
    """Bytes that each turn of a step gathers and scatters at each of its micro-batches, where `players` are gathered by
    layer."""
    shards = [counting(trainer.engines[player], budget, small) for player in players]
    found: dict[tuple[str, int], list[tuple[int, int]]] = {}
    turn, before = ("", 0), (0, 0)

    def begun(index: int = 0, *, player: str) -> None:
        nonlocal turn, before
        turn, before = (player, index), moved()
        found[turn] = []

    def moved() -> tuple[int, int]:
        return sum(one.gathered for one in shards), sum(one.scattered for one in shards)

    def passed(*_: Any, **__: Any) -> None:
        nonlocal before
        now = moved()
        found[turn].append((now[0] - before[0], now[1] - before[1]))
        before = now

    def reduced() -> None:  # once a turn, as what the first micro-batch alone needs
        first, scattered = found[turn][0], moved()[1] - before[1]
        found[turn][0] = first[0], first[1] + scattered

    for player, engine in trainer.engines.items():
        engine.begin_turn = after(engine.begin_turn, partial(begun, player=player))  # type: ignore[method-assign]
        engine.backward = after(engine.backward, passed)  # type: ignore[method-assign]
        engine.reduce = after(engine.reduce, reduced)  # type: ignore[method-assign]
    trainer.train(until=trainer.step + 1)
    return found


class Counted(Shards):
    """A player's weights in one process; counts what views gather and scatter of them, in bytes.

    Args:
        small: weights of so many elements are gathered together.
    """

    def __init__(self, weights: Mapping[str, Tensor], small: int) -> None:
        self.weights = weights
        self.sizes = {name: w.numel() for name, w in weights.items() if w.numel() > small}
        self.lengths, self.device = dict(self.sizes), "cpu"
        self.bytes = sum(weight.nbytes for weight in weights.values())
        self.gathered = self.scattered = 0

    def small(self) -> dict[str, Tensor]:
        found = {name: w.detach() for name, w in self.weights.items() if name not in self.sizes}
        self.gathered += sum(weight.nbytes for weight in found.values())
        return found

    def gather(self, name: str) -> Tensor:
        weight = self.weights[name].detach().clone()
        self.gathered += weight.nbytes
        return weight

    def scatter(self, name: str, gradient: Tensor) -> Tensor:
        self.scattered += gradient.nbytes
        return gradient.reshape(-1)


def counting(engine: Any, budget: int, small: int) -> Counted:
    """Let the views of an engine of one process gather layer by layer, and count that."""
    shards = Counted(engine.names, small)
    engine.views.gather_by_layer(shards, budget)
    add, reduce = engine._add_given, engine.reduce

    def add_whole(gradients: Iterable[Tensor | None]) -> None:
        pairs = zip(gradients, engine.trained.values(), strict=True)
        add([None if g is None else g.reshape(p.shape) for g, p in pairs])

    def reduce_small() -> None:
        if engine.given:
            rest = (w for name, w in engine.trained.items() if name not in shards.sizes)
            shards.scattered += sum(weight.nbytes for weight in rest)
        reduce()

    engine._add_given, engine.reduce = add_whole, reduce_small
    return shards
