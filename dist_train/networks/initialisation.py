"""Initialisation by name, for any network: `init: {name: he, bias: 0}`.

A scheme fills one weight from the default generator, given its fans: how many inputs a unit sums over, and how many
units an input reaches. Weights are the parameters with 2 axes or more, but for embeddings, which sum over nothing. What
stands in a module without such a weight, like a norm, keeps the model's own start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_train import components
from dist_train.errors import UserError

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def initialise(network: nn.Module, spec: Mapping[str, Any], where: str = "init") -> None:
    """Draw the weights of a network by the scheme `spec["name"]`, and set its biases to `spec["bias"]` (0).

    A weight that several modules share is drawn once. Raises UserError when the network has no weight to draw.
    """
    scheme = {key: value for key, value in spec.items() if key != "bias"}
    bias = spec.get("bias", 0.0)
    drawn: set[int] = set()
    for module in network.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            drawn |= {id(parameter) for parameter in own.values()}
        if all(parameter.ndim < 2 for parameter in own.values()):
            continue
        for name, parameter in own.items():
            if id(parameter) in drawn:
                continue
            drawn.add(id(parameter))
            if parameter.ndim >= 2:
                into, out = fans(parameter, module.stride if isinstance(module, TRANSPOSED) else ())
                components.build("init", scheme, where, weight=parameter, fan_in=into, fan_out=out)
            elif "bias" in name:
                parameter.fill_(bias)
    if not drawn:
        raise UserError(f"{where}: {type(network).__name__} has no weight with 2 axes or more")


def fans(weight: Tensor, transposed: Sequence[int] = ()) -> tuple[float, float]:
    """(fan_in, fan_out) of a weight (out, in, *kernel), or (in, out, *kernel) of a convolution `transposed` by strides:
    of its kernel an output meets, in the mean, one weight in as many as the product of the strides."""
    kernel = math.prod(weight.shape[2:])
    first, second = weight.shape[:2]
    if transposed:
        return first * kernel / math.prod(transposed), second * kernel
    return second * kernel, first * kernel


def gaussian(weight: Tensor, std: float = 0.01) -> None:
    """N(0, std^2), whatever the shape: signals vanish or explode with depth unless std fits the width."""
    nn.init.normal_(weight, std=std)


def xavier(
    weight: Tensor,
    fan_in: float,
    fan_out: float,
    gain: float = 1.0,
    distribution: Literal["normal", "uniform"] = "uniform",
) -> None:
    """Variance gain^2 2 / (fan_in + fan_out): keeps activations and gradients of linear layers and tanh in scale.

    Glorot and Bengio 2010.
    """
    _draw(weight, gain * math.sqrt(2.0 / (fan_in + fan_out)), distribution)


def he(
    weight: Tensor,
    fan_in: float,
    fan_out: float,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    distribution: Literal["normal", "uniform"] = "normal",
) -> None:
    """Variance 2 / fan: a ReLU halves the mean square, which 2 makes up for (He et al. 2015, arXiv:1502.01852).

    With `fan_in` the activations keep their variance through the depth, with `fan_out` the gradients.
    """
    _draw(weight, math.sqrt(2.0 / (fan_in if mode == "fan_in" else fan_out)), distribution)


def lecun(
    weight: Tensor, fan_in: float, distribution: Literal["normal", "uniform"] = "normal"
) -> None:
    """Variance 1 / fan_in (LeCun et al. 1998, Efficient BackProp, section 4.6)."""
    _draw(weight, math.sqrt(1.0 / fan_in), distribution)


def orthogonal(weight: Tensor, gain: float = 1.0) -> None:
    """All singular values of the weight, as a matrix (out, everything else), are `gain` (Saxe et al. 2013).

    The orthogonal factor U V' of a Gaussian matrix U S V': uniform over orthogonal matrices. arXiv:1312.6120.
    """
    left, _, right = torch.linalg.svd(
        torch.randn(len(weight), weight[0].numel()), full_matrices=False
    )
    weight.copy_(gain * (left @ right).view_as(weight))


def _draw(weight: Tensor, std: float, distribution: str) -> None:
    if distribution == "normal":
        nn.init.normal_(weight, std=std)
    else:
        bound = math.sqrt(3.0) * std
        nn.init.uniform_(weight, -bound, bound)
