"""G1, G2: sub-pixels see those before them, no others; probabilities sum to 1; draws follow them; conditions count."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_objectives import TURN, Micro
from torch import Tensor, nn

from dist_train.errors import UserError
from dist_train.models.mlp import MLP
from dist_train.models.pixel_cnn import PixelCNN
from dist_train.models.pixel_rnn import RowLSTM
from dist_train.models.pixel_transformer import PixelTransformer
from dist_train.models.subpixels import MaskedConvolution
from dist_train.networks import Networks
from dist_train.objectives.autoregression import Autoregression, draw_after
from dist_train.recipe import Recipe
from dist_train.run import train
from dist_train.run_directory import RunDirectory
from dist_train.sample_quality import label_agreement

SIDE = 5


MODELS: dict[str, Callable[..., nn.Module]] = {
    "pixel_cnn": lambda size, **a: PixelCNN(**{"width": 6, "depth": 3, "levels": 4, **a}),
    "row_lstm": lambda size, **a: RowLSTM(**{"width": 6, "depth": 2, "levels": 4, **a}),
    "pixel_transformer": lambda size, **a: PixelTransformer(
        **{"image_size": size, "dim": 8, "depth": 2, "num_heads": 2, "levels": 4, **a}
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def moved(name: str, size: int = SIDE, **arguments: Any) -> nn.Module:
    """A model elsewhere than at its start, where all levels are equally likely; in float64."""
    torch.manual_seed(0)
    model = MODELS[name](size, **arguments).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model


def levels_of(shape: tuple[int, ...], levels: int) -> Tensor:
    return torch.randint(0, levels, shape).double() / (levels - 1)


def sensitivity(model: nn.Module, x: Tensor) -> Tensor:
    """|d logits / d x| summed over levels: (T, T), row i of sub-pixel i's logits, both in the order of sub-pixels.

    A table of levels has no derivative with respect to a level: there it is that to the embedded one.
    """
    leaf = x.clone().requires_grad_()
    if isinstance(model, PixelTransformer):
        embedded: list[Tensor] = []

        def keep(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[0]

        hook = model.embedding.register_forward_hook(keep)
        logits = model(x)
        hook.remove()
        [leaf] = embedded  # (1, T - 1, D): the last is no input
    else:
        logits = model(leaf)
    rows = []
    for own in logits[0].permute(2, 3, 1, 0).flatten(0, 2):  # (V,) of each, R before G before B
        # random factors, so that no sum over levels cancels
        (slope,) = torch.autograd.grad(
            own @ torch.randn(len(own), dtype=own.dtype), leaf, retain_graph=True
        )
        if leaf.ndim == 3:
            rows.append(F.pad(slope[0].abs().sum(1), (0, 1)))
        else:
            rows.append(slope[0].permute(1, 2, 0).flatten().abs())
    return torch.stack(rows)


@every_model
@pytest.mark.parametrize("channels", [1, 3])
def test_every_sub_pixel_sees_those_before_it_and_no_others(name: str, channels: int) -> None:
    """For every pixel and channel. PixelCNN and the Transformer see all of them, without a blind spot; a Row LSTM, of
    the rows above, a triangle: 3 columns to the right by its first convolution, one more with each row."""
    deep = {} if name == "pixel_transformer" else {"depth": 5, "width": 24}
    model = moved(name, channels=channels, **deep)
    found = sensitivity(model, levels_of((1, channels, SIDE, SIDE), 4)) > 0  # (T, T)
    count = channels * SIDE**2
    expected = torch.ones(count, count).tril(-1).bool()
    if name == "row_lstm":
        row, column = (torch.arange(count) // n for n in (channels * SIDE, channels))
        up, right = row[:, None] - row, column % SIDE - (column % SIDE)[:, None]
        expected &= right <= up + 2
        assert not expected.equal(torch.ones(count, count).tril(-1).bool())
    assert torch.equal(found, expected)


@every_model
@pytest.mark.parametrize(("shape", "levels"), [((1, 2, 2), 2), ((3, 1, 2), 2), ((1, 2, 1), 5)])
def test_probabilities_of_all_images_sum_to_1(
    name: str, shape: tuple[int, int, int], levels: int
) -> None:
    model = moved(name, size=2, channels=shape[0], levels=levels)
    x, log_p = all_images(model, shape, levels)
    assert len(x) == levels ** math.prod(shape)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert log_p.std() > 0.1


def all_images(
    model: nn.Module, shape: tuple[int, int, int], levels: int, condition: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Every image there is, and its log p."""
    every = itertools.product(range(levels), repeat=math.prod(shape))
    level = torch.tensor(list(every)).view(-1, *shape)
    x = level.double() / (levels - 1)
    with torch.no_grad():
        logits = model(x, None if condition is None else condition.expand(len(x)))
    assert logits.shape == (len(x), levels, *shape)
    return x, -F.cross_entropy(logits, level, reduction="none").flatten(1).sum(1)


@every_model
@pytest.mark.parametrize("channels", [1, 3])
def test_a_step_gives_what_the_whole_gives(name: str, channels: int) -> None:
    """The logits of each sub-pixel with a state are those of a forward over the whole image, from any place on."""
    model = moved(name, channels=channels, num_classes=3)
    x, label = levels_of((2, channels, SIDE, SIDE), 4), torch.tensor([2, 0])
    with torch.no_grad():
        whole = model(x, label).permute(0, 1, 3, 4, 2).flatten(2)  # (B, V, T)
        for start in (0, channels * SIDE * 2 + 4):
            state: dict[str, Any] = {}
            for known in range(start, channels * SIDE**2):
                after = x.permute(0, 2, 3, 1).reshape(2, -1).clone()
                after[:, known:] = torch.rand(2, after.shape[1] - known)  # not settled yet
                seen = after.view(2, SIDE, SIDE, channels).permute(0, 3, 1, 2)
                logits, state = model(seen, label, known, state)
                torch.testing.assert_close(logits, whole[:, :, known])


@pytest.mark.parametrize("kind", ["A", "B"])
def test_masks_are_those_of_the_paper(kind: str) -> None:
    layer = MaskedConvolution(6, 12, (3, 3), 3, own=kind == "B", parts=2)
    assert layer.mask[:, :, 0].all() and layer.mask[:, :, 1, 0].all()
    assert not layer.mask[:, :, 1, 2].any() and not layer.mask[:, :, 2].any()
    red, green, blue = [0, 0, 0], [1, 0, 0], [1, 1, 0]
    if kind == "B":
        red, green, blue = green, blue, [1, 1, 1]
    rows = [row for row in (red, green, blue) for _ in range(2)] * 2
    expected = torch.tensor(rows).repeat_interleave(2, dim=1)
    assert torch.equal(layer.mask[:, :, 1, 1], expected.float())


def test_a_row_lstm_is_a_loop_over_rows_and_columns() -> None:
    """Against the paper's equations, one pixel and one tap at a time: o, f, i = sigmoid(K_ss * h + K_is * x), g = tanh
    of its own, c = f c + i g, h = o tanh(c)."""
    model = moved("row_lstm", width=4, kernel=3)
    layer = model.layers[1]  # type: ignore[index]
    x = torch.randn(2, 4, 3, SIDE, dtype=torch.float64)
    nothing = x.new_zeros(2, 4, SIDE)
    found, (last, _) = layer(x, (nothing, nothing), None)
    taps, bias = layer.input_to_state.weight[:, :, 0], layer.input_to_state.bias
    before_h, before_c = nothing, nothing
    for row in range(3):
        h, c = torch.zeros_like(before_h), torch.zeros_like(before_c)
        for column in range(SIDE):
            gates = bias.expand(2, -1)
            for tap, offset in enumerate((-1, 0, 1)):
                at = column + offset
                if not 0 <= at < SIDE:
                    continue
                if offset <= 0:  # of its own row, what stands to the right is masked
                    gates = gates + x[:, :, row, at] @ taps[:, :, tap].T
                gates = gates + before_h[:, :, at] @ layer.state_to_state.weight[:, :, tap].T
            i, f, g, o = gates.split(4, dim=1)
            c[:, :, column] = f.sigmoid() * before_c[:, :, column] + i.sigmoid() * g.tanh()
            h[:, :, column] = o.sigmoid() * c[:, :, column].tanh()
        before_h, before_c = h, c
        matrix = layer.output.weight[:, :, 0, 0]
        expected = x[:, :, row] + torch.einsum("ij,bjw->biw", matrix, h)
        expected = expected + layer.output.bias[:, None]
        torch.testing.assert_close(found[:, :, row], expected)
    torch.testing.assert_close(last, before_h)


@every_model
def test_draws_follow_the_probabilities(name: str) -> None:
    """Of 2 x 2 pixels of 2 levels: how often each of the 16 images comes, within 4 standard errors."""
    model, count = moved(name, size=2, levels=2, num_classes=2), 10_000
    for label in (0, 1):
        x, log_p = all_images(model, (1, 2, 2), 2, torch.tensor([label]))
        torch.manual_seed(label)
        drawn = draw_after(
            model,
            torch.zeros(count, 1, 2, 2, dtype=torch.float64),
            torch.full((count,), label),
            0,
            2,
        )
        places = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
        number = (drawn.flatten(1) @ places).long()
        assert torch.equal((x.flatten(1) @ places).long(), torch.arange(16))
        share = torch.bincount(number, minlength=16) / count
        p = log_p.exp()
        assert ((share - p).abs() <= 4 * (p * (1 - p) / count).sqrt()).all()


@every_model
def test_a_model_starts_with_all_levels_equally_likely(name: str) -> None:
    torch.manual_seed(0)
    for levels in (2, 256):
        model = MODELS[name](SIDE, levels=levels, channels=3)
        objective = Autoregression([3, SIDE, SIDE], levels)
        micro = Micro(image=torch.rand(4, 3, SIDE, SIDE))
        loss, logged = objective.loss(TURN, Networks({"model": model}), micro, {})
        assert loss.item() == pytest.approx(math.log(levels), rel=1e-6)
        assert logged["bits_per_dim"].item() == pytest.approx(math.log2(levels), rel=1e-6)


def test_likelihoods_are_of_the_levels_and_padding_does_not_count() -> None:
    torch.manual_seed(0)
    image = torch.arange(256).repeat_interleave(2)[:500].view(5, 1, 10, 10) / 255
    for levels in (2, 3, 16, 256):
        model = moved("pixel_cnn", levels=levels).float()
        networks, objective = Networks({"model": model}), Autoregression([1, 10, 10], levels)
        found = objective.evaluate(networks, Micro(real=3, image=image))
        level = (image * 255).round().long() * levels // 256
        assert set(level.unique().tolist()) <= set(range(levels))
        with torch.no_grad():
            logits = model(level / (levels - 1))
        nll = F.cross_entropy(logits, level, reduction="none").flatten(1).sum(1)
        torch.testing.assert_close(found["nll"], nll)
        torch.testing.assert_close(found["bits_per_dim"], nll / (100 * math.log(2)))
        torch.testing.assert_close(found["loss_sum"], nll[:3].double().sum() / 100)
        assert found["loss_count"] == 3
        log_p = objective.predict(networks, Micro(image=image))["log_likelihood"]
        torch.testing.assert_close(log_p, -nll)


@every_model
@pytest.mark.parametrize("channels", [1, 3])
def test_a_completion_keeps_the_upper_half_bit_for_bit(name: str, channels: int) -> None:
    networks = Networks({"model": moved(name, size=6, channels=channels).float()})
    objective = Autoregression([channels, 6, 6], levels=4)
    micro = Micro(real=3, image=torch.rand(5, channels, 6, 6))
    torch.manual_seed(1)
    found = objective.completions(networks, micro)["completions"]
    assert found.shape == (9, channels, 6, 6)  # 3 images, and each twice
    rows = found.view(3, 3, channels, 6, 6)
    assert torch.equal(rows[:, :, :, :3], rows[:1, :, :, :3].expand(3, -1, -1, -1, -1))
    assert not torch.equal(rows[1, :, :, 3:], rows[2, :, :, 3:])
    assert torch.equal(found[:3], objective._quantised(micro["image"])[:3])
    torch.manual_seed(1)
    assert torch.equal(found, objective.completions(networks, micro)["completions"])


def class_images() -> Micro:
    """All four images of a toy set: the class says which half is white, and of the last pixel nothing."""
    image = torch.zeros(4, 1, 4, 4)
    image[0::2, :, :, :2] = 1
    image[1::2, :, :, 2:] = 1
    image[:, 0, 3, 3] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    return Micro(image=image, label=torch.tensor([0, 1, 0, 1]))


def fitted(objective: Autoregression, networks: dict[str, nn.Module], micro: Micro) -> float:
    """The loss after 100 steps, in bits an image."""
    weights = [weight for network in networks.values() for weight in network.parameters()]
    optimizer = torch.optim.Adam(weights, 2e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss, _ = objective.loss(TURN, Networks(networks), micro, {})
        loss.backward()
        optimizer.step()
    return loss.item() * 16 / math.log(2)


@every_model
def test_ignoring_the_condition_costs_the_bit_that_it_tells(name: str) -> None:
    """The class is worth 1 bit: without it, or with another's, an image takes more."""
    torch.manual_seed(0)
    micro = class_images()
    alone = fitted(Autoregression([1, 4, 4], levels=2), {"model": MODELS[name](4, levels=2)}, micro)
    told = Autoregression([1, 4, 4], levels=2, num_classes=2)
    model = MODELS[name](4, levels=2, num_classes=2)
    given = fitted(told, {"model": model}, micro)
    print(name, alone, given)
    assert given == pytest.approx(1, abs=0.05)
    assert alone == pytest.approx(2, abs=0.05)
    wrong = Micro(image=micro["image"], label=1 - micro["label"])
    assert told.evaluate(Networks({"model": model}), wrong)["bits_per_dim"].mean() * 16 > 3
    torch.manual_seed(0)
    drawn = told.samples(Networks({"model": model}), 20, "cpu")["samples"]
    assert (drawn[0::2, :, :, :2].mean() > 0.95) and (drawn[1::2, :, :, :2].mean() < 0.05)


def which_half(image: Tensor) -> tuple[Tensor, Tensor]:
    """A judge of the toy set: features, and the class whose half is the whiter."""
    halves = torch.stack([image[..., :2].flatten(1).mean(1), image[..., 2:].flatten(1).mean(1)], 1)
    return halves, halves.argmax(1)


def test_a_judge_sees_a_sample_of_each_images_class() -> None:
    torch.manual_seed(0)
    micro = class_images()
    objective = Autoregression([1, 4, 4], levels=2, num_classes=2)
    objective._judge = which_half  # type: ignore[assignment]
    networks = {"model": MODELS["row_lstm"](4, levels=2, num_classes=2)}
    before = objective.evaluate(Networks(networks), micro)
    assert before["features"].shape == before["real_features"].shape == (4, 2)
    assert torch.equal(before["real_class"], micro["label"])
    fitted(objective, networks, micro)
    agreement = [
        label_agreement(objective.evaluate(Networks(networks), micro), micro).mean().item()
        for _ in range(5)
    ]
    assert agreement == [1.0] * 5


def test_a_run_draws_samples_and_completions(tiny_data: Path, tmp_path: Path) -> None:
    """The first evaluation batch's; the grids are the same when the run is looked at again."""
    recipe = Recipe(
        project="tests",
        duration="2 steps",
        strategy="single",
        threads=1,
        data={
            "path": str(tiny_data / "digits"),
            "global_batch": 8,
            "micro_batch": 8,
            "scale": "unit",
        },
        model={"name": "pixel_cnn", "levels": 2, "width": 4, "depth": 1, "channels": "auto"},
        objective={"name": "autoregression", "shape": [1, 8, 8], "levels": 2},
        optimizer={"name": "adam", "learning_rate": 1e-2},
        evaluate={"split": "test", "every": "2 steps", "metrics": ["bits_per_dim"]},
        callbacks={"samples": {"every": "2 steps", "count": 4}},
    )
    grids = []
    for name in ("one", "two"):
        train(recipe, run_dir=tmp_path / name)
        row = RunDirectory.open(tmp_path / name).rows()[-1]
        assert set(row["images"]) == {"samples", "completions"}
        grids.append([(tmp_path / name / file).read_bytes() for file in row["images"].values()])
    assert grids[0] == grids[1]


@pytest.mark.parametrize("context", ["image", "upper_half"])
def test_an_encoded_context_is_a_condition(context: str) -> None:
    """Here the upper half tells the class too, and the image itself even the last pixel."""
    torch.manual_seed(0)
    micro = class_images()
    objective = Autoregression([1, 4, 4], levels=2, context=context)
    networks = {
        "model": MODELS["pixel_cnn"](4, levels=2, context_dim=3),
        "encoder": MLP(16, num_outputs=3, depth=1, width=16),
    }
    bits = fitted(objective, networks, micro)
    assert bits < (0.3 if context == "image" else 1.15)
    torch.manual_seed(0)
    found = objective.completions(Networks(networks), micro)["completions"].view(4, 4, 4, 4)
    assert (found[1:] == found[:1])[:, :, :3].float().mean() > 0.95
    assert objective.samples(Networks(networks), 4, "cpu") == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"levels": 1}, "levels: got 1, expected 2 to 256"),
        ({"context": "upper"}, "context: got 'upper'.*upper_half"),
        ({"context": "image", "num_classes": 2}, "expected one condition"),
        ({"shape": [28, 28]}, "shape: got .28, 28., expected channels"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Autoregression(**{"shape": [1, 4, 4], **settings})


def test_model_and_objective_must_agree() -> None:
    micro = Micro(image=torch.rand(2, 1, 4, 4), label=torch.tensor([0, 1]))
    networks = Networks({"model": MODELS["pixel_cnn"](4)})
    with pytest.raises(UserError, match="levels: got 8, but the model gives 4"):
        Autoregression([1, 4, 4], levels=8).loss(TURN, networks, micro, {})
    with pytest.raises(UserError, match=r"shape: got \[1, 8, 8\], but samples are \[1, 4, 4\]"):
        Autoregression([1, 8, 8], levels=4).loss(TURN, networks, micro, {})
    with pytest.raises(ValueError, match="num_classes is 0 and context_dim 0, but the condition"):
        Autoregression([1, 4, 4], levels=4, num_classes=2).loss(TURN, networks, micro, {})
    with pytest.raises(ValueError, match="width must be a multiple of the channels, got 8 for 3"):
        PixelCNN(channels=3, width=8)
    with pytest.raises(ValueError, match="kernel must be odd"):
        RowLSTM(kernel=4)
    with pytest.raises(ValueError, match="num_classes or context_dim"):
        PixelTransformer(num_classes=2, context_dim=3)
