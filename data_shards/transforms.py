"""Random changes to images, each a pure function of (sample, generator)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dist_train.errors import UserError

Sample = dict[str, Any]


class RandomCrop:
    """Cut a `size` x `size` window out of the image at a random place, after padding each side with zeros.

    Takes and gives sample["image"] (H, W) or (H, W, C). UserError: the padded image is smaller than the window.
    """

    def __init__(self, size: int, padding: int = 0) -> None:
        if size < 1 or padding < 0:
            raise UserError(
                f"random_crop: size {size} must be positive, padding {padding} not negative"
            )
        self.size = size
        self.padding = padding

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image = sample["image"]
        if self.padding:
            sides = ((self.padding, self.padding),) * 2 + ((0, 0),) * (image.ndim - 2)
            image = np.pad(image, sides)
        height, width = image.shape[:2]
        if height < self.size or width < self.size:
            raise UserError(
                f"random_crop: an image of {height} x {width} (padding included) has no window of {self.size}"
            )
        top = int(rng.integers(height - self.size + 1))
        left = int(rng.integers(width - self.size + 1))
        return {**sample, "image": image[top : top + self.size, left : left + self.size]}


class HorizontalFlip:
    """Mirror the image left to right with this probability."""

    def __init__(self, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise UserError(f"horizontal_flip: probability {probability} is not in [0, 1]")
        self.probability = probability

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() >= self.probability:
            return sample
        return {**sample, "image": sample["image"][:, ::-1]}
