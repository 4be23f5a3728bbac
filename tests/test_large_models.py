"""Networks that are built without a whole copy: the same weights, and ranks that have no room for them all."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import large_cases
import pytest
import torch
from torch import nn

from dist_train import checkpoint, components, randomness
from dist_train.engine.disk import Disk
from dist_train.errors import UserError
from dist_train.networks.deferred import construct, value_of
from dist_train.networks.initialisation import initialise
from dist_train.testing import RankFailed, spawn_ranks
from dist_train.verify import parity
from dist_train.world import World, pin_threads


class Odd(nn.Module):
    """All that constructors do: ties, several draws for one weight, views, values read, buffers computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(40, 30), nn.Linear(40, 30)
        self.b.weight = self.a.weight
        self.recurrent, self.table = nn.LSTM(8, 16, 2), nn.Embedding(50, 16, padding_idx=3)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))
        self.orthogonal, self.norm = nn.Linear(20, 20), nn.BatchNorm2d(8)
        nn.init.orthogonal_(self.orthogonal.weight)
        self.wide = nn.Linear(12, 5)
        nn.init.orthogonal_(self.wide.weight)  # which transposes in place
        self.attention = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 2)
        self.register_buffer("places", torch.arange(10)[None] * torch.tensor([0.5]))
        rates = [rate.item() for rate in torch.linspace(0, 0.3, 3)]
        self.dropouts = nn.ModuleList(nn.Dropout(rate) for rate in rates)
        self.drawn, self.zero = nn.Parameter(torch.randn(7, 9) * 0.02), nn.Parameter(torch.zeros(5))
        self.listed = nn.Parameter(torch.tensor([1.0, 2.0]), requires_grad=False)
        self.after = nn.Linear(33, 17)
        with torch.no_grad():
            nn.init.trunc_normal_(self.table.weight, std=0.02)
            self.after.weight[2:5].zero_()
            self.after.weight[:, 4] *= 3
            self.after.weight.mul_(self.drawn.norm())
        self.last = nn.Parameter(torch.rand(4))


def scaled() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))
    initialise(network, {"name": "orthogonal", "bias": 0.1})
    return network


TRANSFORMER = {"name": "transformer", "vocab_size": 50, "dim": 16, "depth": 2, "num_heads": 2}
RESNET = {"name": "resnet", "depth": 8, "width": 4, "in_channels": 1, "num_classes": 10}
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "odd": Odd,
    "init": scaled,
    "transformer": lambda: components.build("model", {**TRANSFORMER, "max_length": 8}, "model"),
    "resnet": lambda: components.build("model", RESNET, "model"),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", BUILDERS)
def test_deferred_weights_are_those_of_an_ordinary_construction(name: str) -> None:
    """Bit for bit, and the generator stands where it would stand."""
    randomness.reseed(1, 2)
    whole, after = BUILDERS[name](), torch.get_rng_state()
    randomness.reseed(1, 2)
    later = construct(BUILDERS[name], "cpu", "model")
    assert torch.equal(torch.get_rng_state(), after)
    assert list(dict(later.named_parameters())) == list(dict(whole.named_parameters()))
    deferred = 0
    for path, parameter in later.named_parameters():
        truth = whole.get_parameter(path)
        value = value_of(parameter)
        deferred += value is not None
        assert parameter.shape == truth.shape and parameter.requires_grad == truth.requires_grad
        assert torch.equal(parameter if value is None else value, truth), path
        held = parameter.untyped_storage().nbytes()
        assert value is None or held == parameter.element_size()  # room for one number
    assert deferred >= len(list(whole.parameters())) - 1
    for path, buffer in whole.named_buffers():
        assert torch.equal(later.get_buffer(path), buffer), path
    assert torch.equal(torch.get_rng_state(), after)


class Listing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.largest = max(self.weight.detach().numpy())


def test_a_constructor_that_needs_values_is_run_whole(caplog: pytest.LogCaptureFixture) -> None:
    randomness.reseed(1, 2)
    whole = Listing()
    randomness.reseed(1, 2)
    with caplog.at_level(logging.WARNING, "dist_train"):
        network = construct(Listing, "cpu", "model")
    assert isinstance(network, Listing) and network.largest == whole.largest
    assert "model is built whole on every rank" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux")
@pytest.mark.parametrize("strategy", ("zero3", "fsdp2"))
def test_where_no_rank_has_room_for_a_copy(strategy: str, tiny_data: Path, tmp_path: Path) -> None:
    """8 ranks build, train, evaluate, save, resume and start from weights under a limit below one copy."""
    found: dict[str, Any] = {}
    for work in ("train", "load"):
        arguments = (large_cases.limited, strategy, work, str(tiny_data), str(tmp_path))
        for one in spawn_ranks(8, *arguments, timeout=150):
            assert "allocate memory" in one["whole"], "the limit is below a copy"
            found |= one
    pin_threads(1, 1)
    alone = large_cases.recipe(str(tiny_data), "single")
    truth = large_cases.two_steps(alone, World(), tmp_path / "alone")
    for step in (0, 2):
        ends = [
            checkpoint.Reader(checkpoint.at(tmp_path / name / "checkpoints", step))
            for name in ("run", "alone")
        ]
        for name in ends[1].names("weights/"):
            sharded, whole = (end.whole(name) for end in ends)
            if step == 0:
                assert torch.equal(sharded, whole), name
            else:
                assert float((sharded - whole).norm()) <= 1e-6 * float(whole.norm()), name
    assert found["losses"] == pytest.approx(truth["losses"], rel=1e-6)
    for measured in ("measured", "resumed", "started"):
        assert found[measured] == pytest.approx(truth["measured"], rel=1e-6), measured


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux")
def test_a_turn_through_a_critic_of_which_no_rank_has_room_for_a_copy(
    tiny_data: Path, tmp_path: Path
) -> None:
    """4 ranks; gathered whole, as a planted setting has it, it does not fit."""
    arguments = (large_cases.adversaries_limited, str(tiny_data), str(tmp_path))
    found = spawn_ranks(4, *arguments, 0, timeout=240)[0]
    pin_threads(1, 1)
    alone = large_cases.adversaries(str(tiny_data), 0).set("strategy", "single")
    with parity.trainer_of(alone, World(), tmp_path / "alone") as trainer:
        kept = parity.Losses()
        parity.watch(trainer, kept)
        trainer.train()
    assert found["losses"] == pytest.approx(kept.losses, rel=1e-6)
    with pytest.raises(RankFailed, match="allocate memory"):
        spawn_ranks(4, *arguments, 10**9, timeout=240)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux")
def test_an_optimiser_whose_state_has_room_on_a_disk_only(tiny_data: Path, tmp_path: Path) -> None:
    """In memory, as a planted recipe has it, it does not fit. Nothing is left in the folder."""
    disk = tmp_path / "nvme"
    disk.mkdir()
    arguments = (large_cases.state_on_disk, str(tiny_data), str(tmp_path))
    found = spawn_ranks(1, *arguments, str(disk), timeout=240)[0]
    assert not list(disk.iterdir())
    pin_threads(1, 1)
    alone = large_cases.recipe(str(tiny_data), "single").set("evaluate", None)
    alone = alone.set("optimizer", {"name": "adamw", "learning_rate": 1e-3})
    with parity.trainer_of(alone, World(), tmp_path / "alone") as trainer:
        kept = parity.Losses()
        parity.watch(trainer, kept)
        trainer.train()
    assert found == pytest.approx(kept.losses, rel=1e-6)
    with pytest.raises(RankFailed, match="allocate memory"):
        spawn_ranks(1, *arguments, None, timeout=240)


def test_a_disk_without_room_or_folder_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"strategy.nvme_path: .*missing is no folder"):
        Disk(str(tmp_path / "missing"))
    with pytest.raises(
        UserError, match=r"strategy.nvme_path: .* has no room for 4,000,000,000,000"
    ):
        Disk(str(tmp_path)).moved(torch.zeros(1).expand(1_000_000_000_000))
    assert not list(tmp_path.iterdir())
