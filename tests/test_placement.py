"""AlexNet (C2) over two devices: the same outputs, weights and checkpoints; what cannot be is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_train.errors import UserError
from dist_train.forecast.footprint import candidates
from dist_train.launch.preflight import check_placement
from dist_train.launch.spec import Spec
from dist_train.models.alexnet import AlexNet
from dist_train.models.resnet import ResNet
from dist_train.networks import placement
from dist_train.recipe import Recipe
from dist_train.testing import assert_same_run, spawn_ranks, tiny_run
from dist_train.world import World

SPLIT = {"column2": 1}
SMALL: dict[str, Any] = {"image_size": 32, "stem": "small", "width": 6, "hidden": 16}


def small(dropout: float = 0.5) -> AlexNet:
    torch.manual_seed(0)
    return AlexNet(3, 10, dropout=dropout, **SMALL)


@pytest.mark.parametrize("training", [False, True])
def test_split_and_whole_give_equal_outputs(training: bool) -> None:
    whole, split = small().train(training), small().train(training)
    placement.place(split, SPLIT, ["cpu", "cpu"])
    image = torch.randn(5, 3, 32, 32)
    outputs = []
    for network in (whole, split):
        torch.manual_seed(1)
        output = network(image)
        output.square().sum().backward()
        outputs.append(output)
    assert torch.equal(*outputs)
    assert list(split.state_dict()) == list(whole.state_dict())
    for (name, a), b in zip(whole.named_parameters(), split.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad), name


def test_every_tensor_is_where_its_layer_is() -> None:
    """Two GPUs that nobody has: fake tensors refuse an operation whose arguments lie on different devices."""
    devices = ["cuda:0", "cuda:1"]
    bare, split = small().to("meta"), small().to("meta")
    for layer, number in placement.layers(split, SPLIT):
        layer.register_forward_pre_hook(placement.Bring(devices[number]))
    with FakeTensorMode():
        image = torch.empty(5, 3, 32, 32, device=devices[0])
        weights = {
            name: torch.empty(weight.shape, device=devices["column2" in name])
            for name, weight in split.named_parameters()
        }
        output = torch.func.functional_call(split, weights, (image,))
        assert output.device == torch.device(devices[0])
        with pytest.raises(RuntimeError, match="device"):
            torch.func.functional_call(bare, weights, (image,))


def recipe(data: Path, **settings: Any) -> Recipe:
    """A tiny AlexNet on 8 x 8 digits, made larger by padding."""
    made = cases.tiny_recipe("resnet", data)
    made = made.set("data.transforms.train", [{"name": "pad", "padding": 12}])
    network = {"name": "alexnet", "in_channels": 1, "num_classes": 10, "dropout": 0.2, **SMALL}
    made = made.set("model", network)
    for key, value in settings.items():
        made = made.set(key, value)
    return made


def test_the_run_is_the_same(tiny_data: Path, tmp_path: Path) -> None:
    """Split and whole, on one rank and on two, to the bit; half of it split, resumed whole."""
    split = recipe(tiny_data, placement=SPLIT)
    one = tiny_run(recipe(tiny_data), tmp_path / "one", steps=6)
    assert_same_run(one, tiny_run(split, tmp_path / "split", steps=6))
    tiny_run(split, tmp_path / "halves", steps=6, until=3)
    tiny_run(recipe(tiny_data), tmp_path / "halves", steps=6, resume="auto")
    assert_same_run(one, tmp_path / "halves")
    pair = [
        [made.set("duration", "6 steps").as_dict(), str(tmp_path / name), None]
        for name, made in (("two", recipe(tiny_data)), ("two-split", split))
    ]
    spawn_ranks(2, cases.train_cases, pair, timeout=240)
    assert_same_run(tmp_path / "two", tmp_path / "two-split")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "zero2"}, "strategy: got zero2 with a placement, expected single or ddp"),
        ({"strategy": "auto"}, "strategy: got auto with a placement"),
        ({"compile": True}, "compile: got true with a placement"),
        ({"placement": {"column2": 2}}, "placement: got the devices 2, expected all of 1 to 2"),
        ({"placement": {"column2": 0}}, "placement.column2: got 0"),
    ],
)
def test_mistakes_of_a_recipe(tiny_data: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(tiny_data, **{"placement": SPLIT, **settings})


def test_parts_that_cannot_stand_elsewhere() -> None:
    with pytest.raises(UserError, match=r"placement.colum2: .*no such part.*'column2'"):
        placement.check(small(), {"colum2": 1})
    with pytest.raises(UserError, match=r"placement.dropout: holds Dropout, whose draws"):
        placement.check(small(), {"dropout": 1})
    with pytest.raises(UserError, match=r"holds column2.conv1, which has a device of its own"):
        placement.check(small(), {"column2": 1, "column2.conv1": 2})
    with pytest.raises(UserError, match=r"placement.stage1: holds BatchNorm2d, which keeps"):
        placement.check(ResNet(8), {"stage1": 1})


def test_a_node_has_the_gpus_of_its_ranks(tiny_data: Path) -> None:
    split = recipe(tiny_data, placement=SPLIT)
    check_placement(split, Spec(gpus_per_node=4, ranks_per_node=2))
    with pytest.raises(UserError, match=r"4 ranks a node of 2 GPUs each need 8, got 4; .*-node 2"):
        check_placement(split, Spec(gpus_per_node=4))


def test_plan_offers_what_a_placement_can_have(tiny_data: Path) -> None:
    split = recipe(tiny_data, placement=SPLIT)
    assert [[s["name"] for s in candidates(split, ranks)] for ranks in (1, 2)] == [
        ["single"],
        ["ddp"],
    ]


def test_fewer_gpus_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message = "needs 2 GPUs for each of 1 ranks of this machine, which has 1"
    with pytest.raises(UserError, match=message):
        World.join({}, devices=2)
