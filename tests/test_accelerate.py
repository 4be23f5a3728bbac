"""What `accelerate config` says is taken into the recipe, or the two are named that differ."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest

from dist_train.errors import UserError
from dist_train.launch import accelerate
from dist_train.launch.accelerate import adopt
from dist_train.launch.backend import Job
from dist_train.launch.spec import Spec
from dist_train.recipe import Recipe

CONFIGS = Path(__file__).parents[1] / "launch" / "accelerate_configs"


def recipe(data: Path, **settings: Any) -> Recipe:
    """A recipe that leaves strategy and precision open, unless `settings` say otherwise."""
    made = cases.tiny_recipe("resnet", data).as_dict()
    for key in ("strategy", "precision", "callbacks", "compile"):
        del made[key]
    return Recipe(**made | settings)


def zero(stage: int, **more: str) -> dict[str, str]:
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_GRADIENT_CLIPPING": "none",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    } | more


NVME = {"DEVICE": "nvme", "NVME_PATH": "/local/Scratch"}


def fsdp(**more: str) -> dict[str, str]:
    """What `accelerate launch --use_fsdp --fsdp_version 2` exports, and more."""
    told = {
        "VERSION": "2",
        "SHARDING_STRATEGY": "FULL_SHARD",
        "RESHARD_AFTER_FORWARD": "true",
        "OFFLOAD_PARAMS": "false",
        "MIN_NUM_PARAMS": "100000000",
        "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "BACKWARD_PREFETCH": "BACKWARD_PRE",
        "STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FORWARD_PREFETCH": "false",
        "USE_ORIG_PARAMS": "true",
        "CPU_RAM_EFFICIENT_LOADING": "true",
        "SYNC_MODULE_STATES": "true",
        "ACTIVATION_CHECKPOINTING": "false",
        "ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
    } | more
    return {"ACCELERATE_USE_FSDP": "true"} | {f"FSDP_{key}": value for key, value in told.items()}


def test_fsdp_of_version_2_is_fsdp2(tiny_data: Path) -> None:
    open_ = recipe(tiny_data)
    assert adopt(open_, fsdp()).strategies == {"model": {"name": "fsdp2"}}
    kept = adopt(open_, fsdp(RESHARD_AFTER_FORWARD="false", ACTIVATION_CHECKPOINTING="true"))
    assert kept.strategies == {"model": {"name": "fsdp2", "reshard_after_forward": False}}
    assert kept.activation_checkpointing == "auto"
    grouped = recipe(tiny_data, strategy={"name": "fsdp2", "shard_degree": 2})
    assert adopt(grouped, fsdp()).as_dict() == grouped.as_dict()


def test_what_the_recipe_leaves_open_comes_from_accelerate(tiny_data: Path) -> None:
    open_ = recipe(tiny_data)
    assert adopt(open_, {}).as_dict() == open_.as_dict()
    assert adopt(open_, {"ACCELERATE_MIXED_PRECISION": "bf16"}).precision == "bf16"
    assert adopt(open_, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}).compile is True
    for stage, name in enumerate(("ddp", "zero1", "zero2", "zero3")):
        assert adopt(open_, zero(stage)).strategies == {"model": {"name": name}}
    nvme = {f"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_{k}": v for k, v in NVME.items()}
    on_disk = {"name": "zero2", "offload": "optimizer", "nvme_path": "/local/Scratch"}
    assert adopt(open_, zero(2, **nvme)).strategies == {"model": on_disk}
    clipped = adopt(open_, zero(1, ACCELERATE_GRADIENT_CLIPPING="0.5"))
    assert clipped.callbacks["clip_gradients"] == {"norm": 0.5}


def test_what_both_say_alike_is_fine(tiny_data: Path) -> None:
    same = recipe(tiny_data, strategy="zero2", precision="bf16")
    same = Recipe(**same.as_dict() | {"callbacks": {"clip_gradients": {"norm": 1.0}}})
    asked = zero(2, ACCELERATE_MIXED_PRECISION="bf16", ACCELERATE_GRADIENT_CLIPPING="1.0")
    asked |= {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2", "WORLD_SIZE": "2"}
    assert adopt(same, asked).as_dict() == same.as_dict()


@pytest.mark.parametrize(
    ("settings", "environ", "words"),
    [
        ({"precision": "fp32"}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, ["precision", "'fp32'"]),
        ({}, {"ACCELERATE_MIXED_PRECISION": "fp8"}, ["precision", "fp8"]),
        ({"strategy": "zero3"}, zero(2), ["strategy", "zero3", "ZERO_STAGE=2"]),
        ({"strategy": {"name": "ddp"}}, zero(1), ["strategy", "ddp", "ZERO_STAGE=1"]),
        (
            {"callbacks": {"clip_gradients": {"norm": 2.0}}},
            zero(1, ACCELERATE_GRADIENT_CLIPPING="1.0"),
            ["clip_gradients", "2.0", "CLIPPING=1.0"],
        ),
        ({}, zero(1, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="3"), ["4 micro-batches", "STEPS=3"]),
        ({}, zero(3, ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="nvme"), ["nvme", "cpu or none"]),
        ({}, {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, ["BACKEND=EAGER", "expected inductor"]),
        (
            {"compile": ["layer*"]},
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            ["compile", "layer*", "ACCELERATE_DYNAMO_BACKEND=INDUCTOR"],
        ),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, ["FSDP_VERSION=1", "expected 2"]),
        ({}, {"ACCELERATE_USE_MEGATRON_LM": "true"}, ["MEGATRON_LM=true", "fsdp2"]),
        ({}, fsdp(VERSION="1"), ["FSDP_VERSION=1", "expected 2"]),
        ({}, fsdp(SHARDING_STRATEGY="HYBRID_SHARD"), ["HYBRID_SHARD", "strategy.shard_degree"]),
        ({}, fsdp(TRANSFORMER_CLS_TO_WRAP="Block"), ["CLS_TO_WRAP=Block", "finds the repeated"]),
        ({}, fsdp(RESHARD_AFTER_FORWARD="SHARD_GRAD_OP"), ["SHARD_GRAD_OP", "true or false"]),
        (
            {},
            fsdp(OFFLOAD_PARAMS="true"),
            ["FSDP_OFFLOAD_PARAMS=true", "strategy.offload", "zero3"],
        ),
        ({}, fsdp(RESHARD_AFTER_FORWARDS="true"), ["FORWARDS=true", "'RESHARD_AFTER_FORWARD'"]),
        ({"strategy": "zero3"}, fsdp(), ["strategy", "zero3", "FSDP_VERSION=2"]),
    ],
)
def test_what_they_say_differently_is_refused_by_both_names(
    tiny_data: Path, settings: dict[str, Any], environ: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        adopt(recipe(tiny_data, **settings), environ)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_deepspeed_file_is_read(tiny_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    settings = {
        "bf16": {"enabled": True},
        "gradient_clipping": 0.7,
        "train_batch_size": "auto",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    }
    file.write_text(json.dumps(settings))
    environ = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    made = adopt(recipe(tiny_data), environ)
    assert (made.precision, made.strategies["model"]["name"]) == ("bf16", "zero2")
    assert made.callbacks["clip_gradients"] == {"norm": 0.7}
    with pytest.raises(UserError, match=r"'fp32'.*ds\.json: bf16\.enabled"):
        adopt(recipe(tiny_data, precision="fp32"), environ)
    file.write_text("{")
    with pytest.raises(UserError, match="cannot be read as DeepSpeed's JSON"):
        adopt(recipe(tiny_data), environ)


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_the_ready_configurations_say_their_name(tiny_data: Path, name: str) -> None:
    """As accelerate itself reads them."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (1, 2, "no")
    if name == "fsdp2":
        assert config.distributed_type == "FSDP"
        said = {key.removeprefix("fsdp_").upper(): str(v) for key, v in config.fsdp_config.items()}
        environ = {"ACCELERATE_USE_FSDP": "true"} | {f"FSDP_{k}": v for k, v in said.items()}
    else:
        stage = config.deepspeed_config["zero_stage"] if name != "ddp" else 0
        assert (config.distributed_type == "DEEPSPEED") == (name != "ddp")
        environ = zero(stage)
    assert adopt(recipe(tiny_data), environ).strategies["model"]["name"] == name


def test_who_cancels_is_heard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's agent gives the ranks half a minute to save, but at a second SIGTERM it leaves, and they die with it."""
    told: list[str] = []

    class Saving:
        """A launcher that is told to end, and takes its time."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self.looks = 0

        def poll(self) -> int | None:
            self.looks += 1
            if self.looks == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return None if self.looks < 9 else 1

        def terminate(self) -> None:
            told.append("SIGTERM")

    (tmp_path / "logs").mkdir()
    Job(Spec(on="accelerate"), "tiny", tmp_path, tmp_path).write()
    monkeypatch.setattr(accelerate.subprocess, "Popen", Saving)
    monkeypatch.setattr(accelerate, "time", SimpleNamespace(sleep=lambda _: None))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert accelerate.main(str(tmp_path)) == 75
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == ["SIGTERM"]
