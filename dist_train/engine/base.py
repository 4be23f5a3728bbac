"""What every engine is: one player's networks, optimiser and gradients, its turn, and its state by name."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.engine.buffers import BufferKeeper
from dist_train.engine.layers import ORDER
from dist_train.engine.views import Views, plain_name, single_backward
from dist_train.networks import Player
from dist_train.networks.precision import LossScale
from dist_train.world import World

OptimizerMaker = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass
class Slice:
    """A range of a named tensor that this rank holds: elements [start, stop) of it flattened."""

    name: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor  # 1-D, a view of the real storage
    replicated: bool = False  # every rank holds these elements, and one of them is to write them
    written: bool = (
        True  # whether this rank writes them, of the several that hold them under hybrid sharding
    )

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Slice:
        """All of a tensor that every rank has."""
        return cls(name, tuple(tensor.shape), 0, tensor.detach().view(-1), replicated=True)

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()


class Engine(ABC):
    """One player's networks, optimiser and gradients.

    A turn is: begin_turn, backward for each micro-batch, reduce, step.
    """

    weights: list[Slice]
    """The fp32 weights that this rank updates."""

    optimizer_state: dict[str, list[Slice]]
    """The optimiser's tensors by kind (`exp_avg`, `momentum_buffer`), sliced like the weights."""

    norm: Tensor
    """Global norm of the last turn's gradients before clipping (0-d, on the device), after `step`."""

    loss_scale: LossScale | None
    """Under fp16, by what the losses are multiplied."""

    gathers_by_layer = False
    """Whether the live network gathers the weights of each layer when it comes to it."""

    checks_order = False
    """Whether a view of this player or another gathers by layer, so that all ranks have to do so alike."""

    def __init__(self, player: Player, world: World, given: bool) -> None:
        self.world, self.given = world, given
        self.player = player.on(world.devices)
        self.names = {plain_name(name): p for name, p in player.named_parameters()}
        self.trained = {name: p for name, p in self.names.items() if p.requires_grad}
        self.buffers = {plain_name(name): b for name, b in player.named_buffers()}
        self.views = Views(player, self.buffers, self.trained, self._gather_weights)
        self.norm = torch.zeros((), device=world.device)
        self.loss_scale = LossScale() if player.precision == "fp16" else None
        self._keeper = BufferKeeper(list(self.buffers.values()), world)
        self._clip_norm: float | None = None
        self._clip_value: float | None = None

    # -- what objectives call ----------------------------------------------------------------------------------------

    def own(self, network: str) -> Callable[..., Any]:
        """The network as its own turn sees it: live, or with leaf weights where gradients are given."""
        if self.given:
            return self.views.given(network)
        return single_backward(functools.partial(self._live, network))

    def frozen(self, network: str) -> Callable[..., Any]:
        """The network as other players' turns see it (`Views.frozen`)."""
        return self.views.frozen(network)

    def evaluated(
        self, network: str, weights: Mapping[str, Tensor] | None = None, *, together: bool = False
    ) -> Callable[..., Any]:
        """The network in evaluation mode (`Views.evaluated`).

        `together`: all ranks call it equally often, and want no gradients, so that it may be gathered layer by layer.
        """
        if together and weights is None and self.gathers_by_layer:
            return functools.partial(self._live_in_evaluation, network)
        return self.views.evaluated(network, weights)

    def loss_context(self) -> contextlib.AbstractContextManager[Any]:
        """In which the loss of a micro-batch of this player's turn is to be computed (`Views.loss_context`)."""
        if self.player.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self.views.loss_context() if self.given else contextlib.nullcontext()

    # -- the loop ----------------------------------------------------------------------------------------------------

    def begin_turn(self, index: int = 0) -> None:
        """Start the step's turn number `index`, with no gradients and the buffers as they are."""
        self._keeper.begin()

    def backward(self, loss: Tensor, share: float | Tensor = 1.0, *, last: bool) -> None:
        """Take the gradients of one micro-batch's loss, times its share of the global batch."""
        if self.loss_scale:
            self._last_loss = loss.detach()
            share = share * self.loss_scale.value
        if self.given:
            leaves = list(self.views.leaves.values())
            seed = constant_like(loss, share)
            self._add_given(torch.autograd.grad(loss, leaves, seed, allow_unused=True))
        else:
            self._stream(loss, share, last)
        self._keeper.after_micro_batch(last)

    @abstractmethod
    def reduce(self) -> None:
        """Sum the gradients over all ranks."""

    def clip(self, norm: float | None = None, value: float | None = None) -> None:
        """Decide how the next `step` clips: by global norm (direction kept), or each entry into [-value, value]."""
        self._clip_norm, self._clip_value = norm, value

    def step(self) -> None:
        """Clip, update the weights, and make them whole again where they are sharded.

        Under fp16 a turn whose gradients overflowed changes nothing but the loss scale; `norm` stays as it was.
        """
        if self.checks_order:
            ORDER.check(self.world)
        norm = self._update()
        if norm is not None:
            self.norm = norm
            self._keeper.end()
        else:
            self._keeper.undo()
        if self.loss_scale:
            networks = ", ".join(self.player.networks)
            self.loss_scale.update(norm is None, self._last_loss, networks)
        self.views.forget()
        self._clip_norm = self._clip_value = None

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of every parameter group (times the group's own `scale`, if it has one)."""
        for group in self.param_groups:
            group["lr"] = value * group.get("scale", 1.0)

    def scale_setting(self, name: str, factor: float) -> float:
        """Set `momentum` (Adam's first beta), `weight_decay` or `l1` of every parameter group to `factor` times what it
        was built with; returns the largest."""
        values = []
        for group in self.param_groups:
            if name == "momentum" and "betas" in group:
                built = group.setdefault("built_momentum", group["betas"][0])
                group["betas"] = (built * factor, group["betas"][1])
            else:
                built = group.setdefault(f"built_{name}", group.get(name, 0.0))
                group[name] = built * factor
            values.append(built * factor)
        return max(values)

    @torch.no_grad()
    def project(self, function: Callable[[Tensor], None]) -> None:
        """Apply an elementwise in-place function to the weights, each rank on its own slices (WGAN's clipping)."""
        for part in self.weights:
            function(part.tensor)
        self.publish()

    # -- state by name -----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]: ...

    def publish(self) -> None:
        """Make the live weights equal to `weights`, after those were written to."""
        self.views.forget()
        self._publish()

    @abstractmethod
    def full_gradients(self) -> dict[str, Tensor]:
        """Every gradient whole, after `reduce` and before `step` (collective; for proofs and diagnosis)."""

    def full(self, slices: Iterable[Slice]) -> dict[str, Tensor]:
        """Whole tensors from every rank's slices (collective)."""
        mine = {part.name: part for part in slices}
        whole = {}
        for name, parameter in self.trained.items():
            if name in mine and mine[name].replicated:
                whole[name] = mine[name].tensor.view(mine[name].shape)
                continue
            shape = self.shape(parameter)
            flat = torch.zeros(shape.numel(), device=self.world.device)
            if name in mine and mine[name].written:
                flat[mine[name].start : mine[name].stop] = mine[name].tensor
            whole[name] = self.world.sum_(flat).view(shape)
        return whole

    def full_weights(self) -> dict[str, Tensor]:
        """The weights and buffers by name, whole, on every rank (collective)."""
        weights = {name: tensor.detach().clone() for name, tensor in self.views.weights.items()}
        return {**weights, **{name: buffer.clone() for name, buffer in self.buffers.items()}}

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """The shape of a parameter even where its data is elsewhere."""
        return getattr(parameter, "ds_shape", parameter.shape)

    def slices(self) -> Iterator[tuple[str, Slice]]:
        """All tensors that make up this player's state, by the names that a checkpoint gives them."""
        for part in [*self.weights, *self._frozen_slices()]:
            yield f"weights/{part.name}", part
        for kind, parts in self.optimizer_state.items():
            for part in parts:
                yield f"optimizer/{kind}/{part.name}", part
        for name, buffer in self.buffers.items():
            yield f"buffers/{name}", Slice.whole(name, buffer)

    def _frozen_slices(self) -> Iterator[Slice]:
        """The weights that nobody updates."""
        for name, parameter in self.names.items():
            if name not in self.trained:
                yield Slice.whole(name, parameter)

    def optimizer_steps(self) -> float:
        """How many updates the optimiser has made, as it counts them for its bias correction."""
        for state in self._states():
            if "step" in state:
                return float(state["step"])
        return 0.0

    def set_optimizer_steps(self, steps: float) -> None:
        for state in self._states():
            if "step" in state:
                state["step"].fill_(steps)

    # -- how it is done ----------------------------------------------------------------------------------------------

    def _live_in_evaluation(self, network: str, *inputs: Any) -> Any:
        self.player.eval()
        try:
            with torch.no_grad():
                return self._live(network, *inputs)
        finally:
            self.player.train()

    @abstractmethod
    def _live(self, network: str, *inputs: Any) -> Any: ...
    @abstractmethod
    def _stream(self, loss: Tensor, share: float | Tensor, last: bool) -> None: ...
    @abstractmethod
    def _add_given(self, gradients: Iterable[Tensor | None]) -> None: ...
    @abstractmethod
    def _publish(self) -> None: ...
    @abstractmethod
    def _update(self) -> Tensor | None:
        """What `norm` becomes; None where fp16 overflowed, and nothing has changed."""

    @abstractmethod
    def _states(self) -> Iterator[dict[str, Any]]: ...
    @abstractmethod
    def _gather_weights(self) -> dict[str, Tensor]: ...


def constant_like(loss: Tensor, value: float | Tensor) -> Tensor:
    """The gradient that a backward starts with; a tensor stays on its device, so that nobody waits for it."""
    return value.to(loss) if isinstance(value, Tensor) else torch.full_like(loss, value)


def added(
    total: list[Tensor | None] | None, gradients: Iterable[Tensor | None]
) -> list[Tensor | None]:
    """The sums of gradients that come one micro-batch after the other; None is a gradient of 0."""
    if total is None:
        return list(gradients)
    pairs = zip(total, gradients, strict=True)
    return [b if a is None else a if b is None else a.add_(b) for a, b in pairs]


def backward(loss: Tensor, seed: Tensor) -> None:
    """`loss.backward(seed)`, without what torch.autograd looks at first, for which a small network does not wait."""
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


@torch.no_grad()
def materialise(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimiser's state as it is before the first step, so that it can be saved, loaded and sliced at any
    time: one step of rate 0 on gradients of 0, and everything it counted back to 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    gradients = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
        for parameter in group["params"]:
            parameter.grad = gradients[parameter]
            for value in optimizer.state[parameter].values():
                if isinstance(value, Tensor):
                    value.zero_()
