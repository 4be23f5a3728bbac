"""What a model of the next token writes: greedy, sampled, or by beam search.

A `Step` is the model as decoding sees it: (tokens (R, t) that are new, state) -> (logits (R, t or 1, V), state). The
first state is {}; tensors in it have R rows first. Shapes: B sequences, K beams, V vocabulary, P tokens of a prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
Step = Callable[[Tensor, State], tuple[Tensor, State]]


@dataclass(frozen=True)
class Decoding:
    """How to decode.

    Attributes:
        beam: 1 draws or takes one token at a time; more searches with so many hypotheses.
        temperature: 0 takes the likeliest token (greedy). top_k, top_p: draw among so many of the likeliest tokens, or
            among the fewest whose probabilities add up to at least this.
        length_power: beams are ranked by log p / length ** length_power; 0 favours short ones.
    """

    beam: int = 1
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    length_power: float = 1.0

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise ValueError(f"beam must be 1 or more, got {self.beam}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be 1 or more, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        for name, value in (("top_k", self.top_k), ("top_p", self.top_p)):
            if value is not None and self.temperature == 0:
                raise ValueError(f"{name} {value} is for draws, expected a temperature above 0")
        if self.length_power < 0:
            raise ValueError(f"length_power must be 0 or more, got {self.length_power}")
        if self.beam > 1 and self.temperature > 0:
            raise ValueError(
                f"beam {self.beam} searches and temperature {self.temperature} draws: give one of them"
            )

    def __call__(
        self, step: Step, prefix: Tensor, count: int, *, end: int | None = None, early: bool = True
    ) -> Tensor:
        """Continue the prefix (B, P) by `count` tokens -> (B, P + count), as `sample` or the best of `beam_search`."""
        if self.beam > 1:
            best, _ = beam_search(
                step,
                prefix,
                count,
                end=end,
                beam=self.beam,
                length_power=self.length_power,
                early=early,
            )
            return best[:, 0]
        return sample(
            step,
            prefix,
            count,
            end=end,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            early=early,
        )


def whole(model: Callable[[Tensor], Tensor], max_length: int) -> Step:
    """A step of a model without a state: it reads the last `max_length` tokens each time."""

    def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
        if state:
            tokens = torch.cat([state["tokens"], tokens], dim=1)
        tokens = tokens[:, -max_length:]
        return model(tokens), {"tokens": tokens}

    return step


def generate(
    model: Callable[[Tensor], Tensor],
    tokens: Tensor,
    count: int,
    *,
    max_length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """Continue `tokens` (B, T) by `count` tokens of a model without a state, which sees the last `max_length`."""
    return sample(whole(model, max_length), tokens, count, temperature=temperature, top_k=top_k)


def rows(state: State, index: Tensor) -> State:
    """Those rows of every tensor of a state."""
    return {
        name: rows(value, index) if isinstance(value, dict) else value[index]
        for name, value in state.items()
    }


def truncated(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (..., V), -inf but for the `top_k` largest, then for the fewest that hold `top_p` of the probability."""
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, places = logits.sort(dim=-1, descending=True)
        share = ordered.softmax(dim=-1)
        outside = share.cumsum(dim=-1) - share >= top_p  # those before it are enough
        outside[..., 0] = False
        logits = logits.masked_fill(outside.gather(-1, places.argsort(dim=-1)), -torch.inf)
    return logits


@torch.no_grad()
def sample(
    step: Step,
    prefix: Tensor,
    count: int,
    *,
    end: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    early: bool = True,
) -> Tensor:
    """Continue the prefix (B, P) by `count` drawn tokens -> (B, P + count) int64.

    Draws come from the default generator; `temperature` 0 takes the likeliest token. After `end` a row has only `end`.
    `early`: no step is taken once all rows have ended, so how often the model is called depends on what it says.
    """
    _check_prefix(prefix)
    written, state = [prefix], State()
    tokens = prefix
    done = torch.zeros_like(prefix[:, :1], dtype=torch.bool)  # (B, 1)
    for _ in range(count):
        if end is not None and early and bool(done.all()):
            tokens = torch.full_like(tokens[:, -1:], end)
            written.append(tokens)
            continue
        logits, state = step(tokens, state)
        logits = logits[:, -1].float()  # (B, V)
        if temperature == 0:
            tokens = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        else:
            logits = truncated(logits / temperature, top_k, top_p)
            tokens = torch.multinomial(logits.softmax(dim=-1), num_samples=1)
        if end is not None:
            tokens = tokens.masked_fill(done, end)
            done = done | (tokens == end)
        written.append(tokens)
    return torch.cat(written, dim=1)


@torch.no_grad()
def beam_search(
    step: Step,
    prefix: Tensor,
    count: int,
    *,
    end: int | None = None,
    beam: int = 4,
    length_power: float = 1.0,
    early: bool = True,
) -> tuple[Tensor, Tensor]:
    """Continue the prefix (B, P) by up to `count` tokens, with `beam` hypotheses a row.

    Returns (hypotheses (B, K, P + count), the best first, and their scores (B, K)): log p of what follows the prefix,
    `end` included, by its length ** `length_power` (Wu et al. 2016, arXiv:1609.08144, divide likewise). One that has
    ended stays in the beam with its score and is filled with `end`. With K = 1 this is greedy; with K = V ** count it
    leaves out nothing, so the best is the likeliest there is. `early` as in `sample`.
    """
    _check_prefix(prefix)
    batch = len(prefix)
    written = prefix[:, None].expand(-1, beam, -1)  # (B, K, P)
    log_p = torch.full((batch, beam), -torch.inf, device=prefix.device)
    log_p[:, 0] = 0.0  # all K are the prefix as yet: one of them counts
    length = torch.zeros_like(log_p)
    done = torch.zeros_like(log_p, dtype=torch.bool)
    score = log_p
    state = State()
    tokens = prefix.repeat_interleave(beam, dim=0)  # (B K, P)
    first = torch.arange(batch, device=prefix.device)[:, None] * beam  # where a row's beams begin
    for _ in range(count):
        if end is not None and early and bool(done.all()):
            filler = torch.full_like(written[:, :, :1], end)
            written = torch.cat([written, filler], dim=2)
            continue
        logits, state = step(tokens, state)
        following = logits[:, -1].float().log_softmax(dim=-1).view(batch, beam, -1)  # (B, K, V)
        vocabulary = following.shape[-1]
        if end is not None:
            stays = torch.full_like(following[0, 0], -torch.inf)
            stays[end] = 0.0
            following = torch.where(done[:, :, None], stays, following)
        total = log_p[:, :, None] + following
        length = length + (~done)
        ranked = total / length[:, :, None] ** length_power
        score, best = ranked.flatten(1).topk(beam)  # (B, K)
        parent, token = best // vocabulary, best % vocabulary
        log_p = total.flatten(1).gather(1, best)
        length, done = length.gather(1, parent), done.gather(1, parent)
        if end is not None:
            done = done | (token == end)
        written = written.gather(1, parent[:, :, None].expand_as(written))
        written = torch.cat([written, token[:, :, None]], dim=2)
        tokens = token.reshape(-1, 1)
        state = rows(state, (first + parent).flatten())
    return written, score


def _check_prefix(prefix: Tensor) -> None:
    if prefix.shape[1] == 0:
        raise ValueError("decoding needs at least one token to continue")
