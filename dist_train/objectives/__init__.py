"""An objective says whose turn it is, and what that turn's loss is: written as if on one device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_train.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dist_train.data_shards.loader import MicroBatch
    from dist_train.models.decoding import Decoding
    from dist_train.networks import Networks


@dataclass(frozen=True)
class Turn:
    """One player's update within a step. `index` counts the turns of that step from 0."""

    player: str
    index: int = 0


class Objective(ABC):
    """Subclass it, and name the class in a recipe: `objective: {name: my_package.losses:MyObjective}`."""

    players: tuple[str, ...] = ("model",)
    """The players this objective knows, one optimiser each."""

    given: frozenset[str] = frozenset()
    """Players whose loss needs a double backward (a gradient penalty): their gradients are taken whole, then given
    to the engine, instead of being streamed to it layer by layer."""

    scale: str | None = None
    """The `data.scale` that its pictures must have; None for any."""

    def turns(self, step: int) -> list[Turn]:
        """Whose turns step `step` has, in order. A pure function of the step."""
        return [Turn(player, index) for index, player in enumerate(self.players)]

    @abstractmethod
    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a micro-batch (0-d) and what to log of it (detached 0-d tensors).

        `networks.NAME` is the network as this turn may see it: live for the turn's own player, frozen for the others.
        """

    def weight(self, micro: MicroBatch) -> float | Tensor:
        """How many things the loss averages over: samples, unless an objective counts tokens or pixels."""
        return float(len(micro.ids))

    def constant_weight(self) -> bool:
        """Whether every micro-batch weighs the same, so that no rank has to ask the others."""
        return type(self).weight is Objective.weight

    def evaluate(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        """What metrics need of an evaluation batch; `loss_sum` and `loss_count` over its first `micro.real` rows.

        As in `loss`, how often it calls a network must not depend on values: ranks of zero3 and fsdp2 do so together.
        """
        raise TypeError(
            f"{type(self).__name__} has no evaluation: give it `evaluate`, or remove `evaluate:`"
        )

    def evaluate_members(self, networks: Networks, micro: MicroBatch) -> list[dict[str, Tensor]]:
        """What `evaluate` gives for each member of a network that is an ensemble; for any other, for itself."""
        return [self.evaluate(networks, micro)]

    def combine(
        self, outputs: Sequence[dict[str, Tensor]], micro: MicroBatch, how: str = "mean"
    ) -> dict[str, Tensor]:
        """What `evaluate` would give for an ensemble of members that gave `outputs` for this micro-batch.

        Args:
            how: "mean" of the probabilities (a mixture), or the majority's "vote" between classes.
        """
        raise UserError(f"objective: {type(self).__name__} combines no members: give it `combine`")

    def predict(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        """What a user of the network wants to know of each row: (B,) or (B, D) by name; without looking at a label.
        `class` (B,) is written as the class's name, `text` (B, T) as the text of these tokens."""
        raise UserError(f"objective: {type(self).__name__} predicts nothing: give it `predict`")

    def samples(self, networks: Networks, count: int, device: str) -> dict[str, Tensor]:
        """Images (N, C, H, W) in [0, 1] to look at, drawn from the default generator on rank 0 alone; empty when there
        are none."""
        return {}

    def completions(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        """Images as `samples` gives them, that go on from those of an evaluation batch; empty when there are none."""
        return {}

    def continue_tokens(
        self,
        networks: Networks,
        prompt: list[int],
        count: int,
        context: int,
        device: str,
        how: Decoding | None = None,
        cached: bool = False,
        prefix: Sequence[int] | None = None,
    ) -> list[int] | None:
        """`prompt` and `count` tokens more, drawn from the default generator; the model sees the last `context`.
        None when the model writes no text. Handed over only where they are asked for: `how` to decode; `cached`, the
        model takes a state; `prefix`, how the answer to the prompt begins."""
        return None
