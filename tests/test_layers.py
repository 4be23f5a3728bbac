"""Networks whose weights are gathered when they are read: the numbers of plain torch, and how much is there at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import engine_cases
import pytest
import torch
from torch import Tensor, nn

from dist_train.engine.layers import Layers, Shards
from dist_train.engine.views import Views
from dist_train.errors import UserError
from dist_train.networks import Player
from dist_train.networks.blocks import recompute_activations
from dist_train.world import pin_threads


class Here(Shards):
    """The slices of one rank, which are the weights; counts what is gathered, and what of it is alive."""

    def __init__(self, weights: dict[str, Tensor], small: int) -> None:
        self.weights = weights
        self.sizes = {n: w.numel() for n, w in weights.items() if w.numel() > small}
        self.lengths, self.device = dict(self.sizes), "cpu"
        self.gathered: list[str] = []
        self.scattered: list[str] = []
        self.alive = self.most = 0

    def small(self) -> dict[str, Tensor]:
        return {n: w.detach() for n, w in self.weights.items() if n not in self.sizes}

    def gather(self, name: str) -> Tensor:
        self.gathered.append(name)
        whole = self.weights[name].detach().clone()
        self.alive += whole.numel()
        self.most = max(self.most, self.alive)
        weakref.finalize(whole.untyped_storage(), self._free, whole.numel())
        return whole

    def _free(self, elements: int) -> None:
        self.alive -= elements

    def scatter(self, name: str, gradient: Tensor) -> Tensor:
        self.scattered.append(name)
        return gradient.flatten()


class Attention(nn.Module):
    """Uses the weights of a layer that it does not call (`out_proj`), and one weight several times."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rows = nn.ParameterList([nn.Parameter(torch.randn(8, 8) / 3) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + torch.tanh(x @ self.rows[0] @ self.rows[1])
        return self.attention(x, x, x)[0].sum(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def spectral() -> nn.Module:
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(nn.Flatten(), norm(nn.Linear(40, 12)), nn.Softplus(), nn.Linear(12, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.Conv2d(4, 2, 3, stride=2),
        nn.Flatten(),
    )


def recomputed() -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Softplus(), nn.Dropout(0.2)) for _ in range(3)]
    for block in blocks:
        recompute_activations(block)
    return nn.Sequential(*blocks, nn.Linear(8, 2))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "recurrent": Recurrent,
    "spectral": spectral,
    "convolutional": convolutional,
    "recomputed": recomputed,
}
"""All take (B, 5, 8)."""
PLAIN_BACKWARD = ("recurrent",)
"""torch has no double backward of these on a CPU."""


def twins(name: str, small: int, budget: int) -> tuple[nn.Module, Views, Here]:
    """A network, views of one with the same weights, and the slices behind them."""
    pin_threads(1, 1)
    torch.manual_seed(3)
    plain = NETWORKS[name]().train()
    torch.manual_seed(3)
    player = Player({"net": NETWORKS[name]().train()}, "fp32", "cpu")
    weights = {n.removeprefix("networks."): p for n, p in player.named_parameters()}
    buffers = {n.removeprefix("networks."): b for n, b in player.named_buffers()}
    views = Views(player, buffers, weights, dict)
    shards = Here(weights, small)
    views.gather_by_layer(shards, budget)
    return plain, views, shards


def loss_of(net: Callable[[Tensor], Tensor], penalised: bool) -> tuple[Tensor, Tensor]:
    """(loss, the input): of two batches, as a critic's, and of the slope at one."""
    torch.manual_seed(5)
    x, other = torch.randn(4, 5, 8).requires_grad_(), torch.randn(4, 5, 8)
    loss = net(x).square().mean() - net(other).mean()
    if penalised:
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        loss = loss + (slope.flatten(1).norm(dim=1) - 1).square().mean()
    return loss, x


@pytest.mark.parametrize("budget", (0, 100, 10**6))
@pytest.mark.parametrize("small", (0, 10))
@pytest.mark.parametrize("name", NETWORKS)
def test_given_gradients_are_those_of_plain_torch(name: str, small: int, budget: int) -> None:
    plain, views, _ = twins(name, small, budget)
    loss, _ = loss_of(plain, name not in PLAIN_BACKWARD)
    truth = torch.autograd.grad(loss, list(plain.parameters()))
    with views.loss_context():
        ours, _ = loss_of(views.given("net"), name not in PLAIN_BACKWARD)
    assert torch.equal(ours, loss)
    found = torch.autograd.grad(ours, list(views.leaves.values()))
    for path, one, other in zip(views.leaves, found, truth, strict=True):
        apart = (one.flatten() - other.flatten()).norm()
        assert float(apart) <= 1e-6 * max(1.0, float(other.norm())), path


@pytest.mark.parametrize("name", NETWORKS)
def test_a_frozen_view_by_layer_is_the_network_bit_for_bit(name: str) -> None:
    plain, views, shards = twins(name, 10, 0)
    for penalised in (False, name not in PLAIN_BACKWARD):
        for (
            module
        ) in plain.modules():  # a view changes nothing, so each loss finds the first buffers
            for key, buffer in module._buffers.items():
                module._buffers[key] = buffer.clone() if buffer is not None else None
        before = {key: b.clone() for key, b in plain.named_buffers()}
        loss, x = loss_of(plain, penalised)
        truth = torch.autograd.grad(loss, x)[0]
        for key, buffer in plain.named_buffers():
            buffer.data.copy_(before[key])
        ours, x = loss_of(views.frozen("net"), penalised)
        assert torch.equal(ours, loss)
        assert torch.equal(torch.autograd.grad(ours, x)[0], truth)
    assert not shards.scattered


class Deep(nn.Sequential):
    def __init__(self, depth: int = 12) -> None:
        super().__init__(
            *[m for _ in range(depth) for m in (nn.Linear(16, 16, bias=False), nn.Softplus())]
        )


LAYER = 16 * 16


def deep(budget: int) -> tuple[Views, Here]:
    player = Player({"net": Deep()}, "fp32", "cpu")
    weights = {n.removeprefix("networks."): p for n, p in player.named_parameters()}
    views, shards = Views(player, {}, weights, dict), Here(weights, 0)
    views.gather_by_layer(shards, budget)
    return views, shards


@pytest.mark.parametrize("budget", (0, 4 * LAYER))
def test_few_layers_are_there_at_once(budget: int) -> None:
    """Forward, backward and double backward hold the budget and what is in use; all is gathered in the same order."""
    views, shards = deep(budget)
    orders = []
    for _ in range(2):
        shards.gathered.clear()
        with views.loss_context():
            net = views.given("net")
            x = torch.randn(3, 16).requires_grad_()
            (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
            loss = slope.square().mean() + net(x).mean()
        assert shards.alive <= budget + LAYER
        torch.autograd.grad(loss, list(views.leaves.values()))
        orders.append(list(shards.gathered))
        views.forget()
        assert shards.alive == 0
    assert shards.most <= budget + 3 * LAYER
    assert orders[0] == orders[1]


def test_a_large_budget_gathers_once_a_turn() -> None:
    views, shards = deep(10**6)
    for _ in range(3):  # micro-batches
        with views.loss_context():
            loss = engine_cases.penalty(views.given("net"), torch.randn(3, 16))
        torch.autograd.grad(loss, list(views.leaves.values()))
    assert len(shards.gathered) == 12


def test_a_graph_of_an_earlier_turn_is_refused() -> None:
    views, _ = deep(0)
    x = torch.randn(3, 16).requires_grad_()
    out = views.frozen("net")(x).sum()
    views.forget()
    with pytest.raises(UserError, match="weights of an earlier turn"):
        out.backward()


def test_the_same_weights_are_kept_whatever_else_is_alive() -> None:
    """What is kept follows from the order of use, not from when something is freed, which differs from rank to rank."""
    orders: list[list[str]] = []
    for hold in (False, True):
        views, shards = deep(3 * LAYER)
        held: list[Any] = []
        for _ in range(2):
            layers: Layers = views._layers["frozen"]
            held += [layers.whole(f"net.{2 * i}.weight") for i in (0, 1, 2, 1, 3, 4, 0, 3)]
            if not hold:
                held.clear()
        orders.append(shards.gathered)
    assert orders[0] == orders[1]
