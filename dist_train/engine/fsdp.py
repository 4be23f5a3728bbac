"""torch's `fully_shard` (FSDP2): the only file that knows it, and the only one that sees a DTensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from dist_train.engine.base import (
    Engine,
    OptimizerMaker,
    Slice,
    added,
    constant_like,
    materialise,
)
from dist_train.engine.layers import VIEW_ELEMENTS, Shards
from dist_train.engine.mesh import AllGather, Mesh, ReduceScatter
from dist_train.engine.norm import global_norm
from dist_train.engine.order import Order
from dist_train.engine.update import Update
from dist_train.engine.views import plain_name
from dist_train.errors import UserError
from dist_train.networks import Player
from dist_train.networks.blocks import separable_blocks
from dist_train.networks.deferred import value_of
from dist_train.strategies import check_ranks
from dist_train.world import World

SMALL = 10_000
"""Weights of up to so many elements views gather together."""


class FsdpEngine(Engine):
    """Weights, gradients and optimiser state shared out by rows, each block gathered when it is its turn.

    Of a weight (rows, ...) each of `shard_degree` ranks that follow each other holds ceil(rows / shard_degree) rows,
    the last ones fewer or none: one range of the flattened tensor. Under hybrid sharding the ranks form several such
    groups, whose gradients are added up. The optimiser runs on plain flat tensors, what torch's hooks gather.
    """

    gathers_by_layer = True

    def __init__(
        self,
        player: Player,
        groups: Any,
        make: OptimizerMaker,
        world: World,
        given: bool,
        strategy: Mapping[str, Any],
    ) -> None:
        super().__init__(player, world, given)
        check_ranks(strategy, world.size, "strategy")
        self.mesh = Mesh(world, strategy.get("shard_degree", world.size))
        self._keeps = not strategy.get("reshard_after_forward", True)
        for buffer in self.buffers.values():
            world.broadcast_(buffer.data)
        self._order = Order(_OTHER_ORDER)
        self._units = self._shard()
        self.names = {plain_name(name): p for name, p in player.named_parameters()}
        self.trained = {name: p for name, p in self.names.items() if p.requires_grad}
        self._buckets = self._fixed_buckets()
        self._shards = {
            name: nn.Parameter(local)
            for name, parameter in self.trained.items()
            if (local := _local(parameter)).numel()
        }
        self.optimizer: Any = make(self._local_groups(groups(list(self.trained.items()))))
        materialise(self.optimizer)
        self._update_by = Update(self.optimizer)
        self.weights = list(self._slices({n: s.detach() for n, s in self._shards.items()}))
        self.optimizer_state = self._slices_of_state()
        self._sum: list[Tensor | None] | None = None
        self._last: bool | None = None
        budget = strategy.get("view_elements", VIEW_ELEMENTS)
        self._seen = FsdpShards(self, small=min(SMALL, budget))
        if sum(self._seen.sizes.values()) > budget:
            self.views.gather_by_layer(self._seen, budget)

    # -- how it is shared out ----------------------------------------------------------------------------------------

    def _shard(self) -> list[Any]:
        """Share out each block, then what is left; those that are not there yet are made whole one block at a time."""
        units: list[Any] = [*separable_blocks(self.player.networks), self.player]
        for unit in units:
            whole = [p for p in unit.parameters() if not isinstance(p, DTensor)]
            for parameter in whole:
                self._make_whole(parameter)
            unit.register_forward_hook(_no_view)
            fully_shard(unit, mesh=self.mesh.devices, reshard_after_forward=not self._keeps)
            for parameter in whole:
                parameter.data = parameter.data.new_empty(0)
            unit.set_gradient_divide_factor(
                1.0
            )  # gradients come in weighted, and are to be added up
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_reduce_scatter_unused_params(True)
        for number, unit in enumerate(units):
            unit.set_custom_all_gather(AllGather(self._order, number))
            unit.set_custom_reduce_scatter(ReduceScatter(self._order, number))
        return units

    def _make_whole(self, parameter: nn.Parameter) -> None:
        if parameter.ndim == 0:
            name = next(n for n, p in self.names.items() if p is parameter)
            raise UserError(
                f"strategy: fsdp2 shares out the rows of a weight, and {name} is a single number;"
                " give it the shape (1,), or choose zero3 or ddp"
            )
        value = value_of(parameter)
        parameter.data = (parameter.data if value is None else value).to(self.world.device)
        parameter.data = parameter.data.contiguous()
        self.world.broadcast_(parameter.data)

    def _fixed_buckets(self) -> list[list[str]]:
        """The names of each unit's weights, those of one type together: what this engine itself sends at once."""
        unit_of = {
            id(p): i
            for i, unit in reversed(list(enumerate(self._units)))
            for p in unit.parameters()
        }
        buckets: dict[Any, list[str]] = {}
        for name, parameter in self.names.items():
            buckets.setdefault((unit_of[id(parameter)], parameter.dtype), []).append(name)
        return list(buckets.values())

    def _local_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimiser's groups with this rank's shards in the place of the weights."""
        shards = {id(self.trained[name]): shard for name, shard in self._shards.items()}
        found = []
        for group in groups:
            kept = [i for i, p in enumerate(group["params"]) if id(p) in shards]
            more = {"names": [group["names"][i] for i in kept]} if "names" in group else {}
            params = [shards[id(group["params"][i])] for i in kept]
            found.append({**group, **more, "params": params})
        return found

    def _slices(self, flat: Mapping[str, Tensor]) -> Iterator[Slice]:
        """Flat tensors of this rank as ranges of the whole ones; of equal ones one rank writes, each in its turn."""
        for index, (name, parameter) in enumerate(self.names.items()):
            if name in flat:
                start = self.mesh.place * self._share(name)
                written = index % self.mesh.replicas == self.mesh.replica
                yield Slice(name, tuple(parameter.shape), start, flat[name], written=written)

    def _slices_of_state(self) -> dict[str, list[Slice]]:
        kinds: dict[str, dict[str, Tensor]] = {}
        for name, shard in self._shards.items():
            for kind, tensor in self.optimizer.state[shard].items():
                if isinstance(tensor, Tensor) and kind != "step":  # which `optimizer_steps` has
                    kinds.setdefault(kind, {})[name] = tensor
        return {kind: list(self._slices(flat)) for kind, flat in kinds.items()}

    def _frozen_slices(self) -> Iterator[Slice]:
        frozen = {n: _local(p) for n, p in self.names.items() if n not in self.trained}
        yield from self._slices({name: flat for name, flat in frozen.items() if flat.numel()})

    def _share(self, name: str) -> int:
        """Elements of a weight that a rank holds, if it is not one of the last."""
        shape = self.names[name].shape
        return -(-shape[0] // self.mesh.degree) * shape[1:].numel()

    # -- a turn ------------------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def begin_turn(self, index: int = 0) -> None:
        super().begin_turn(index)
        self._sum = None
        self._order.clear()
        for parameter in self.trained.values():
            parameter.grad = None

    def _live(self, network: str, *inputs: Any) -> Any:
        try:
            return self.player(network, *inputs)
        except RuntimeError as error:
            if "DTensor" not in str(error):
                raise
            raise UserError(
                f"strategy: fsdp2 gathers a block's weights when the block is called, but '{network}' uses one of them"
                " without a call; call the block, or choose zero3 or ddp"
            ) from error

    def _stream(self, loss: Tensor, share: float | Tensor, last: bool) -> None:
        if last != self._last:
            self._last = last
            # groups of ranks add their sums up once a turn, and weights that are kept are kept for the whole of it
            self.player.set_requires_all_reduce(last)  # type: ignore[operator]
            self.player.set_reshard_after_backward(last or not self._keeps)  # type: ignore[operator]
        loss.backward(constant_like(loss, share))

    def _add_given(self, gradients: Iterable[Tensor | None]) -> None:
        self._sum = added(self._sum, gradients)

    @torch.no_grad()  # or each `to_local` would be a node of a graph
    def reduce(self) -> None:
        if self.given:
            self._scatter_given()
            return
        for name, parameter in self.trained.items():
            if name in self._shards:
                gradient: Any = parameter.grad
                flat = None if gradient is None else gradient.to_local().view(-1)
                shard = self._shards[name]
                shard.grad = torch.zeros_like(shard) if flat is None else flat
            parameter.grad = None

    def _scatter_given(self) -> None:
        """Add up this rank's whole gradients and those of the others, each rank keeping its shards."""
        assert self._sum is not None
        sums = dict(zip(self.trained, self._sum, strict=True))
        self._sum = None
        if self.views.by_layer:  # of large weights the sums are there already
            self._take_slices(sums)
        for bucket in self._buckets:
            trained = [name for name in bucket if name in sums]
            if not trained:
                continue
            rows = [self._rows(name, sums.pop(name)) for name in trained]  # (degree, share) each
            mine = self.mesh.sum_rows(torch.cat(rows, dim=1))
            for name, part in zip(trained, mine.split([r.shape[1] for r in rows]), strict=True):
                if name in self._shards:
                    self._shards[name].grad = part[: self._shards[name].numel()]

    def _take_slices(self, sums: dict[str, Tensor | None]) -> None:
        for name in self._seen.sizes:
            part = sums.pop(name, None)
            if name in self._shards:
                shard = self._shards[name]
                shard.grad = torch.zeros_like(shard) if part is None else part[: shard.numel()]

    def _rows(self, name: str, whole: Tensor | None) -> Tensor:
        """A whole tensor as what each rank holds of it, (degree, share), the last ones padded."""
        size = self.mesh.degree * self._share(name)
        parameter = self.names[name]
        if whole is None:
            whole = torch.zeros(size, dtype=parameter.dtype, device=self.world.device)
        flat = whole.reshape(-1)
        return F.pad(flat, (0, size - flat.numel())).view(self.mesh.degree, -1)

    def full_gradients(self) -> dict[str, Tensor]:
        scale = self.loss_scale.value if self.loss_scale else 1.0
        flat = {n: s.grad for n, s in self._shards.items() if s.grad is not None}
        return {name: whole / scale for name, whole in self.full(self._slices(flat)).items()}

    def _update(self) -> Tensor | None:
        gradients = [s.grad for s in self._shards.values() if s.grad is not None]
        norm = self._agreed_norm(gradients)
        clip = self._clip_norm, self._clip_value
        used = self._update_by.turn(gradients, norm, self.loss_scale, *clip)
        if used is not None:
            for shard in self._shards.values():
                shard.grad = None
            self._release()
        return used

    def _agreed_norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm over all shards, of replicas once; and the check that all ranks gathered the same, in one order."""
        square = None
        if self.mesh.replica == 0 and gradients:
            square = global_norm(gradients, self.world.device).double().square()
        return self._order.check(self.world, square).sqrt().float()

    # -- the weights -------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        """Free what is gathered: it is no longer what the shards say."""
        for unit in self._units:
            unit.reshard()

    def _publish(self) -> None:
        self._release()

    def _states(self) -> Iterator[dict[str, Any]]:
        yield from self.optimizer.state.values()

    def _gather_weights(self) -> dict[str, Tensor]:
        whole = self._gathered(self._buckets)
        return {name: whole[name] for name in self.names}

    @torch.no_grad()
    def _gathered(self, buckets: Iterable[Sequence[str]]) -> dict[str, Tensor]:
        """Weights whole, in memory of their own; a collective a bucket."""
        whole: dict[str, Tensor] = {}
        for bucket in buckets:
            sizes = [self._share(name) for name in bucket]
            locals_ = [_local(self.names[name]) for name in bucket]
            padded = [F.pad(f, (0, s - f.numel())) for f, s in zip(locals_, sizes, strict=True)]
            columns = self.mesh.join_rows(torch.cat(padded)).split(sizes, dim=1)
            for name, rows in zip(bucket, columns, strict=True):
                shape = self.names[name].shape
                # one row a rank would stay a strided view, of which batch norm's backward makes wrong gradients
                flat = rows.reshape(-1)[: shape.numel()].contiguous()
                whole[name] = flat.view(shape)
        return whole


class FsdpShards(Shards):
    """Weights as FSDP2 holds them, for the views: of each the rows of a rank."""

    def __init__(self, engine: FsdpEngine, small: int) -> None:
        self.engine, self.device = engine, engine.world.device
        self.sizes = {n: p.numel() for n, p in engine.names.items() if p.numel() > small}
        self.lengths = {name: engine._share(name) for name in self.sizes}

    def small(self) -> dict[str, Tensor]:
        rest = [[n for n in b if n not in self.sizes] for b in self.engine._buckets]
        return self.engine._gathered(bucket for bucket in rest if bucket)

    def gather(self, name: str) -> Tensor:
        return self.engine._gathered([[name]])[name]

    def scatter(self, name: str, gradient: Tensor) -> Tensor:
        return self.engine.mesh.sum_rows(self.engine._rows(name, gradient))


_OTHER_ORDER = (
    "strategy: fsdp2: this rank called other blocks, or in another order, than the other ranks in this turn, and torch"
    " would take the weights of one for those of another; name the player in the objective's `given`, or choose ddp"
)


def _no_view(unit: nn.Module, inputs: Any, output: Any) -> Any:
    """Outputs in memory of their own: whoever changes a view in place takes FSDP's hook off it, without a word."""
    return tree_map_only(Tensor, lambda t: t.clone() if t._is_view() else t, output)


def _local(parameter: nn.Parameter) -> Tensor:
    """This rank's rows, flat: the storage itself."""
    shared_out: Any = parameter.detach()
    return shared_out.to_local().view(-1)
