"""Before the queue: what a recipe would hold, compute, send and cost on other machines than this."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from dist_train import assembly
from dist_train.callbacks.learning_rate_decay import LearningRateDecay
from dist_train.data import data_folders
from dist_train.duration import Duration
from dist_train.errors import UserError
from dist_train.forecast import footprint
from dist_train.forecast.auto import GIB
from dist_train.forecast.hardware import Device
from dist_train.forecast.tracing import Step, foresee, turns_per_step
from dist_train.forecast.views import Seen, seen_in_a_step
from dist_train.recipe import Recipe
from dist_train.recipe.checks import check_shard_degrees
from dist_train.strategies import AUTO, SHARDED
from dist_train.trainer import Trainer

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def plan(
    recipe: Recipe, device: Device, *, nodes: int = 1, per_node: int = 1, price: float | None = None
) -> dict[str, Any]:
    """Batches, learning rate, and for each strategy memory, traffic, time and cost of a run; plain data.

    Args:
        device: what each rank runs on. per_node: how many of them a node has.
        price: of one device for one hour.
    Raises: UserError for a batch that so many ranks cannot share, or a step that cannot be foreseen.
    """
    recipe.check_components()
    ranks = nodes * per_node
    share = shared_out(recipe, ranks)
    data_folders(recipe)  # packed now: files cannot be mapped where every tensor is fake
    step, trainer = foresee(recipe, assembly.build_one, micro_batches=min(share, 2))
    steps = _real_length(trainer, recipe)
    often = turns_per_step(trainer.objective.turns)
    other = _other_size(recipe, ranks)
    second = foresee(recipe, assembly.build_one, other, min(share, 2))[0] if other else step
    limit = device.memory * GIB * (1 - footprint.RESERVED)
    libraries = {"libraries": device.workspaces * 2**20}  # of what is reserved
    rows: list[dict[str, Any]] = []
    choices = footprint.candidates(recipe, ranks)
    for strategy in [*choices, *footprint.besides(recipe, ranks)]:
        held = footprint.rank_memory(step, strategy, ranks, share)
        seen = seen_in_a_step(recipe, assembly.build_one, trainer, strategy, share)
        rows.append(
            {
                "strategy": named(strategy),
                "memory": held | libraries,
                "total": sum(held.values()) + sum(libraries.values()),
                "fits": footprint.fits(held, limit),
                "largest_micro_batch": _largest(
                    recipe, strategy, ranks, (step, second), other, limit
                ),
                **_time(recipe, step, strategy, device, nodes, per_node, share, often, seen),
            }
        )
    auto = footprint.fastest(choices, step, ranks, share, limit)
    flops = _flops(step, often) / step.micro_batches * share * ranks
    batch, micro = recipe.data.global_batch, recipe.data.micro_batch
    found: dict[str, Any] = {
        "recipe": recipe.name,
        "device": device.name,
        "nodes": nodes,
        "ranks": ranks,
        "batch": f"{batch} = {micro} x {ranks} ranks x {share} accumulation",
        "parameters": {player: size // 4 for player, size in step.weights.items()},
        "steps": steps,
        "epochs": steps * batch / trainer.samples_per_epoch,
        "learning_rate": _rates(trainer, recipe, steps),
        "flops_per_step": flops,
        "strategies": rows,
        "auto": named(auto) if auto else None,
        "limit": limit,
    }
    taken = next((row for row in rows if auto and row["strategy"] == named(auto)), None)
    if taken is not None:
        hours = taken["seconds_per_step"] * steps / 3600
        found["hours"] = hours
        peak = device.flops_per_second(recipe.precision, recipe.tf32) * ranks
        found["mfu"] = flops / taken["seconds_per_step"] / peak
        if price is not None:
            found["cost"] = hours * ranks * price
    return found


def check_fit(recipe: Recipe, ranks: int, limit: float, where: str) -> int:
    """Raise UserError, with what would fit, where a rank needs more than its `limit` bytes; returns the bytes of a
    checkpoint's weights, optimiser and buffers.

    Of players under several strategies the leanest counts; under DeepSpeed settings of one's own nothing is refused.
    """
    share = shared_out(recipe, ranks)
    data_folders(recipe)  # packed now: files cannot be mapped where every tensor is fake
    step, trainer = foresee(recipe, assembly.build_one, micro_batches=min(share, 2))
    saved = sum(
        part.tensor.numel() * part.tensor.element_size()
        for engine in trainer.engines.values()
        for _, part in engine.slices()
    )
    own = list(recipe.strategies.values())
    choices = footprint.candidates(recipe, ranks)
    asked = choices if any(strategy["name"] == AUTO for strategy in own) else own
    if any("deepspeed" in strategy for strategy in asked):
        return saved
    needs = [sum(footprint.rank_memory(step, s, ranks, share).values()) for s in asked]
    need = min(needs)
    if need <= limit:
        return saved
    strategy = asked[needs.index(need)]
    other = _other_size(recipe, ranks)
    second = foresee(recipe, assembly.build_one, other, min(share, 2))[0] if other else step
    largest = _largest(recipe, strategy, ranks, (step, second), other, limit)
    fitting = footprint.fastest(choices, step, ranks, share, limit)
    remedies = [f"strategy {named(fitting)}"] if fitting else []
    remedies += [f"data.micro_batch {largest}"] if largest else []
    raise UserError(
        f"memory: a rank needs {need / GIB:.3g} GiB under {named(strategy)}, and {where} has {limit / GIB:.3g} for it;"
        f" {' or '.join(remedies) or 'only more ranks or a smaller model'} would fit"
    )


def shared_out(recipe: Recipe, ranks: int) -> int:
    """How many micro-batches each of `ranks` ranks takes; UserError, with what would divide, where they do not, or
    where groups of `shard_degree` ranks do not."""
    check_shard_degrees(recipe, ranks)
    count = recipe.data.global_batch // recipe.data.micro_batch
    if count % ranks:
        fitting = [str(n) for n in range(1, count + 1) if count % n == 0]
        raise UserError(
            f"{count} micro-batches ({recipe.data.global_batch} / {recipe.data.micro_batch}) do not share out over"
            f" {ranks} ranks; these numbers of ranks divide them: {', '.join(fitting)}"
        )
    return count // ranks


def _real_length(trainer: Trainer, recipe: Recipe) -> int:
    """The steps of the run, whose batch is larger than that of the foreseen step."""
    turns = trainer.objective.turns
    steps = Duration.parse(recipe.duration).steps(
        samples=trainer.samples_per_epoch,
        global_batch=recipe.data.global_batch,
        tokens=trainer.tokens_per_epoch,
        turns=lambda player, step: sum(turn.player == player for turn in turns(step)),
    )
    trainer.total_steps, trainer.global_batch = steps, recipe.data.global_batch
    return steps


def _rates(trainer: Trainer, recipe: Recipe, steps: int) -> dict[str, list[float]]:
    """The learning rate of each player at 0, 25, 50, 75 and 100 % of the run."""
    schedules = [c for c in assembly.make_callbacks(recipe) if isinstance(c, LearningRateDecay)]
    for schedule in schedules:
        schedule.run_begins(trainer)
    rates: dict[str, list[float]] = {player: [] for player in trainer.engines}
    for point in POINTS:
        trainer.step = min(steps - 1, round(point * steps))
        for schedule in schedules:
            schedule.step_begins(trainer)
        for player, engine in trainer.engines.items():
            rates[player].append(float(engine.param_groups[0]["lr"]))
    return rates


def _other_size(recipe: Recipe, ranks: int) -> int | None:
    """Another micro-batch that would share out, to see how memory grows with its size."""
    sizes = _sizes(recipe, ranks)
    others = [size for size in sizes if size != recipe.data.micro_batch]
    return min(others, key=lambda size: abs(math.log(size / recipe.data.micro_batch)), default=None)


def _sizes(recipe: Recipe, ranks: int) -> list[int]:
    return [
        n
        for n in _divisors(recipe.data.global_batch)
        if recipe.data.global_batch % (n * ranks) == 0
    ]


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _largest(
    recipe: Recipe,
    strategy: Mapping[str, Any],
    ranks: int,
    traced: tuple[Step, Step],
    other: int | None,
    limit: float,
) -> int | None:
    """The largest micro-batch that fits: memory is taken to grow in a straight line through two traced sizes."""
    size = recipe.data.micro_batch
    fitting = []
    for candidate in _sizes(recipe, ranks):
        count = recipe.data.global_batch // candidate // ranks
        here = sum(footprint.rank_memory(traced[0], strategy, ranks, count).values())
        if other is not None:
            there = sum(footprint.rank_memory(traced[1], strategy, ranks, count).values())
            here += round((there - here) * (candidate - size) / (other - size))
        elif candidate != size:
            continue
        if here <= limit:
            fitting.append(candidate)
    return max(fitting, default=None)


def _time(
    recipe: Recipe,
    step: Step,
    strategy: Mapping[str, Any],
    device: Device,
    nodes: int,
    per_node: int,
    micro_batches: int,
    often: Mapping[tuple[str, int], float],
    seen: Seen,
) -> dict[str, float]:
    """Seconds of a step at the roofline: every operation as fast as arithmetic or memory allows, all traffic hidden
    behind them where it is shorter."""
    peak = device.flops_per_second(recipe.precision, recipe.tf32)
    seconds = partial(_seconds, peak=peak, bandwidth=device.bandwidth * 1e9)
    ranks = nodes * per_node
    compute = sum(seconds(step.turns[key]) * n for key, n in often.items() if key in step.turns)
    compute *= micro_batches / step.micro_batches
    update = sum(seconds(step.updates[key]) * n for key, n in often.items() if key in step.updates)
    players: dict[str, float] = {}
    for (player, _), n in often.items():
        players[player] = players.get(player, 0.0) + n
    wire = footprint.wire_bytes(step, strategy, ranks, micro_batches, players, seen)
    link = device.network if nodes > 1 else device.link
    compute += update / (strategy.get("shard_degree", ranks) if strategy["name"] in SHARDED else 1)
    return {
        "wire_bytes_per_step": wire,
        "compute_seconds": compute,
        "wire_seconds": wire / (link * 1e9),
        "seconds_per_step": max(compute, wire / (link * 1e9)),
    }


def _seconds(work: Any, peak: float, bandwidth: float) -> float:
    return work.seconds(peak, bandwidth)


def _flops(step: Step, often: Mapping[tuple[str, int], float]) -> float:
    return sum(step.turns[key].flops * n for key, n in often.items() if key in step.turns)


def named(strategy: Mapping[str, Any]) -> str:
    """`zero3`, `zero3 + optimizer on the host`, or `fsdp2 in groups of 8`."""
    if "shard_degree" in strategy:
        return f"{strategy['name']} in groups of {strategy['shard_degree']}"
    offload = strategy.get("offload")
    where = {None: "", "all": " + all on the host"}.get(offload, f" + {offload} on the host")
    return f"{strategy['name']}{where}"
