"""A training step taken without data or memory: what it would hold, how much it would compute.

The step is the real one (`Trainer.train`, this recipe's networks, objective and optimiser, any players), run on fake
tensors, which have shapes and no storage. Every operation passes through here, forward and backward.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from dist_train.errors import UserError
from dist_train.networks.blocks import separable_blocks

if TYPE_CHECKING:
    from dist_train.objectives import Turn
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer

aten = torch.ops.aten
T = TypeVar("T")
SEARCHED = 100
"""A turn that does not come within so many steps is not traced."""


class Unforeseeable(UserError):
    """A step whose course or shapes depend on values."""


@dataclass
class Work:
    """What a turn computes: (FLOPs, bytes read and written) of every operation."""

    operations: list[tuple[int, int]] = field(default_factory=list)

    @property
    def flops(self) -> int:
        return sum(flops for flops, _ in self.operations)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Each operation at the roofline: as long as its arithmetic or its memory traffic takes, whichever is more."""
        return sum(max(f / flops_per_second, b / bytes_per_second) for f, b in self.operations)


@dataclass
class Step:
    """What one step of one process holds, in bytes, and computes, by turn.

    `activations` is the most that lives beside weights, gradients, optimiser, buffers and batch within forward and
    backward; `with_gradients` the same with the gradients that are there at that moment; `update` the most that the
    optimiser's step needs for itself; `largest` is one weight, `block` the largest that fsdp2 gathers by itself and
    `rest` what it gathers as one of a player. `turns` is the work of forward and backward of all its
    micro-batches.
    """

    micro_batches: int
    weights: dict[str, int]
    largest: int
    block: int
    rest: int
    trained: dict[str, int]
    optimizer: dict[str, int]
    buffers: int
    batch: int
    activations: int
    with_gradients: int
    update: int
    turns: dict[tuple[str, int], Work]
    updates: dict[tuple[str, int], Work]


class Live(TorchDispatchMode):
    """The bytes of all storages that operations make, until they are freed; and each operation's work."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {"other": 0, "gradient": 0}
        self.peak = {"other": 0, "both": 0}
        self.work = Work()
        self._known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        fresh = [self._take(tensor) for tensor in made]
        if any(fresh) or func._schema.is_mutable:  # else a view
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            traffic = sum(t.numel() * t.element_size() for t in [*read, *made])
            self.work.operations.append((_flops(func, args, kwargs or {}, result), traffic))
        return result

    def holds(self, tensor: Tensor) -> None:
        """This tensor was here before: it is not counted."""
        self._known[tensor.untyped_storage()] = [0, "other"]

    def is_gradient(self, tensor: Tensor) -> None:
        """From now on this tensor counts as a gradient."""
        record = self._known.get(tensor.untyped_storage())
        if record is not None and record[1] == "other":
            self.bytes["other"] -= record[0]
            self.bytes["gradient"] += record[0]
            record[1] = "gradient"

    def _take(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return False
        size = storage.nbytes()
        record = [size, "other"]
        self._known[storage] = record
        weakref.finalize(storage, self._free, record)
        self.bytes["other"] += size
        self.peak["other"] = max(self.peak["other"], self.bytes["other"])
        self.peak["both"] = max(self.peak["both"], sum(self.bytes.values()))
        return True

    def _free(self, record: list[Any]) -> None:
        self.bytes[record[1]] -= record[0]


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """The FLOPs of an operation's matrix products and convolutions; attention counts whole, causal or not."""
    operation = func._overloadpacket
    if operation in CPU_KERNELS:
        return CPU_KERNELS[operation](*args)
    formula = flop_registry.get(operation)
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0


def _layer(x: Tensor, *weights: Tensor) -> int:
    """A recurrent layer: (T, B, I), and its weights from the input and from the state."""
    return 2 * x.shape[0] * x.shape[1] * sum(weight.numel() for weight in weights)


CPU_KERNELS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_: sdpa_flop_count(q.shape, k.shape, v.shape)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_: sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)
    ),
    aten.mkldnn_rnn_layer: lambda x, w, r, *_: _layer(x, w, r),
    aten.mkldnn_rnn_layer_backward: lambda x, w, r, *_: 2 * _layer(x, w, r),
}
"""What torch's own table of formulas lacks."""


def foresee(
    recipe: Recipe,
    build: Callable[[Recipe], Trainer],
    micro_batch: int | None = None,
    micro_batches: int = 1,
) -> tuple[Step, Trainer]:
    """Take the first step in which every player has a turn, in one process, on fake tensors.

    Args:
        build: makes a trainer of one process; it is called where every new tensor is fake.
        micro_batch: its size, by default the recipe's. micro_batches: how many the step has.
    Returns: what the step held and computed, and the trainer, whose tensors are fake.
    Raises: Unforeseeable when the step's course depends on values, which fake tensors have not.
    """
    return on_fakes(recipe, build, _traced, micro_batch, micro_batches)


def on_fakes(
    recipe: Recipe,
    build: Callable[[Recipe], Trainer],
    trace: Callable[[Trainer, list[Any]], T],
    micro_batch: int | None = None,
    micro_batches: int = 1,
) -> tuple[T, Trainer]:
    """What `trace` finds when it takes that step, of this batch; else as `foresee`."""
    size = micro_batch or recipe.data.micro_batch
    bare = recipe.set("strategy", "single").set("data.micro_batch", size)
    bare = (
        bare.set("data.global_batch", size * micro_batches)
        .set("weights", None)
        .set("compile", False)
    )
    if recipe.precision == "fp16":  # as many bytes, and no loss scale, which looks at values
        bare = bare.set("precision", "bf16")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode, _modules_overwrite():
            trainer = build(bare)
        trainer.callbacks.by_name = {}
        trainer.step = _step_of_all(trainer)
        batch = next(iter(trainer.data.from_(trainer.step, trainer.step + 1)))[1]  # real: of shards
        fake = [micro._map(mode.from_tensor) for micro in batch]
        trainer.data = _Once(fake)
        with mode, _modules_overwrite():
            return trace(trainer, fake), trainer
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise Unforeseeable(
            f"the step cannot be foreseen: its course or its shapes depend on values ({error})"
        ) from error


def _traced(trainer: Trainer, batch: list[Any]) -> Step:
    live, peaks = Live(), {"activations": 0, "with_gradients": 0, "update": 0}
    turns: dict[tuple[str, int], Work] = {}
    updates: dict[tuple[str, int], Work] = {}

    def section(kind: str, name: tuple[str, int]) -> None:
        """End a part of a turn: its peak counts, and its work."""
        if kind == "backward":
            peaks["activations"] = max(peaks["activations"], live.peak["other"])
            peaks["with_gradients"] = max(peaks["with_gradients"], live.peak["both"])
        else:
            peaks["update"] = max(peaks["update"], live.peak["other"])
        (turns if kind == "backward" else updates)[name] = live.work
        live.work, live.peak = Work(), dict.fromkeys(live.peak, 0)

    index = 0

    def begun(turn: int = 0) -> None:
        nonlocal index
        index = turn

    for player, engine in trainer.engines.items():
        engine.begin_turn = after(engine.begin_turn, begun)  # type: ignore[method-assign]
        engine.backward = after(  # type: ignore[method-assign]
            engine.backward, lambda *_, engine=engine, **__: _mark(live, engine)
        )
        engine.reduce = after(  # type: ignore[method-assign]
            engine.reduce, lambda player=player: section("backward", (player, index))
        )
        engine.step = after(  # type: ignore[method-assign]
            engine.step, lambda player=player: section("update", (player, index))
        )
        for parameter in engine.trained.values():
            parameter.register_post_accumulate_grad_hook(lambda p: live.is_gradient(p.grad))
    held = {id(t): t for t in _standing(trainer)}.values()
    for tensor in [*held, *(t for micro in batch for t in micro.tensors.values())]:
        live.holds(tensor)
    with live:
        trainer.train(until=trainer.step + 1)
    return Step(
        micro_batches=len(batch),
        weights={p: _bytes(e.names.values()) for p, e in trainer.engines.items()},
        largest=max(_bytes([w]) for e in trainer.engines.values() for w in e.names.values()),
        **_units(trainer),
        trained={p: _bytes(e.trained.values()) for p, e in trainer.engines.items()},
        optimizer={
            p: sum(_bytes(part.tensor for part in parts) for parts in e.optimizer_state.values())
            for p, e in trainer.engines.items()
        },
        buffers=sum(_bytes(e.buffers.values()) for e in trainer.engines.values()),
        batch=_bytes(batch[0].tensors.values()),
        turns=turns,
        updates=updates,
        **peaks,
    )


def _mark(live: Live, engine: Any) -> None:
    """Given gradients reach no hook."""
    for parameter in engine.trained.values():
        if parameter.grad is not None:
            live.is_gradient(parameter.grad)


def _standing(trainer: Trainer) -> Iterator[Tensor]:
    for engine in trainer.engines.values():
        yield from engine.names.values()
        yield from engine.buffers.values()
        for parts in engine.optimizer_state.values():
            yield from (part.tensor for part in parts)


def _units(trainer: Trainer) -> dict[str, int]:
    """The largest block, and the largest rest of a player's weights beside its blocks."""
    sizes, rests = [0], [0]
    for engine in trainer.engines.values():
        blocks = separable_blocks(engine.player.networks)
        own = [_bytes(block.parameters()) for block in blocks]
        sizes += own
        rests.append(_bytes(engine.names.values()) - sum(own))
    return {"block": max(sizes), "rest": max(rests)}


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def after(method: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        then(*args, **kwargs)
        return result

    return both


def _step_of_all(trainer: Trainer) -> int:
    def players(step: int) -> set[str]:
        return {turn.player for turn in trainer.objective.turns(step)}

    everyone = set(trainer.engines)
    return next((step for step in range(SEARCHED) if players(step) == everyone), 0)


def turns_per_step(turns: Callable[[int], list[Turn]]) -> dict[tuple[str, int], float]:
    """How often each turn comes in a step, on average over the first steps."""
    came = Counter((turn.player, turn.index) for step in range(SEARCHED) for turn in turns(step))
    return {turn: count / SEARCHED for turn, count in came.items()}


class _Once:
    def __init__(self, batch: list[Any]) -> None:
        self.batch = batch

    def from_(self, step: int, stop: int) -> Iterator[tuple[int, list[Any]]]:
        yield step, self.batch


@contextlib.contextmanager
def _modules_overwrite() -> Iterator[None]:
    """Let `Module.to` put new parameters in the place of fake ones: torch 2.13 would swap them, which it refuses where
    there are weak references, as fake tensors have them."""
    kept = nn.Module._apply

    def _apply(
        module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> Any:
        for child in module.children() if recurse else ():
            child._apply(function)
        with torch.no_grad():
            for name, parameter in module._parameters.items():
                if parameter is not None and (new := function(parameter)) is not parameter:
                    module._parameters[name] = nn.Parameter(new, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = function(buffer)
        return module

    nn.Module._apply = _apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = kept  # type: ignore[method-assign]
