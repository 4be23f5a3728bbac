"""The L2 norm of many tensors together, to the last digits of fp32 however large they are.

On a CPU torch adds the squares of a tensor in a few running fp32 sums, which lose digits as they grow: 1e-6 of the norm
at 300,000 elements, 5e-5 at 2.5 million, 1e-3 at 25 million. So a large tensor is taken row by row there. A GPU adds in
a tree and loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROW = 4096
LARGE = 16 * ROW
"""Elements from which a tensor on a CPU is taken by rows of so many."""


def global_norm(tensors: Sequence[Tensor], device: str | torch.device) -> Tensor:
    """The norm (0-d, on `device`) of at least one tensor, of any shapes and on any devices."""
    parts = [part for tensor in tensors for part in _parts(tensor)]
    norms = [norm.to(device) for norm in torch._foreach_norm(parts)]
    return torch.linalg.vector_norm(torch.stack(norms))


def _parts(tensor: Tensor) -> list[Tensor]:
    """Tensors whose norms together have the norm of this one."""
    if tensor.device.type != "cpu" or tensor.numel() < LARGE:
        return [tensor]
    flat = tensor.detach().flatten()
    rows, rest = flat.split([flat.numel() // ROW * ROW, flat.numel() % ROW])
    norms = torch.linalg.vector_norm(rows.view(-1, ROW), dim=1)
    return [*_parts(norms), rest] if len(rest) else _parts(norms)
