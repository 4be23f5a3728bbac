"""Reconstruction: an autoencoder's squared error, of a code that may be sparse and an input that may be damaged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_train.data_shards.loader import MicroBatch
from dist_train.errors import UserError
from dist_train.networks import Networks
from dist_train.objectives import Objective, Turn


class Reconstruction(Objective):
    """`model(x) -> (code (B, Z), reconstruction)`; the loss is the mean squared error of an element, and
    `sparsity` times the mean |code|.

    The input may be damaged, the target is whole (denoising, Vincent et al. 2010). Each of the three settings may be
    a scalar on a schedule instead.

    Args:
        sparsity: the weight of the code's L1 norm, a mean over samples and numbers.
        noise: the deviation of Gaussian noise on the input. masking: the share of its elements that are set to 0.
        inputs: the field.
    """

    def __init__(
        self,
        sparsity: float = 0.0,
        noise: float = 0.0,
        masking: float = 0.0,
        inputs: str = "image",
    ) -> None:
        for name, value in (("sparsity", sparsity), ("noise", noise)):
            if value < 0:
                raise UserError(f"{name}: got {value}, expected 0 or more")
        if not 0 <= masking < 1:
            raise UserError(f"masking: got {masking}, expected a share in [0, 1)")
        self.settings = {"sparsity": sparsity, "noise": noise, "masking": masking}
        self.inputs = inputs

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x = micro[self.inputs]
        now = {name: scalars.get(name, value) for name, value in self.settings.items()}
        code, reconstruction = networks.model(damaged(x, now["noise"], now["masking"]))
        error, size = (reconstruction - x).square().mean(), code.abs().mean()
        loss = error + now["sparsity"] * size
        logged = {"loss": loss, "reconstruction": error, "code_size": size}
        return loss, {name: value.detach() for name, value in logged.items()}

    def evaluate(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        """Of whole inputs: the squared error alone."""
        x = micro[self.inputs]
        code, reconstruction = networks.model(x)
        errors = (reconstruction - x).flatten(1).square().mean(dim=1)  # (B,)
        return {
            "code": code,
            "prediction": reconstruction.flatten(1),
            "target": x.flatten(1),
            "loss_sum": errors[: micro.real].double().sum(),
            "loss_count": errors.new_tensor(micro.real),
        }

    def predict(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        return {"code": networks.model(micro[self.inputs])[0]}


def damaged(x: Tensor, noise: float, masking: float) -> Tensor:
    """x with Gaussian noise of this deviation, then this share of its elements set to 0."""
    if noise:
        x = x + noise * torch.randn_like(x)
    if masking:
        x = x * (torch.rand_like(x) >= masking)
    return x
