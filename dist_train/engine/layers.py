"""Weights of a sharded player that are gathered when a view uses them, and not kept (docs/decisions/0056)."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_train.engine.order import Order
from dist_train.errors import UserError

VIEW_ELEMENTS = 5_000_000
"""So many elements of a player's weights its views keep gathered; a smaller player they gather whole."""
ORDER = Order(
    "objective: this step's networks were called in another order, or with other branches, on some ranks, and their"
    " weights are gathered layer by layer; set strategy.view_elements to the size of the player"
)
"""Of what the views of this process gather; where one of a run does so, ranks that differ have computed wrongly."""


class Shards(ABC):
    """A player's weights in slices, as its engine holds them. All ranks call these alike, as they are collectives."""

    sizes: dict[str, int]
    """The elements of every weight that is gathered on its own."""

    lengths: dict[str, int]
    """The elements of a rank's slice of it, the same on every rank."""

    device: str
    """Where they are."""

    @abstractmethod
    def small(self) -> dict[str, Tensor]:
        """The other weights, whole and detached."""

    @abstractmethod
    def gather(self, name: str) -> Tensor:
        """A weight, whole, in memory of its own, detached."""

    @abstractmethod
    def scatter(self, name: str, gradient: Tensor) -> Tensor:
        """The sum of a whole gradient over the ranks: this rank's slice of it, padded to its length."""


class Layers:
    """Weights by name, whole for as long as somebody uses them, and the `budget` elements used last a little longer.

    What backward needs of them is gathered again (`regathered`). What is kept depends on the order of use alone, so
    that all ranks gather the same weights in the same order.

    Args:
        trained: the weights whose gradients go to the `leaves`; the others have none.
    """

    def __init__(self, shards: Shards, budget: int, trained: Iterable[str] = ()) -> None:
        self.shards, self.budget, self._trained = shards, budget, list(trained)
        self.version = 0
        self.forget()

    def forget(self) -> None:
        """The weights have changed: a graph that has used them can no longer be gone back through."""
        self.version += 1
        self.leaves: dict[str, Tensor] = {}
        self._small: dict[str, Tensor] | None = None
        self.drop()

    def drop(self) -> None:
        """Keep no gathered weight."""
        self._kept: dict[str, Tensor] = {}  # what was used last stands last
        self._elements = 0

    def begin(self) -> None:
        """Make leaves for the trained weights, by which a loss can be differentiated: slices, whose gradients come
        summed over the ranks, and small weights whole, whose gradients are this rank's own."""
        if not self.leaves:
            for name in self._trained:
                length = self.shards.lengths.get(name)
                leaf = (
                    self.small[name].detach()
                    if length is None
                    else _shape_alone(length, self.shards.device)
                )
                self.leaves[name] = leaf.requires_grad_()

    @property
    def small(self) -> dict[str, Tensor]:
        if self._small is None:
            self._small = self.shards.small()
        return self._small

    def whole(self, name: str) -> Tensor:
        """The weight (a collective, unless it is kept)."""
        size = self.shards.sizes.get(name)
        if size is None:
            return self.leaves[name] if name in self.leaves else self.small[name]
        weight = self._kept.pop(name, None)
        if weight is None:
            self._make_room(size)
            weight = self._gather(name)
            self._elements += size
        self._kept[name] = weight
        return weight

    def _make_room(self, size: int) -> None:
        while self._kept and self._elements + size > self.budget:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            self._elements -= self.shards.sizes[oldest]

    def _gather(self, name: str) -> Tensor:
        ORDER.note(name)
        if name not in self.leaves:
            weight = self.shards.gather(name)
        else:
            with torch.enable_grad():  # backward may gather what the next forward finds kept
                weight = _Gathered.apply(self.leaves[name], self.shards, name)
        _origins[weight.untyped_storage()] = (self, self.version, name)
        return weight


def _shape_alone(length: int, device: str) -> Tensor:
    """A 1-D tensor whose values nobody reads, and that takes no memory."""
    return torch.zeros(1, device=device).expand(length)


class _Gathered(torch.autograd.Function):
    """A whole weight as a function of this rank's slice: its gradient is summed over the ranks, and sliced."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, shards: Shards, name: str) -> Tensor:
        ctx.shards, ctx.name = shards, name
        return shards.gather(name)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ORDER.note(ctx.name)
        return ctx.shards.scatter(ctx.name, gradient), None, None


# -- modules whose weights are made when they are read ---------------------------------------------------------------


class _Read(dict[str, Any]):
    """A module's own parameters, each made whole by `read` when the module, or another one, asks for it."""

    def __init__(self, parameters: dict[str, Any], read: Callable[[str], Tensor]) -> None:
        super().__init__(parameters)
        self._read = read

    def __getitem__(self, name: str) -> Any:
        return None if super().__getitem__(name) is None else self._read(name)


def read_through(skeleton: nn.Module, names: Mapping[str, str], layers: Layers) -> None:
    """Let all modules of a skeleton take their weights from `layers`.

    Args:
        names: {every path to a parameter: its one name}.
    """

    def read(prefix: str, name: str) -> Tensor:
        return layers.whole(names[f"{prefix}.{name}"])

    for path, module in skeleton.named_modules():
        if module._parameters:
            module.__dict__["_parameters"] = _Read(module._parameters, partial(read, path))
        if isinstance(module, nn.RNNBase):
            module.register_forward_hook(_let_go, always_call=True)


def _let_go(module: nn.RNNBase, *_: Any) -> None:
    """A recurrent layer holds on to the weights that it has found, until it sees that they are others."""
    own = [dict.get(module._parameters, name) for name in module._flat_weights_names]
    module._flat_weights = own
    module._flat_weight_refs = [None if weight is None else weakref.ref(weight) for weight in own]


# -- what backward needs of them -------------------------------------------------------------------------------------

_origins: weakref.WeakKeyDictionary[Any, tuple[Layers, int, str]] = weakref.WeakKeyDictionary()
"""The weight of every storage that holds a gathered one."""


class _Saved(NamedTuple):
    """A view of a gathered weight, as backward will need it."""

    layers: Layers
    version: int
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def regathered() -> torch.autograd.graph.saved_tensors_hooks:
    """Within this block no graph keeps a gathered weight: backward gathers it again, also a double one, whose own
    graph is made where the first backward is called. Not around a live network under zero3 or fsdp2, which swap
    the memory behind the weights that a graph keeps."""
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> Any:
    origin = _origins.get(tensor.untyped_storage())
    if origin is None:
        return tensor
    return _Saved(*origin, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(saved: Any) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    if saved.version != saved.layers.version:
        raise UserError(
            f"objective: a gradient goes through weights of an earlier turn ('{saved.name}'), which are gone;"
            " detach what is kept from turn to turn"
        )
    weight = saved.layers.whole(saved.name).detach()
    return weight.as_strided(saved.size, saved.stride, saved.offset)
