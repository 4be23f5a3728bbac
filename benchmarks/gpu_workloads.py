"""The workloads of benchmarks/gpu.py: models, how their batches look, and the raw loops beside them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train import assembly
from dist_train.data_shards.loader import MicroBatch
from dist_train.objectives import Objective, Turn
from dist_train.recipe import Recipe


@dataclass
class Workload:
    """A model, how its batches look, and the raw loop that does the same."""

    name: str
    model: dict[str, Any]
    objective: dict[str, Any]
    optimizer: dict[str, Any]
    batch: int
    fields: Callable[[torch.Generator, int], dict[str, Tensor]]
    raw: Callable[[Workload, list[dict[str, Tensor]], Bench], Callable[[int], None]]
    unit: str
    units: int
    """How many of them a step takes."""
    settings: dict[str, Any]
    convention: Callable[[int], float] | None = None
    """FLOPs of a unit from the number of weights; counted where None."""
    stock: Callable[[Workload, list[dict[str, Tensor]], Bench], Callable[[int], None]] | None = None
    """A loop as tutorials write it, where there is a well-known one."""


@dataclass
class Bench:
    """Where and how long it runs."""

    device: str
    rounds: int
    steps: int
    warm_up: int
    small: bool

    @property
    def kind(self) -> str:
        return self.device.partition(":")[0]

    def wait(self) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any]) -> float:
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began


# ---------------------------------------------------------------------------------------------------------------------
# DCGAN (Radford et al. 2016, arXiv:1511.06434), whole: parts of a project's own, named by import path. Its convolutions
# from and to a 1x1 map are the linear layers that they are: of such a map torch.compile mistakes the memory format.


class Generator(nn.Module):
    """Latent (B, 100) -> image (B, 3, 64, 64) in [-1, 1]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = [8 * width, 4 * width, 2 * width, width]
        layers: list[nn.Module] = [nn.Linear(100, sizes[0] * 16, bias=False)]
        layers += [nn.Unflatten(1, (sizes[0], 4, 4)), nn.BatchNorm2d(sizes[0]), nn.ReLU()]
        for before, after in itertools.pairwise(sizes):
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh())

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(latent)


class Discriminator(nn.Module):
    """Image (B, 3, 64, 64) -> logits (B,)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = [3, width, 2 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(itertools.pairwise(sizes)):
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(after)] if index else []
            layers += [nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 8 * width, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image).flatten()


class NonSaturating(Objective):
    """The discriminator's turn, then the generator's: -log D(x) - log(1 - D(G(z))), and -log D(G(z))."""

    players = ("generator", "discriminator")

    def turns(self, step: int) -> list[Turn]:
        return [Turn("discriminator", 0), Turn("generator", 1)]

    def loss(
        self, turn: Turn, networks: Any, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        real = micro["image"]
        latent = torch.randn(len(real), 100, device=real.device)
        if turn.player == "generator":
            loss = F.softplus(-networks.discriminator(networks.generator(latent))).mean()
        else:
            fake = networks.generator(latent).detach()
            loss = F.softplus(-networks.discriminator(real)).mean()
            loss = loss + F.softplus(networks.discriminator(fake)).mean()
        return loss, {"loss": loss.detach()}


# ---------------------------------------------------------------------------------------------------------------------
# The raw loops: what a good engineer writes by hand


def raw_supervised(
    work: Workload, batches: list[dict[str, Tensor]], bench: Bench
) -> Callable[[int], None]:
    """One network and fused AdamW or SGD, autocast, the same settings of compile and memory format."""
    (module,) = fresh_networks(work, bench).values()
    if work.settings.get("channels_last"):
        module = module.to(memory_format=torch.channels_last)
    if work.optimizer["name"] == "sgd":
        optimizer: Any = torch.optim.SGD(
            module.parameters(), work.optimizer["learning_rate"], momentum=0.9, fused=True
        )
    else:
        optimizer = torch.optim.AdamW(
            module.parameters(), work.optimizer["learning_rate"], fused=True
        )
    call = torch.compile(module) if work.settings.get("compile") else module
    chunk = work.objective.get("chunk", 0)

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        if "tokens" not in batch:
            return F.cross_entropy(call(batch["image"]).float(), batch["label"])
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        if chunk:
            ones = torch.ones(targets.shape, device=targets.device)
            return call(inputs, targets, ones, chunk) / targets.numel()
        return F.cross_entropy(call(inputs).float().flatten(0, 1), targets.flatten())

    def loop(steps: int) -> None:
        for step in range(steps):
            with torch.autocast(bench.kind, torch.bfloat16):
                loss = loss_of(batches[step % len(batches)])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return loop


def raw_gan(
    work: Workload, batches: list[dict[str, Tensor]], bench: Bench
) -> Callable[[int], None]:
    """Two fused optimisers, autocast, the same settings of compile and memory format, and the fake images computed once
    and used in both turns."""
    networks = fresh_networks(work, bench)
    rate = work.optimizer["learning_rate"]
    first, second = (
        torch.optim.Adam(networks[name].parameters(), rate, betas=(0.5, 0.999), fused=True)
        for name in ("discriminator", "generator")
    )
    if work.settings.get("channels_last"):
        networks = {n: net.to(memory_format=torch.channels_last) for n, net in networks.items()}
    calls: Any = networks
    if how := work.settings.get("compile"):
        options = {"triton.cudagraphs": how == "cuda_graphs"}
        calls = {n: torch.compile(network, options=options) for n, network in networks.items()}
    generator, discriminator = calls["generator"], calls["discriminator"]

    def loop(steps: int) -> None:
        for step in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            real = batches[step % len(batches)]["image"]
            with torch.autocast(bench.kind, torch.bfloat16):
                fake = generator(torch.randn(len(real), 100, device=real.device))
                loss = F.softplus(-discriminator(real).float()).mean()
                loss = loss + F.softplus(discriminator(fake.detach()).float()).mean()
            first.zero_grad()
            loss.backward()
            first.step()
            with torch.autocast(bench.kind, torch.bfloat16):
                loss = F.softplus(-discriminator(fake).float()).mean()
            second.zero_grad()
            loss.backward()
            second.step()

    return loop


def stock_gan(
    work: Workload, batches: list[dict[str, Tensor]], bench: Bench
) -> Callable[[int], None]:
    """The loop of tutorials: fp32, as written, real and fake batches one after the other, losses read every step."""
    networks = fresh_networks(work, bench)
    generator, discriminator = networks["generator"], networks["discriminator"]
    rate = work.optimizer["learning_rate"]
    first, second = (
        torch.optim.Adam(net.parameters(), rate, betas=(0.5, 0.999))
        for net in (discriminator, generator)
    )
    criterion = nn.BCEWithLogitsLoss()
    images = [batch["image"].contiguous() for batch in batches]

    def loop(steps: int) -> None:
        for step in range(steps):
            real = images[step % len(images)]
            ones, zeros = (torch.full((len(real),), v, device=real.device) for v in (1.0, 0.0))
            discriminator.zero_grad()
            loss_real = criterion(discriminator(real), ones)
            loss_real.backward()
            fake = generator(torch.randn(len(real), 100, device=real.device))
            loss_fake = criterion(discriminator(fake.detach()), zeros)
            loss_fake.backward()
            first.step()
            generator.zero_grad()
            loss = criterion(discriminator(fake), ones)
            loss.backward()
            second.step()
            _ = (loss_real + loss_fake).item(), loss.item()

    return loop


def fresh_networks(work: Workload, bench: Bench) -> dict[str, nn.Module]:
    made = assembly.make_networks(Recipe(**plain_recipe(work, "nowhere")), {})
    return {
        name: module.to(bench.device)
        for modules in made.values()
        for name, module in modules.items()
    }


# ---------------------------------------------------------------------------------------------------------------------


def workloads(small: bool, compiled: bool) -> Iterator[Workload]:
    """The four, or their miniatures."""
    for name, size, batch in (
        ("gpt2-124m", {"dim": 768, "depth": 12, "num_heads": 12, "max_length": 1024}, 64),
        ("gpt-1.3b", {"dim": 2048, "depth": 24, "num_heads": 16, "max_length": 2048}, 4),
    ):
        vocabulary = 50304
        if small:
            size, batch = {"dim": 32, "depth": 2, "num_heads": 2, "max_length": 32}, 2
            vocabulary = 128
        length, depth, dim = size["max_length"], size["depth"], size["dim"]

        def tokens(
            generator: torch.Generator, batch: int, length: int = length, v: int = vocabulary
        ) -> dict[str, Tensor]:
            drawn = torch.randint(0, v, (batch, length + 1), generator=generator)
            return {"tokens": drawn, "length": torch.full((batch,), length)}

        yield Workload(
            name,
            {"name": "transformer", "vocab_size": vocabulary, **size},
            {"name": "language_modelling", "chunk": 32 if small else 8192},
            {"name": "adamw", "learning_rate": 1e-4},
            batch,
            tokens,
            raw_supervised,
            "tokens",
            batch * length,
            {"compile": compiled},
            lambda n, depth=depth, dim=dim, length=length: (
                6 * (n - length * dim) + 12 * depth * dim * length
            ),
        )

    def images(side: int) -> Callable[[torch.Generator, int], dict[str, Tensor]]:
        return lambda generator, batch: {
            "image": torch.randn(batch, 3, side, side, generator=generator),
            "label": torch.randint(0, 10, (batch,), generator=generator),
        }

    batch, side = (4, 32) if small else (256, 224)
    yield Workload(
        "resnet-50",
        {"name": "resnet_imagenet", "depth": 18 if small else 50, "width": 8 if small else 64},
        {"name": "classification"},
        {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9},
        batch,
        images(side),
        raw_supervised,
        "images",
        batch,
        {"channels_last": True, "compile": compiled},
    )
    batch, width = (4, 8) if small else (128, 64)
    yield Workload(
        "dcgan-64",
        {
            "generator": {"name": "gpu_workloads:Generator", "width": width},
            "discriminator": {"name": "gpu_workloads:Discriminator", "width": width},
        },
        {"name": "gpu_workloads:NonSaturating"},
        {"name": "adam", "learning_rate": 2e-4, "betas": [0.5, 0.999]},
        batch,
        images(64),
        raw_gan,
        "images",
        batch,
        {"channels_last": True, "compile": "cuda_graphs" if compiled else False},
        stock=stock_gan,
    )


def plain_recipe(work: Workload, data: str) -> dict[str, Any]:
    return {
        "duration": "1000000 steps",
        "strategy": "single",
        "precision": "bf16",
        "data": {"path": data, "global_batch": work.batch, "micro_batch": work.batch},
        "model": work.model,
        "objective": work.objective,
        "optimizer": work.optimizer,
        "log": {"every": "10 steps"},
        **work.settings,
    }
