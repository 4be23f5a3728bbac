"""Transforms of a whole batch of images (b, H, W) or (b, H, W, C), on its device, by numbers drawn for each of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def crop(images: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """The window of `size` x `size` whose corner is at (`top`, `left`), (b,) each."""
    places = torch.arange(size, device=images.device)
    rows = (top[:, None] + places)[:, :, None]
    columns = (left[:, None] + places)[:, None, :]
    return images[torch.arange(len(images), device=images.device)[:, None, None], rows, columns]


def pad(images: Tensor, padding: int, fill: int = 0) -> Tensor:
    """`padding` pixels of the value `fill` on each side."""
    channels = (0, 0) * (images.ndim - 3)
    return functional.pad(images, (*channels, *(padding,) * 4), value=fill)


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirrored left to right where `flipped` (b,) is not 0."""
    return torch.where(_spread(flipped != 0, images), images.flip(2), images)


def cutout(images: Tensor, cut: Tensor, top: Tensor, left: Tensor, size: int, fill: int) -> Tensor:
    """`fill` in the square of `size` whose corner is at (`top`, `left`), perhaps outside, where `cut` is not 0."""
    inside = [
        (places >= corner[:, None]) & (places < corner[:, None] + size)
        for corner, side in ((top, images.shape[1]), (left, images.shape[2]))
        for places in [torch.arange(side, device=images.device)]
    ]
    square = inside[0][:, :, None] & inside[1][:, None, :] & (cut != 0)[:, None, None]
    return images.masked_fill(square.reshape(*square.shape, *(1,) * (images.ndim - 3)), fill)


def _spread(which: Tensor, images: Tensor) -> Tensor:
    return which.reshape(-1, *(1,) * (images.ndim - 1))
