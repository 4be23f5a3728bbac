"""In which number formats a run computes: autocast over fp32 weights, the loss scale of fp16, TF32, determinism."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.errors import UserError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The type that autocast chooses where it can; weights, gradients and optimiser stay fp32."""


def check_device(precision: str, network: nn.Module, device: str) -> None:
    """Refuse what this device cannot compute."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in network.modules())
    if precision == "fp16" and device == "cpu" and recurrent:
        raise UserError(
            "precision: fp16, but torch has no recurrent layers in fp16 on a CPU; use bf16 or fp32"
        )
    if precision == "bf16" and device == "cpu" and recurrent and not has_recurrent_bf16():
        raise UserError("precision: bf16, but this CPU has no recurrent layers in bf16; use fp32")


@functools.cache
def has_recurrent_bf16() -> bool:
    """Whether this CPU has what oneDNN's recurrent layers in bf16 need: one with AVX2 alone has not."""
    try:
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(1, 1)(torch.zeros(1, 1, 1))
    except RuntimeError:
        return False
    return True


def set_numerics(*, tf32: bool, deterministic: bool) -> None:
    """Set for this process whether fp32 products may run as TF32, and whether only deterministic kernels may run.

    With `deterministic` an operation that has no such kernel on this device is a RuntimeError that names it.
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # it imports inductor
        torch.use_deterministic_algorithms(deterministic)


class LossScale:
    """The factor by which fp16 losses are multiplied, so that small gradients do not vanish (Micikevicius et al. 2018).

    A turn whose gradients overflow is skipped and halves the scale; `growth_interval` good ones in a row double it.
    All ranks see the same gradients, so they decide alike. At the floor a further overflow is an error.
    """

    def __init__(
        self, initial: float = 2.0**16, growth_interval: int = 2000, floor: float = 1.0
    ) -> None:
        self.value, self.growth_interval, self.floor = initial, growth_interval, floor
        self.good = 0  # turns since the last overflow or growth
        self.skipped = 0  # turns, in all
        self.in_a_row = 0

    def update(self, overflow: bool, loss: Tensor, networks: str) -> None:
        """Take note of a turn. `loss` is its last one, unscaled: whether that was finite tells the cause."""
        if not overflow:
            self.in_a_row = 0
            self.good += 1
            if self.good >= self.growth_interval:
                self.value, self.good = self.value * 2, 0
            return
        self.good = 0
        self.skipped += 1
        self.in_a_row += 1
        if self.value <= self.floor:
            cause = (
                "some activation or gradient exceeds the range of fp16 by itself; use bf16"
                if torch.isfinite(loss)
                else f"the loss itself is {float(loss):g}: look at the model and the data, no scale can mend that"
            )
            raise RuntimeError(
                f"precision: fp16: the gradients of {networks} are not finite at the smallest loss scale,"
                f" {self.floor:g} ({self.in_a_row} turns skipped in a row): {cause}"
            )
        self.value = max(self.value / 2, self.floor)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good": self.good, "skipped": self.skipped} | {
            "in_a_row": self.in_a_row
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.good = state["value"], state["good"]
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
