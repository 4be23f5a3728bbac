"""Translation: the negative log-likelihood of each target token, given the source and the target before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train import bleu
from dist_train.data_shards.loader import MicroBatch
from dist_train.data_shards.tokens import ByteTokenizer, Tokenizer
from dist_train.models.decoding import Decoding, State
from dist_train.networks import Networks
from dist_train.objectives import Objective, Turn


class Translation(Objective):
    """Cross-entropy of `model(source (B, S), length (B,), target (B, T)) -> logits (B, T, V)` with the token that
    follows (teacher forcing). The data are made by the transform `tokenise_pair`.

    Args:
        label_smoothing: this share of each target's probability is spread over all tokens (arXiv:1512.00567), in
            training.
        decode: at most so many tokens of each translation are written in an evaluation, for the metric `bleu`; 0: none.
            Every row takes so many steps, since how often a network is called must not depend on what it says.
        beam, length_power: how they are searched (`dist_train.models.decoding`).
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        decode: int = 0,
        beam: int = 1,
        length_power: float = 1.0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if decode < 0:
            raise ValueError(f"decode must be 0 or more tokens, got {decode}")
        self.label_smoothing, self.decode = label_smoothing, decode
        self.how = Decoding(beam=beam, length_power=length_power)
        self.tokenizer = tokenizer or ByteTokenizer()

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses, real = self._losses(networks, micro, self.label_smoothing)
        loss = (losses * real).sum() / micro["target_length"].sum()
        return loss, {"loss": loss.detach()}

    def weight(self, micro: MicroBatch) -> Tensor:
        return micro["target_length"].sum()

    def evaluate(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        losses, real = self._losses(networks, micro, 0.0)
        real[micro.real :] = False
        outputs = {"loss_sum": (losses * real).sum().double(), "loss_count": real.sum()}
        if self.decode:
            outputs["bleu"] = self._counts(networks, micro)
        return outputs

    def translate(
        self,
        networks: Networks,
        source: Tensor,
        length: Tensor,
        count: int,
        how: Decoding,
        prefix: Tensor | None = None,
        early: bool = True,
    ) -> Tensor:
        """Sources (B, S), the number of their tokens (B,) -> at most `count` tokens of each translation (B, P + count),
        the boundary after its end; it begins with `prefix` (B, P), if that is given."""
        end = self.tokenizer.boundary
        begin = torch.full_like(source[:, :1], end)
        if prefix is not None:
            begin = torch.cat([begin, prefix], dim=1)
        if how.beam > 1:  # a row for each hypothesis
            source = source.repeat_interleave(how.beam, dim=0)
            length = length.repeat_interleave(how.beam, dim=0)

        def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
            return networks.model(source, length, tokens, state)

        return how(step, begin, count, end=end, early=early)[:, 1:]

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
        """The translation of `prompt`, as evaluations decode it if nothing else is asked for."""
        source = torch.tensor([[*prompt, self.tokenizer.boundary]], device=device)
        length = torch.tensor([source.shape[1]], device=device)
        begin = torch.tensor([[*(prefix or ())]], dtype=torch.int64, device=device)
        written = self.translate(networks, source, length, count, how or self.how, begin)
        return written[0].tolist()

    def _losses(
        self, networks: Networks, micro: MicroBatch, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """(losses (B, T), which of them are of real targets)."""
        target, length = micro["target"], micro["target_length"]
        logits = networks.model(micro["source"], micro["source_length"] + 1, target[:, :-1])
        losses = F.cross_entropy(
            logits.flatten(0, 1),
            target[:, 1:].flatten(),
            reduction="none",
            label_smoothing=smoothing,
        ).view(len(target), -1)
        places = torch.arange(losses.shape[1], device=losses.device)
        return losses, places < length[:, None]

    def _counts(self, networks: Networks, micro: MicroBatch) -> Tensor:
        """BLEU's counts of each row: (B, 10), 0 for padding."""
        source, length = micro["source"], micro["source_length"] + 1
        written = self.translate(networks, source, length, self.decode, self.how, early=False)
        texts = [self._text(row) for row in written.tolist()]
        truths = [self._text(row[1:]) for row in micro["target"].tolist()]
        found = torch.zeros(len(texts), bleu.COUNTS, dtype=torch.float64)
        for row in range(micro.real):
            found[row] = torch.tensor(bleu.counts(texts[row], truths[row]), dtype=torch.float64)
        return found.to(source.device)

    def _text(self, ids: list[int]) -> str:
        """The text before the boundary."""
        end = ids.index(self.tokenizer.boundary) if self.tokenizer.boundary in ids else len(ids)
        return self.tokenizer.decode(ids[:end]).decode(errors="replace")
