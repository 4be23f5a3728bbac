"""How a player may be spread over the ranks: the settings of `strategy`, checked without torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from dist_train.errors import UserError, nearest
from dist_train.settings import short

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
SHARDED = ("zero1", "zero2", "zero3", "fsdp2")
"""Those whose ranks hold and update parts of tensors."""
WEIGHTLESS = ("zero3", "fsdp2")
"""Those under which no rank ever holds a whole network."""
AUTO = "auto"
"""The fastest of them that fits the machine, resolved when the run begins."""
OFFLOADS = {
    "none": (AUTO, *STRATEGIES),
    "optimizer": ("zero1", "zero2", "zero3"),
    "all": ("zero3",),  # the parameters too
}
"""What lives in the memory of the host instead of the device's, and the strategies that can do so."""

FSDP2_NEEDS = (2, 13)
"""The first torch whose fully_shard sums the gradients of parameters that a rank did not use."""

OWNED_BY_THE_RECIPE = {
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.micro_batch",
    "gradient_accumulation_steps": "data.global_batch / data.micro_batch / ranks",
    "gradient_clipping": "callbacks.clip_gradients",
    "optimizer": "optimizer",
    "scheduler": "callbacks.learning_rate_decay",
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "activation_checkpointing": "activation_checkpointing",
    "compile": "compile",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "zero_optimization.stage": "strategy.name",
    "zero_optimization.mics_shard_size": "strategy.shard_degree of fsdp2 (DeepSpeed has removed MiCS)",
    "zero_optimization.offload_optimizer": "strategy.offload",
    "zero_optimization.offload_param": "strategy.offload",
    "zero_optimization.stage3_param_persistence_threshold": "strategy.persistence_threshold",
}
"""Settings of DeepSpeed that a recipe cannot give as such, and the recipe's own that decides them."""


def check_strategy(strategy: Any, where: str) -> None:
    """Raise UserError for what no strategy can be; `where` is the key path to name."""
    name = strategy.get("name") if isinstance(strategy, dict) else strategy
    if name not in (AUTO, *STRATEGIES):
        raise UserError(
            f"{where}: got {short(name)}, expected one of {', '.join((AUTO, *STRATEGIES))}"
            + nearest(str(name), (AUTO, *STRATEGIES))
        )
    if name == "fsdp2":
        _check_torch(where)
    known = ["name"]
    if name.startswith("zero"):
        known += ["offload", "nvme_path", "deepspeed"]
    if name == "zero3":
        known += ["persistence_threshold"]
    if name in ("zero3", "fsdp2"):
        known += ["view_elements"]
    if name == "fsdp2":
        known += ["offload", "shard_degree", "reshard_after_forward"]
    for key in strategy:
        if key not in known:
            raise UserError(
                f"{where}.{key}: unknown key, {name} takes {', '.join(known)}{nearest(key, known)}"
            )
    for key in ("persistence_threshold", "view_elements"):
        count = strategy.get(key, 0)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise UserError(
                f"{where}.{key}: got {short(count)}, expected a whole number of elements, 0 or more"
            )
    degree = strategy.get("shard_degree", 1)
    if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
        raise UserError(
            f"{where}.shard_degree: got {short(degree)}, expected a whole number of ranks, 1 or more"
        )
    if not isinstance(strategy.get("reshard_after_forward", True), bool):
        raise UserError(
            f"{where}.reshard_after_forward: got {short(strategy['reshard_after_forward'])},"
            " expected true or false"
        )
    able = OFFLOADS.get(strategy.get("offload", "none"))
    if able is None:
        disk = " with `nvme_path: FOLDER`" if strategy["offload"] == "nvme" else ""
        raise UserError(
            f"{where}.offload: got {short(strategy['offload'])}, expected one of {', '.join(OFFLOADS)}{disk}"
        )
    if name not in able:
        raise UserError(
            f"{where}.offload: got {short(strategy['offload'])} with {name}, expected {' or '.join(able)}:"
            " others keep all of a rank on its device"
        )
    path = strategy.get("nvme_path", "a folder")
    if not isinstance(path, str) or not path:
        raise UserError(f"{where}.nvme_path: got {short(path)}, expected a folder on a local disk")
    if "nvme_path" in strategy and strategy.get("offload", "none") == "none":
        raise UserError(
            f"{where}.nvme_path: got {short(path)}, but nothing is offloaded; expected with it"
            f" offload: {'optimizer or all' if name == 'zero3' else 'optimizer'}"
        )
    _check_deepspeed(strategy.get("deepspeed", {}), f"{where}.deepspeed")


def _check_torch(where: str) -> None:
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < FSDP2_NEEDS:
        needed = ".".join(map(str, FSDP2_NEEDS))
        raise UserError(
            f"{where}: fsdp2 needs torch {needed} or later, here is {version}; zero3 shards alike with any"
        )


def check_ranks(strategy: Mapping[str, Any], ranks: int, where: str) -> None:
    """Raise UserError for a `shard_degree` into whose groups the ranks do not divide."""
    degree = strategy.get("shard_degree", ranks)
    if ranks % degree:
        fitting = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise UserError(
            f"{where}.shard_degree: got {degree}, which does not divide {ranks} ranks; these would: {fitting}"
        )


def _check_deepspeed(settings: Any, where: str) -> None:
    if not isinstance(settings, dict):
        raise UserError(f"{where}: got {short(settings)}, expected a mapping of DeepSpeed settings")
    for key, value in flat(settings).items():
        for owned, ours in OWNED_BY_THE_RECIPE.items():
            if key == owned or key.startswith(f"{owned}."):
                raise UserError(
                    f"{where}.{key}: got {short(value)}, but the recipe decides this by '{ours}'; set it there"
                )


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{a: {b: 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        path = f"{prefix}{key}"
        found |= flat(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return found


def merged(base: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both have a value, `more` wins."""
    result = dict(base)
    for key, value in more.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, Mapping)
        result[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result
