"""Decoding against exhaustive search, closed forms and itself."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_train.models.decoding import (
    Decoding,
    beam_search,
    generate,
    rows,
    sample,
    truncated,
    whole,
)
from dist_train.models.transformer import Transformer

V, END = 4, 3


def toy(seed: int = 0) -> tuple[Any, Any]:
    """A model whose next token depends on the last two, at random: (step with a state, log p of a sequence)."""
    generator = torch.Generator().manual_seed(seed)
    table = 2 * torch.randn(V, V, V, generator=generator)

    def logits(text: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(text[:, :1]), text[:, :-1]], dim=1)
        return table[before, text]

    def log_p(text: list[int]) -> float:
        scores = logits(torch.tensor([text[:-1]]))[0].double().log_softmax(1)
        return sum(scores[t, text[t + 1]].item() for t in range(len(text) - 1))

    return whole(logits, 100), log_p


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    logits = torch.tensor([0.1, 0.5, 0.05, 0.35]).log()
    for given, kept in [
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.4}, [1]),
        ({"top_p": 0.5}, [1]),
        ({"top_p": 0.51}, [1, 3]),
        ({"top_p": 0.9}, [0, 1, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),
    ]:
        found = truncated(logits, **given)  # type: ignore[arg-type]
        assert found.isfinite().nonzero().flatten().tolist() == kept, given


def test_samples_have_the_models_shares() -> None:
    step, log_p = toy()
    torch.manual_seed(0)
    prefix = torch.zeros(20_000, 1, dtype=torch.int64)
    written = sample(step, prefix, 2, end=END)
    assert written.shape == (20_000, 3)
    for first, second in itertools.product(range(V), repeat=2):
        share = (written[:, 1:] == torch.tensor([first, second])).all(1).double().mean().item()
        possible = first != END or second == END  # after the end there is only the end
        likelihood = log_p([0, first] if first == END else [0, first, second])
        assert share == pytest.approx(possible * math.exp(likelihood), abs=0.012)


@pytest.mark.parametrize("end", [None, END])
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_a_beam_of_one_is_greedy(end: int | None, power: float) -> None:
    for seed in range(20):
        step, _ = toy(seed)
        prefix = torch.tensor([[0], [1], [2]])
        greedy = sample(step, prefix, 6, end=end, temperature=0)
        found, _ = beam_search(step, prefix, 6, end=end, beam=1, length_power=power)
        assert torch.equal(found[:, 0], greedy)
        assert torch.equal(Decoding()(step, prefix, 6, end=end), greedy)


@pytest.mark.parametrize("power", [0.0, 0.6, 1.0])
def test_a_beam_of_all_finds_the_likeliest(power: float) -> None:
    """K = V ** T: the first of all sequences that end within T tokens, or have T, by brute force."""
    count, better = 4, 0
    for seed in range(6):
        step, log_p = toy(seed)
        ranked = {}
        for text in itertools.product(range(V), repeat=count):
            cut = text[: text.index(END) + 1] if END in text else text
            ranked[cut] = log_p([1, *cut]) / len(cut) ** power
        best = max(ranked, key=lambda text: ranked[text])
        found, score = beam_search(
            step, torch.tensor([[1], [1]]), count, end=END, beam=V**count, length_power=power
        )
        assert found[0, 0, 1:].tolist() == [*best, *[END] * (count - len(best))]
        assert score[0, 0].item() == pytest.approx(ranked[best], abs=1e-5)
        assert torch.equal(found[0], found[1])
        order = sorted(ranked.values(), reverse=True)
        assert score[0, : len(order)].tolist() == pytest.approx(order, abs=1e-5)
        greedy = sample(step, torch.tensor([[1]]), count, end=END, temperature=0)[0, 1:].tolist()
        better += greedy != found[0, 0, 1:].tolist()
    assert better  # or this would show nothing


def test_a_wider_beam_is_no_worse_here_and_rows_do_not_mix() -> None:
    step, _ = toy(3)
    prefix = torch.tensor([[0], [1], [2], [0]])
    alone = [beam_search(step, row[None], 5, end=END, beam=3)[0][0] for row in prefix]
    together, score = beam_search(step, prefix, 5, end=END, beam=3)
    assert torch.equal(together, torch.stack(alone))
    assert (score.diff(dim=1) <= 0).all()


def test_a_prefix_is_kept_and_early_changes_nothing() -> None:
    step, _ = toy(1)
    prefix = torch.tensor([[0, 2, 1], [1, 1, 0]])
    for how in (Decoding(), Decoding(beam=3)):
        written = how(step, prefix, 8, end=END)
        assert torch.equal(written[:, :3], prefix)
        assert torch.equal(written, how(step, prefix, 8, end=END, early=False))
        for row in written[:, 3:].tolist():
            if END in row:
                assert set(row[row.index(END) :]) == {END}


def test_with_a_cache_the_same_is_written() -> None:
    """KV-cached and uncached, by each way of decoding."""
    torch.manual_seed(0)
    model = Transformer(11, dim=16, depth=2, num_heads=2, max_length=12).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)

    def cached(tokens: Tensor, state: Any) -> Any:
        calls.append(tokens.shape[1])
        return model(tokens, None, None, 0, state)

    prefix = torch.randint(0, 11, (3, 4))
    for how in (
        Decoding(),
        Decoding(temperature=0.9, top_k=5),
        Decoding(temperature=1.0, top_p=0.8),
        Decoding(beam=4),
        Decoding(beam=4, length_power=0.0),
    ):
        calls: list[int] = []
        torch.manual_seed(2)
        written = how(cached, prefix, 8, end=10)
        torch.manual_seed(2)
        assert torch.equal(written, how(whole(model, 12), prefix, 8, end=10)), how
        assert calls[0] == 4 and set(calls[1:]) == {1}


def test_rows_of_a_state() -> None:
    state = {"a": torch.arange(3), "b": {"c": torch.arange(6).view(3, 2)}}
    found = rows(state, torch.tensor([2, 2, 0]))
    assert found["a"].tolist() == [2, 2, 0] and found["b"]["c"].tolist() == [[4, 5], [4, 5], [0, 1]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"beam": 0},
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_k": 5},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"length_power": -1.0},
        {"beam": 2, "temperature": 1.0},
    ],
)
def test_decoding_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Decoding(**wrong)


def test_generate_draws_from_the_softmax() -> None:
    logits = torch.tensor([0.1, 2.0, -1.0, 1.0])

    def model(tokens: Tensor) -> Tensor:
        assert tokens.shape[1] <= 3
        return logits.expand(*tokens.shape, 4)

    torch.manual_seed(0)
    start = torch.zeros(5_000, 2, dtype=torch.int64)
    out = generate(model, start, 2, max_length=3, temperature=0.7)
    assert out.shape == (5_000, 4)
    assert torch.equal(out[:, :2], start)
    shares = torch.bincount(out[:, 2:].flatten(), minlength=4) / 10_000
    torch.testing.assert_close(shares, (logits / 0.7).softmax(0), rtol=0, atol=0.02)

    best = generate(model, start[:5], 1, max_length=3, top_k=2)[:, 2]
    assert set(best.tolist()) <= {1, 3}
    greedy = generate(model, start[:5], 1, max_length=3, temperature=0)[:, 2]
    assert greedy.tolist() == [1] * 5


def test_generate_continues_beyond_the_context() -> None:
    torch.manual_seed(0)
    model = Transformer(50, dim=32, depth=3, max_length=16).eval()
    start = torch.randint(0, 50, (2, 3))
    torch.manual_seed(1)
    first = generate(model, start, 20, max_length=model.max_length)
    torch.manual_seed(1)
    again = generate(model, start, 20, max_length=model.max_length)
    assert first.shape == (2, 23)
    assert torch.equal(first, again)


def test_decoding_needs_a_token() -> None:
    step, _ = toy()
    for how in (Decoding(), Decoding(beam=2)):
        with pytest.raises(ValueError, match="at least one token"):
            how(step, torch.zeros(1, 0, dtype=torch.int64), 1)
