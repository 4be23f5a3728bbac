"""Optimisers (F5) against their written update rules in float64, and under every strategy against one process.

Regularisation (F4) too: decay as the MAP gradient, what l1 makes sparse, what dropout keeps.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import optimizer_cases as cases
import pytest
import torch
from torch import Tensor, nn

from dist_train.errors import UserError
from dist_train.optimizers import adafactor, adagrad, adam, adamw, muon, rmsprop, sgd
from dist_train.parameter_groups import assign, heed_groups, parameter_groups
from dist_train.recipe.checks import check_optimizer
from dist_train.recipe.sections import GroupSettings
from dist_train.testing import spawn_ranks
from dist_train.world import World, pin_threads

RATE = 0.05


def five_steps(optimizer_of, rule, **arguments) -> None:
    """Give an optimiser and `rule(weight, gradient, state, step) -> weight` the same gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(37, 3, generator=generator, dtype=torch.float64)

    ours = nn.Parameter(draw())
    expected = ours.detach().clone()
    state: dict[str, Tensor] = {}
    optimizer = optimizer_of([{"params": [ours], "names": ["net.w"]}], RATE, **arguments)
    for step in range(1, 6):
        ours.grad = draw()
        expected = rule(expected, ours.grad.clone(), state, step)
        optimizer.step()
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd(decay: float) -> None:
    def rule(w: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        return w - RATE * (g + decay * w)

    five_steps(sgd, rule, weight_decay=decay)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_momentum(nesterov: bool) -> None:
    def rule(w: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        g = g + 0.1 * w
        state["v"] = 0.9 * state.get("v", torch.zeros_like(w)) + g
        return w - RATE * (g + 0.9 * state["v"] if nesterov else state["v"])

    five_steps(sgd, rule, momentum=0.9, nesterov=nesterov, weight_decay=0.1)


def adam_step(
    g: Tensor, state: dict[str, Tensor], step: int, beta1: float, beta2: float, eps: float
) -> Tensor:
    state["m"] = beta1 * state.get("m", torch.zeros_like(g)) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", torch.zeros_like(g)) + (1 - beta2) * g * g
    m, v = state["m"] / (1 - beta1**step), state["v"] / (1 - beta2**step)
    return m / (v.sqrt() + eps)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_adds_decay_to_the_gradient(decay: float) -> None:
    def rule(w: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        return w - RATE * adam_step(g + decay * w, state, step, 0.5, 0.9, 1e-6)

    five_steps(adam, rule, betas=[0.5, 0.9], eps=1e-6, weight_decay=decay)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_decays_beside_the_gradient(decay: float) -> None:
    def rule(w: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        return w - RATE * decay * w - RATE * adam_step(g, state, step, 0.9, 0.999, 1e-8)

    five_steps(adamw, rule, weight_decay=decay)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop(momentum: float) -> None:
    def rule(w: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        g = g + 0.1 * w
        state["s"] = 0.8 * state.get("s", torch.zeros_like(w)) + 0.2 * g * g
        quotient = g / (state["s"].sqrt() + 1e-6)
        state["v"] = momentum * state.get("v", torch.zeros_like(w)) + quotient
        return w - RATE * state["v"]

    five_steps(rmsprop, rule, decay=0.8, eps=1e-6, momentum=momentum, weight_decay=0.1)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adagrad(decay: float) -> None:
    def rule(w: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        g = g + decay * w
        state["s"] = state.get("s", torch.zeros_like(w)) + g * g
        return w - RATE * g / (state["s"].sqrt() + 1e-10)

    five_steps(adagrad, rule, weight_decay=decay)


def test_adafactor() -> None:
    """Shazeer and Stern 2018, algorithms 4 and 5."""

    def rms(x: Tensor) -> float:
        return float(x.square().mean().sqrt())

    def rule(w: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        rate = max(1e-3, rms(w)) * min(RATE, 1 / math.sqrt(step))
        new = step**-0.8
        for name, axis in (("rows", 1), ("columns", 0)):
            mean = g.square().mean(dim=axis, keepdim=True)
            state[name] = (1 - new) * state.get(name, torch.zeros_like(mean)) + new * mean
        second = state["rows"] @ state["columns"] / state["rows"].mean()
        update = g / second.sqrt()
        return w * (1 - RATE * 0.1) - rate * update / max(1.0, rms(update) / 1.01)

    five_steps(adafactor, rule, clip=1.01, weight_decay=0.1)


def orthogonal(update: Tensor) -> Tensor:
    """Five Newton-Schulz steps in bfloat16: x <- a x + (b A + c A A) x with A = x x'."""
    x = update.bfloat16()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.T if update.shape[0] > update.shape[1] else x


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon(nesterov: bool) -> None:
    def rule(w: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        state["v"] = 0.9 * state.get("v", torch.zeros_like(w)) + 0.1 * g
        update = orthogonal(0.9 * state["v"] + 0.1 * g if nesterov else state["v"])
        singular = torch.linalg.svdvals(update.double())
        assert 0.5 < float(singular.min()) <= float(singular.max()) < 1.3
        return w * (1 - RATE * 0.1) - RATE * 0.2 * math.sqrt(37) * update.double()

    five_steps(muon, rule, momentum=0.9, nesterov=nesterov, weight_decay=0.1)


def test_muon_gives_adamw_what_is_no_matrix_or_is_named() -> None:
    module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Linear(5, 9))
    named = [(f"net.{name}", p) for name, p in module.named_parameters()]
    groups = parameter_groups(named, 0.1)
    optimizer = muon(groups, RATE, weight_decay=0.1, adamw=["0.*", "net.2.weight"])
    by_muon = [g["names"] for g in optimizer.param_groups if "ns_steps" in g]
    by_adamw = [g["names"] for g in optimizer.param_groups if "betas" in g]
    assert by_muon == [["net.1.weight"]]
    assert by_adamw == [["net.0.weight", "net.2.weight"], ["net.1.bias", "net.2.bias"]]
    alone = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Linear(5, 9))
    alone.load_state_dict(module.state_dict())
    expected = torch.optim.AdamW(
        [{"params": [alone[0].weight, alone[2].weight]}], RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    for ours, theirs in zip(module.parameters(), alone.parameters(), strict=True):
        theirs.grad = torch.randn_like(theirs)
        ours.grad = theirs.grad.clone()
    optimizer.step()
    expected.step()
    torch.testing.assert_close(module[0].weight, alone[0].weight)
    torch.testing.assert_close(module[2].weight, alone[2].weight)
    with pytest.raises(UserError, match=r"'embedding.*' matches no parameter"):
        muon(groups, RATE, adamw=["embedding.*"])


@pytest.mark.parametrize("make", [sgd, adam, adamw])
def test_the_kernel_is_fused(make) -> None:
    optimizer = make([{"params": [nn.Parameter(torch.zeros(2))]}], 0.1)
    assert optimizer.defaults["fused"]
    assert optimizer.defaults["weight_decay"] == 0.0


@pytest.mark.parametrize("make", [sgd, adam, adamw])
def test_a_device_without_fused_kernels_gets_the_plain_ones(make) -> None:
    optimizer = make([{"params": [nn.Parameter(torch.zeros(2, device="meta"))]}], 0.1)
    assert not optimizer.defaults["fused"]


def test_parameter_groups_spare_norms_and_biases() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    groups = parameter_groups(model.named_parameters(), 0.1)
    assert [group["names"] for group in groups] == [
        ["0.weight", "3.weight"],
        ["0.bias", "1.weight", "1.bias", "3.bias"],
    ]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    named = dict(model.named_parameters())
    for group in groups:
        assert all(
            named[name] is p for name, p in zip(group["names"], group["params"], strict=True)
        )
    optimizer = adamw(groups, 0.1, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["names"] == ["0.weight", "3.weight"]


def test_parameter_groups_leave_out_the_empty() -> None:
    norm = nn.LayerNorm(4)
    groups = parameter_groups(norm.named_parameters(), 0.1)
    assert [group["names"] for group in groups] == [["weight", "bias"]]
    assert parameter_groups([], 0.1) == []


def of_torch(groups: Any, learning_rate: float, kind: str, **more: Any) -> torch.optim.Optimizer:
    return getattr(torch.optim, kind)(groups, lr=learning_rate, **more)


@pytest.mark.parametrize(
    ("settings", "begins_at_0"),
    [
        ({"kind": "RAdam"}, True),
        ({"kind": "Adadelta"}, True),
        ({"kind": "Adamax"}, True),
        ({"kind": "SGD", "momentum": 0.9}, True),
        ({"kind": "SGD", "momentum": 0.9, "dampening": 0.5}, False),
        ({"kind": "NAdam"}, False),
        ({"kind": "Rprop"}, False),
        ({"kind": "ASGD"}, False),
    ],
    ids=str,
)
def test_the_state_of_ones_own_optimizer_begins_at_0(
    settings: dict[str, Any], begins_at_0: bool
) -> None:
    """As `materialise` takes it to."""
    spec = {"name": f"{__name__}:of_torch", "learning_rate": RATE} | settings
    expected = pytest.raises(UserError, match=r"optimizer: the state of .* does not begin at 0")
    with contextlib.nullcontext() if begins_at_0 else expected:
        check_optimizer(spec, "optimizer")


def test_betas_are_two() -> None:
    with pytest.raises(UserError, match="betas must be two numbers"):
        adam([{"params": [nn.Parameter(torch.zeros(1))]}], 0.1, betas=[0.9])


# ---------------------------------------------------------------------------------------------------------------------
# Groups by patterns of names, and the l1 term


def settings(*groups: dict[str, Any], l1: float = 0.0) -> GroupSettings:
    return GroupSettings(groups=list(groups), l1=l1)


def test_the_first_pattern_that_matches_wins() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    wanted = settings(
        {"match": "0.*", "frozen": True},
        {"match": "*.bias", "learning_rate_scale": 0.5, "weight_decay": 0.3},
        {"match": "net.2.*", "l1": 0.01},
        l1=0.02,
    )
    rule_of = assign({"net": net}, wanted)
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == [
        "0.weight",
        "0.bias",
    ]
    named = [(f"net.{name}", p) for name, p in net.named_parameters() if p.requires_grad]
    optimizer = heed_groups(sgd(parameter_groups(named, 0.1, wanted, rule_of), 0.4))
    found = [(g["names"], g["lr"], g["weight_decay"], g["l1"]) for g in optimizer.param_groups]
    assert found == [
        (["net.1.weight"], 0.4, 0.0, 0.0),
        (["net.1.bias", "net.2.bias"], 0.2, 0.3, 0.0),
        (["net.2.weight"], 0.4, 0.1, 0.01),
    ]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"match": "stam.*"}], r"groups.0.match: got 'stam.\*', which matches no parameter"),
        ([{"match": "1.wieght"}], "did you mean '1.weight'"),
        ([{"match": "*"}, {"match": "0.*"}], "groups.1.match.*earlier groups.*first"),
        ([{"match": "*", "frozen": True}], "every parameter is frozen"),
    ],
)
def test_a_pattern_without_effect_is_an_error(groups: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        assign({"net": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))}, settings(*groups))


def test_weight_decay_of_sgd_is_the_map_gradient() -> None:
    """-log p(w | data) with w ~ N(0, 1 / decay): its gradient moves the weights."""
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    net = nn.Linear(3, 1, dtype=torch.float64)
    before = net.weight.detach().clone().requires_grad_()
    prior = torch.distributions.Normal(0.0, (1 / 0.3) ** 0.5)
    likelihood = 0.5 * (x @ before.T + net.bias.detach() - y).square().mean()
    (likelihood - prior.log_prob(before).sum()).backward()
    groups = parameter_groups([("net.weight", net.weight), ("net.bias", net.bias)], 0.3)
    optimizer = sgd(groups, 0.1, weight_decay=0.3)
    (0.5 * (net(x) - y).square().mean()).backward()
    optimizer.step()
    torch.testing.assert_close(net.weight, before - 0.1 * before.grad)


def test_l1_solves_a_sparse_problem() -> None:
    """The lasso on orthogonal inputs has a closed form, soft(X'y / N, l1); 44 of 50 true weights are 0."""
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(200, 50, dtype=torch.float64))[0] * math.sqrt(200)
    true = torch.zeros(50, dtype=torch.float64)
    true[:6] = torch.tensor([3.0, -2.0, 1.5, -1.0, 0.8, 2.5])
    y = x @ true + 0.5 * torch.randn(200, dtype=torch.float64)
    weight = nn.Parameter(torch.randn(1, 50, dtype=torch.float64))
    wanted = settings(l1=0.15)
    optimizer = heed_groups(sgd(parameter_groups([("net.w", weight)], 0.0, wanted), 0.5))
    for _ in range(60):
        weight.grad = None
        (0.5 * (x @ weight[0] - y).square().mean()).backward()
        optimizer.step()
    least_squares = x.T @ y / 200
    expected = least_squares.sign() * (least_squares.abs() - 0.15).clamp(min=0)
    torch.testing.assert_close(weight[0].detach(), expected)
    assert (weight == 0).double().mean() >= 0.8
    assert (weight[0, :6] != 0).all()


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.linspace(-2, 3, 40)
    dropped = nn.functional.dropout(x.expand(20_000, -1), 0.3)
    error = dropped.mean(0) - x
    deviation = x.abs() * math.sqrt(0.3 / 0.7 / 20_000)
    assert (error.abs() <= 5 * deviation + 1e-6).all()


# ---------------------------------------------------------------------------------------------------------------------
# Under every strategy


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, extensions = tmp_path_factory.mktemp("states"), tmp_path_factory.mktemp("extensions")
    pin_threads(1, 1)
    single = {
        name: cases.train_and_move(World(), name, "single", folder) for name in cases.OPTIMIZERS
    }
    environ = {"TORCH_EXTENSIONS_DIR": str(extensions)}
    (two, _) = spawn_ranks(2, cases.two_ranks, str(folder), environ=environ, timeout=200)
    return {"single": single, **two}


@pytest.mark.parametrize(("optimizer", "strategy"), cases.PAIRS)
def test_every_optimizer_is_the_same_under_every_strategy(
    found: dict[str, Any], optimizer: str, strategy: str
) -> None:
    """Three turns with a frozen layer, a scaled rate, decay, clipping and the l1 term."""
    ours, truth = found[strategy][optimizer], found["single"][optimizer]
    assert "error" not in ours, ours["error"]
    # Newton-Schulz is done in bfloat16, where a last bit of the gradient can move the result by 1/128
    bound = 2e-3 if optimizer == "muon" else 2e-6
    for name, values in truth["weights"].items():
        difference = (torch.tensor(values) - torch.tensor(ours["weights"][name])).abs().max()
        assert float(difference) <= bound, name
    start = cases.numbers(cases.network().state_dict())
    frozen = ours["frozen"]
    assert frozen == ["0.bias", "0.weight"]
    assert all(ours["weights"][name] == start[name] for name in frozen)
    assert all(ours["weights"][name] != start[name] for name in start if name not in frozen)
    zeros = sum(w == 0 for row in ours["weights"]["2.weight"] for w in row)
    assert zeros > 0


@pytest.mark.parametrize(("optimizer", "strategy"), cases.PAIRS)
def test_state_is_saved_and_resumed_bit_for_bit(
    found: dict[str, Any], optimizer: str, strategy: str
) -> None:
    """Saved after three turns and loaded into a new engine: a fourth turn is the same, frozen weights included."""
    ours = found[strategy][optimizer]
    assert ours["kinds"] == cases.OPTIMIZERS[optimizer][1]
    assert ours["resumed"] == ours["unbroken"]


def test_state_moves_between_strategies(found: dict[str, Any]) -> None:
    for name, moved in found["moved"].items():
        assert "error" not in moved, moved["error"]
        assert moved["weights"] == moved["source"], name
