"""What the fork server imports once, so that every rank starts with it in memory: 2 s a start instead of 6."""

import gc
import importlib
import importlib.util

import torch
import torch._dynamo  # torch imports it when the first optimiser is made
import torch._inductor.compile_fx  # and DeepSpeed this, when an engine is made
import torch.distributed  # noqa: F401

import dist_train.run  # noqa: F401
from dist_train.components import CATALOGUE

for kind in ("model", "objective", "optimizer"):
    for target in CATALOGUE[kind].values():
        importlib.import_module(target.partition(":")[0])

if importlib.util.find_spec("deepspeed") is not None:
    from dist_train.engine.zero import import_deepspeed

    import_deepspeed()
    for name in (
        "comm.torch",
        "runtime.engine",
        "runtime.zero.stage_1_and_2",
        "runtime.zero.stage3",
    ):
        importlib.import_module(f"deepspeed.{name}")

# DeepSpeed collects garbage for each ZeRO-3 engine it makes: it need not look through all of this again
gc.collect()
gc.freeze()
