"""What one rank holds under each strategy, at the worst moment of a step (docs/plan.md has the formulas)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dist_train.engine.layers import VIEW_ELEMENTS
from dist_train.engine.zero import ZERO_BUCKET
from dist_train.forecast.tracing import Step
from dist_train.forecast.views import NOTHING_SEEN, Seen
from dist_train.recipe import Recipe
from dist_train.recipe.checks import SHARDED_WEIGHTS, WHOLE_TENSORS
from dist_train.strategies import SHARDED

FASTEST_FIRST: tuple[dict[str, Any], ...] = (
    {"name": "single"},
    {"name": "ddp"},
    {"name": "zero1"},
    {"name": "zero2"},
    {"name": "zero3"},
    {"name": "zero3", "offload": "optimizer"},
    {"name": "zero3", "offload": "all"},
)
"""Each needs less memory than those before it, and more traffic or more waiting."""
BYTES = 4  # of a weight: networks are fp32 under every precision
BUCKET = BYTES * ZERO_BUCKET
RESERVED = 0.08
"""The share of a GPU's memory that is left to its driver, its libraries and fragmentation."""


def rank_memory(
    step: Step, strategy: Mapping[str, Any], ranks: int, micro_batches: int
) -> dict[str, int]:
    """Bytes of one rank by what they are for.

    Args:
        step: what one process holds, as traced.
        micro_batches: how many a rank takes in a step; the data of all of them are there at once.
    """
    name, offload = strategy["name"], strategy.get("offload", "none")
    players = len(step.weights)
    weights, trained = sum(step.weights.values()), sum(step.trained.values())
    state = sum(step.optimizer.values())
    held = {"buffers": step.buffers, "batch": step.batch * micro_batches}
    if name == "single" and micro_batches == 1:
        # a player's gradients come while its activations go; those of the others are still there
        others = trained - min(step.trained.values())
        update = trained - others + step.update
        return held | {
            "weights": weights,
            "optimizer": state,
            "gradients": others,
            "activations": max(step.with_gradients, update),
        }
    if name in ("single", "ddp"):
        peak = max(step.activations, step.update)
        return held | {
            "weights": weights,
            "optimizer": state,
            "gradients": trained,
            "activations": peak,
        }
    if name == "fsdp2":
        return held | _fsdp2(step, strategy, strategy.get("shard_degree", ranks), micro_batches)
    part, frozen = -(-trained // ranks), weights - trained
    on_host = offload != "none"
    held["optimizer"] = (
        0 if on_host else -(-state // ranks) + part
    )  # with the fp32 weights it updates
    accumulated = micro_batches > 1
    if name == "zero3":
        # layer by layer; of other players' networks, which a turn sees frozen, what their views keep besides
        kept = BYTES * strategy.get("view_elements", VIEW_ELEMENTS)
        seen = (w if w <= kept else min(w, kept + step.largest) for w in step.weights.values())
        gathered = step.largest if players == 1 else sum(seen)
        scattered = 2 * min(trained, max(BUCKET, step.largest))
        held["weights"] = gathered + (0 if offload == "all" else part + -(-frozen // ranks))
        held["gradients"] = part
        held["buckets"] = players * BUCKET + scattered
        held["activations"] = max(step.activations, part - scattered)
    else:
        held["weights"] = weights
        # its own of this micro-batch, which the rank of the last layers has early, and what it has summed so far
        summed = 0 if not accumulated else part if name == "zero2" else trained - part
        held["gradients"] = part + summed
        held["buckets"] = BUCKET  # one player at a time
        # or the update, when gradients and bucket are gone: this rank's own, flat, twice
        held["activations"] = max(step.activations, 2 * part - held["gradients"] - BUCKET)
    return held


def _fsdp2(
    step: Step, strategy: Mapping[str, Any], group: int, micro_batches: int
) -> dict[str, int]:
    """Its shards; what is gathered and scattered at once; the networks of other players, which a turn sees frozen.

    The gradients of a first micro-batch come while its activations go.
    """
    weights, trained = sum(step.weights.values()), sum(step.trained.values())
    others = 0 if len(step.weights) == 1 else weights
    keeps = not strategy.get("reshard_after_forward", True)
    gathered = max(step.weights.values()) if keeps else step.rest + step.block
    part, forward = -(-trained // group), step.activations
    if micro_batches == 1:
        forward = max(part, forward + (step.with_gradients - forward) // group)
    return {
        "weights": -(-weights // group) + gathered + others,
        "optimizer": -(-sum(step.optimizer.values()) // group),
        "gradients": part if micro_batches > 1 else 0,
        "buckets": step.rest + 2 * step.block,  # gradients, and what is scattered of them
        "activations": max(forward, -(-step.update // group)),
    }


def fits(memory: Mapping[str, int], limit: float) -> bool:
    return sum(memory.values()) <= limit


def besides(recipe: Recipe, ranks: int) -> list[dict[str, Any]]:
    """What `auto` does not choose from and `plan` shows all the same: fsdp2 as the recipe has it."""
    own = [dict(s) for s in recipe.strategies.values() if s["name"] == "fsdp2"]
    possible = ranks > 1 and len(candidates(recipe, ranks)) > 1
    return (own or [{"name": "fsdp2"}])[:1] if possible else []


def candidates(recipe: Recipe, ranks: int) -> list[dict[str, Any]]:
    """The strategies that this recipe can have on so many ranks, the fastest first.

    One rank has nobody to share with: it is `single`, or it moves what it holds to the host.
    """
    found: list[dict[str, Any]] = []
    whole = any(optimizer["name"] in WHOLE_TENSORS for optimizer in recipe.optimizers.values())
    for strategy in FASTEST_FIRST:
        alone, offloads = strategy["name"] == "single", "offload" in strategy
        if alone if ranks > 1 else not alone and not offloads:
            continue
        if (whole or recipe.placement) and strategy["name"] in SHARDED:
            continue
        if recipe.members and strategy["name"] in SHARDED_WEIGHTS:
            continue
        found.append(dict(strategy))
    return found


def fastest(
    choices: Iterable[dict[str, Any]], step: Step, ranks: int, micro_batches: int, limit: float
) -> dict[str, Any] | None:
    """The first of `choices` whose rank fits into `limit` bytes."""
    fitting = (s for s in choices if fits(rank_memory(step, s, ranks, micro_batches), limit))
    return next(fitting, None)


def wire_bytes(
    step: Step,
    strategy: Mapping[str, Any],
    ranks: int,
    micro_batches: int,
    turns: Mapping[str, float],
    seen: Seen = NOTHING_SEEN,
) -> float:
    """Payload that a rank hands to collectives in a step, on average: what a ring moves.

    ZeRO-2 sums its gradients over the ranks after each micro-batch; ZeRO-3 and FSDP2 gather their weights twice
    besides, FSDP2 once a step where it keeps them. Across its groups it sums once a step what a rank holds.
    Gradients that are given are summed once a turn; under ZeRO-3, which gathers the weights for that, or by the views.

    Args:
        turns: how often each player has a turn in a step.
        seen: what views send.
    """
    name, group = strategy["name"], strategy.get("shard_degree", ranks)
    gathers = 2.0 * micro_batches if strategy.get("reshard_after_forward", True) else 1.0
    times = {
        "single": 0.0,
        "ddp": 2.0,
        "zero1": 2.0,
        "zero2": micro_batches + 1.0,
        "zero3": 3.0 * micro_batches,
        "fsdp2": micro_batches + gathers,
    }[name]
    at_once = {"zero2": 2.0, "zero3": 2.0, "fsdp2": 1.0}.get(name, times)
    sent, summed = 0.0, seen.scattered  # over the ranks of a group; across the groups
    for player, often in turns.items():
        if player not in seen.by_layer:
            size = step.trained[player] * often
            sent += size * (at_once if player in seen.given else times)
            summed += size
    if name in SHARDED_WEIGHTS:
        sent += seen.gathered + seen.scattered
    across = 2.0 / group * (ranks // group - 1) / (ranks // group)
    return sent * (group - 1) / group + summed * across
