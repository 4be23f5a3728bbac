"""Language modelling: the negative log-likelihood of each next token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.data_shards.loader import MicroBatch
from dist_train.errors import UserError
from dist_train.models.decoding import Decoding, State, whole
from dist_train.networks import Networks
from dist_train.objectives import Objective, Turn

TEACHER_FORCING = "teacher_forcing"
"""The scalar that a schedule may set."""


class LanguageModelling(Objective):
    """Cross-entropy of `model(tokens (B, T)) -> logits (B, T, V)` with the token that follows.

    Sequences may have unequal lengths: a loss is the mean over real targets, so a micro-batch weighs as many targets
    as it has, and the gradient is that of the mean over the whole global batch (law 3).

    Args:
        chunk: 0 takes the logits as the model gives them. More: the model is asked for the weighted sum of the losses,
            `model(tokens, targets, weights, chunk) -> ()`, which it computes for so many positions at a time and never
            holds all logits.
        describes: a field that the text describes, like `image`: the model is `model(tokens, image)`.
        teacher_forcing: the probability that a training input is the true token, else one that the model draws there
            (scheduled sampling). The scalar `teacher_forcing` of a `schedule` takes its place.
        passes: how often the model draws in the light of what it drew; see `scheduled_sampling`.
        free_running: how many tokens evaluation and prediction write after each row's first, each the likeliest after
            those written before. A row ends with the last of the vocabulary's tokens, the boundary.
    """

    def __init__(
        self,
        chunk: int = 0,
        describes: str = "",
        teacher_forcing: float = 1.0,
        passes: int = 1,
        free_running: int = 0,
    ) -> None:
        if chunk < 0:
            raise UserError(f"language_modelling: chunk must be 0 or more positions, got {chunk}")
        if chunk and describes:
            raise UserError(
                f"language_modelling: chunk must be 0 with describes '{describes}', got {chunk}"
            )
        if passes < 1:
            raise UserError(f"language_modelling: passes must be 1 or more, got {passes}")
        if free_running < 0:
            raise UserError(
                f"language_modelling: free_running must be 0 or more tokens, got {free_running}"
            )
        self.chunk, self.describes = chunk, describes
        self.passes, self.free_running = passes, free_running
        self.teacher_forcing = self._probability(teacher_forcing)

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = micro["tokens"][:, :-1]
        forcing = self._probability(scalars.get(TEACHER_FORCING, self.teacher_forcing))
        if forcing < 1.0:
            inputs = scheduled_sampling(self._model(networks, micro), inputs, forcing, self.passes)
        total = self._sum(networks, micro, inputs, len(micro["length"]))
        loss = total / micro["length"].sum()
        return loss, {"loss": loss.detach()}

    def weight(self, micro: MicroBatch) -> Tensor:
        return micro["length"].sum()

    def evaluate(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        tokens, length = micro["tokens"], micro["length"]
        found = {
            "loss_sum": self._sum(networks, micro, tokens[:, :-1], micro.real).double(),
            "loss_count": length[: micro.real].sum(),
        }
        if self.free_running:
            written, ends = write(self._model(networks, micro), tokens[:, :1], self.free_running)
            found |= {"written": written, "written_length": ends}
            found |= {"truth": tokens[:, 1:], "truth_length": length}
        return found

    def predict(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        if not self.free_running:
            raise UserError("objective.free_running: 0, expected how many tokens to write at most")
        start = micro["tokens"][:, :1]
        written, _ = write(self._model(networks, micro), start, self.free_running)
        return {"text": written}

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
    ) -> list[int]:
        if prefix is not None:
            raise UserError(
                f"prefix: {len(prefix)} tokens, but a language model continues its prompt: write them there"
            )
        if self.describes:
            raise UserError(
                f"objective.describes: the model writes of a field '{self.describes}': use dist-train predict"
            )

        def cache(tokens: Tensor, state: State) -> tuple[Tensor, State]:
            return networks.model(tokens, None, None, 0, state)

        fits = cached and len(prompt) + count <= context
        step = cache if fits else whole(networks.model, context)
        tokens = (how or Decoding(temperature=0.8))(
            step, torch.tensor([prompt], device=device), count
        )
        return tokens[0].tolist()

    def _model(self, networks: Networks, micro: MicroBatch) -> Callable[[Tensor], Tensor]:
        """Of the tokens alone: what they describe is that of this micro-batch."""
        if not self.describes:
            return networks.model
        return lambda tokens: networks.model(tokens, micro[self.describes])

    def _probability(self, value: float) -> float:
        if not 0.0 <= value <= 1.0:
            raise UserError(
                f"language_modelling: teacher_forcing must be a probability, 0 to 1, got {value}"
            )
        if value < 1.0 and self.chunk:
            raise UserError(
                f"language_modelling: teacher_forcing {value} needs whole logits: chunk must be 0, got {self.chunk}"
            )
        return value

    def _sum(self, networks: Networks, micro: MicroBatch, inputs: Tensor, rows: int) -> Tensor:
        """Of the losses of the real targets in the first `rows` rows."""
        targets, length = micro["tokens"][:, 1:], micro["length"]
        real = torch.arange(targets.shape[1], device=targets.device) < length[:, None]  # (B, T)
        real[rows:] = False
        if self.chunk:
            try:
                return networks.model(inputs, targets, real, self.chunk)
            except TypeError as error:
                raise UserError(
                    "objective.chunk: asks the model for model(tokens, targets, weights, chunk) -> sum of losses, which"
                    f" failed: {error}; leave chunk out for a model that gives logits"
                ) from error
        logits = self._model(networks, micro)(inputs)  # (B, T, V)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (losses.view_as(targets) * real).sum()


@torch.no_grad()
def scheduled_sampling(
    model: Callable[[Tensor], Tensor], inputs: Tensor, forcing: float, passes: int = 1
) -> Tensor:
    """Of inputs (B, T) each but the first stays with probability `forcing`, else the model draws it (Bengio et al.
    2015, arXiv:1506.03099).

    All places are drawn at once, each with the history of the pass before (Mihaylova and Martins 2019,
    arXiv:1906.07651): in the first pass that is the true one. The draws of a place are the same in each pass, so that
    after k passes the first k + 1 inputs are what drawing one after the other gives, after T - 1 all of them.
    """
    stays = torch.rand(inputs.shape, device=inputs.device) < forcing
    stays[:, 0] = True
    place = torch.rand(inputs.shape, device=inputs.device)  # of each draw, in its distribution
    mixed = inputs
    for _ in range(passes):
        drawn = draw(model(mixed), place)  # (B, T): of the token that follows
        mixed = torch.where(stays, inputs, drawn.roll(1, dims=1))  # the first stays
    return mixed


def draw(logits: Tensor, place: Tensor) -> Tensor:
    """Logits (..., V) and uniform numbers (...) -> tokens (...) int64, by the inverse of the distribution function."""
    below = logits.float().softmax(dim=-1).cumsum(dim=-1) <= place[..., None]
    return below.sum(dim=-1).clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def write(model: Callable[[Tensor], Tensor], tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens (B, count) after tokens (B, T), each given those before, and how many each row has:
    up to the first that is the last of the vocabulary, the boundary, which then fills the row."""
    start = tokens.shape[1]
    for _ in range(count):
        logits = model(tokens)[:, -1]  # (B, V)
        tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
    written, end = tokens[:, start:], logits.shape[-1] - 1
    ended = (written == end).cumsum(dim=1) > 0  # (B, count): from its first boundary on
    return written.masked_fill(ended, end), (~ended).sum(dim=1).add(1).clamp(max=count)
