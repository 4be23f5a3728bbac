"""DeepSpeed ZeRO: the only file that knows it."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.engine.base import Engine, OptimizerMaker, Slice, added, materialise
from dist_train.engine.disk import Disk
from dist_train.engine.layers import VIEW_ELEMENTS, Shards
from dist_train.errors import UserError
from dist_train.networks import Player
from dist_train.networks.deferred import value_of
from dist_train.strategies import merged
from dist_train.world import World

ZERO_BUCKET = 5_000_000
"""Elements that ZeRO reduces or gathers at once: enough to fill a link, without a buffer of gigabytes."""
PERSISTENCE_THRESHOLD = 10_000
"""ZeRO-3 keeps parameters of at most so many elements (norms, biases) whole on every rank."""


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
        self.stage, self.deepspeed, self.gathers_by_layer = stage, deepspeed, stage == 3
        self._disk = Disk(strategy["nvme_path"]) if "nvme_path" in strategy else None
        for buffer in self.buffers.values():
            world.broadcast_(buffer.data)
        optimizer = make(groups(list(self.trained.items())))
        optimizer.register_step_pre_hook(self._clamp_owned_gradients)
        # it takes LOCAL_RANK for the GPU's index, which ranks may share, and cannot do without on a CPU either
        gpu = torch.device(world.device).index
        os.environ["LOCAL_RANK"] = str(world.local_rank if gpu is None else gpu)
        config = configuration(stage, strategy, 1 if given else micro_batches)
        if stage == 3:
            self._make_slices(config)
        self.engine, *_ = deepspeed.initialize(
            model=player,
            optimizer=optimizer,
            dist_init_required=False,
            config=config,
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
        if stage == 3:
            self._shards = ZeroShards(self.names, world)
            budget = strategy.get("view_elements", VIEW_ELEMENTS)
            if sum(self._shards.sizes.values()) > budget:
                self.views.gather_by_layer(self._shards, budget)

    def _make_slices(self, config: dict[str, Any]) -> None:
        """Make the weights that are not there yet, one after the other, and keep this rank's slice of each."""
        # each player makes its groups for hpZ; DeepSpeed expects one engine a process, and keeps the last ones
        self.deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        sliced: Any = None
        for parameter in self.names.values():
            value = value_of(parameter)
            if value is None:
                continue
            parameter.data = value.to(self.world.device)
            if sliced is None:
                one = nn.ParameterList([parameter])
                self.deepspeed.zero.Init(module=one, config_dict_or_path=config)
                sliced = parameter
            else:
                sliced.convert_to_zero_parameters(param_list=[parameter])

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
            if self.views.by_layer:
                self._take_slices(self._sum)
                return
            with self._whole():
                pairs = zip(self.trained.values(), self._sum, strict=True)
                # whose gradient is the one given; every parameter has a part in it, also one that only other
                # ranks used: DeepSpeed needs the same gradients in the same order on every rank
                surrogate = [(p * (0.0 if g is None else g)).sum() for p, g in pairs]
                self._stream(torch.stack(surrogate).sum(), 1.0, last=True)
            return
        if self._turn not in self._orders:
            orders = self.world.gather(self._came)
            self._orders[self._turn] = orders[0] if all(o == orders[0] for o in orders) else []
        if self._came != self._orders[self._turn]:
            raise UserError(f"strategy: zero{self.stage}: {_OTHER_ORDER}")

    @torch.no_grad()
    def _take_slices(self, gradients: list[Tensor | None]) -> None:
        """Put this rank's slices of gradients that are summed over the ranks where DeepSpeed looks for its own."""
        by_name = dict(zip(self.trained, gradients, strict=True))
        by_name |= self._shards.small_slices(by_name)
        for name, parameter in self.trained.items():
            part = by_name.pop(name)
            if part is None:
                part = torch.zeros(self._shards.lengths[name], device=self.world.device)
            self.zero.set_local_grad_for_param(part / self.world.size, parameter)
        if self.zero.offload_optimizer:
            return
        for index, group in enumerate(self.zero.fp16_groups):
            self.zero.averaged_gradients[index] = [
                self.zero._get_fp32_grad_state_partition(p, False)[0] for p in group
            ]

    def full_gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        return {n: safe_get_full_grad(p) / self._scale for n, p in self.trained.items()}

    @torch.no_grad()
    def _publish(self) -> None:
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

    def _stream(self, loss: Tensor, share: float | Tensor, last: bool) -> None:
        self.engine.backward(loss * share, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the micro-batch; it updates nothing before the last

    def _add_given(self, gradients: Iterable[Tensor | None]) -> None:
        # summed over this rank's micro-batches first: given one by one, ZeRO-3 gets them silently wrong
        self._sum = added(self._sum, gradients)

    @property
    def _scale(self) -> float:
        """By what DeepSpeed's gradients are to be divided: it averages over the ranks, and weighted losses need the
        sum, so the loss scale of fp16 (or 1) over the number of ranks."""
        return (self.loss_scale.value if self.loss_scale else 1.0) / self.world.size

    def _update(self) -> Tensor | None:
        self.zero.clip_grad = self._clip_norm or 0.0
        self.zero.override_loss_scale(self._scale)
        self.engine.step()
        self.zero.custom_loss_scaler = False  # or its backward multiplies the loss by it
        if self.loss_scale and self.zero.overflow:
            return None
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(norm, device=self.world.device, dtype=torch.float32).detach()

    def _clamp_owned_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._clip_value is None:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.clamp_(-self._clip_value, self._clip_value)

    def _frozen_slices(self) -> Iterator[Slice]:
        if self.stage < 3:
            yield from super()._frozen_slices()
            return
        for name, parameter in self.names.items():
            if name not in self.trained:
                mine: Any = parameter
                start = min(mine.ds_tensor.numel() * self.world.rank, mine.ds_numel)
                flat = mine.ds_tensor.detach()[: mine.ds_numel - start]
                if flat.numel():
                    yield Slice(name, tuple(mine.ds_shape), start, flat)

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
        """Make the optimiser's state; with a disk, it and the fp32 weights that it updates lie there."""
        optimizer = self.zero.optimizer
        for index, flat in self._flat_partitions():
            if self._disk:
                flat.data = self._disk.moved(flat.data)
                self._look_there(index, flat)
            kept = [group["params"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["params"] = []
            optimizer.param_groups[index]["params"] = [flat]
            materialise(optimizer)
            for group, parameters in zip(optimizer.param_groups, kept, strict=True):
                group["params"] = parameters
            if self._disk:
                state = optimizer.state[flat]
                for kind, tensor in state.items():
                    if isinstance(tensor, Tensor) and tensor.shape == flat.shape:
                        state[kind] = self._disk.moved(tensor)

    def _look_there(self, group: int, flat: Tensor) -> None:
        """Stages 1 and 2 also know each parameter's part of its flat partition: that is elsewhere now."""
        mappings = [getattr(parameter, "_hp_mapping", None) for parameter in self.trained.values()]
        for mapping in mappings:
            if mapping is not None and mapping.param_group_index == group:
                place = mapping.get_hp_fragment_address()
                mapping.hp_fragment = flat.detach()[place.start : place.start + place.numel]

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


class ZeroShards(Shards):
    """Weights as ZeRO-3 holds them: of each an equal slice, the last ones padded."""

    def __init__(self, names: Mapping[str, Any], world: World) -> None:
        self.names, self.world, self.device = names, world, world.device
        large = {name: p for name, p in self.names.items() if not p.ds_persist}
        self.sizes = {name: p.ds_numel for name, p in large.items()}
        self.lengths = {name: p.ds_tensor.ds_numel for name, p in large.items()}
        self._small = [name for name in names if name not in large]

    def small(self) -> dict[str, Tensor]:
        if not self._small:
            return {}
        slices = [self._slice(name) for name in self._small]
        ranks = self.world.join_slices(torch.cat(slices)).view(self.world.size, -1)
        parts = ranks.split([len(part) for part in slices], dim=1)
        # a slice of one element would stay a strided view, of which batch norm's backward makes wrong gradients
        flat = [part.contiguous().view(-1) for part in parts]
        return {n: self._cut(n, whole) for n, whole in zip(self._small, flat, strict=True)}

    def gather(self, name: str) -> Tensor:
        return self._cut(name, self.world.join_slices(self._slice(name)))

    def scatter(self, name: str, gradient: Tensor) -> Tensor:
        flat, full = gradient.reshape(-1), self.lengths[name] * self.world.size
        if flat.numel() < full:
            flat = torch.nn.functional.pad(flat, (0, full - flat.numel()))
        return self.world.sum_to_slices(flat)

    def small_slices(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """This rank's slices of the sums of the small weights' gradients."""
        mine = [name for name in self._small if name in gradients]
        if not mine:
            return {}
        lengths = [self.names[name].ds_tensor.ds_numel for name in mine]
        flat = torch.zeros(self.world.size, sum(lengths), device=self.world.device)
        for name, part in zip(mine, flat.split(lengths, dim=1), strict=True):
            if (gradient := gradients[name]) is not None:
                whole = torch.zeros(part.numel(), device=self.world.device)
                whole[: gradient.numel()] = gradient.flatten()
                part.copy_(whole.view_as(part))
        return dict(zip(mine, self.world.sum_to_slices(flat.view(-1)).split(lengths), strict=True))

    def _slice(self, name: str) -> Tensor:
        return self.names[name].ds_tensor.detach().to(self.world.device)

    def _cut(self, name: str, padded: Tensor) -> Tensor:
        parameter = self.names[name]
        return padded[: parameter.ds_numel].view(parameter.ds_shape)


def configuration(stage: int, strategy: Mapping[str, Any], micro_batches: int) -> dict[str, Any]:
    """DeepSpeed's settings: those that the recipe decides, and the user's own of `strategy.deepspeed`."""
    pinned = torch.cuda.is_available()
    host = {"device": "cpu", "pin_memory": pinned}
    offload = strategy.get("offload", "none")
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": ZERO_BUCKET,
        "allgather_bucket_size": ZERO_BUCKET,
        # each sum goes to the rank that owns it; no weight outlives its use (docs/decisions/0034)
        "use_multi_rank_bucket_allreduce": False,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": ZERO_BUCKET if torch.cuda.is_available() else 0,
        "stage3_param_persistence_threshold": strategy.get(
            "persistence_threshold", PERSISTENCE_THRESHOLD
        ),
    }
    if offload in ("optimizer", "all"):
        zero["offload_optimizer"] = host
    if offload == "all":
        zero["offload_param"] = host
    ours = {
        "train_micro_batch_size_per_gpu": 1,  # counted by us; DeepSpeed only wants a number
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
        "steps_per_print": sys.maxsize,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    return merged(ours, strategy.get("deepspeed", {}))


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
