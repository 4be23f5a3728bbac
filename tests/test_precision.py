"""fp16's loss scale, and what a run does with it; TF32 and determinism as settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cases
import pytest
import torch
from torch import nn

from dist_train import checkpoint, run
from dist_train.errors import UserError
from dist_train.networks import Player
from dist_train.networks.precision import LossScale, check_device, has_recurrent_bf16, set_numerics
from dist_train.objectives.classification import Classification

ONE = torch.tensor(1.0)


@pytest.fixture(autouse=True)
def numerics() -> Iterator[None]:
    yield
    set_numerics(tf32=False, deterministic=False)


def test_the_scale_doubles_after_an_interval_and_halves_on_overflow() -> None:
    scale = LossScale(initial=8.0, growth_interval=3)
    values = []
    for overflow in (False, False, True, False, False, False, False):
        scale.update(overflow, ONE, "net")
        values.append(scale.value)
    assert values == [8, 8, 4, 4, 4, 8, 8]
    assert scale.skipped == 1


@pytest.mark.parametrize(
    ("loss", "cause"), ((1.0, "use bf16"), (float("nan"), "loss itself is nan"))
)
def test_the_floor_is_an_error_with_its_cause(loss: float, cause: str) -> None:
    scale = LossScale(initial=4.0)
    scale.update(True, ONE, "critic")
    scale.update(True, ONE, "critic")
    with pytest.raises(RuntimeError, match=f"critic.*3 turns skipped in a row.*{cause}"):
        scale.update(True, torch.tensor(loss), "critic")


def test_state_survives() -> None:
    scale, other = LossScale(), LossScale()
    for overflow in (True, False, True):
        scale.update(overflow, ONE, "net")
    other.load_state_dict(scale.state_dict())
    assert vars(other) == vars(scale)


class Pair(NamedTuple):
    code: torch.Tensor
    steps: int


class Named(nn.Module):
    def forward(self, x: torch.Tensor) -> Pair:
        return Pair(x @ x.T, 3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_outputs_keep_their_kind_in_every_precision(precision: str) -> None:
    found = Player({"net": Named()}, precision, "cpu")("net", torch.eye(2))
    assert isinstance(found, Pair) and found.code.dtype == torch.float32 and found.steps == 3


class Exploding(Classification):
    """A loss whose gradients no scale can hold."""

    def loss(self, *arguments: Any) -> Any:
        loss, logged = super().loss(*arguments)
        return loss * 1e38, logged


def test_a_run_under_fp16_resumes_exactly(tiny_data: Path, tmp_path: Path) -> None:
    recipe = cases.tiny_recipe("wgan_gp", tiny_data, precision="fp16", strategy="single")
    recipe = recipe.set("log.every", "1 step").set("duration", "8 steps")
    run.train(recipe, run_dir=tmp_path / "unbroken")
    run.train(recipe, run_dir=tmp_path / "broken", until=5)
    run.train(recipe, run_dir=tmp_path / "broken", resume="auto")
    held = [checkpoint.Reader(checkpoint.resolve(tmp_path / n)) for n in ("unbroken", "broken")]
    assert held[0].values["players"] == held[1].values["players"]
    assert "loss_scale" in held[0].values["players"]["critic"]
    digests = [checkpoint.weights_digest(reader.path) for reader in held]
    assert digests[0] == digests[1]


def test_a_run_that_overflows_at_any_scale_ends(tiny_data: Path, tmp_path: Path) -> None:
    recipe = cases.tiny_recipe("resnet", tiny_data, precision="fp16", strategy="single")
    recipe = recipe.set("objective.name", "test_precision:Exploding").set("log.every", "1 step")
    with pytest.raises(RuntimeError, match=r"smallest loss scale, 1 \(17 turns"):
        run.train(recipe, run_dir=tmp_path / "run")
    rows = run.RunDirectory.open(tmp_path / "run").rows()
    assert [row["skipped_turns"] for row in rows] == list(range(1, 17))
    assert [row["loss_scale"] for row in rows] == [2.0**k for k in range(15, -1, -1)]


def test_what_a_cpu_has_not_is_refused() -> None:
    if has_recurrent_bf16():
        check_device("bf16", nn.LSTM(2, 2), "cpu")
    else:
        with pytest.raises(UserError, match="recurrent layers in bf16"):
            check_device("bf16", nn.LSTM(2, 2), "cpu")
    with pytest.raises(UserError, match="recurrent layers in fp16"):
        check_device("fp16", nn.Sequential(nn.LSTM(2, 2)), "cpu")


def test_numerics_are_set_both_ways() -> None:
    for value in (True, False):
        set_numerics(tf32=value, deterministic=value)
        assert torch.backends.cudnn.allow_tf32 is value
        assert torch.backends.cuda.matmul.allow_tf32 is value
        assert torch.are_deterministic_algorithms_enabled() is value


def test_deterministic_names_the_operation_that_has_no_such_kernel() -> None:
    set_numerics(tf32=False, deterministic=True)
    indices = torch.zeros(2, 1, 4, 4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="max_unpool"):
        nn.functional.max_unpool2d(torch.rand(2, 1, 4, 4), indices, 2)
