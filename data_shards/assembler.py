"""From sample ids to tensors: read, transformed with each sample's own generator, scaled, padded, stacked (law 2)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dist_train.data_shards.mixture import Together
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.transforms import Batched
from dist_train.errors import UserError, nearest

SCALES = ("standard", "signed", "unit")
Transform = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]
"""One may say which other fields it `reads` (text, say), and of which kinds those are that it `makes`: {name: kind}."""


DRAWS = "image draws"
"""The tensor (draws, b) by which a batch's images are still to be transformed."""


class Assembler:
    """Turns the ids of samples into tensors, the same in any process.

    With `on_device` the field `image` comes as it is stored, with what was drawn for it; `finish` transforms and scales
    it, as a batch, wherever it then is. The result is the same.
    """

    def __init__(
        self,
        shards: Shards | Together,
        seed: int,
        transforms: Sequence[Transform] = (),
        scale: str = "standard",
        on_device: bool = False,
    ) -> None:
        if scale not in SCALES:
            raise UserError(
                f"data.scale '{scale}'{nearest(scale, SCALES)} (use {', '.join(SCALES)})"
            )
        self.shards = shards
        self.seed = seed
        self.transforms = tuple(transforms)
        self.scale = scale
        self.batched = _batched(self.transforms) if on_device else []
        self.kinds = {
            spec.name: spec.kind
            for spec in shards.index.fields.values()
            if spec.kind in ("image", "array", "tokens", "label")
        }
        reads = [name for transform in transforms for name in getattr(transform, "reads", ())]
        self.reads = tuple(dict.fromkeys([*self.kinds, *reads]))
        for transform in transforms:
            self.kinds |= getattr(transform, "makes", {})
        self.on_device = on_device
        if on_device and self.kinds.get("image") != "image":
            raise UserError(
                f"transforms on the device: {shards.index.name} has no pictures in a field 'image'"
            )

    def tensors(self, ids: np.ndarray, epochs: np.ndarray) -> dict[str, torch.Tensor]:
        """The fields of the samples `ids` (b,), drawn for `epochs` (b,); each tensor has b rows."""
        columns = self.shards.columns(self.reads, ids)
        if self.transforms and not self.on_device:
            columns = self._transformed(columns, ids, epochs)
        tensors: dict[str, torch.Tensor] = {}
        for name, kind in self.kinds.items():
            if kind == "label":
                tensors[name] = torch.from_numpy(np.asarray(columns[name], np.int64))
            elif kind == "tokens":
                length = "length" if name == "tokens" else f"{name}_length"
                tensors[name], tensors[length] = _padded(columns[name])
            else:
                stacked = self._stacked(name, columns[name], ids)
                later = name == "image" and self.on_device
                scaled = kind == "image" and not later
                tensors[name] = self._scaled(name, stacked) if scaled else stacked
                if later:
                    tensors[DRAWS] = self._drawn(stacked, ids, epochs)
        return tensors

    def finish(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What `tensors` made, with its images transformed and scaled."""
        if not self.on_device:
            return tensors
        images, drawn = tensors["image"], tensors[DRAWS]
        for transform in self.batched:
            images = transform.batched(images, drawn[: transform.draws])
            drawn = drawn[transform.draws :]
        finished = tensors | {"image": self._scaled("image", images)}
        del finished[DRAWS]
        return finished

    def _drawn(self, images: torch.Tensor, ids: np.ndarray, epochs: np.ndarray) -> torch.Tensor:
        """What the batched transforms draw for each image, (draws, b) int64."""
        drawn = np.empty((sum(t.draws for t in self.batched), len(ids)), np.int64)
        for row, (i, epoch) in enumerate(zip(ids.tolist(), epochs.tolist(), strict=True)):
            rng = keyed_generator(self.seed, epoch, i)
            size = (images.shape[1], images.shape[2])
            own: list[int] = []
            for transform in self.batched:
                own += transform.draw(rng, *size)
                size = transform.size(*size)
            drawn[:, row] = own
        return torch.from_numpy(drawn)

    def _transformed(
        self, columns: dict[str, Any], ids: np.ndarray, epochs: np.ndarray
    ) -> dict[str, list[Any]]:
        samples = []
        for i, epoch, *values in zip(ids.tolist(), epochs.tolist(), *columns.values(), strict=True):
            sample = dict(zip(columns, values, strict=True))
            rng = keyed_generator(self.seed, epoch, i)
            for transform in self.transforms:
                sample = transform(sample, rng)
            samples.append(sample)
        return {name: [sample[name] for sample in samples] for name in self.kinds}

    def _stacked(self, name: str, values: Any, ids: np.ndarray) -> torch.Tensor:
        if isinstance(values, np.ndarray):
            return torch.from_numpy(values)
        for i, value in zip(ids.tolist(), values, strict=True):
            if (value.shape, value.dtype) != (values[0].shape, values[0].dtype):
                raise UserError(
                    f"{self.shards.where(i)}, field '{name}': has shape {value.shape} of {value.dtype}, another of its "
                    f"batch {values[0].shape} of {values[0].dtype}; bring them to one when packing, or crop"
                )
        return torch.from_numpy(np.stack(values))

    def _scaled(self, name: str, images: torch.Tensor) -> torch.Tensor:
        """(b, H, W) or (b, H, W, C) uint8 -> (b, C, H, W) float32."""
        images = images.unsqueeze(1) if images.ndim == 3 else images.movedim(3, 1)
        scaled = images.to(torch.float32, memory_format=torch.contiguous_format)
        if self.scale == "unit":
            return scaled.div_(255)
        if self.scale == "signed":
            return scaled.sub_(127.5).div_(127.5)
        statistics = self.shards.index.statistics.get(name, {"mean": [], "std": []})
        if len(statistics["mean"]) != images.shape[1]:
            raise UserError(
                f"{self.shards.folder}: no statistics of {images.shape[1]} channels in index.json; "
                "use data.scale unit or signed"
            )
        mean, std = (
            torch.tensor(values, device=images.device).view(-1, 1, 1)
            for values in (statistics["mean"], [value or 1.0 for value in statistics["std"]])
        )
        return scaled.div_(255).sub_(mean).div_(std)


def _batched(transforms: Sequence[Transform]) -> list[Batched]:
    found = []
    for transform in transforms:
        if not isinstance(transform, Batched):
            name = getattr(transform, "__name__", type(transform).__name__)
            raise UserError(
                f"transforms on the device: {name} runs on a sample, on the CPU, only; "
                f"on a batch run {', '.join(one.__name__ for one in Batched.__subclasses__())}"
            )
        found.append(transform)
    return found


def derived(seed: int, name: str) -> int:
    """The seed of one of several streams of samples; that of the only one, '', is the run's."""
    if not name:
        return seed
    text = struct.pack("<q", seed) + name.encode()
    digest = hashlib.blake2b(text, digest_size=8, person=b"dist-train data").digest()
    return int.from_bytes(digest, "little", signed=True)


def keyed_generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The generator of law 2 for the data: the same draws for (seed, epoch, sample) on any rank, in any worker."""
    key = np.array([seed, epoch], dtype=np.int64).view(np.uint64)
    return np.random.Generator(
        np.random.Philox(key=key, counter=np.array([0, 0, 0, sample], np.uint64))
    )


def _padded(pieces: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces of unequal length -> (b, longest) int64 padded right with 0, and their numbers of targets (b,)."""
    lengths = [len(piece) for piece in pieces]
    if isinstance(pieces, np.ndarray):
        tokens = pieces.astype(np.int64)
    else:
        tokens = np.zeros((len(pieces), max(lengths)), np.int64)
        for row, piece in zip(tokens, pieces, strict=True):
            row[: len(piece)] = piece
    return torch.from_numpy(tokens), torch.tensor(lengths, dtype=torch.int64) - 1
