"""Initialisation by name (C7): its closed forms, through 50 layers, and in a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import nn

from dist_train import checkpoint
from dist_train.errors import UserError
from dist_train.networks.initialisation import fans, initialise
from dist_train.testing import assert_same_run, spawn_ranks, tiny_run
from dist_train.world import pin_threads


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    pin_threads(1, 1)


@torch.no_grad()
def variances(spec: dict[str, Any], x: torch.Tensor, activation: nn.Module) -> list[float]:
    """Of what each of 50 layers puts out before its activation."""
    found = []
    for _ in range(50):
        layer = nn.Linear(x.shape[1], x.shape[1])
        initialise(layer, spec)
        x = layer(x)
        found.append(float(x.var()))
        x = activation(x)
    return found


def test_he_keeps_the_variance_of_50_relu_layers() -> None:
    """In expectation it is 1 throughout; at width n one draw of 50 layers strays by about sqrt(50 * 5 / n)."""
    torch.manual_seed(1)
    x = torch.randn(64, 1024).relu()
    assert all(0.5 <= variance <= 2 for variance in variances({"name": "he"}, x, nn.ReLU()))
    assert variances({"name": "gaussian", "std": 0.01}, x, nn.ReLU())[-1] < 1e-30  # it dies out


def test_xavier_keeps_the_variance_of_50_linear_layers() -> None:
    torch.manual_seed(2)
    found = variances({"name": "xavier"}, torch.randn(64, 512), nn.Identity())
    assert all(0.5 <= variance <= 2 for variance in found)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (16, 4, 3, 3)])
def test_orthogonal_has_all_singular_values_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    weight = nn.Conv2d(shape[1], shape[0], shape[2]) if len(shape) == 4 else nn.Linear(*shape[::-1])
    initialise(weight, {"name": "orthogonal", "gain": 1.5})
    values = torch.linalg.svdvals(weight.weight.detach().flatten(1))
    torch.testing.assert_close(values, torch.full_like(values, 1.5))


@pytest.mark.parametrize(
    ("spec", "variance"),
    [
        ({"name": "gaussian", "std": 0.3}, 0.09),
        ({"name": "he"}, 2 / (24 * 9)),
        ({"name": "he", "mode": "fan_out"}, 2 / (40 * 9)),
        ({"name": "he", "distribution": "uniform"}, 2 / (24 * 9)),
        ({"name": "xavier"}, 2 / (64 * 9)),
        ({"name": "xavier", "gain": 2, "distribution": "normal"}, 8 / (64 * 9)),
        ({"name": "lecun"}, 1 / (24 * 9)),
    ],
)
def test_variance_of_a_weight(spec: dict[str, Any], variance: float) -> None:
    """8,640 draws: the variance of a sample is within 10 %."""
    torch.manual_seed(4)
    convolution = nn.Conv2d(24, 40, 3)
    initialise(convolution, {**spec, "bias": 0.25})
    assert float(convolution.weight.detach().var()) == pytest.approx(variance, rel=0.1)
    assert (convolution.bias == 0.25).all()


def test_fans_of_a_transposed_convolution() -> None:
    assert fans(nn.Conv2d(3, 5, 4).weight) == (3 * 16, 5 * 16)
    assert fans(nn.ConvTranspose2d(3, 5, 4).weight, transposed=(1, 1)) == (3 * 16, 5 * 16)


@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (3, 1), (2, 2)])
def test_a_transposed_convolution_keeps_the_variance(kernel: int, stride: int) -> None:
    """Of its kernel an output meets one weight in stride x stride."""
    torch.manual_seed(5)
    up = nn.ConvTranspose2d(32, 32, kernel, stride)
    initialise(up, {"name": "lecun"})
    inside = up(torch.randn(8, 32, 16, 16)).detach()[..., kernel:-kernel, kernel:-kernel]
    assert float(inside.var()) == pytest.approx(1.0, rel=0.1)


def test_norms_and_embeddings_keep_their_own() -> None:
    network = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9))
    network[2].weight = network[0].weight  # tied
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    initialise(network, {"name": "gaussian", "bias": 1.0})
    changed = [n for n, t in network.state_dict().items() if not torch.equal(t, before[n])]
    assert changed == ["2.bias"]
    with pytest.raises(UserError, match="LayerNorm has no weight"):
        initialise(nn.LayerNorm(4), {"name": "he"})


# ---------------------------------------------------------------------------------------------------------------------
# In a run


def recipe(data: Path, **settings: Any) -> Any:
    init = {"name": "orthogonal", "bias": 0.1}
    made = cases.tiny_recipe("resnet", data, strategy="single", init=init, **settings)
    return made.set("optimizer.learning_rate", 0.0).set("callbacks.learning_rate_decay", None)


def test_a_run_starts_from_the_seed_alone(tiny_data: Path, tmp_path: Path) -> None:
    """Under two ranks and ZeRO-3 the same bits as in one process; another seed, other weights."""
    one = tiny_run(recipe(tiny_data), tmp_path / "one", steps=1)
    two = tiny_run(
        recipe(tiny_data).set("strategy", cases.strategy("zero3")),
        tmp_path / "two",
        steps=1,
        ranks=2,
    )
    other = tiny_run(recipe(tiny_data, seed=8), tmp_path / "other", steps=1)
    found = [checkpoint.Reader(checkpoint.resolve(path)) for path in (one, two, other)]
    for name in found[0].names("weights/"):
        weight = found[0].whole(name)
        assert torch.equal(weight, found[1].whole(name)), name
        if weight.ndim >= 2:
            values = torch.linalg.svdvals(weight.flatten(1))
            torch.testing.assert_close(values, torch.ones_like(values))
            assert not torch.equal(weight, found[2].whole(name))
    assert (found[0].whole("weights/model.classifier.bias") == 0.1).all()


def test_activation_scale_changes_nothing_and_sees_the_layers(
    tiny_data: Path, tmp_path: Path
) -> None:
    plain = cases.tiny_recipe("wgan_gp", tiny_data, strategy="single")
    watched = plain.set("callbacks.activation_scale", {"every": "2 steps"})
    first = tiny_run(plain, tmp_path / "plain", steps=4)
    second = tiny_run(watched, tmp_path / "watched", steps=4)
    assert_same_run(first, second)
    assert sorted(path.name for path in (second / "plots").iterdir()) == [
        f"activation-scale-critic-{step:08d}.{kind}" for step in (0, 2) for kind in ("json", "png")
    ]  # the generator has its turn in the odd steps
    assert (second / "plots" / "activation-scale-critic-00000002.png").read_bytes()[
        :4
    ] == b"\x89PNG"
    scales = json.loads((second / "plots" / "activation-scale-critic-00000000.json").read_text())
    assert len(scales) >= 3
    assert all(scale["activation"] > 0 and scale["gradient"] > 0 for scale in scales.values())


def test_activation_scale_of_a_hand_made_forward(tiny_data: Path, tmp_path: Path) -> None:
    """The first layer's deviation, from the weights and the micro-batch themselves; also by two ranks under ZeRO-3."""
    (one, two) = spawn_ranks(2, cases.scales_in_ranks, str(tiny_data), str(tmp_path), timeout=240)
    assert one == two
    found = json.loads(
        (tmp_path / "run" / "plots" / "activation-scale-model-00000000.json").read_text()
    )
    assert found["model.stem.0"]["activation"] == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"name": "kaiming"}, "init.name: no init is called 'kaiming'"),
        ({"name": "he", "mod": "fan_in"}, "did you mean 'mode'"),
        ({"name": "he", "mode": "both"}, "init.mode: got 'both'"),
        ({"name": "he", "weight": 3}, "no argument 'weight'"),
        ({"name": "he", "bias": "small"}, "init.bias: got 'small', expected a number"),
        ({"critic": {"name": "he"}}, "init.critic: expected 'name', or some of the players model"),
        ({"model": "he"}, "init.model: got 'he'"),
    ],
)
def test_mistakes(tiny_data: Path, init: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(tiny_data).set("init", None).set("init", init).check_components()
