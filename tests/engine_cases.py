"""Small networks with known answers, and what ranks measure on them. Ranks import this file by name.

A check is a function `(world, strategy) -> JSON`: the same function runs in one process under `single` and on two
ranks under everything else, and the tests compare what it returns with plain torch (`plain_*`) or a closed form.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dist_train import checkpoint, run
from dist_train.callbacks import Callback
from dist_train.engine import Engine, buckets, make_engine
from dist_train.errors import UserError
from dist_train.networks import Player
from dist_train.networks.blocks import compile_forward
from dist_train.objectives.wgan_gp import WassersteinGradientPenalty
from dist_train.parameter_groups import parameter_groups
from dist_train.recipe import Recipe
from dist_train.verify.payload import Payload
from dist_train.world import World, pin_threads

DISK = tempfile.gettempdir()

SPECS: dict[str, dict[str, Any]] = {
    "single": {"name": "single"},
    "ddp": {"name": "ddp"},
    "zero1": {"name": "zero1"},
    "zero2": {"name": "zero2"},
    "zero3": {"name": "zero3", "persistence_threshold": 0},
    "zero3-persistent": {
        "name": "zero3",
        "deepspeed": {"zero_optimization": {"stage3_prefetch_bucket_size": 50}},
    },
    "fsdp2": {"name": "fsdp2"},
    "fsdp2-kept": {"name": "fsdp2", "reshard_after_forward": False},
    "fsdp2-hybrid": {"name": "fsdp2", "shard_degree": 2},
    "zero3-layers": {"name": "zero3", "persistence_threshold": 12, "view_elements": 0},
    "fsdp2-layers": {"name": "fsdp2", "view_elements": 0},
    "zero3-hpz": {
        "name": "zero3",
        "persistence_threshold": 0,
        "deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 2}},
    },
    "zero1-offload": {"name": "zero1", "offload": "optimizer"},
    "zero2-disk": {"name": "zero2", "offload": "optimizer", "nvme_path": DISK},
    "zero3-disk": {
        "name": "zero3",
        "offload": "all",
        "nvme_path": DISK,
        "persistence_threshold": 0,
    },
    "zero3-all": {
        "name": "zero3",
        "offload": "all",
        "persistence_threshold": 0,
        "view_elements": 0,
    },
}
"""`zero3` shards every tensor; `zero3-persistent` keeps small ones whole, as it does by default, and gathers ahead;
`zero3-layers` keeps biases whole, and its views gather everything else when it is used;
`fsdp2-hybrid` and `zero3-hpz` are for four ranks."""
FOUR_RANKS = ("fsdp2-hybrid", "zero3-hpz")
STRATEGIES = tuple(name for name in SPECS if name not in ("single", *FOUR_RANKS))
MOVED = (
    *("ddp", "zero1", "zero2", "zero3", "zero3-persistent", "zero2-disk", "zero3-all"),
    "zero3-disk",
    "fsdp2",
)
"""Strategies between which state moves."""
STEPS = 5
MICRO_BATCHES = 4  # of a global batch
NORMS: list[float | None] = [0.05, 100.0, 0.2, None, 0.01]
VALUES: list[float | None] = [0.01, 100.0, 0.003, None, 0.02]
RATE, MOMENTUM = 0.1, 0.9


# ---------------------------------------------------------------------------------------------------------------------
# Networks and data


def mlp() -> nn.Module:
    """Of odd sizes, so that the borders between ranks fall inside tensors."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def normalised() -> nn.Module:
    """With running statistics, and no bias whose true gradient is 0."""
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.BatchNorm1d(7), nn.Linear(7, 3))


def spectral() -> nn.Module:
    """A spectral norm far from its fixed point, so that each power iteration can be seen."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 7)), nn.Linear(7, 3))
    with torch.no_grad():
        norm = net[0].parametrizations.weight[0]
        norm._u.copy_(F.normalize(torch.randn(7), dim=0))
        norm._v.copy_(F.normalize(torch.randn(5), dim=0))
    return net


class Tied(nn.Module):
    """The output layer is the transposed embedding; both names are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.table = nn.Linear(5, 6, bias=False)
        self.middle = nn.Linear(6, 5)
        self.out = nn.Linear(5, 6, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.middle(torch.tanh(self.table(x)))))


class Scaled(nn.Module):
    """Two blocks that hold one and the same buffer, as blocks share a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)
        scale = torch.linspace(0.5, 1.5, 5)
        self.first.register_buffer("scale", scale)
        self.second.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x * self.first.scale))
        return self.second(x * self.second.scale)


class Branches(nn.Module):
    """Parameters that no forward uses, and two branches of which an input picks one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.unused = nn.Linear(9, 4)
        self.a, self.b = nn.Linear(5, 6), nn.Linear(5, 6)
        self.idle = nn.Parameter(torch.randn(11))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, branch: str = "both") -> Tensor:
        hidden = {"a": self.a, "b": self.b, "both": lambda x: self.a(x) + self.b(x)}[branch](x)
        return self.head(torch.tanh(hidden))


def batches(count: int = STEPS, classes: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Global batches of 16: x (16, 5), y (16,)."""
    random = torch.Generator().manual_seed(11)
    return [
        (
            2 * torch.randn(16, 5, generator=random),
            torch.randint(classes, (16,), generator=random),
        )
        for _ in range(count)
    ]


def penalty(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A loss whose gradient needs a double backward."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return ((slope.norm(dim=1) - 1) ** 2).mean()


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM)


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-2)


def one_group(named: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    return [{"params": [p for _, p in named]}]


def engine_of(
    strategy: str,
    world: World,
    module: nn.Module,
    make: Callable[[Any], torch.optim.Optimizer] = sgd,
    *,
    groups: Any = one_group,
    given: bool = False,
    precision: str = "fp32",
) -> Engine:
    """An engine over one network, `net`, that takes its share of MICRO_BATCHES in a turn."""
    player = Player({"net": module.train()}, precision, world.device.partition(":")[0])
    micro_batches = MICRO_BATCHES // world.size
    return make_engine(
        SPECS[strategy], player, groups, make, world, given=given, micro_batches=micro_batches
    )


def accumulate(
    engine: Engine, x: Tensor, y: Tensor, loss: Any = None, forward: Any = None
) -> float:
    """Forward, backward and reduction of a global batch; returns its loss."""
    world = engine.world
    x, y = x.to(world.device), y.to(world.device)
    share = MICRO_BATCHES // world.size
    mine = range(world.rank * share, (world.rank + 1) * share)
    engine.begin_turn()
    total = torch.zeros((), device=world.device)
    for i in mine:
        part_x, part_y = x.chunk(MICRO_BATCHES)[i], y.chunk(MICRO_BATCHES)[i]
        net = forward or engine.own("net")
        with engine.loss_context():
            value = loss(net, part_x) if loss else F.cross_entropy(net(part_x), part_y)
        value = value * len(part_x) / len(x)
        engine.backward(value, last=i == mine[-1])
        total += value.detach()
    engine.reduce()
    return float(world.sum_(total))


def numbers(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """JSON of tensors, under the names that they have in the network itself."""
    return {
        name.removeprefix("net."): tensor.detach().double().cpu().tolist()
        for name, tensor in tensors.items()
    }


def plain_gradients(
    module: nn.Module, x: Tensor, y: Tensor, loss: Any = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a global batch as one process has them, micro-batch after micro-batch."""
    module.zero_grad()
    total = 0.0
    for part_x, part_y in zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True):
        value = loss(module, part_x) if loss else F.cross_entropy(module(part_x), part_y)
        (value * len(part_x) / len(x)).backward()
        total += float(value.detach()) * len(part_x) / len(x)
    return total, {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Checks of one engine


def clip_by(world: World, strategy: str, kind: str, given: bool) -> dict[str, Any]:
    """STEPS turns under a bound that changes each turn."""
    e = engine_of(strategy, world, mlp(), given=given)
    norms, own_norms = [], []
    for (x, y), norm, value in zip(batches(), NORMS, VALUES, strict=True):
        accumulate(e, x, y)
        gradients = e.full_gradients()
        own_norms.append(float(torch.stack([g.norm() for g in gradients.values()]).norm()))
        e.clip(**({"norm": norm} if kind == "norm" else {"value": value}))
        e.step()
        norms.append(float(e.norm))
    return {"weights": numbers(e.full_weights()), "norms": norms, "own_norms": own_norms}


def plain_clip(kind: str) -> dict[str, Any]:
    """The same by torch's own functions on whole gradients."""
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=MOMENTUM)
    norms = []
    for (x, y), norm, value in zip(batches(), NORMS, VALUES, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        bound = norm if kind == "norm" and norm is not None else float("inf")
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), bound)))
        if kind == "value" and value is not None:
            nn.utils.clip_grad_value_(module.parameters(), value)
        optimizer.step()
    return {"weights": numbers(module.state_dict()), "norms": norms}


def project(world: World, strategy: str) -> dict[str, Any]:
    """Two turns, the weights clamped, what the live network, a frozen view and an evaluation see, one more turn."""
    e = engine_of(strategy, world, mlp())
    *first, (x, y) = batches(3)
    for pair in first:
        accumulate(e, *pair)
        e.step()
    e.project(lambda weights: weights.clamp_(-0.1, 0.1))
    found = {"clamped": numbers(e.full_weights())}
    x = x.to(world.device)
    with torch.no_grad():
        views = {
            "live": e.own("net")(x),
            "frozen": e.frozen("net")(x),
            "evaluated": e.evaluated("net")(x),
        }
    found |= numbers(views)
    accumulate(e, x, y)
    e.step()
    return found | {"after": numbers(e.full_weights())}


def plain_project() -> dict[str, Any]:
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=MOMENTUM)
    *first, (x, y) = batches(3)

    def update(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()

    for pair in first:
        update(*pair)
    with torch.no_grad():
        for p in module.parameters():
            p.clamp_(-0.1, 0.1)
        found = {
            "clamped": numbers(module.state_dict()),
            "live": module(x).double().tolist(),
        }
    update(x, y)
    return found | {"after": numbers(module.state_dict())}


def learning_rates(world: World, strategy: str) -> dict[str, Any]:
    """Two players at rates of their own, biases at twice the rate: how far a weight moved, over its gradient."""

    def groups(named: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        weights = [p for n, p in named if n.endswith("weight")]
        biases = [p for n, p in named if n.endswith("bias")]
        return [{"params": weights}, {"params": biases, "scale": 2.0}]

    players = {
        name: engine_of(
            strategy, world, mlp(), lambda groups: torch.optim.SGD(groups, lr=RATE), groups=groups
        )
        for name in ("generator", "critic")
    }
    players["generator"].set_learning_rate(0.25)
    players["critic"].set_learning_rate(0.5)
    (batch,) = batches(1)
    found = {}
    for name, e in players.items():
        before = e.full_weights()
        accumulate(e, *batch)
        gradients = e.full_gradients()
        e.step()
        after = e.full_weights()
        found[name] = {
            key: float(((before[key] - after[key]) * g).sum() / (g * g).sum())
            for key, g in gradients.items()
        }
    return found


def slices(world: World, strategy: str) -> dict[str, Any]:
    """What every rank writes, (start, stop, replicated) of every tensor, and the shapes."""
    e = engine_of(strategy, world, normalised(), adamw, groups=parameter_groups)
    written = [(name, part) for name, part in e.slices() if part.written]
    mine = [[n, s.start, s.stop, s.replicated, list(s.shape)] for n, s in written]
    return {"ranks": world.gather(mine)}


def publish(world: World, strategy: str) -> dict[str, Any]:
    """Weights written through the slices: what the live network makes of them."""
    e = engine_of(strategy, world, mlp())
    (x, y), *_ = batches(1)
    accumulate(e, x, y)
    e.step()
    target = published()
    for part in e.weights:
        whole = target[part.name.removeprefix("net.")].flatten()
        part.tensor.copy_(whole[part.start : part.stop])
    e.publish()
    live = e.own("net")(x.to(world.device))
    return {"live": live.double().tolist(), "weights": numbers(e.full_weights())}


def published() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(12)
    return {n: torch.randn(t.shape, generator=random) for n, t in mlp().state_dict().items()}


def double_backward(world: World, strategy: str) -> dict[str, Any]:
    """A gradient penalty on a player whose gradients are streamed, and on one whose are given."""
    (x, y), *_ = batches(1)
    e = engine_of(strategy, world, mlp(), given=True)
    loss = accumulate(e, x, y, loss=penalty)
    gradients = numbers(e.full_gradients())
    streamed = engine_of(strategy, world, mlp())
    streamed.begin_turn()
    try:
        penalty(streamed.own("net"), x.to(world.device))
    except UserError as error:
        refusal = str(error)
    else:
        refusal = ""
    return {"refusal": refusal, "loss": loss, "gradients": gradients}


def frozen(world: World, strategy: str) -> dict[str, Any]:
    """The generator's turn through the frozen critic, then the critic's own turn."""
    torch.manual_seed(9)
    generator = engine_of(strategy, world, nn.Sequential(nn.Linear(5, 6), nn.Tanh()))
    critic = engine_of(strategy, world, frozen_critic())
    before = {name: buffer.clone() for name, buffer in critic.buffers.items()}
    x, y = batches(1)[0]
    critic.begin_turn()
    accumulate(generator, x, y, loss=lambda net, x: towards(critic.frozen("net")(net(x))))
    untouched = all(torch.equal(before[n], b) for n, b in critic.buffers.items())
    polluted = [
        n for n, p in critic.trained.items() if p.grad is not None and p.grad.abs().max() > 0
    ]
    gradients = numbers(generator.full_gradients())
    generator.step()
    view = generator.frozen("net")
    accumulate(critic, x, y, loss=lambda net, x: net(view(x).detach()).square().mean())
    return {
        "buffers_untouched": untouched,
        "polluted": polluted,
        "generator": gradients,
        "critic": numbers(critic.full_gradients()),
    }


def towards(score: Tensor) -> Tensor:
    """Not linear: the mean of what a batch norm puts out has no gradient."""
    return (score - score.new_tensor([1.0, -2.0, 0.5, 3.0])[:, None]).square().mean()


def frozen_critic() -> nn.Module:
    torch.manual_seed(10)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 1))


def plain_frozen() -> dict[str, Any]:
    torch.manual_seed(9)
    generator, critic = nn.Sequential(nn.Linear(5, 6), nn.Tanh()), frozen_critic()
    x, y = batches(1)[0]
    _, of_generator = plain_gradients(generator, x, y, lambda net, x: towards(critic(net(x))))
    torch.optim.SGD(generator.parameters(), lr=RATE).step()
    _, of_critic = plain_gradients(
        critic, x, y, lambda net, x: net(generator(x).detach()).square().mean()
    )
    return {"generator": numbers(of_generator), "critic": numbers(of_critic)}


def buffers(world: World, strategy: str, kind: str, given: bool) -> dict[str, Any]:
    """The buffers, and the weights before it, of each of two turns of MICRO_BATCHES micro-batches."""
    e = engine_of(strategy, world, {"norm": normalised, "spectral": spectral}[kind](), given=given)
    found = []
    for x, y in batches(2):
        before = numbers(e.full_weights())
        accumulate(e, x, y)
        e.step()
        found.append({"before": before, "after": numbers(e.full_weights())})
    return {"turns": found}


def tied(world: World, strategy: str, given: bool) -> dict[str, Any]:
    """Three turns of a network with one parameter under two names, and what its views see."""
    e = engine_of(strategy, world, Tied(), given=given)
    for x, y in batches(3, classes=6):
        accumulate(e, x, y)
        e.step()
    x = batches(1)[0][0].to(world.device)
    views = {
        "frozen": e.frozen("net")(x),
        "evaluated": e.evaluated("net")(x),
        "own": e.own("net")(x),
    }
    return {**numbers(views), "weights": numbers(e.full_weights())}


def plain_tied() -> dict[str, Any]:
    module = Tied()
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=MOMENTUM)
    for x, y in batches(3, classes=6):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    out = module(batches(1)[0][0]).double().tolist()
    return {"out": out, "weights": numbers(dict(module.named_parameters()))}


def shared_buffer(world: World, strategy: str) -> dict[str, Any]:
    """What a view makes of a network whose blocks share a buffer."""
    e = engine_of(strategy, world, Scaled())
    x = batches(1)[0][0].to(world.device)
    return numbers({"frozen": e.frozen("net")(x), "own": e.own("net")(x)})


def partly_trained(world: World, strategy: str) -> dict[str, Any]:
    """Two turns of a network whose first layer is not trained."""
    module = mlp()
    module[0].requires_grad_(False)
    e = engine_of(strategy, world, module)
    for x, y in batches(2):
        accumulate(e, x, y)
        e.step()
    return {"weights": numbers(e.full_weights()), "trained": sorted(e.trained)}


def plain_partly_trained() -> dict[str, Any]:
    module = mlp()
    optimizer = torch.optim.SGD(module[2].parameters(), lr=RATE, momentum=MOMENTUM)
    for x, y in batches(2):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    return numbers(module.state_dict())


def unused(world: World, strategy: str) -> dict[str, Any]:
    """Three turns with parameters that get no gradient, the gradients in buckets of 64 bytes."""
    kept, buckets.BUCKET_BYTES = buckets.BUCKET_BYTES, 64
    launched: list[int] = []
    launch = buckets.Buckets._launch

    def noted(self: Any) -> None:
        launched.append(self.flat[len(self.work)].numel())
        launch(self)

    buckets.Buckets._launch = noted  # type: ignore[method-assign]
    try:
        e = engine_of(strategy, world, Branches(), lambda g: torch.optim.AdamW(g, lr=1e-2))
        gradients = []
        for x, y in batches(3):
            accumulate(e, x, y)
            gradients.append(numbers(e.full_gradients()))
            e.step()
    finally:
        buckets.BUCKET_BYTES, buckets.Buckets._launch = kept, launch  # type: ignore[method-assign]
    return {
        "gradients": gradients,
        "weights": numbers(e.full_weights()),
        "launched": world.gather(launched),
    }


def plain_unused() -> dict[str, Any]:
    module = Branches()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    gradients = []
    for x, y in batches(3):
        _, found = plain_gradients(module, x, y)
        gradients.append(numbers(found))
        for name, p in module.named_parameters():  # ours count as 0, torch leaves them out
            p.grad = found[name]
        optimizer.step()
    return {"gradients": gradients, "weights": numbers(module.state_dict())}


def branches(world: World, strategy: str, given: bool = False) -> dict[str, Any]:
    """One turn in which each micro-batch takes its own branch, so that ranks use different parameters."""
    kept, buckets.BUCKET_BYTES = buckets.BUCKET_BYTES, 64
    try:
        e = engine_of(strategy, world, Branches(), given=given)
    finally:
        buckets.BUCKET_BYTES = kept
    x, y = batches(1)[0]
    accumulate(e, x, y, loss=branch_loss)
    return {"gradients": numbers(e.full_gradients())}


class Viewed(nn.Module):
    """Its output is a view of a layer's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.layer = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).squeeze(1)


def in_place_loss(net: Any, x: Tensor) -> Tensor:
    output = net(x)
    output += 1.0
    return output.square().mean()


def in_place(world: World, strategy: str) -> dict[str, Any]:
    """One turn whose loss changes the network's output in place."""
    e = engine_of(strategy, world, Viewed())
    x, y = batches(1)[0]
    accumulate(e, x, y, loss=in_place_loss)
    return {"gradients": numbers(e.full_gradients())}


def frozen_of_four() -> dict[str, Any]:
    """`frozen` on four ranks, of each weight of whose batch norm each rank holds one element."""
    world = World.join(group=True)
    pin_threads(1, 1)
    found = {s: frozen(world, s) for s in ("zero3-layers", "fsdp2", "fsdp2-layers")}
    world.leave()
    return found


def branches_alone(strategy: str, given: bool) -> dict[str, Any]:
    """The same in ranks of its own: where DeepSpeed finds them at odds they end."""
    world = World.join(group=True)
    pin_threads(1, 1)
    return branches(world, strategy, given)


def branches_by_layer() -> dict[str, Any]:
    """The same where views gather layer by layer, to the end of the turn."""
    world = World.join(group=True)
    pin_threads(1, 1)
    e = engine_of("zero3-layers", world, Branches(), given=True)
    e.checks_order = True
    x, y = batches(1)[0]
    accumulate(e, x, y, loss=branch_loss)
    before = numbers(e.full_weights())
    try:
        e.step()
    except UserError as error:
        return {"refusal": str(error), "untouched": before == numbers(e.full_weights())}
    return {"refusal": ""}


def branch_loss(net: Any, x: Tensor) -> Tensor:
    """The first half of the batch goes through `a`, the second through `b`."""
    first_half = any(torch.equal(x.cpu(), part) for part in batches(1)[0][0].chunk(4)[:2])
    return net(x, "a" if first_half else "b").square().mean()


def precisions(world: World, strategy: str) -> dict[str, Any]:
    """Loss and gradients of one classification step under autocast, and in fp32."""
    found = {}
    for precision in ("fp32", "bf16", "fp16"):
        e = engine_of(strategy, world, mlp(), precision=precision)
        loss = accumulate(e, *batches(1)[0])
        found[precision] = {"loss": loss, "gradients": numbers(e.full_gradients())}
        e.step()
        found[precision]["weights"] = numbers(e.full_weights())
    return found


def overflow(world: World, strategy: str, given: bool) -> dict[str, Any]:
    """Under fp16 a good turn, one on one rank of which gradients overflow, and a good one again."""
    e = engine_of(strategy, world, normalised(), given=given, precision="fp16")
    assert e.loss_scale is not None
    states, norms, scales = [], [], []
    for number, (x, y) in enumerate(batches(3)):
        spoilt = number == 1
        if spoilt and world.rank == world.size - 1:
            e.loss_scale.value *= 2.0**40  # known to this rank alone: only its gradients overflow
        accumulate(e, x, y)
        if spoilt and world.rank == world.size - 1:
            e.loss_scale.value /= 2.0**40
        e.clip(norm=0.05)
        e.step()
        states.append(numbers(e.full_weights()))
        norms.append(float(e.norm))
        scales.append(e.loss_scale.value)
    return {"states": states, "norms": norms, "scales": scales, "skipped": e.loss_scale.skipped}


def traffic(world: World, strategy: str) -> dict[str, Any]:
    """Bytes of payload of a step of one and of two micro-batches a rank, the mean over the ranks, after two such steps
    in which DeepSpeed learns the order of the layers."""
    found = {}
    for micro_batches in (1, 2):
        module = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(5)])
        player = Player({"net": module}, "fp32", world.device.partition(":")[0])
        e = make_engine(
            SPECS[strategy],
            player,
            one_group,
            sgd,
            world,
            given=False,
            micro_batches=micro_batches,
        )
        for _ in range(3):
            with Payload() as payload:
                e.begin_turn()
                for i in range(micro_batches):
                    loss = e.own("net")(torch.ones(2, 64, device=world.device)).square().mean()
                    e.backward(loss, last=i == micro_batches - 1)
                e.reduce()
                e.step()
        found[str(micro_batches)] = sum(world.gather(payload.bytes)) / world.size
    return {"bytes": found, "weights": 4 * 5 * (64 * 64 + 64)}


CHECKS: dict[str, Callable[[World, str], dict[str, Any]]] = {
    "clip-norm-streamed": lambda w, s: clip_by(w, s, "norm", False),
    "clip-norm-given": lambda w, s: clip_by(w, s, "norm", True),
    "clip-value-streamed": lambda w, s: clip_by(w, s, "value", False),
    "clip-value-given": lambda w, s: clip_by(w, s, "value", True),
    "project": project,
    "learning-rates": learning_rates,
    "slices": slices,
    "publish": publish,
    "double-backward": double_backward,
    "frozen": frozen,
    "norm-streamed": lambda w, s: buffers(w, s, "norm", False),
    "norm-given": lambda w, s: buffers(w, s, "norm", True),
    "spectral-streamed": lambda w, s: buffers(w, s, "spectral", False),
    "spectral-given": lambda w, s: buffers(w, s, "spectral", True),
    "tied-streamed": lambda w, s: tied(w, s, False),
    "tied-given": lambda w, s: tied(w, s, True),
    "shared-buffer": shared_buffer,
    "partly-trained": partly_trained,
    "unused": unused,
    "branches-streamed": branches,
    "branches-given": lambda w, s: branches(w, s, True),
    "in-place": in_place,
    "precisions": precisions,
    "traffic": traffic,
    "overflow-streamed": lambda w, s: overflow(w, s, False),
    "overflow-given": lambda w, s: overflow(w, s, True),
}


VARIED = (
    "project",
    "slices",
    "publish",
    "frozen",
    "clip-norm-given",
    "clip-norm-streamed",
    "overflow-streamed",
    "traffic",
)
"""What could differ where weights stay whole for longer, or where something lies in the host's memory."""
LAYERED = (
    *VARIED,
    "double-backward",
    "clip-value-given",
    "norm-given",
    "spectral-given",
    "tied-given",
    "shared-buffer",
    "partly-trained",
    "overflow-given",
)
"""What could differ where views gather layer by layer."""


def run_checks(world: World, strategies: tuple[str, ...]) -> dict[str, Any]:
    """{check: {strategy: what it found, or {"error": traceback}}}."""
    found: dict[str, Any] = {check: {} for check in CHECKS}
    for strategy in strategies:
        for check, function in CHECKS.items():
            varied = LAYERED if strategy.endswith("-layers") else VARIED
            if "-" in strategy and check not in varied:
                continue
            if check.startswith("branches") and strategy.startswith("zero"):
                continue  # `branches_alone`
            try:
                found[check][strategy] = function(world, strategy)
            except Exception:
                found[check][strategy] = {"error": traceback.format_exc(limit=-3)}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# State that moves between strategies and numbers of ranks


def trained_engine(world: World, strategy: str) -> Engine:
    """Three turns of AdamW with decayed and undecayed groups, and running statistics."""
    e = engine_of(strategy, world, normalised(), adamw, groups=decaying)
    for x, y in batches(4)[:3]:
        accumulate(e, x, y)
        e.step()
    return e


def decaying(named: Any) -> Any:
    return parameter_groups(named, 0.1)


def save_engine(e: Engine, folder: Path) -> None:
    """As the trainer does: replicated slices are shared out over the ranks."""
    pairs = list(e.slices())
    shared = [pair for pair in pairs if pair[1].replicated]
    mine = [pair for pair in pairs if not pair[1].replicated and pair[1].written]
    mine += shared[e.world.rank :: e.world.size]
    checkpoint.save(folder, 3, mine, {"steps": e.optimizer_steps()}, e.world)


def load_engine(e: Engine, folder: Path) -> None:
    reader = checkpoint.Reader(checkpoint.at(folder, 3))
    for name, part in e.slices():
        reader.fill(name, part)
    e.set_optimizer_steps(reader.values["steps"])
    e.publish()


def save_all(world: World, strategies: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Train under each strategy, save, and tell what a forward gave."""
    found = {}
    x = batches(1)[0][0].to(world.device)
    for strategy in strategies:
        e = trained_engine(world, strategy)
        save_engine(e, folder / f"{strategy}-{world.size}")
        found[f"{strategy}-{world.size}"] = e.evaluated("net")(x).double().tolist()
    return found


def load_all(
    world: World, sources: list[str], strategies: tuple[str, ...], folder: Path
) -> dict[str, Any]:
    """Load every source under every strategy, save it again, and take one more turn."""
    found = {}
    *_, (x, y) = batches(4)
    for strategy in strategies:
        e = engine_of(strategy, world, normalised(), adamw, groups=decaying)
        for source in sources:
            for _, part in e.slices():  # nothing of what was there may remain
                part.tensor.fill_(float("nan") if part.tensor.is_floating_point() else -1)
            load_engine(e, folder / source)
            again = folder / f"{source}-{strategy}-{world.size}"
            save_engine(e, again)
            evaluated = e.evaluated("net")(batches(1)[0][0].to(world.device)).double().tolist()
            steps = e.optimizer_steps()
            accumulate(e, x, y)
            e.step()
            found[f"{source} -> {strategy}-{world.size}"] = {
                "folder": str(again),
                "steps": steps,
                "evaluated": evaluated,
                "after": numbers(e.full_weights()),
            }
    return found


def plain_adamw(steps: int) -> dict[str, Any]:
    module = normalised()
    named = list(module.named_parameters())
    optimizer = adamw(parameter_groups(named, 0.1))
    for x, y in batches(4)[:steps]:
        _, gradients = plain_gradients(module, x, y)
        for name, p in named:
            p.grad = gradients[name]
        optimizer.step()
    return numbers(dict(named))


# ---------------------------------------------------------------------------------------------------------------------
# What ranks run


def two_ranks(folder: str, extensions: str) -> dict[str, Any]:
    """Everything that test_engine.py wants to know of two ranks."""
    world = World.join(group=True)
    pin_threads(1, 1)
    found = run_checks(world, STRATEGIES)
    try:
        state = {"saved": save_all(world, MOVED, Path(folder))}
        sources = [*state["saved"], "single-1"]
        state["loaded"] = load_all(world, sources, MOVED, Path(folder))
    except Exception:
        state = {"error": traceback.format_exc()}
    import deepspeed

    switch = deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]
    built = [str(path) for path in Path(extensions).rglob("*")]
    accelerator = deepspeed.get_accelerator().device_name()
    world.leave()
    return {
        "checks": found,
        "state": state,
        "switch": switch,
        "built": built,
        "accelerator": accelerator,
    }


def four_ranks(folder: str) -> dict[str, Any]:
    """Two groups of two ranks that share out the weights; two micro-batches a rank where their size does not count."""
    global MICRO_BATCHES
    world = World.join(group=True)
    pin_threads(1, 1)
    found: dict[str, Any] = {}
    name = "fsdp2-hybrid"
    for check in (*VARIED, "clip-value-streamed", "tied-streamed", "unused"):
        MICRO_BATCHES = 4 if check in ("frozen", "overflow-streamed") else 8
        found[check] = CHECKS[check](world, name)
    MICRO_BATCHES = 4
    for check in ("clip-norm-streamed", "clip-norm-given", "traffic"):
        found[f"hpz-{check}"] = CHECKS[check](world, "zero3-hpz")
    found["saved"] = save_all(world, (name,), Path(folder))
    found["loaded"] = load_all(world, [f"{name}-4", "single-1"], (name,), Path(folder))
    world.leave()
    return found


class Halves(nn.Module):
    """Two blocks of one kind and size, each of which the engine gathers by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(13)
        self.halves = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor, way: str, half: int) -> Tensor:
        """(B, 5) -> (B, 5): of one half, both of which may be called, or by its weight alone."""
        if way == "forward":
            return self.halves[half](x)
        if way == "backward":
            return [module(x) for module in self.halves][half]
        return F.linear(x, self.halves[half][0].weight)


def at_odds(way: str, alike: bool) -> str:
    """What two ranks are told that use different blocks of one network, or the same (`alike`)."""
    world = World.join(group=True)
    e = engine_of("fsdp2", world, Halves())
    x, y = batches(1)[0]
    half = 0 if alike else world.rank
    try:
        for _ in range(2):
            accumulate(e, x, y, loss=lambda net, x: net(x, way, half).square().mean())
            e.step()
    except UserError as error:
        return str(error)
    world.leave()
    return ""


def compiled() -> dict[str, Any]:
    """The weights after two turns, by what is compiled; and the frames that were."""
    world = World.join(group=True)
    pin_threads(1, 1)
    found: dict[str, Any] = {}
    x, y = batches(1)[0]
    for what in ("nothing", "blocks", "network"):
        module = Halves()
        counters.clear()
        for part in {"nothing": [], "blocks": module.halves, "network": [module]}[what]:
            compile_forward(part)
        e = engine_of("fsdp2", world, module)
        both = lambda net, x: sum(net(x, "forward", half).square().mean() for half in (0, 1))
        for _ in range(2):
            accumulate(e, x, y, loss=both)
            e.step()
        found[what] = {"weights": numbers(e.full_weights()), "frames": counters["frames"]["ok"]}
    world.leave()
    return found


def single_number() -> str:
    """What is said of a weight without axes."""
    world = World.join(group=True)
    module = mlp()
    module.temperature = nn.Parameter(torch.tensor(1.0))
    try:
        engine_of("fsdp2", world, module)
    except UserError as error:
        return str(error)
    return ""


def save_here(strategies: list[str], folder: str) -> dict[str, Any]:
    """`save_all` in this world."""
    world = World.join(group=True)
    pin_threads(1, 1)
    found = save_all(world, tuple(strategies), Path(folder))
    world.leave()
    return found


def load_here(sources: list[str], strategies: list[str], folder: str) -> dict[str, Any]:
    """`load_all` in this world."""
    world = World.join(group=True)
    pin_threads(1, 1)
    found = load_all(world, sources, tuple(strategies), Path(folder))
    world.leave()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What test_world.py starts


def talk() -> dict[str, Any]:
    """Every way in which ranks tell each other something."""
    world = World.join()
    numbers = torch.tensor([1.0, 10.0]) * (world.rank + 1)
    gathered = world.gather(
        {"rank": world.rank, "text": "\u00e9" * (100 * world.rank), "none": None}
    )
    found = {
        "place": [world.rank, world.size, world.local_rank, world.local_size, world.is_main],
        "gathered": gathered,
        "agreed": world.agree(["rank", world.rank]),
        "sum": world.sum_(numbers.clone()).tolist(),
        "broadcast": world.broadcast_(numbers.clone(), source=2).tolist(),
        "floats": world.gather([0.1 + world.rank, float("inf")]),
    }
    world.barrier()
    world.leave()
    return found


def fall(how: str, rank: int, folder: str, others: str) -> None:
    """All ranks are there, then one of them fails while the others wait, in a collective or by themselves."""
    world = World.join()
    (Path(folder) / f"pid-{world.rank}").write_text(str(os.getpid()))
    world.barrier()
    if world.rank == rank:
        if how == "error":
            raise ValueError(f"planted in rank {rank}")
        if how == "user error":
            raise UserError(f"optimizer.rate: planted in rank {rank}")
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    if others == "in a collective":
        world.barrier()
    threading.Event().wait()


# ---------------------------------------------------------------------------------------------------------------------
# Parts and runs of test_callbacks.py


class Planned:
    """A metric whose successive evaluations give these values, however the model does."""

    values: tuple[float, ...] = (0.5, 0.3, 0.4, 0.35, 0.1, 0.2)

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, outputs: Any, micro: Any) -> tuple[float, float]:
        self.asked += 1  # one micro-batch a rank holds the whole split, or nothing of it
        return self.values[(self.asked - 1) % len(self.values)] * micro.real, micro.real


class Never(Planned):
    values = (float("nan"),)


class Weights(Callback):
    """Keeps the whole weights and buffers of every player: at the start, and after each of its turns."""

    priority = 15  # before the average is taken, as it is from the same weights

    def __init__(self) -> None:
        self.after: dict[str, list[dict[str, Tensor]]] = {}

    def run_begins(self, run: Any) -> None:
        self.after = {player: [run.full_weights(player)] for player in run.engines}

    def turn_ends(self, run: Any, turn: Any) -> None:
        self.after[turn.player].append(run.full_weights(turn.player))


class Ids(Callback):
    """Keeps the ids that count in each evaluation."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def evaluation_batch(self, run: Any, outputs: Any, micro: Any) -> None:
        self.ids += micro.ids[: micro.real].tolist()


def pack_few(folder: Path) -> None:
    """`folder/few`: 24 images to train on, 2 to evaluate on."""
    from sklearn.datasets import load_digits

    from dist_train.data_shards.write import write_shards

    digits = load_digits()

    def images() -> Iterator[Any]:
        for i in range(26):
            image = (digits.images[i] * 15).astype("uint8")
            sample = {"image.npy": image, "cls": int(digits.target[i])}
            yield "test" if i < 2 else "train", f"{i:05d}", sample

    write_shards(folder / "few", "few", images(), shard_size=13, classes=list("0123456789"))


class OneRow(nn.Module):
    """Digits (B, 1, 8, 8) -> logits (B, 10), by one row of weights: of two ranks under fsdp2 one has none."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Linear(64, 1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.row(image.flatten(1)) * torch.arange(10.0)


class DrawnByRank0(WassersteinGradientPenalty):
    """Refuses to draw samples on another rank."""

    def samples(self, networks: Any, count: int, device: str) -> dict[str, Tensor]:
        assert dist.get_rank() == 0
        return super().samples(networks, count, device)


def stopping_recipe(data: str, metric: str = "Planned", **settings: Any) -> Recipe:
    """Evaluated every 2 steps, a new best at step 4, stopped at step 8."""
    evaluate = {
        "split": "test",
        "every": "2 steps",
        "metrics": [f"engine_cases:{metric}"],
        "best": f"engine_cases:{metric}",
        "mode": "min",
        "micro_batch": 60,
    }
    recipe = cases.tiny_recipe("resnet", data, evaluate=evaluate, **settings)
    return recipe.set("callbacks.early_stopping", {"patience": 2}).set(
        "callbacks.checkpoint", {"every": "2 steps", "keep": 9}
    )


def evaluate_in(world: World, data: str, micro_batch: int, folder: Path) -> dict[str, Any]:
    """One evaluation of the model as it is at step 0."""
    evaluate = {
        "split": "test",
        "every": "1 step",
        "metrics": ["accuracy", "loss"],
        "micro_batch": micro_batch,
    }
    recipe = cases.tiny_recipe("resnet", folder, micro_batches=12, evaluate=evaluate)
    recipe = recipe.set("data.path", data)
    recipe = recipe.set("callbacks.ids", {"name": "engine_cases:Ids"})
    directory = folder / f"{Path(data).name}-{world.size}"
    with cases.trainer_of(recipe, world, directory) as trainer:
        results = trainer.evaluate()
        ids = [i for mine in world.gather(trainer.callback("ids").ids) for i in mine]
    return {"results": results, "ids": sorted(ids)}


def average_in(world: World, model: str, strategy: str, data: str, folder: Path) -> dict[str, Any]:
    """Largest difference of the average from the one computed by hand, after 12 steps, and how far it is from live."""
    recipe = cases.tiny_recipe(model, data, strategy=cases.strategy(strategy))
    recipe = recipe.set("callbacks.checkpoint", None).set("callbacks.ema", {"decay": 0.5})
    recipe = recipe.set("callbacks.weights", {"name": "engine_cases:Weights"})
    apart = {}
    directory = folder / f"average-{model}-{strategy}-{world.size}"
    with cases.trainer_of(recipe, world, directory) as trainer:
        trainer.train(until=12)
        averages = trainer.callback("ema").weights(trainer)
        for player, states in trainer.callback("weights").after.items():
            expected = by_hand(states, 0.5)
            apart[player] = {
                "turns": len(states) - 1,
                "from_hand": max(
                    float((averages[player][n].double() - t).abs().max())
                    for n, t in expected.items()
                ),
                "from_live": max(
                    float((averages[player][n] - states[-1][n]).abs().max()) for n in expected
                ),
                "names": sorted(averages[player]) == sorted(states[-1]),
            }
    return apart


def by_hand(states: list[dict[str, Tensor]], limit: float) -> dict[str, Tensor]:
    """a <- d a + (1 - d) w with d = min(limit, (1 + t) / (10 + t)) at turn t = 0, 1, ..., in float64."""
    average = {n: t.double() for n, t in states[0].items() if t.is_floating_point()}
    for turn, state in enumerate(states[1:]):
        decay = min(limit, (1 + turn) / (10 + turn))
        average = {n: decay * a + (1 - decay) * state[n].double() for n, a in average.items()}
    return average


def callbacks_in_ranks(data: str, few: str, folder: str) -> dict[str, Any]:
    """What test_callbacks.py wants to know of several ranks."""
    world = World.join(group=True)
    pin_threads(1, 1)
    here = Path(folder)
    found: dict[str, Any] = {
        "digits": evaluate_in(world, data + "/digits", 7, here),
        "few": evaluate_in(world, few, 1, here),
    }
    if world.size == 2:
        found["average"] = {
            f"{model}-{strategy}": average_in(world, model, strategy, data, here)
            for model, strategy in (("resnet", "zero2"), ("wgan_gp", "zero3"))
        }
        recipe = stopping_recipe(data, strategy="zero2")
        found["stopped"] = run.train(recipe, run_dir=here / "stopped-2")
    world.leave()
    return found
