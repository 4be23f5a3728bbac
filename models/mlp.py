"""Multilayer perceptron, and at depth 0 the linear model: softmax (logistic) or linear regression.

Rumelhart, Hinton, Williams 1986, "Learning representations by back-propagating errors".
Shapes: B samples, F features, H hidden width, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dist_train.models.layers import ACTIVATIONS, chosen

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda features: nn.Identity(),
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
}


class MLP(nn.Module):
    """`depth` hidden layers of `width`, each affine, norm, activation, dropout; then an affine layer."""

    def __init__(
        self,
        in_features: int,
        num_outputs: int,
        depth: int = 2,
        width: int = 256,
        activation: str = "relu",
        norm: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 0:
            raise ValueError(f"depth counts hidden layers, 0 or more, got {depth}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        activate = chosen(ACTIVATIONS, activation, "activation")
        normalise = chosen(NORMS, norm, "norm")
        layers, features = [], in_features
        for _ in range(depth):
            affine = nn.Linear(features, width)
            layers.append(nn.Sequential(affine, normalise(width), activate(), nn.Dropout(dropout)))
            features = width
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Linear(features, num_outputs)
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights from the default generator."""
        for module in self.hidden.modules():
            if isinstance(module, nn.Linear):
                # A ReLU halves the variance: sqrt(2 / fan_in) keeps the signal (arXiv:1502.01852).
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        # Outputs near 0: the first loss is that of a guess, and a linear model starts at its centre.
        nn.init.normal_(self.output.weight, std=0.01)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, F), or an image (B, C, H, W) with F = C H W -> outputs (B, K)."""
        x = x.flatten(1)  # (B, F)
        x = self.hidden(x)  # (B, H), at depth 0 (B, F)
        return self.output(x)  # (B, K)
