"""The landscape of a trained run's loss (F12): its curvature, the kind of point it ended at, a map of the way there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dist_train import checkpoint, trained
from dist_train.errors import UserError
from dist_train.networks import Networks
from dist_train.pictures import plots

Loss = Callable[[Tensor], Tensor]
"""From all weights as one vector (P,) to the loss (0-d)."""
FLAT = 1e-3
"""An eigenvalue below this share of the largest counts as 0: Lanczos finds it no better."""
AROUND = 1.5
"""How far the map reaches, in units of the way's length."""


def hessian_product(loss: Loss, at: Tensor, vector: Tensor) -> Tensor:
    """H v by a double backward (Pearlmutter 1994): the Hessian itself is never formed."""
    weights = at.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
        (gradient,) = torch.autograd.grad(loss(weights), weights, create_graph=True)
    (product,) = torch.autograd.grad(gradient @ vector, weights)
    return product


def lanczos(multiply: Callable[[Tensor], Tensor], size: int, steps: int, seed: int = 0) -> Tensor:
    """Eigenvalues (k,), rising, of a symmetric matrix of which only products are known; k is at most `steps`.

    Those at both ends converge first; with as many steps as there are dimensions all are exact. Each new vector is
    made orthogonal to all before it, without which rounding brings copies of the largest.
    """
    draw = torch.Generator().manual_seed(seed)
    vector = torch.randn(size, generator=draw, dtype=torch.float64)
    basis: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []
    norm = float(vector.norm())
    for _ in range(min(steps, size)):
        basis.append(vector / norm)
        product = multiply(basis[-1]).double()
        diagonal.append(float(product @ basis[-1]))
        known = torch.stack(basis)
        for _ in range(2):
            product = product - known.T @ (known @ product)
        vector, norm = product, float(product.norm())
        if norm < 1e-10 * max(1.0, *map(abs, diagonal)):
            break
        beside.append(norm)
    off = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
    return torch.linalg.eigvalsh(matrix)


def kind_of_point(eigenvalues: Tensor) -> str:
    """What a critical point with these curvatures is: `minimum`, `maximum`, `saddle`, or `flat`."""
    least = FLAT * float(eigenvalues.abs().max())
    up, down = bool((eigenvalues > least).any()), bool((eigenvalues < -least).any())
    if up and down:
        return "saddle"
    return "minimum" if up else "maximum" if down else "flat"


def directions(way: Tensor, seed: int = 0) -> Tensor:
    """Two orthonormal directions (2, P) that show the most of a way (T, P) to its last point.

    They are the principal components of the way; what a short way leaves open is random.
    """
    offsets = (way[:-1] - way[-1]).double()
    found = torch.linalg.svd(offsets, full_matrices=False)
    axes = found.Vh[:2][found.S[:2] > 1e-12]
    draw = torch.Generator().manual_seed(seed)
    while len(axes) < 2:
        new = torch.randn(way.shape[1], generator=draw, dtype=torch.float64)
        new = new - axes.T @ (axes @ new)
        axes = torch.cat([axes, (new / new.norm())[None]])
    return axes


def landscape(
    run_dir: str | Path,
    *,
    out: Path | None = None,
    batches: int = 4,
    steps: int = 20,
    grid: int = 15,
) -> dict[str, Any]:
    """Measure and draw the landscape around a run's last checkpoint, over `batches` micro-batches of its evaluation.

    Args:
        out: the PNG (default: `plots/landscape.png` of the run). steps: of Lanczos. grid: points of the map a side.
    """
    plots.need_matplotlib("diagnose landscape")
    trainer = trained.restore(run_dir)
    if trainer.evaluation is None or len(trainer.engines) != 1:
        raise UserError(f"{run_dir}: expected a run of one player with an evaluate section")
    ((player, engine),) = trainer.engines.items()
    names = {name: weight.shape for name, weight in engine.trained.items()}
    device = trainer.world.device
    chosen = zip(range(batches), trainer.evaluation, strict=False)
    micros = [micro.to(device) for _, micro in chosen]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.to(device).float().split([shape.numel() for shape in names.values()])
        weights = {n: part.view(names[n]) for n, part in zip(names, parts, strict=True)}
        whole = {**trainer.full_weights(player), **weights}
        calls = {n: engine.evaluated(n, whole) for n in engine.player.networks}
        outputs = [trainer.objective.evaluate(Networks(calls), micro) for micro in micros]
        count = sum(output["loss_count"] for output in outputs)
        return sum((output["loss_sum"] for output in outputs), flat.new_zeros(())) / count

    way = torch.stack([_weights(path, names) for path in _checkpoints(trainer)])
    end = way[-1]
    eigenvalues = lanczos(lambda v: hessian_product(loss, end, v), len(end), steps)
    axes = directions(way)
    placed = (way - end) @ axes.T  # (T, 2)
    reach = AROUND * float(placed.norm(dim=1).max()) or AROUND * 0.1 * float(end.norm())
    line = torch.linspace(-reach, reach, grid, dtype=torch.float64)
    with torch.no_grad():
        levels = [[float(loss(end + x * axes[0] + y * axes[1])) for x in line] for y in line]
        here = float(loss(end))
    at = end.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at), at)
    path = out or trainer.directory.path / "plots" / "landscape.png"
    plots.contour_plot(path, line.tolist(), line.tolist(), levels, placed.tolist())
    return {
        "plot": str(path),
        "step": trainer.step,
        "loss": here,
        "gradient_norm": float(gradient.norm()),
        "largest_eigenvalues": eigenvalues.flip(0)[:5].tolist(),
        "smallest_eigenvalue": float(eigenvalues[0]),
        "kind": kind_of_point(eigenvalues),
    }


def _checkpoints(trainer: Any) -> list[Path]:
    folder = trainer.directory.checkpoints
    return [checkpoint.at(folder, step) for step in checkpoint.steps(folder)]


def _weights(path: Path, names: dict[str, torch.Size]) -> Tensor:
    """A checkpoint's trained weights as one vector (P,), float64."""
    reader = checkpoint.Reader(path)
    return torch.cat([reader.whole(f"weights/{name}").flatten().double() for name in names])
