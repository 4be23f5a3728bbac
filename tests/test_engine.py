"""The engine against plain torch and closed forms: two ranks under every strategy, and one process."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_cases as cases
import pytest
import torch
import torch.nn.functional as F

from dist_train import checkpoint, strategies
from dist_train.engine.norm import global_norm
from dist_train.errors import UserError
from dist_train.forecast import footprint
from dist_train.testing import RankFailed, spawn_ranks
from dist_train.world import World, pin_threads

SHARDED = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
STRATEGIES = ("single", *SHARDED)
LOADERS = ("single", *cases.MOVED)
EXACT = 1e-6  # of sums in another order, in fp32
each = pytest.mark.parametrize("strategy", STRATEGIES)
each_and_varied = pytest.mark.parametrize("strategy", ("single", *cases.STRATEGIES))
LAYERED = ("zero3-layers", "fsdp2-layers")
each_and_layers = pytest.mark.parametrize("strategy", (*STRATEGIES, *LAYERED))
each_way = pytest.mark.parametrize(
    ("strategy", "way"),
    [
        *itertools.product(STRATEGIES, ("streamed", "given")),
        *((name, "given") for name in LAYERED),
    ],
)
streamed_and_given = pytest.mark.parametrize("way", ("streamed", "given"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process measured here, two ranks in one start, then one rank that loads what two have saved."""
    folder, extensions = tmp_path_factory.mktemp("states"), tmp_path_factory.mktemp("extensions")
    pin_threads(1, 1)
    checks = cases.run_checks(World(), ("single",))
    saved = cases.save_all(World(), ("single",), folder)
    environ = {"TORCH_EXTENSIONS_DIR": str(extensions)}
    two = spawn_ranks(
        2, cases.two_ranks, str(folder), str(extensions), environ=environ, timeout=240
    )[0]
    for check, found in two["checks"].items():
        checks[check] |= found
    state = two.pop("state")
    assert "error" not in state, state["error"]
    saved |= state["saved"]
    (one,) = spawn_ranks(1, cases.load_here, list(saved), LOADERS, str(folder), timeout=240)
    loaded = {**state["loaded"], **one}
    return {**two, "checks": checks, "saved": saved, "loaded": loaded, "folder": folder}


Found = Callable[[str, str], dict[str, Any]]


@pytest.fixture
def found(measured: dict[str, Any]) -> Found:
    """What a check found under a strategy."""

    def of(check: str, strategy: str) -> dict[str, Any]:
        result = measured["checks"][check][strategy]
        assert "error" not in result, result["error"]
        return result

    return of


def difference(a: Any, b: Any) -> float:
    """The largest difference of two numbers, tensors or mappings of them."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max(difference(a[key], b[key]) for key in a)
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert x.shape == y.shape
    return float((x - y).abs().max())


# ---------------------------------------------------------------------------------------------------------------------
# What reaches the weights


@functools.cache
def plain_clip(kind: str) -> dict[str, Any]:
    return cases.plain_clip(kind)


@each_way
def test_clipping_by_norm_equals_torch(found: Found, strategy: str, way: str) -> None:
    truth = plain_clip("norm")
    bounds = [math.inf if bound is None else bound for bound in cases.NORMS]
    assert sum(norm > bound for norm, bound in zip(truth["norms"], bounds, strict=True)) == 3
    result = found(f"clip-norm-{way}", strategy)
    assert difference(result["weights"], truth["weights"]) <= EXACT


@each_way
def test_clipping_by_value_equals_torch(found: Found, strategy: str, way: str) -> None:
    result = found(f"clip-value-{way}", strategy)
    assert difference(result["weights"], plain_clip("value")["weights"]) <= EXACT
    assert difference(result["weights"], plain_clip("norm")["weights"]) > 1000 * EXACT


def test_global_norm_keeps_its_digits_however_large_a_tensor_is() -> None:
    """torch's own norm of the largest of these is 5e-5 off."""
    draws = torch.Generator().manual_seed(0)
    shapes = [(3_000_001,), (700, 700), (5, 3, 160, 160), (64 * 1024 - 1,), (7,), (), (0,)]
    tensors = [torch.randn(shape, generator=draws) for shape in shapes]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    exact = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
    assert float(global_norm(tensors, "cpu")) == pytest.approx(exact, rel=3e-7)
    for tensor in tensors[:-1]:
        found = float(global_norm([tensor], "cpu"))
        assert found == pytest.approx(float(tensor.double().norm()), rel=3e-7)


@pytest.mark.parametrize("kind", ("norm", "value"))
@each_way
def test_norm_is_the_global_one_before_clipping(
    found: Found, strategy: str, way: str, kind: str
) -> None:
    result = found(f"clip-{kind}-{way}", strategy)
    assert difference(result["norms"], plain_clip(kind)["norms"]) <= EXACT
    assert difference(result["norms"], result["own_norms"]) <= EXACT


@each_and_varied
def test_project_clamps_the_weights_that_everyone_sees(found: Found, strategy: str) -> None:
    truth, result = cases.plain_project(), found("project", strategy)
    assert difference(result["clamped"], truth["clamped"]) <= EXACT
    assert max(abs(v) for v in torch.tensor(truth["clamped"]["0.weight"]).flatten()) <= 0.1
    for view in ("live", "frozen", "evaluated"):
        assert difference(result[view], truth["live"]) <= EXACT, view
    assert difference(result["after"], truth["after"]) <= EXACT


@each
def test_every_player_and_group_has_its_own_learning_rate(found: Found, strategy: str) -> None:
    result = found("learning-rates", strategy)
    for player, rate in (("generator", 0.25), ("critic", 0.5)):
        for name, moved in result[player].items():
            expected = rate * (2.0 if name.endswith("bias") else 1.0)
            assert moved == pytest.approx(expected, rel=1e-5), (player, name)


@each_and_varied
def test_slices_cover_every_element_once(found: Found, strategy: str) -> None:
    ranks = found("slices", strategy)["ranks"]
    module = cases.normalised()
    shapes = {f"weights/net.{name}": p.shape for name, p in module.named_parameters()}
    for kind in ("exp_avg", "exp_avg_sq"):
        shapes |= {f"optimizer/{kind}/net.{n}": p.shape for n, p in module.named_parameters()}
    shapes |= {f"buffers/net.{name}": b.shape for name, b in module.named_buffers()}
    assert {part[0] for mine in ranks for part in mine} == set(shapes)
    for name, shape in shapes.items():
        parts = [part for mine in ranks for part in mine if part[0] == name]
        assert all(part[4] == list(shape) for part in parts), name
        if any(part[3] for part in parts):  # replicated: whole on every rank
            assert [part[1:4] for part in parts] == [[0, shape.numel(), True]] * len(ranks), name
            continue
        covered = sorted(part[1:3] for part in parts)
        assert [start for start, _ in covered] == [0, *[stop for _, stop in covered[:-1]]], name
        assert covered[-1][1] == shape.numel(), name
    sharded = cases.SPECS[strategy]["name"] in strategies.SHARDED
    assert any(not part[3] for mine in ranks for part in mine) == sharded


@each_and_varied
def test_published_slices_are_what_the_live_network_uses(found: Found, strategy: str) -> None:
    result, target = found("publish", strategy), cases.published()
    assert result["weights"] == cases.numbers(target)  # bit for bit
    module = cases.mlp()
    module.load_state_dict(target)
    assert difference(result["live"], module(cases.batches(1)[0][0]).tolist()) <= EXACT


# ---------------------------------------------------------------------------------------------------------------------
# Double backward, frozen views, ties


@each
def test_double_backward_of_a_streamed_player_names_given(found: Found, strategy: str) -> None:
    refusal = found("double-backward", strategy)["refusal"]
    assert "`given`" in refusal
    assert "\n" not in refusal


@each_and_layers
def test_double_backward_given_equals_plain_torch(found: Found, strategy: str) -> None:
    result = found("double-backward", strategy)
    loss, gradients = cases.plain_gradients(
        cases.mlp(), *cases.batches(1)[0], lambda net, x: cases.penalty(net, x)
    )
    assert result["loss"] == pytest.approx(loss, abs=EXACT)
    assert difference(result["gradients"], cases.numbers(gradients)) <= EXACT
    assert max(float(g.abs().max()) for g in gradients.values()) > 0.01


@each_and_varied
def test_frozen_view_passes_gradients_to_its_input_only(found: Found, strategy: str) -> None:
    truth, result = cases.plain_frozen(), found("frozen", strategy)
    assert result["buffers_untouched"]
    assert result["polluted"] == []
    assert difference(result["generator"], truth["generator"]) <= EXACT
    assert difference(result["critic"], truth["critic"]) <= EXACT
    assert torch.tensor(truth["generator"]["0.weight"]).abs().max() > 0.001


@pytest.mark.parametrize("strategy", ("zero3", "fsdp2"))
def test_a_frozen_view_by_layer_is_the_whole_one_bit_for_bit(found: Found, strategy: str) -> None:
    by_layer, whole = found("frozen", f"{strategy}-layers"), found("frozen", strategy)
    assert by_layer["generator"] == whole["generator"]


@each_way
def test_tied_weights(found: Found, strategy: str, way: str) -> None:
    truth, result = cases.plain_tied(), found(f"tied-{way}", strategy)
    assert difference(result["weights"], truth["weights"]) <= EXACT
    for view in ("own", "frozen", "evaluated"):
        assert difference(result[view], truth["out"]) <= EXACT, view


@each_and_layers
def test_a_buffer_under_two_names_works_in_views(found: Found, strategy: str) -> None:
    result = found("shared-buffer", strategy)
    truth = cases.Scaled()(cases.batches(1)[0][0]).tolist()
    assert difference(result["own"], truth) <= EXACT
    assert difference(result["frozen"], truth) <= EXACT


@each_and_layers
def test_what_is_not_trained_stays(found: Found, strategy: str) -> None:
    result = found("partly-trained", strategy)
    assert result["trained"] == ["net.2.bias", "net.2.weight"]
    assert difference(result["weights"], cases.plain_partly_trained()) <= EXACT
    assert result["weights"]["0.weight"] == cases.numbers(cases.mlp().state_dict())["0.weight"]


# ---------------------------------------------------------------------------------------------------------------------
# Buffers (law 11)


@each_way
def test_running_statistics_take_one_update_a_turn(found: Found, strategy: str, way: str) -> None:
    """running <- 0.9 running + 0.1 * mean over the 4 micro-batches of all ranks of the batch's own statistic."""
    mean, var = torch.zeros(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    for number, turn in enumerate(found(f"norm-{way}", strategy)["turns"]):
        before, after = turn["before"], turn["after"]
        weight, bias = (torch.tensor(before[f"0.{n}"]).double() for n in ("weight", "bias"))
        hidden = torch.tanh(cases.batches(2)[number][0].double() @ weight.T + bias)
        parts = hidden.chunk(cases.MICRO_BATCHES)
        mean = 0.9 * mean + 0.1 * torch.stack([part.mean(0) for part in parts]).mean(0)
        var = 0.9 * var + 0.1 * torch.stack([part.var(0) for part in parts]).mean(0)
        assert difference(after["2.running_mean"], mean.tolist()) <= EXACT
        assert difference(after["2.running_var"], var.tolist()) <= EXACT
        assert before["2.num_batches_tracked"] == number
        assert after["2.num_batches_tracked"] == number + 1


@each_way
def test_spectral_norm_takes_one_power_iteration_a_turn(
    found: Found, strategy: str, way: str
) -> None:
    """u <- normalised(W v), v <- normalised(W' u): once, however many micro-batches there are."""
    norm = "0.parametrizations.weight"
    for turn in found(f"spectral-{way}", strategy)["turns"]:
        weight = torch.tensor(turn["before"][f"{norm}.original"]).double()
        u = F.normalize(weight @ torch.tensor(turn["before"][f"{norm}.0._v"]).double(), dim=0)
        v = F.normalize(weight.T @ u, dim=0)
        assert difference(turn["after"][f"{norm}.0._u"], u.tolist()) <= EXACT
        assert difference(turn["after"][f"{norm}.0._v"], v.tolist()) <= EXACT
        again = F.normalize(weight @ v, dim=0)
        assert difference(again.tolist(), u.tolist()) > 1000 * EXACT, "a second one would not show"


# ---------------------------------------------------------------------------------------------------------------------
# Buckets


@each
def test_parameters_without_gradients(found: Found, strategy: str) -> None:
    truth, result = cases.plain_unused(), found("unused", strategy)
    for ours, plain in zip(result["gradients"], truth["gradients"], strict=True):
        assert difference(ours, plain) <= EXACT
    assert difference(result["weights"], truth["weights"]) <= 10 * EXACT  # Adam magnifies rounding


def test_buckets_start_in_one_order_on_every_rank(found: Found) -> None:
    launched = found("unused", "ddp")["launched"]
    assert launched[0] == launched[1]
    assert len(launched[0]) == 3 * len(launched[0][: len(launched[0]) // 3])
    assert len(launched[0]) // 3 >= 5, "several buckets a turn"
    turn = len(launched[0]) // 3
    assert launched[0][:turn] == launched[0][turn : 2 * turn]  # the same in the second turn


@pytest.fixture(scope="module")
def branched() -> dict[str, Any]:
    module = cases.Branches()
    return cases.numbers(cases.plain_gradients(module, *cases.batches(1)[0], cases.branch_loss)[1])


@pytest.mark.parametrize("strategy", ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2"))
def test_an_output_that_is_a_view_may_be_changed_in_place(found: Found, strategy: str) -> None:
    module = cases.Viewed()
    truth = cases.plain_gradients(module, *cases.batches(1)[0], cases.in_place_loss)[1]
    assert difference(found("in-place", strategy)["gradients"], cases.numbers(truth)) <= EXACT


@streamed_and_given
@pytest.mark.parametrize("strategy", ("single", "ddp", "fsdp2"))
def test_ranks_that_use_different_parameters(
    found: Found, branched: dict[str, Any], strategy: str, way: str
) -> None:
    """Rank 0 takes one branch, rank 1 the other: the sums are right, and nobody waits for ever. (Under fsdp2 both are
    of one block.)"""
    assert difference(found(f"branches-{way}", strategy)["gradients"], branched) <= EXACT


@pytest.mark.parametrize("strategy", ("zero1", "zero2", "zero3"))
def test_ranks_that_use_different_parameters_given(branched: dict[str, Any], strategy: str) -> None:
    result = spawn_ranks(2, cases.branches_alone, strategy, True, timeout=240)[0]
    assert difference(result["gradients"], branched) <= EXACT


def test_frozen_views_whose_weights_have_one_element_a_rank() -> None:
    """A strided weight, as slices come from the others, has batch norm's backward compute something else."""
    truth = cases.plain_frozen()
    for strategy, found in spawn_ranks(4, cases.frozen_of_four, timeout=240)[0].items():
        assert difference(found["generator"], truth["generator"]) <= EXACT, strategy
        assert difference(found["critic"], truth["critic"]) <= EXACT, strategy


def test_ranks_that_use_different_parameters_by_layer_are_refused() -> None:
    """Each gathers what the other does not: all ranks say so before a weight changes."""
    for result in spawn_ranks(2, cases.branches_by_layer, timeout=240):
        assert "view_elements" in result["refusal"]
        assert result["untouched"]


@pytest.mark.parametrize("strategy", ("zero1", "zero2", "zero3"))
def test_ranks_that_use_different_parameters_streamed(
    branched: dict[str, Any], strategy: str
) -> None:
    """DeepSpeed streams them in the order in which they come: an error, or the right sums, but never wrong ones."""
    try:
        result = spawn_ranks(2, cases.branches_alone, strategy, False, timeout=240)[0]
    except (UserError, RankFailed):
        return
    assert difference(result["gradients"], branched) <= EXACT


# ---------------------------------------------------------------------------------------------------------------------
# Precision, and what DeepSpeed is kept from


ROUNDINGS = {"bf16": 2.0**-6, "fp16": 2.0**-9}  # a few roundings to 8 and 11 bits of mantissa


@pytest.mark.parametrize("precision", ROUNDINGS)
@each
def test_16_bits_are_finite_and_near_fp32(found: Found, strategy: str, precision: str) -> None:
    result, bound = found("precisions", strategy), ROUNDINGS[precision]
    low, full = result[precision], result["fp32"]
    assert 0 < abs(low["loss"] - full["loss"]) <= bound * abs(full["loss"])
    norm = 0.0
    for name, gradient in full["gradients"].items():
        assert torch.tensor(low["gradients"][name]).isfinite().all(), name
        norm = math.hypot(norm, float(torch.tensor(gradient).norm()))
    for name, gradient in full["gradients"].items():
        apart = torch.tensor(low["gradients"][name]) - torch.tensor(gradient)
        assert float(apart.norm()) <= bound * norm, name
    weights = low["weights"]["0.weight"]
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert weights != torch.tensor(weights).to(kind).double().tolist(), "weights stay fp32"


@each_way
def test_an_overflow_skips_the_turn_on_every_rank(found: Found, strategy: str, way: str) -> None:
    result = found(f"overflow-{way}", strategy)
    first, spoilt, last = result["states"]
    assert spoilt == first, "weights and running statistics, bit for bit"
    assert last != spoilt
    assert result["norms"][1] == result["norms"][0]
    assert result["scales"] == [2.0**16, 2.0**15, 2.0**15]
    assert result["skipped"] == 1


def test_offload_equals_no_offload_to_the_last_bits(found: Found) -> None:
    for strategy in ("zero1", "zero2", "zero3"):
        kept = found("clip-norm-streamed", strategy)
        variants = [
            name for name in cases.SPECS if re.fullmatch(f"{strategy}-(offload|all|disk)", name)
        ]
        for variant in variants:
            moved = found("clip-norm-streamed", variant)
            assert difference(moved["weights"], kept["weights"]) <= EXACT, variant
            assert difference(moved["norms"], kept["norms"]) <= EXACT, variant


def test_deepspeed_compiles_nothing(measured: dict[str, Any]) -> None:
    assert measured["switch"] is False
    assert measured["built"] == []


@pytest.mark.parametrize("strategy", (*SHARDED, "fsdp2-kept"))
def test_payload_is_what_plan_says(found: Found, strategy: str) -> None:
    """2 P (N - 1) / N under ddp, zero1 and zero2, 3 P (N - 1) / N under zero3 and fsdp2; of two micro-batches zero2
    sums each, and zero3 and fsdp2 do everything for each. Weights that fsdp2 keeps are gathered once."""
    result = found("traffic", strategy)
    step: Any = SimpleNamespace(trained={"net": result["weights"]})
    for micro_batches, payload in result["bytes"].items():
        due = footprint.wire_bytes(step, cases.SPECS[strategy], 2, int(micro_batches), {"net": 1.0})
        assert payload == pytest.approx(due, rel=0.02), micro_batches
    times = result["bytes"]["1"] / (result["weights"] / 2)
    assert times == pytest.approx(3.0 if strategy in ("zero3", "fsdp2") else 2.0, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# State


SAVED = ["single-1", *[f"{strategy}-2" for strategy in cases.MOVED]]
LOADED = [
    *[f"{a} -> {b}-2" for a, b in itertools.product(SAVED, cases.MOVED)],
    *[f"{a} -> {b}-1" for a, b in itertools.product(SAVED, LOADERS)],
]


@pytest.fixture(scope="module")
def digests(measured: dict[str, Any]) -> dict[str, str]:
    return {name: checkpoint.weights_digest(measured["folder"] / name) for name in SAVED}


@pytest.mark.parametrize("move", LOADED)
def test_state_moves_bit_for_bit(
    measured: dict[str, Any], digests: dict[str, str], move: str
) -> None:
    """Saved under one strategy, loaded under another and saved again: weights, moments, buffers, count of steps."""
    source, result = move.partition(" -> ")[0], measured["loaded"][move]
    assert checkpoint.weights_digest(Path(result["folder"])) == digests[source]
    assert result["steps"] == 3.0
    assert result["evaluated"] == measured["saved"][source]


@functools.cache
def plain_adamw(steps: int) -> dict[str, Any]:
    return cases.plain_adamw(steps)


@pytest.mark.parametrize("move", LOADED)
def test_the_step_after_a_move_is_the_next_one(measured: dict[str, Any], move: str) -> None:
    """Moments and bias correction are those of step 4, as in plain AdamW that never stopped."""
    after = measured["loaded"][move]["after"]
    truth = plain_adamw(4)
    assert difference({name: after[name] for name in truth}, truth) <= 10 * EXACT


def test_all_tensors_are_in_the_checkpoint(measured: dict[str, Any]) -> None:
    held = checkpoint.inspect(measured["folder"] / "zero3-2")["tensors"]
    shapes = {f"net.{name}": list(t.shape) for name, t in cases.normalised().named_parameters()}
    for kind in ("weights", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
        assert {n: held[f"{kind}/{n}"]["shape"] for n in shapes} == shapes
    assert any(held[f"weights/{n}"]["parts"] == 2 for n in shapes), "cut between the ranks"
