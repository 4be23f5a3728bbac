"""Players: batch norm over the ranks, memories that move with their slots, weights that two players hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import player_cases as cases
import pytest
import torch
from cases import tiny_recipe
from parity_models import Adversarial, family_recipe
from torch import nn

from dist_train import assembly, run
from dist_train.errors import UserError
from dist_train.objectives import Turn
from dist_train.testing import spawn_ranks
from dist_train.world import World

EXACT = 2e-6


def difference(a: Any, b: Any) -> float:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((difference(a[key], b[key]) for key in a), default=0.0)
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    return float((x - y).abs().max())


@pytest.fixture(scope="module")
def synchronised() -> dict[int, dict[str, Any]]:
    return {ranks: spawn_ranks(ranks, cases.all_synchronised, timeout=150)[0] for ranks in (2, 4)}


@pytest.mark.parametrize("ranks", (2, 4))
@pytest.mark.parametrize("way", cases.WAYS)
@pytest.mark.parametrize("strategy", cases.STRATEGIES)
def test_synchronised_batch_norm_is_that_of_the_whole_batch(
    synchronised: dict[int, dict[str, Any]], ranks: int, strategy: str, way: str
) -> None:
    """Loss, gradients (also of a penalty, and through a frozen view), running statistics."""
    found, truth = synchronised[ranks][f"{strategy}-{way}"], cases.whole_batch(way)
    assert found["loss"] == pytest.approx(truth["loss"], abs=EXACT)
    assert difference(found["gradients"], truth["gradients"]) <= EXACT
    assert max(torch.tensor(g).abs().max() for g in truth["gradients"].values()) > 0.01
    assert difference(found["buffers"], truth["buffers"]) <= EXACT


def test_synchronised_needs_one_micro_batch_a_rank(tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("resnet", tiny_data, batch_norm="synchronised", micro_batches=4)
    with pytest.raises(UserError, match=r"expected data.micro_batch 24 instead of 6"):
        assembly.build(recipe, World(), run.RunDirectory.create_at(tmp_path / "run"))


def test_pools_move_with_their_slots(tiny_data: Path, tmp_path: Path) -> None:
    """4 slots: broken on 2 ranks after 3 steps, gone on with 4 under another strategy, then 1; against unbroken."""
    data = str(tiny_data)
    unbroken = spawn_ranks(
        1, cases.cycle_run, data, str(tmp_path / "unbroken"), "single", None, False, timeout=240
    )[0]
    folder = str(tmp_path / "broken")
    spawn_ranks(2, cases.cycle_run, data, folder, "ddp", 3, False, timeout=240)
    spawn_ranks(4, cases.cycle_run, data, folder, "zero2", 6, True, timeout=240)
    moved = spawn_ranks(1, cases.cycle_run, data, folder, "single", None, True, timeout=240)[0]
    assert unbroken["step"] == moved["step"] == 8
    assert sorted(unbroken["pools"]) == [f"memory/0000{i}/{d}" for i in range(4) for d in "ab"]
    assert difference(moved["pools"], unbroken["pools"]) <= EXACT
    assert difference(moved["weights"], unbroken["weights"]) <= EXACT


class Leaking(Adversarial):
    def loss(self, turn: Turn, networks: Any, micro: Any, scalars: Any) -> Any:
        loss, logged = super().loss(turn, networks, micro, scalars)
        micro.memory["loss"] = loss
        return loss, logged


def test_a_memory_with_a_graph_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    recipe = family_recipe("DCGAN", tiny_data, 4, "none").set(
        "objective.name", "test_players:Leaking"
    )
    with pytest.raises(UserError, match=r"micro\.memory\['loss'\] is a tensor with a graph"):
        run.train(recipe, run_dir=tmp_path / "run")


def test_a_weight_of_two_players_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    recipe = family_recipe("DCGAN", tiny_data, 4, "none")
    trunk = nn.Linear(3, 3)
    networks = {"generator": nn.Sequential(trunk), "discriminator": nn.Sequential(trunk, nn.ReLU())}
    directory = run.RunDirectory.create_at(tmp_path / "run")
    with pytest.raises(UserError, match=r"discriminator.0.weight is a weight of 'generator' too"):
        assembly.build(recipe, World(), directory, model=networks)


class Trunk(Adversarial):
    """The generator's player owns a trunk, which the discriminator's turns use as it is."""

    def loss(self, turn: Turn, networks: Any, micro: Any, scalars: Any) -> Any:
        real = networks.trunk(micro["image"])
        if turn.player == "generator":
            return (networks.generator(real.flatten(1)) ** 2).mean(), {}
        return (networks.discriminator(real.flatten(1)) - 1).square().mean(), {}


def test_a_shared_trunk_belongs_to_one_player(tiny_data: Path, tmp_path: Path) -> None:
    """Against plain torch: the trunk moves by its own player's loss alone, the other's turn leaves it."""

    def networks() -> dict[str, nn.Module]:
        torch.manual_seed(3)
        return {
            "trunk": nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh()),
            "generator": nn.Linear(128, 2),
            "discriminator": nn.Linear(128, 1),
        }

    recipe = family_recipe("DCGAN", tiny_data, 1, "none").set(
        "objective.name", "test_players:Trunk"
    )
    some = {"name": "parity_models:Perceptron"}
    recipe = recipe.set("model.generator", {"trunk": some, "generator": some})
    recipe = recipe.set("model.discriminator", some).set("optimizer.weight_decay", 0.0)
    directory = run.RunDirectory.create_at(tmp_path / "run")
    trainer = assembly.build(recipe, World(), directory, model=networks())
    run.begin(trainer, None)
    trainer.train(until=1)
    image, plain = trainer.batch[0]["image"], networks()
    players = {"generator": ("trunk", "generator"), "discriminator": ("discriminator",)}
    optimizers = {
        player: torch.optim.SGD(
            [p for n in names for p in plain[n].parameters()], lr=0.02, momentum=0.9
        )
        for player, names in players.items()
    }
    for player in ("discriminator", "generator", "discriminator"):
        hidden = plain["trunk"](image).flatten(1)
        if player == "generator":
            loss = (plain["generator"](hidden) ** 2).mean()
        else:
            loss = (plain["discriminator"](hidden.detach()) - 1).square().mean()
        optimizers[player].zero_grad()
        loss.backward()
        optimizers[player].step()
    for player, names in players.items():
        weights = trainer.full_weights(player)
        for name in names:
            for key, truth in plain[name].named_parameters():
                assert difference(weights[f"{name}.{key}"].tolist(), truth.tolist()) <= 1e-6
