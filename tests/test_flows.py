"""G7: flows are inverted, their log-determinant is autograd's, their density integrates to 1, bits are bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_objectives import TURN, Micro
from torch import Tensor, nn

from dist_train.errors import UserError
from dist_train.models.flow import NICE, RealNVP
from dist_train.networks import Networks
from dist_train.objectives.likelihood import PRIORS, Likelihood, dequantised, logit

FLOWS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "nice": (lambda: NICE(15, couplings=4, width=16), (15,)),
    "nice, affine": (lambda: NICE(16, couplings=3, width=16, coupling="affine"), (1, 4, 4)),
    "realnvp": (lambda: RealNVP(2, 8, scales=3, width=4), (2, 8, 8)),
    "realnvp, small": (lambda: RealNVP(1, 4, scales=2, width=4), (1, 4, 4)),
    "realnvp, one scale": (lambda: RealNVP(1, 4, scales=1, width=4), (1, 4, 4)),
    "realnvp, additive": (lambda: RealNVP(1, 4, scales=2, width=4, coupling="additive"), (1, 4, 4)),
}


def moved(flow: nn.Module, by: float = 0.1) -> nn.Module:
    """A flow elsewhere than at its start, which is the identity."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(by * torch.randn_like(weight))
    return flow


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_starts_as_the_identity_and_is_inverted_to_1e_5(name: str) -> None:
    make, shape = FLOWS[name]
    torch.manual_seed(1)
    flow, x = make(), torch.randn(6, *shape)
    z, log_det = flow(x)
    torch.testing.assert_close(z.flatten(1).sort(1).values, x.flatten(1).sort(1).values)
    torch.testing.assert_close(log_det, torch.zeros(6))
    moved(flow, by=0.03)
    z, log_det = flow(x)
    assert z.shape == x.shape and log_det.shape == (6,)
    back, log_det_back = flow(z, True)
    assert (back - x).abs().max() < 1e-5
    torch.testing.assert_close(log_det_back, -log_det, atol=1e-4, rtol=1e-5)
    assert (z - x).abs().max() > 0.1


def test_a_flow_in_bf16_is_inverted_too() -> None:
    """What the couplings add and multiply by is rounded, the same on the way back; x is not."""
    make, shape = FLOWS["nice, affine"]
    flow, x = moved(make()), torch.randn(6, *shape)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z, log_det = flow(x)
        back, log_det_back = flow(z, True)
    assert (back - x).abs().max() < 1e-5
    torch.testing.assert_close(log_det_back, -log_det, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "name", [name for name, (_, shape) in FLOWS.items() if math.prod(shape) < 20]
)
def test_the_log_determinant_is_autograds(name: str) -> None:
    make, shape = FLOWS[name]
    flow = moved(make()).double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    _, log_det = flow(x)
    for one, found in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda value: flow(value[None])[0].flatten(), one
        ).flatten(1)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, found)
    if "additive" in name or name == "nice":
        assert log_det.std() < 1e-12  # the same for every x


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_a_density_integrates_to_1(coupling: str, prior: str) -> None:
    flow = moved(NICE(2, couplings=4, depth=1, width=8, coupling=coupling)).double()
    objective = Likelihood([2], prior, inputs="features")
    side, points = 30.0, 801
    line = torch.linspace(-side, side, points, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        found = objective.predict(Networks({"model": flow}), Micro(features=grid))
    mass = found["log_likelihood"].exp().sum() * (line[1] - line[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=2e-3)


def test_bits_of_a_uniform_density_are_8_and_what_alpha_leaves_out() -> None:
    """Under a logistic base the identity is a uniform density of p = alpha + (1 - 2 alpha) y."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.float64) / 255
    networks = Networks({"model": NICE(16).double()})
    objective = Likelihood([1, 4, 4], "logistic", alpha=0.05)
    expected = 8 - math.log2(0.9)
    found = objective.evaluate(networks, Micro(image=x))
    torch.testing.assert_close(found["bits_per_dim"], torch.full((5,), expected).double())
    loss, logged = objective.loss(TURN, networks, Micro(image=x), {})
    assert logged["bits_per_dim"].item() == pytest.approx(expected)
    assert loss.item() == pytest.approx(expected * math.log(2))


def test_logit_and_noise_within_a_level() -> None:
    torch.manual_seed(0)
    y = torch.rand(4, 7, dtype=torch.float64, requires_grad=True)
    x, log_slope = logit(y, 0.05)
    (slope,) = torch.autograd.grad(x.sum(), y)
    torch.testing.assert_close(log_slope, slope.log().sum(1))
    level = torch.arange(256.0)
    noisy = dequantised((level / 255).expand(200, -1)) * 256
    assert torch.equal(noisy.floor().clamp(max=255), level.expand(200, -1))
    assert (noisy - level).mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("prior", PRIORS)
def test_samples_are_pictures_whose_way_back_is_the_noise(prior: str) -> None:
    flow = moved(RealNVP(2, 8, scales=2, width=4), by=0.05)
    objective = Likelihood([2, 8, 8], prior)

    def draw() -> Tensor:
        torch.manual_seed(4)
        return objective.samples(Networks({"model": flow}), 5, "cpu")["flow"]

    with torch.no_grad():
        drawn = draw()
    assert drawn.shape == (5, 2, 8, 8)
    assert drawn.min() >= 0 and drawn.max() <= 1
    assert torch.equal(drawn, draw())
    torch.manual_seed(4)
    noise = torch.randn(5, 2, 8, 8)
    if prior == "gaussian":
        inside = ((drawn > 0) & (drawn < 1)).flatten(1).all(1)
        z, _ = flow(logit(drawn, 0.05)[0])
        torch.testing.assert_close(z[inside], noise[inside], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"prior": "gausian"}, "prior: got 'gausian'.*gaussian"), ({"alpha": 0.5}, "alpha: got 0.5")],
)
def test_mistakes_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Likelihood([1, 4, 4], **settings)
    with pytest.raises(UserError, match=r"shape: got \[1, 4, 4\], but samples are \[1, 8, 8\]"):
        Likelihood([1, 4, 4]).predict(Networks({}), Micro(image=torch.rand(2, 1, 8, 8)))
    with pytest.raises(ValueError, match="multiple of 4 for 3 scales"):
        RealNVP(1, 6, scales=3)
