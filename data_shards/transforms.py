"""Changes to a sample, each a pure function of (sample, generator); they run in the workers, on the CPU.

Images are uint8 (H, W) or (H, W, C) and stay so; `data.scale` makes them floats afterwards. Those that are `Batched`
can also run on a whole batch on its device: the draws are the same, and so is the result.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_train.data_shards import tokens
from dist_train.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

Sample = dict[str, Any]
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


class Batched(ABC):
    """A transform of images that is told apart from its draws."""

    draws = 0
    """How many numbers it draws for an image."""

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Sequence[int]:
        """Those numbers, for an image of this size."""
        return ()

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that it makes of an image of this size."""
        return height, width

    @abstractmethod
    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample: ...

    @abstractmethod
    def batched(self, images: Tensor, drawn: Tensor) -> Tensor:
        """What it makes of images (b, H, W) or (b, H, W, C) by the numbers `drawn` (draws, b)."""


class RandomCrop(Batched):
    """Cut a `size` x `size` window out of the image at a random place, after padding each side with zeros.

    UserError: the padded image is smaller than the window.
    """

    draws = 2

    def __init__(self, size: int, padding: int = 0) -> None:
        _positive("random_crop", size=size)
        if padding < 0:
            raise UserError(f"random_crop: padding {padding} must not be negative")
        self.side = size
        self.padding = padding

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Sequence[int]:
        height, width = height + 2 * self.padding, width + 2 * self.padding
        _large_enough("random_crop", height, width, self.side)
        return [int(rng.integers(side - self.side + 1)) for side in (height, width)]

    def size(self, height: int, width: int) -> tuple[int, int]:
        return self.side, self.side

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        top, left = self.draw(rng, *sample["image"].shape[:2])
        if self.padding:
            sample = {**sample, "image": _padded(sample["image"], self.padding, 0)}
        return _window(sample, top, left, self.side, self.side)

    def batched(self, images: Tensor, drawn: Tensor) -> Tensor:
        from dist_train.data_shards import batched

        images = batched.pad(images, self.padding) if self.padding else images
        return batched.crop(images, drawn[0], drawn[1], self.side)


class CenterCrop(Batched):
    """Cut the `size` x `size` window out of the middle of the image. UserError: the image is smaller."""

    def __init__(self, size: int) -> None:
        _positive("center_crop", size=size)
        self.side = size

    def size(self, height: int, width: int) -> tuple[int, int]:
        return self.side, self.side

    def corner(self, height: int, width: int) -> tuple[int, int]:
        """(top, left) of the window."""
        _large_enough("center_crop", height, width, self.side)
        return (height - self.side) // 2, (width - self.side) // 2

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        top, left = self.corner(*sample["image"].shape[:2])
        return _window(sample, top, left, self.side, self.side)

    def batched(self, images: Tensor, drawn: Tensor) -> Tensor:
        top, left = self.corner(images.shape[1], images.shape[2])
        return images[:, top : top + self.side, left : left + self.side]


class RandomResizedCrop:
    """Cut out a window of random area and shape, and resize it to `size` x `size` (Szegedy et al. 2015).

    Its area is uniform in `area` (shares of the image), the logarithm of its width / height uniform in `aspect`; what
    is then higher or wider than the image is cut to it.
    """

    def __init__(
        self,
        size: int,
        area: Sequence[float] = (0.08, 1.0),
        aspect: Sequence[float] = (3 / 4, 4 / 3),
    ) -> None:
        _positive("random_resized_crop", size=size)
        for name, (low, high) in (("area", area), ("aspect", aspect)):
            if not 0 < low <= high or (name == "area" and high > 1):
                raise UserError(f"random_resized_crop: {name} [{low}, {high}] is no such range")
        self.resize = Resize([size, size])
        self.area = (float(area[0]), float(area[1]))
        self.aspect = (math.log(aspect[0]), math.log(aspect[1]))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = sample["image"].shape[:2]
        area = height * width * rng.uniform(*self.area)
        aspect = math.exp(rng.uniform(*self.aspect))
        wide = min(max(round((area * aspect) ** 0.5), 1), width)
        high = min(max(round((area / aspect) ** 0.5), 1), height)
        top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
        return self.resize(_window(sample, top, left, high, wide), rng)


class Resize:
    """Bring the image to [height, width], or its shorter side to `size`; bilinear, and smoothed where it shrinks."""

    def __init__(self, size: int | Sequence[int]) -> None:
        sizes = [size] if isinstance(size, int) else list(size)
        if len(sizes) not in (1, 2) or min(sizes) < 1:
            raise UserError(f"resize: size {size} is neither a number nor [height, width]")
        self.sizes = sizes

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        import torch
        from torch.nn.functional import interpolate

        image = sample["image"]
        height, width = image.shape[:2]
        if len(self.sizes) == 2:
            target = (self.sizes[0], self.sizes[1])
        else:
            scale = self.sizes[0] / min(height, width)
            target = (max(round(height * scale), 1), max(round(width * scale), 1))
        if target == (height, width):
            return sample
        planes = image.reshape(height, width, -1).transpose(2, 0, 1)  # (C, H, W)
        pixels = torch.from_numpy(np.ascontiguousarray(planes, np.float32))[None]
        resized = interpolate(pixels, target, mode="bilinear", antialias=True)[0]
        planes = resized.round_().clamp_(0, 255).to(torch.uint8).numpy().transpose(1, 2, 0)
        return {**sample, "image": planes.reshape(*target, *image.shape[2:])}


class Pad(Batched):
    """Add `padding` pixels of the value `fill` on each side of the image."""

    def __init__(self, padding: int, fill: int = 0) -> None:
        _positive("pad", padding=padding)
        if not 0 <= fill <= 255:
            raise UserError(f"pad: fill {fill} is not in [0, 255]")
        self.padding, self.fill = padding, fill

    def size(self, height: int, width: int) -> tuple[int, int]:
        return height + 2 * self.padding, width + 2 * self.padding

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return {**sample, "image": _padded(sample["image"], self.padding, self.fill)}

    def batched(self, images: Tensor, drawn: Tensor) -> Tensor:
        from dist_train.data_shards import batched

        return batched.pad(images, self.padding, self.fill)


class HorizontalFlip(Batched):
    """Mirror the image left to right with this probability."""

    draws = 1

    def __init__(self, probability: float = 0.5) -> None:
        _probability("horizontal_flip", probability)
        self.probability = probability

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Sequence[int]:
        return [rng.random() < self.probability]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        (flipped,) = self.draw(rng, *sample["image"].shape[:2])
        return {**sample, "image": sample["image"][:, ::-1]} if flipped else sample

    def batched(self, images: Tensor, drawn: Tensor) -> Tensor:
        from dist_train.data_shards import batched

        return batched.flip(images, drawn[0])


class Cutout(Batched):
    """Set a square of `size` pixels around a random pixel to `fill`, with this probability (DeVries, Taylor 2017)."""

    draws = 3

    def __init__(self, size: int, fill: int = 0, probability: float = 1.0) -> None:
        _positive("cutout", size=size)
        _probability("cutout", probability)
        self.side, self.fill, self.probability = size, fill, probability

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Sequence[int]:
        if rng.random() >= self.probability:
            return 0, 0, 0
        return 1, *(int(rng.integers(side)) - self.side // 2 for side in (height, width))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        cut, top, left = self.draw(rng, *sample["image"].shape[:2])
        if not cut:
            return sample
        image = sample["image"].copy()
        image[max(top, 0) : top + self.side, max(left, 0) : left + self.side] = self.fill
        return {**sample, "image": image}

    def batched(self, images: Tensor, drawn: Tensor) -> Tensor:
        from dist_train.data_shards import batched

        return batched.cutout(images, drawn[0], drawn[1], drawn[2], self.side, self.fill)


class ColourJitter:
    """Change brightness, contrast and saturation, in this order, each by a factor uniform in [1 - x, 1 + x]."""

    def __init__(
        self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0
    ) -> None:
        self.ranges = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        for name, extent in self.ranges.items():
            if not 0 <= extent <= 1:
                raise UserError(f"colour_jitter: {name} {extent} is not in [0, 1]")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        factors = {
            name: rng.uniform(1 - extent, 1 + extent) for name, extent in self.ranges.items()
        }
        pixels = sample["image"].astype(np.float32) * np.float32(factors["brightness"])
        pixels = _mixed(np.clip(pixels, 0, 255), _grey(pixels).mean(), factors["contrast"])
        if pixels.ndim == 3 and pixels.shape[2] == 3:
            pixels = _mixed(pixels, _grey(pixels)[..., None], factors["saturation"])
        return {**sample, "image": np.rint(pixels).astype(np.uint8)}


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


class Tokenise:
    """Make `tokens` of the text in `field`, at most `length` + 1 of them: a window at a random place of longer ones.

    With `ends` a boundary stands before and after the text: its first token is then a target too, and its end. A longer
    one keeps its beginning.

    `tokenizer` is the path of a `tokenizer.json` (see `tokens`). Without one it is that `beside` the shards, or a byte
    is a token. A text of fewer than 2 tokens gets boundaries after it, so that it has a target.
    """

    makes = {"tokens": "tokens"}

    def __init__(
        self,
        length: int,
        field: str = "text",
        tokenizer: str | None = None,
        ends: bool = False,
        beside: tokens.Tokenizer | None = None,
    ) -> None:
        _positive("tokenise", length=length)
        self.ends = ends
        self.reads = (field,)
        self.length = length
        self.tokenizer = beside or tokens.ByteTokenizer()
        if tokenizer is not None:
            self.tokenizer = tokens.read(tokenizer)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        ids = self.tokenizer.encode(sample[self.reads[0]].encode())
        if self.ends:
            end = np.array([self.tokenizer.boundary], self.tokenizer.dtype)
            return {**sample, "tokens": np.concatenate([end, ids[: self.length - 1], end])}
        if len(ids) < 2:
            ids = np.append(ids, [self.tokenizer.boundary] * (2 - len(ids)))
        start = int(rng.integers(max(len(ids) - self.length, 1)))
        return {**sample, "tokens": ids[start : start + self.length + 1]}


class TokenisePair:
    """Make `source` and `target` of the texts in two fields, for translation.

    A source is its ids and the boundary; a target the boundary, its ids and the boundary: the last id of the tokenizer
    is both <bos> and <eos>. Of either at most `length` + 1 ids are kept, boundaries among them, which a Transformer's
    `max_length` must hold; of what is cut so the end is not marked.
    `tokenizer` as in `tokenise`.
    """

    makes = {"source": "tokens", "target": "tokens"}

    def __init__(
        self,
        source: str,
        target: str,
        length: int,
        tokenizer: str | None = None,
        beside: tokens.Tokenizer | None = None,
    ) -> None:
        _positive("tokenise_pair", length=length)
        self.reads = (source, target)
        self.length = length
        self.tokenizer = beside or tokens.ByteTokenizer()
        if tokenizer is not None:
            self.tokenizer = tokens.read(tokenizer)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        source, target = (self.tokenizer.encode(sample[name].encode()) for name in self.reads)
        end = [self.tokenizer.boundary]
        return {
            **sample,
            "source": np.concatenate([source, end])[: self.length + 1],
            "target": np.concatenate([end, target, end])[: self.length + 1],
        }


def _window(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    return {**sample, "image": sample["image"][top : top + height, left : left + width]}


def _padded(image: np.ndarray, padding: int, fill: int) -> np.ndarray:
    sides = ((padding, padding),) * 2 + ((0, 0),) * (image.ndim - 2)
    return np.pad(image, sides, constant_values=fill)


def _large_enough(name: str, height: int, width: int, size: int) -> None:
    if height < size or width < size:
        raise UserError(
            f"{name}: an image of {height} x {width} (padding included) has no window of {size}"
        )


def _grey(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H, W); an image of another number of channels is its own grey."""
    return pixels @ GREY if pixels.ndim == 3 and pixels.shape[2] == 3 else pixels


def _mixed(pixels: np.ndarray, base: Any, factor: float) -> np.ndarray:
    return np.clip(base + (pixels - base) * np.float32(factor), 0, 255)


def _positive(name: str, **values: int) -> None:
    for argument, value in values.items():
        if value < 1:
            raise UserError(f"{name}: {argument} {value} must be positive")


def _probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name}: probability {value} is not in [0, 1]")
