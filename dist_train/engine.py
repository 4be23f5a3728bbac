"""The engine carries one player's gradients to its weights: plain, DDP or ZeRO (the only file that knows DeepSpeed).

Its contract is gradients, not losses (docs/decisions/0002): a turn's gradients are either streamed to it, layer by
layer, by the backward of a loss through the live networks, or given to it whole, for losses with a double backward.
Whatever the strategy, the sum over all micro-batches of all ranks is what reaches the weights, so every loss comes in
already weighted by its share of the global batch.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.buckets import Buckets
from dist_train.buffers import BufferKeeper
from dist_train.errors import UserError
from dist_train.networks import Player
from dist_train.world import World

ZERO_BUCKET = 5_000_000
"""Elements that ZeRO reduces or gathers at once: enough to fill a link, without a buffer of gigabytes."""
PERSISTENCE_THRESHOLD = 10_000
"""ZeRO-3 keeps parameters of at most so many elements (norms, biases) whole on every rank."""

OptimizerMaker = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass
class Slice:
    """A range of a named tensor that this rank holds: elements [start, stop) of it flattened."""

    name: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor  # 1-D, a view of the real storage
    replicated: bool = False  # every rank holds these elements, and one of them is to write them

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()


def make_engine(
    strategy: Mapping[str, Any],
    player: Player,
    groups: Callable[[list[tuple[str, nn.Parameter]]], list[dict[str, Any]]],
    optimizer: OptimizerMaker,
    world: World,
    *,
    given: bool,
    micro_batches: int,
) -> Engine:
    """Build the engine of one player.

    Args:
        strategy: `{"name": "single" | "ddp" | "zero1" | "zero2" | "zero3"}`, for zero3 also `persistence_threshold`.
        groups: named parameters -> the optimiser's parameter groups.
        optimizer: parameter groups -> optimiser.
        given: whether this player's gradients are given whole instead of streamed.
        micro_batches: how many micro-batches a rank takes in a step.
    """
    name = strategy["name"]
    if name == "single" and world.size > 1:
        raise UserError(
            f"strategy: single is one process, but there are {world.size} ranks; choose ddp or zero1-3"
        )
    if name in ("single", "ddp"):
        return PlainEngine(player, groups, optimizer, world, given=given)
    return ZeroEngine(
        player, groups, optimizer, world, given, int(name[-1]), strategy, micro_batches
    )


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

    def __init__(self, player: Player, world: World, given: bool) -> None:
        self.world, self.given = world, given
        self.player = player.to(world.device)
        self.skeleton = player.skeleton()
        self.names = {_plain(name): p for name, p in player.named_parameters()}
        self.trained = {name: p for name, p in self.names.items() if p.requires_grad}
        self.buffers = {_plain(name): b for name, b in player.named_buffers()}
        self._aliases = _aliases(player)
        self.evaluation_skeleton = player.skeleton().eval()
        self.norm = torch.zeros((), device=world.device)
        self._keeper = BufferKeeper(list(self.buffers.values()), world)
        self._frozen: dict[str, Tensor] | None = None
        self._leaves: dict[str, Tensor] | None = None
        self._clip_norm: float | None = None
        self._clip_value: float | None = None

    # -- what objectives call ----------------------------------------------------------------------------------------

    def own(self, network: str) -> Callable[..., Any]:
        """The network as its own turn sees it: live, or with leaf weights where gradients are given."""
        if self.given:
            if self._leaves is None:
                frozen = self._current_weights()
                self._leaves = {
                    name: frozen[name].detach().requires_grad_() for name in self.trained
                }
            leaves = {**self._current_weights(), **self._leaves}
            return self._view(self.skeleton, network, leaves, self.buffers)

        def call(*inputs: Any) -> Any:
            output = self._live(network, *inputs)
            _for_each_tensor(output, _refuse_double_backward)
            return output

        return call

    def frozen(self, network: str) -> Callable[..., Any]:
        """The network as other players' turns see it: gradients flow through it to its input, nothing reaches or
        changes the network (running statistics are copies)."""
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        return self._view(self.skeleton, network, self._current_weights(), buffers)

    def evaluated(
        self, network: str, weights: Mapping[str, Tensor] | None = None
    ) -> Callable[..., Any]:
        """The network in evaluation mode, with the present weights or those given (names as in `full_weights`)."""
        source = self._current_weights() if weights is None else weights
        buffers = {
            n: weights[n] if weights and n in weights else b for n, b in self.buffers.items()
        }
        return self._view(self.evaluation_skeleton, network, source, buffers)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def begin_turn(self, index: int = 0) -> None:
        """Start the step's turn number `index`, with no gradients and the buffers as they are."""
        self._keeper.begin()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Take the gradients of one micro-batch's loss (already weighted by its share of the global batch)."""
        if self.given:
            assert self._leaves is not None, (
                "the loss was computed without this turn's own networks"
            )
            leaves = list(self._leaves.values())
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            self._add_given(gradients)
        else:
            self._stream(loss, last)
        self._keeper.after_micro_batch(last)

    @abstractmethod
    def reduce(self) -> None:
        """Sum the gradients over all ranks."""

    def clip(self, norm: float | None = None, value: float | None = None) -> None:
        """Decide how the next `step` clips: by global norm (direction kept), or each entry into [-value, value]."""
        self._clip_norm, self._clip_value = norm, value

    def step(self) -> None:
        """Clip, update the weights, and make them whole again where they are sharded."""
        self._keeper.end()
        self._frozen = self._leaves = None
        self._update()
        self._clip_norm = self._clip_value = None

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of every parameter group (times the group's own `scale`, if it has one)."""
        for group in self.param_groups:
            group["lr"] = value * group.get("scale", 1.0)

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

    @abstractmethod
    def publish(self) -> None:
        """Make the live weights equal to `weights`, after those were written to."""
        self._frozen = self._leaves = None

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
            if name in mine:
                flat[mine[name].start : mine[name].stop] = mine[name].tensor
            whole[name] = self.world.sum_(flat).view(shape)
        return whole

    def full_weights(self) -> dict[str, Tensor]:
        """The weights and buffers by name, whole, on every rank (collective)."""
        weights = {
            name: tensor.detach().clone() for name, tensor in self._current_weights().items()
        }
        return {**weights, **{name: buffer.clone() for name, buffer in self.buffers.items()}}

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """The shape of a parameter even where its data is elsewhere."""
        return getattr(parameter, "ds_shape", parameter.shape)

    def slices(self) -> Iterator[tuple[str, Slice]]:
        """All tensors that make up this player's state, by the names that a checkpoint gives them."""
        for part in self.weights:
            yield f"weights/{part.name}", part
        for kind, parts in self.optimizer_state.items():
            for part in parts:
                yield f"optimizer/{kind}/{part.name}", part
        for name, buffer in self.buffers.items():
            part = Slice(name, tuple(buffer.shape), 0, buffer.view(-1), replicated=True)
            yield f"buffers/{name}", part

    def optimizer_steps(self) -> float:
        """How many updates the optimiser has made, as it counts them for its bias correction."""
        for state in self._states():
            if "step" in state:
                return float(state["step"])
        return 0.0

    def set_optimizer_steps(self, steps: float) -> None:
        for state in self._states():
            if "step" in state:
                state["step"] = torch.full_like(state["step"], steps)

    # -- how it is done ----------------------------------------------------------------------------------------------

    @abstractmethod
    def _live(self, network: str, *inputs: Any) -> Any: ...
    @abstractmethod
    def _stream(self, loss: Tensor, last: bool) -> None: ...
    @abstractmethod
    def _add_given(self, gradients: Iterable[Tensor | None]) -> None: ...
    @abstractmethod
    def _update(self) -> None: ...
    @abstractmethod
    def _states(self) -> Iterator[dict[str, Any]]: ...
    @abstractmethod
    def _gather_weights(self) -> dict[str, Tensor]: ...

    def _current_weights(self) -> dict[str, Tensor]:
        if self._frozen is None:
            self._frozen = self._gather_weights()
        return self._frozen

    def _view(
        self,
        skeleton: Player,
        network: str,
        weights: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> Callable[..., Any]:
        by_name = {**weights, **buffers}
        tensors = {alias: by_name[name] for alias, name in self._aliases.items()}

        def call(*inputs: Any) -> Any:
            return torch.func.functional_call(skeleton, tensors, (network, *inputs))

        return call


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
        self.weights = [
            Slice(name, tuple(p.shape), 0, p.detach().view(-1), replicated=True)
            for name, p in self.trained.items()
        ]
        self.optimizer_state = _slices_of_state(self.trained, self.optimizer.state)
        self._buckets = Buckets(list(self.trained.values()), world) if world.size > 1 else None
        self._divides_by_scale = bool(self.optimizer.defaults.get("fused")) and all(
            p.dtype == torch.float32 for p in self.trained.values()
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def begin_turn(self, index: int = 0) -> None:
        super().begin_turn(index)
        if self._buckets:
            self._buckets.clear()
        else:
            for parameter in self.trained.values():
                parameter.grad = None

    def reduce(self) -> None:
        if self._buckets:
            self._buckets.finish()
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def full_gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.trained.items() if p.grad is not None}

    def publish(self) -> None:
        super().publish()

    def _live(self, network: str, *inputs: Any) -> Any:
        return self.player(network, *inputs)

    def _stream(self, loss: Tensor, last: bool) -> None:
        if self._buckets:
            self._buckets.launch_when_ready = last
        loss.backward()

    def _add_given(self, gradients: Iterable[Tensor | None]) -> None:
        for parameter, gradient in zip(self.trained.values(), gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)

    @torch.no_grad()
    def _update(self) -> None:
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norms = torch._foreach_norm(self._buckets.flat if self._buckets else gradients)
        self.norm = torch.linalg.vector_norm(torch.stack(norms))
        if self._clip_norm is not None:
            excess = ((self.norm + 1e-6) / self._clip_norm).clamp(min=1.0)
            if self._clip_value is None and self._divides_by_scale:
                self.optimizer.grad_scale = (
                    excess  # the fused kernel divides by it while it reads the gradients
                )
            else:
                torch._foreach_div_(gradients, excess)
        if self._clip_value is not None:
            torch._foreach_clamp_min_(gradients, -self._clip_value)
            torch._foreach_clamp_max_(gradients, self._clip_value)
        self.optimizer.step()
        if self._divides_by_scale:
            self.optimizer.grad_scale = None

    def _states(self) -> Iterator[dict[str, Any]]:
        yield from self.optimizer.state.values()

    def _gather_weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.names.items()}


class ZeroEngine(Engine):
    """DeepSpeed ZeRO stage 1, 2 or 3, through the interface that docs/decisions/0002 explains."""

    def __init__(
        self,
        player: Player,
        groups: Any,
        make: OptimizerMaker,
        world: World,
        given: bool,
        stage: int,
        strategy: Mapping[str, Any],
        micro_batches: int,
    ) -> None:
        deepspeed = import_deepspeed()
        super().__init__(player, world, given)
        self.stage, self.deepspeed = stage, deepspeed
        for buffer in self.buffers.values():
            world.broadcast_(buffer.data)
        optimizer = make(groups(list(self.trained.items())))
        optimizer.register_step_pre_hook(self._clamp_owned_gradients)
        self.engine, *_ = deepspeed.initialize(
            model=player,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # counted by us; DeepSpeed only wants a number
                "gradient_accumulation_steps": 1 if given else micro_batches,
                "gradient_clipping": 0.0,
                "steps_per_print": sys.maxsize,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {
                    "stage": stage,
                    "reduce_bucket_size": ZERO_BUCKET,
                    "allgather_bucket_size": ZERO_BUCKET,
                    "stage3_param_persistence_threshold": strategy.get(
                        "persistence_threshold", PERSISTENCE_THRESHOLD
                    ),
                },
            },
        )
        self.zero = self.engine.optimizer
        self._sum: list[Tensor | None] | None = None
        self._turn = 0
        self._came: list[int] = []  # in which order this turn's gradients came
        self._orders: dict[int, list[int]] = {}
        if not given and stage < 3 and world.size > 1:
            for index, parameter in enumerate(self.trained.values()):
                parameter.register_post_accumulate_grad_hook(
                    lambda _, index=index: self._came.append(index)
                )
        self._materialise()
        self._slice_state()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.zero.optimizer.param_groups

    def begin_turn(self, index: int = 0) -> None:
        super().begin_turn(index)
        self._sum = None
        self._turn, self._came = index, []

    def reduce(self) -> None:
        if self.given:
            assert self._sum is not None
            with self._whole():
                pairs = zip(self.trained.values(), self._sum, strict=True)
                # whose gradient is the one given; every parameter has a part in it, also one that only other
                # ranks used: DeepSpeed needs the same gradients in the same order on every rank
                surrogate = [(p * (0.0 if g is None else g)).sum() for p, g in pairs]
                self._stream(torch.stack(surrogate).sum(), last=True)
            return
        if self._turn not in self._orders:
            orders = self.world.gather(self._came)
            self._orders[self._turn] = orders[0] if all(o == orders[0] for o in orders) else []
        if self._came != self._orders[self._turn]:
            raise UserError(f"strategy: zero{self.stage}: {_OTHER_ORDER}")

    def full_gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p).clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def publish(self) -> None:
        super().publish()
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        for index in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(index)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def _live(self, network: str, *inputs: Any) -> Any:
        return self.engine(network, *inputs)

    def _stream(self, loss: Tensor, last: bool) -> None:
        # DeepSpeed averages over the ranks; times the world size that mean is the sum that weighted losses need
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the micro-batch; it updates nothing before the last

    def _add_given(self, gradients: Iterable[Tensor | None]) -> None:
        # summed over this rank's micro-batches first: given one by one, ZeRO-3 gets them silently wrong
        if self._sum is None:
            self._sum = list(gradients)
            return
        for index, gradient in enumerate(gradients):
            total = self._sum[index]
            if gradient is not None:
                self._sum[index] = gradient if total is None else total.add_(gradient)

    def _update(self) -> None:
        self.zero.clip_grad = self._clip_norm or 0.0
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        self.norm = torch.as_tensor(norm, device=self.world.device, dtype=torch.float32).detach()

    def _clamp_owned_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._clip_value is None:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.clamp_(-self._clip_value, self._clip_value)

    def _states(self) -> Iterator[dict[str, Any]]:
        yield from self.zero.optimizer.state.values()

    def _whole(self) -> Any:
        if self.stage < 3:
            return torch.enable_grad()
        return self.deepspeed.zero.GatheredParameters(list(self.names.values()))

    def _gather_weights(self) -> dict[str, Tensor]:
        if self.stage < 3:
            return {name: p.detach() for name, p in self.names.items()}
        with self._whole():
            return {name: p.detach().clone() for name, p in self.names.items()}

    def _flat_partitions(self) -> list[tuple[int, nn.Parameter]]:
        """This rank's flat fp32 weights, each with the index of its parameter group."""
        if self.stage < 3:
            return list(enumerate(self.zero.single_partition_of_fp32_groups))
        groups = self.zero.sub_group_to_group_id
        return [(groups[i], flat) for i, flat in enumerate(self.zero.fp32_partitioned_groups_flat)]

    def _materialise(self) -> None:
        optimizer = self.zero.optimizer
        for index, flat in self._flat_partitions():
            kept = [group["params"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["params"] = []
            optimizer.param_groups[index]["params"] = [flat]
            materialise(optimizer)
            for group, parameters in zip(optimizer.param_groups, kept, strict=True):
                group["params"] = parameters

    def _slice_state(self) -> None:
        """Find this rank's range of every parameter in the flat partitions, as views."""
        self.weights, self.optimizer_state = [], {}
        for name, parameter in self.trained.items():
            place = self._place(parameter)
            if place is None:
                continue
            flat, offset, start, count = place
            shape = tuple(self.shape(parameter))
            self.weights.append(Slice(name, shape, start, flat.detach()[offset : offset + count]))
            for kind, tensor in self.zero.optimizer.state[flat].items():
                if isinstance(tensor, Tensor) and tensor.shape == flat.shape:
                    part = Slice(name, shape, start, tensor[offset : offset + count])
                    self.optimizer_state.setdefault(kind, []).append(part)

    def _place(self, parameter: Any) -> tuple[nn.Parameter, int, int, int] | None:
        """(flat partition, offset in it, first element of the parameter, how many); None where this rank has none."""
        if self.stage < 3:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            group = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
            here, there = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
            return group, here.start, there.start, here.numel
        group, offset, count = self.zero.grad_position[self.zero.get_param_id(parameter)]
        start = min(count * self.world.rank, parameter.ds_numel)
        count = min(count, parameter.ds_numel - start)  # the last ranks' partitions are padded
        return (
            (self.zero.fp32_partitioned_groups_flat[group], offset, start, count) if count else None
        )


# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def materialise(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimiser's state as it is before the first step, so that it can be saved, loaded and sliced at any
    time: one step of rate 0 on gradients of 0, and everything it counted back to 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
        for parameter in group["params"]:
            parameter.grad = None
            for value in optimizer.state[parameter].values():
                if isinstance(value, Tensor):
                    value.zero_()


_OTHER_ORDER = (
    "this rank used other parameters, or in another order, than the other ranks or than before,"
    " and DeepSpeed would add up the wrong ones; name the player in the objective's `given`, or choose ddp"
)


def import_deepspeed() -> Any:
    """Import DeepSpeed set up for this machine, or say how to install it."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise UserError(
            "strategy: ZeRO needs DeepSpeed: DS_BUILD_OPS=0 pip install 'dist-train[zero]'"
        ) from error
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed 0.19 still calls collectives by names that torch 2.13 has renamed
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+. is deprecated", FutureWarning)
    # its shared-memory collectives would be compiled at run time, and a process killed meanwhile leaves a lock on which
    # every later run hangs (FACTS: an undocumented switch, which tests/test_engine.py holds on to)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _plain(name: str) -> str:
    return name.removeprefix("networks.")


def _aliases(player: Player) -> dict[str, str]:
    """{every path to a parameter or buffer: its one name}; a tied tensor has several paths."""
    names: dict[int, str] = {}
    aliases = {}
    for named in (player.named_parameters, player.named_buffers):
        for path, tensor in named(remove_duplicate=False):
            aliases[path] = names.setdefault(id(tensor), _plain(path))
    return aliases


def _slices_of_state(
    parameters: Mapping[str, nn.Parameter], state: Mapping[Any, dict[str, Any]]
) -> dict[str, list[Slice]]:
    by_kind: dict[str, list[Slice]] = {}
    for name, parameter in parameters.items():
        for kind, tensor in state[parameter].items():
            if isinstance(tensor, Tensor) and tensor.shape == parameter.shape and tensor.dim():
                part = Slice(name, tuple(parameter.shape), 0, tensor.view(-1), replicated=True)
                by_kind.setdefault(kind, []).append(part)
    return by_kind


def _for_each_tensor(output: Any, function: Callable[[Tensor], None]) -> None:
    if isinstance(output, Tensor):
        function(output)
    elif isinstance(output, tuple | list):
        for part in output:
            _for_each_tensor(part, function)
    elif isinstance(output, dict):
        for part in output.values():
            _for_each_tensor(part, function)


def _refuse_double_backward(output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(_check_single_backward)


def _check_single_backward(gradient: Tensor) -> None:
    if torch.is_grad_enabled():  # within backward this is so only under create_graph=True
        raise UserError(
            "objective: a gradient of a gradient was asked of a player whose gradients are streamed;"
            " name the player in the objective's `given`"
        )
