"""One process, or plain data parallelism with buckets of our own (docs/decisions/0001)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.engine.base import (
    Engine,
    OptimizerMaker,
    Slice,
    backward,
    constant_like,
    materialise,
)
from dist_train.engine.buckets import Buckets
from dist_train.engine.norm import global_norm
from dist_train.engine.update import Update
from dist_train.networks import Player
from dist_train.world import World


class PlainEngine(Engine):
    """One process, or plain data parallelism: gradients in buckets fixed before the first step, summed over the ranks
    while the last micro-batch's backward still runs."""

    def __init__(
        self, player: Player, groups: Any, make: OptimizerMaker, world: World, *, given: bool
    ) -> None:
        super().__init__(player, world, given)
        for tensor in [*self.names.values(), *self.buffers.values()]:
            world.broadcast_(tensor.data)
        self.optimizer: Any = make(groups(list(self.trained.items())))
        materialise(self.optimizer)
        self._update_by = Update(self.optimizer)
        self._parameters = list(self.trained.values())
        self.weights = [Slice.whole(name, p) for name, p in self.trained.items()]
        self.optimizer_state = _slices_of_state(self.trained, self.optimizer.state)
        self._buckets = Buckets(self._parameters, world) if world.size > 1 else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def begin_turn(self, index: int = 0) -> None:
        super().begin_turn(index)
        if self._buckets:
            self._buckets.clear()
        else:
            for parameter in self._parameters:
                parameter.grad = None

    def reduce(self) -> None:
        if self._buckets:
            self._buckets.finish()
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def full_gradients(self) -> dict[str, Tensor]:
        scale = self.loss_scale.value if self.loss_scale else 1.0
        return {name: p.grad / scale for name, p in self.trained.items() if p.grad is not None}

    def _publish(self) -> None: ...  # the weights are the live ones

    def _live(self, network: str, *inputs: Any) -> Any:
        return self.player.forward(network, *inputs)

    def _stream(self, loss: Tensor, share: float | Tensor, last: bool) -> None:
        if self._buckets:
            self._buckets.expect(last)
        backward(loss, constant_like(loss, share))
        if self.player.cuda_graphs and not last:
            self._keep_gradients()

    def _keep_gradients(self) -> None:
        """Copy them from where the next replay of a graph writes."""
        if self._buckets:
            self._buckets.take()
            return
        for parameter in self._parameters:
            parameter.grad = None if parameter.grad is None else parameter.grad.clone()

    def _add_given(self, gradients: Iterable[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)
        if self._buckets:
            self._buckets.take()

    def _update(self) -> Tensor | None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = global_norm(self._buckets.flat if self._buckets else gradients, self.world.device)
        clip = self._clip_norm, self._clip_value
        return self._update_by.turn(gradients, norm, self.loss_scale, *clip)

    def _states(self) -> Iterator[dict[str, Any]]:
        yield from self.optimizer.state.values()

    def _gather_weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.names.items()}


def _slices_of_state(
    parameters: Mapping[str, nn.Parameter], state: Mapping[Any, dict[str, Any]]
) -> dict[str, list[Slice]]:
    by_kind: dict[str, list[Slice]] = {}
    for name, parameter in parameters.items():
        for kind, tensor in state[parameter].items():
            if isinstance(tensor, Tensor) and kind != "step":  # which `optimizer_steps` has
                by_kind.setdefault(kind, []).append(Slice.whole(name, tensor))
    return by_kind
