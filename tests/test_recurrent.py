"""Recurrent networks against torch's own, temporal convolutions against their formula, sampling against a loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn as packing

from dist_train.data_shards.transforms import Tokenise
from dist_train.errors import UserError
from dist_train.metrics import edit_distance, edit_error
from dist_train.models.captioner import Captioner
from dist_train.models.recurrent import (
    CELLS,
    Recurrent,
    RecurrentClassifier,
    RecurrentLanguageModel,
)
from dist_train.models.temporal_convolution import CausalConvolution, TemporalConvolution
from dist_train.networks import Networks
from dist_train.objectives import Turn
from dist_train.objectives.language_modelling import (
    LanguageModelling,
    draw,
    scheduled_sampling,
    write,
)

TORCH: dict[str, Any] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
LENGTH = torch.tensor([7, 3, 1, 6])


def pair(cell: str, depth: int, bidirectional: bool) -> tuple[Recurrent, nn.RNNBase]:
    """Ours and torch's, with the same weights, in float64."""
    torch.manual_seed(0)
    ours = Recurrent(5, 6, depth, cell, bidirectional).double()
    theirs = TORCH[cell](5, 6, depth, batch_first=True, bidirectional=bidirectional).double()
    names = [
        f"l{layer}{end}" for layer in range(depth) for end in ("", "_reverse")[: ours.directions]
    ]
    with torch.no_grad():
        for layer, name in zip(ours.layers, names, strict=True):
            for weight in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(layer, weight).copy_(torch.randn_like(getattr(layer, weight)) / 2)
                getattr(theirs, f"{weight}_{name}").copy_(getattr(layer, weight))
    return ours, theirs


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_is_torchs(cell: str, depth: int, bidirectional: bool, lengths: bool) -> None:
    """R1: outputs, last states, gradients of weights, inputs, first states; packed sequences where lengths differ."""
    ours, theirs = pair(cell, depth, bidirectional)
    x = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=True)
    begin = torch.randn(CELLS[cell].states, len(ours.layers), 4, 6, dtype=torch.float64)
    begin.requires_grad_()
    length = LENGTH if lengths else None
    y, state = ours(x, length, tuple(begin))
    given = packing.pack_padded_sequence(x, LENGTH, True, enforce_sorted=False) if lengths else x
    expected, last = theirs(given, tuple(begin) if cell == "lstm" else begin[0])
    if lengths:
        expected, _ = packing.pad_packed_sequence(expected, batch_first=True)
    last = last if cell == "lstm" else (last,)
    torch.testing.assert_close(y, expected)
    for part, other in zip(state, last, strict=True):
        torch.testing.assert_close(part, other)
    mix = [torch.randn_like(value) for value in (y, *state)]
    found = []
    for values in ((y, *state), (expected, *last)):
        ours.zero_grad()
        loss = sum((a * b).sum() for a, b in zip(values, mix, strict=True))
        found.append(torch.autograd.grad(loss, (x, begin), retain_graph=True))
        loss.backward()
        if values[0] is y:
            own = [p.grad.clone() for layer in ours.layers for p in layer.parameters()]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    for one, parameter in zip(own, theirs.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


@pytest.mark.parametrize("cell", CELLS)
def test_padding_has_no_effect(cell: str) -> None:
    """R1: each sequence of a padded batch is as if it was alone, whatever the padding holds."""
    ours, _ = pair(cell, 2, True)
    x = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=True)
    y, state = ours(x, LENGTH)
    y.sum().backward()
    assert x.grad is not None
    for row, size in enumerate(LENGTH.tolist()):
        alone, last = ours(x[row : row + 1, :size])
        torch.testing.assert_close(y[row, :size], alone[0])
        assert not y[row, size:].any() and not x.grad[row, size:].any()
        for part, other in zip(state, last, strict=True):
            torch.testing.assert_close(part[:, row], other[:, 0])
    other = x.detach().clone()
    other[torch.arange(7) >= LENGTH[:, None]] = 1e9
    again, _ = ours(other, LENGTH)
    assert torch.equal(again, y)


def test_first_weights_keep_states_alive() -> None:
    torch.manual_seed(0)
    layer = Recurrent(8, 16, 1, "lstm").layers[0]
    for gate in layer.weight_hh.chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(16), atol=1e-5, rtol=0)
    assert torch.equal(layer.bias_ih.chunk(4)[1], torch.ones(16))
    assert layer.bias_ih.sum() == 16


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_goes_through_time(cell: str) -> None:
    """R2: the last logits depend on the first token, and no logits on a later one."""
    torch.manual_seed(0)
    model = RecurrentLanguageModel(11, 8, 2, cell, embedding=4)
    tokens = torch.randint(11, (3, 9))
    assert model(tokens).shape == (3, 9, 11)
    seen: list[Tensor] = []
    model.embedding.register_forward_hook(
        lambda *a: seen.append(a[2].detach().requires_grad_()) or seen[-1]
    )  # type: ignore[func-returns-value]
    model(tokens)[:, 5].sum().backward()
    reached = seen[0].grad.abs().sum(dim=2)  # (B, T)
    assert (reached[:, :6] > 0).all() and not reached[:, 6:].any()


def test_first_loss_is_near_that_of_chance() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(256, (4, 40))
    for model in (
        RecurrentLanguageModel(256, 32, 2, "lstm", embedding=16),
        TemporalConvolution(256, 32, 4, embedding=16),
    ):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        assert abs(loss.item() - math.log(256)) < 0.3


def test_classifier_reads_to_the_end_of_each_row() -> None:
    torch.manual_seed(0)
    model = RecurrentClassifier(3, 11, 8, 2, "gru", 4, bidirectional=True)
    tokens = torch.randint(11, (4, 7))
    logits = model(tokens, LENGTH)
    assert logits.shape == (4, 3)
    for row, size in enumerate(LENGTH.tolist()):
        alone = model(tokens[row : row + 1, :size], LENGTH[row : row + 1])
        torch.testing.assert_close(logits[row], alone[0])


@pytest.mark.parametrize("cell", CELLS)
def test_caption_depends_on_its_picture(cell: str) -> None:
    """R2: the encoder's gradient comes through the first state alone; and that state is what the picture says."""
    torch.manual_seed(0)
    model = Captioner(11, 3, 8, 2, cell, embedding=4, encoder_width=4)
    image, tokens = torch.randn(2, 3, 16, 16, requires_grad=True), torch.randint(11, (2, 6))
    logits = model(tokens, image)
    assert logits.shape == (2, 6, 11)
    (logits[0, -1].sum()).backward()
    assert image.grad is not None and image.grad[0].any() and not image.grad[1].any()
    first = torch.tanh(model.first(model.encoder(image))).view(2, -1, 2, 8)  # (B, parts, L, C)
    state = tuple(first[:, part].transpose(0, 1) for part in range(CELLS[cell].states))
    x, _ = model.recurrent(model.embedding(tokens), state=state)
    torch.testing.assert_close(model.output(x), logits)


# Temporal convolution


def test_causal_convolution_is_its_formula() -> None:
    torch.manual_seed(0)
    ours = CausalConvolution(3, 4, kernel=3, dilation=2).double()
    theirs = nn.Conv1d(3, 4, 3, dilation=2).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            nn.init.normal_(parameter)
    nn.utils.parametrizations.weight_norm(theirs)
    with torch.no_grad():
        theirs.parametrizations.weight.original0.copy_(ours.gain)
        theirs.parametrizations.weight.original1.copy_(ours.direction)
        theirs.bias.copy_(ours.bias)
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(nn.functional.pad(x, (4, 0))))


def test_no_output_depends_on_a_later_token() -> None:
    """R8: changing token t changes no output before t, and those from t to the end of its reach."""
    torch.manual_seed(0)
    model = TemporalConvolution(11, 8, depth=3, kernel=3, embedding=4).double()
    assert model.context == 1 + 2 * 2 * (1 + 2 + 4)
    tokens = torch.randint(11, (1, 40))
    logits = model(tokens)
    assert logits.shape == (1, 40, 11)
    for t in (0, 1, 17, 39):
        other = tokens.clone()
        other[0, t] = (other[0, t] + 1) % 11
        changed = (model(other) != logits).any(dim=2)[0]
        assert not changed[:t].any() and changed[t]
        assert not changed[t + model.context :].any()


# Scheduled sampling, and writing


class Rows:
    """A micro-batch of tokens as the objective sees it."""

    def __init__(self, tokens: Tensor, length: Tensor) -> None:
        self.fields, self.real = {"tokens": tokens, "length": length}, len(tokens)

    def __getitem__(self, field: str) -> Tensor:
        return self.fields[field]


def step(scalars: dict[str, float], **settings: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    """The loss and gradients of a small model, and the generator's state afterwards."""
    torch.manual_seed(0)
    model = RecurrentLanguageModel(11, 8, embedding=4, dropout=0.2)
    micro: Any = Rows(torch.randint(11, (3, 9)), torch.tensor([8, 2, 5]))
    objective = LanguageModelling(**settings)
    loss, _ = objective.loss(Turn("model"), Networks({"model": model}), micro, scalars)
    loss.backward()
    return loss, [parameter.grad for parameter in model.parameters()], torch.get_rng_state()


def test_teacher_forcing_of_1_is_teacher_forcing_bit_for_bit() -> None:
    """R3: as if there was no such setting, the draws of what follows among it."""
    plain = step({})
    for other in (step({"teacher_forcing": 1.0}, teacher_forcing=0.3), step({}, passes=4)):
        for one, two in zip(
            (plain[0], *plain[1], plain[2]), (other[0], *other[1], other[2]), strict=True
        ):
            assert torch.equal(one, two)
    assert not torch.equal(step({"teacher_forcing": 0.5})[0], plain[0])


def test_enough_passes_are_drawing_one_after_the_other() -> None:
    """R3: k passes give the first k + 1 inputs that a loop gives which draws each token after those before it."""
    torch.manual_seed(0)
    model, inputs = RecurrentLanguageModel(11, 8, embedding=4).double(), torch.randint(11, (4, 7))
    state = torch.get_rng_state()
    stays, place = torch.rand(4, 7) < 0.4, torch.rand(4, 7)
    expected = inputs[:, :1]
    for t in range(1, 7):
        logits = model(expected)[:, -1]
        drawn = torch.searchsorted(logits.softmax(1).cumsum(1), place[:, t - 1, None].double())
        drawn = torch.where(stays[:, t, None], inputs[:, t, None], drawn)
        expected = torch.cat([expected, drawn], dim=1)
    assert (expected != inputs).float().mean() > 0.3
    for passes in (1, 3, 6):
        torch.set_rng_state(state)
        mixed = scheduled_sampling(model, inputs, 0.4, passes)
        assert torch.equal(mixed[:, : passes + 1], expected[:, : passes + 1])
        assert not mixed.requires_grad


def test_no_gradient_goes_through_a_sampled_token() -> None:
    """R3: the gradient is that of the same inputs as constants."""
    torch.manual_seed(0)
    model = RecurrentLanguageModel(11, 8, embedding=4)
    micro: Any = Rows(torch.randint(11, (3, 9)), torch.tensor([8, 2, 5]))
    networks = Networks({"model": model})
    state = torch.get_rng_state()
    LanguageModelling(teacher_forcing=0.3).loss(Turn("model"), networks, micro, {})[0].backward()
    sampled = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    torch.set_rng_state(state)
    inputs = scheduled_sampling(model, micro["tokens"][:, :-1], 0.3)
    losses = nn.functional.cross_entropy(
        model(inputs).transpose(1, 2), micro["tokens"][:, 1:], reduction="none"
    )
    real = torch.arange(8) < micro["length"][:, None]
    model.zero_grad()
    ((losses * real).sum() / real.sum()).backward()
    for one, parameter in zip(sampled, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-6, atol=1e-8)


def test_draws_follow_the_distribution() -> None:
    probability = torch.tensor([0.5, 0.2, 0.0, 0.3])
    place = torch.arange(1000) / 1000
    drawn = draw(probability.log().expand(1000, 4), place)
    assert torch.bincount(drawn, minlength=4).tolist() == [500, 200, 0, 300]


def test_writing_ends_at_the_boundary() -> None:
    """A model that counts up: after token i the likeliest is i + 1, and after the last the first."""
    following = nn.functional.one_hot(torch.tensor([1, 2, 3, 4, 0]), 5).float()
    written, length = write(lambda tokens: following[tokens], torch.tensor([[1], [3], [4]]), 4)
    assert written.tolist() == [[2, 3, 4, 4], [4, 4, 4, 4], [0, 1, 2, 3]]
    assert length.tolist() == [3, 1, 4]


def test_edit_error_is_edits_for_each_true_token() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    outputs = {
        "written": torch.tensor([[1, 2, 9, 9], [4, 4, 4, 9], [0, 0, 0, 0]]),
        "written_length": torch.tensor([3, 4, 4]),
        "truth": torch.tensor([[1, 3, 9], [4, 9, 0], [5, 5, 5]]),
        "truth_length": torch.tensor([3, 2, 3]),
    }
    micro: Any = Rows(torch.zeros(3, 1), torch.zeros(3))
    micro.real = 2
    assert edit_error(outputs, micro) == (1 + 2, 5)


def test_tokens_have_ends() -> None:
    tokenise = Tokenise(4, field="text", ends=True)
    rng = np.random.default_rng(0)
    assert tokenise({"text": "ab"}, rng)["tokens"].tolist() == [256, 97, 98, 256]
    assert tokenise({"text": "abcdef"}, rng)["tokens"].tolist() == [256, 97, 98, 99, 256]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_forcing": 1.5}, "teacher_forcing must be a probability, 0 to 1, got 1.5"),
        ({"teacher_forcing": 0.5, "chunk": 8}, "needs whole logits: chunk must be 0, got 8"),
        ({"passes": 0}, "passes must be 1 or more, got 0"),
        ({"free_running": -1}, "free_running must be 0 or more tokens, got -1"),
        ({"chunk": 2, "describes": "image"}, "chunk must be 0 with describes 'image', got 2"),
    ],
)
def test_mistakes_in_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        LanguageModelling(**settings)
    assert str(error.value).endswith(message)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Recurrent(2, 2, 0), "depth must be 1 or more, got 0"),
        (lambda: Recurrent(2, 2, cell="ltsm"), "cell must be one of rnn, lstm, gru, got 'ltsm'"),
        (lambda: Recurrent(2, 2, dropout=1.0), "dropout must be in [0, 1), got 1.0"),
        (lambda: TemporalConvolution(5, kernel=0), "kernel must be 1 or more, got 0"),
    ],
)
def test_mistakes_are_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value) == message
