"""Changes to a sample, each a pure function of (sample, generator)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dist_train.errors import UserError, nearest

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


class Standardise:
    """Give float fields mean 0 and deviation 1, by the `statistics` of the training split that the index holds."""

    def __init__(
        self, fields: Sequence[str], statistics: Mapping[str, Mapping[str, Sequence[float]]]
    ) -> None:
        for name in fields:
            if name not in statistics:
                known = ", ".join(statistics) or "none"
                raise UserError(
                    f"standardise: the index has no statistics of '{name}'{nearest(name, statistics)} (it has {known})"
                )
        self.moments = {
            name: (
                np.array(statistics[name]["mean"], np.float32),
                np.array([value or 1.0 for value in statistics[name]["std"]], np.float32),
            )
            for name in fields
        }

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        changed = {name: (sample[name] - mean) / std for name, (mean, std) in self.moments.items()}
        return {**sample, **changed}
