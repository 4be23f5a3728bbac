"""What is fsdp2's own: hybrid sharding on four ranks, blocks that ranks use differently, what cannot be shared out.

What it has in common with the other strategies is in test_engine.py, test_parity_grid.py, test_crossings.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_cases as cases
import pytest
from test_engine import EXACT, difference

from dist_train import checkpoint
from dist_train.errors import UserError
from dist_train.forecast import footprint
from dist_train.strategies import check_ranks, check_strategy
from dist_train.testing import spawn_ranks
from dist_train.world import World, pin_threads

HYBRID = "fsdp2-hybrid"


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four ranks as two groups of two, and one process that loads what they saved."""
    folder = tmp_path_factory.mktemp("states")
    pin_threads(1, 1)
    saved = cases.save_all(World(), ("single",), folder)
    found = spawn_ranks(4, cases.four_ranks, str(folder), timeout=240)
    loads = [f"{HYBRID}-4"], ["single", "fsdp2", "zero3"]
    (one,) = spawn_ranks(1, cases.load_here, *loads, str(folder), timeout=240)
    loaded = found[0].pop("loaded") | one
    return {"ranks": found, "saved": saved | found[0]["saved"], "loaded": loaded, "folder": folder}


def test_hybrid_clips_by_the_norm_of_one_group(hybrid: dict[str, Any]) -> None:
    for way, kind in (("streamed", "norm"), ("given", "norm"), ("streamed", "value")):
        truth = cases.plain_clip(kind)
        for rank in hybrid["ranks"]:
            result = rank[f"clip-{kind}-{way}"]
            assert difference(result["weights"], truth["weights"]) <= EXACT, (way, kind)
            assert difference(result["norms"], truth["norms"]) <= EXACT, (way, kind)
            assert difference(result["norms"], result["own_norms"]) <= EXACT, (way, kind)


def test_hybrid_groups_hold_the_same_to_the_bit(hybrid: dict[str, Any]) -> None:
    first, *others = hybrid["ranks"]
    for check in ("clip-norm-streamed", "clip-norm-given", "tied-streamed", "project"):
        assert all(rank[check] == first[check] for rank in others), check


def test_hybrid_agrees_with_one_process_elsewhere(hybrid: dict[str, Any]) -> None:
    result = hybrid["ranks"][3]
    project, frozen = cases.plain_project(), cases.plain_frozen()
    assert difference(result["project"]["after"], project["after"]) <= EXACT
    assert difference(result["frozen"]["critic"], frozen["critic"]) <= EXACT
    assert difference(result["tied-streamed"]["weights"], cases.plain_tied()["weights"]) <= EXACT
    assert result["publish"]["weights"] == cases.numbers(cases.published())
    for ours, plain in zip(
        result["unused"]["gradients"], cases.plain_unused()["gradients"], strict=True
    ):
        assert difference(ours, plain) <= EXACT
    assert result["overflow-streamed"]["scales"] == [2.0**16, 2.0**15, 2.0**15]
    states = result["overflow-streamed"]["states"]
    assert states[1] == states[0] != states[2]


def test_hybrid_writes_every_element_once(hybrid: dict[str, Any]) -> None:
    ranks = hybrid["ranks"][0]["slices"]["ranks"]
    module = cases.normalised()
    for name, parameter in module.named_parameters():
        full = f"weights/net.{name}"
        covered = sorted(tuple(part[1:3]) for mine in ranks for part in mine if part[0] == full)
        assert [start for start, _ in covered] == [0, *[stop for _, stop in covered[:-1]]], name
        assert covered[-1][1] == parameter.numel(), name
    writing = [any(part[0].startswith("weights/") for part in mine) for mine in ranks]
    assert writing == [True] * 4, "the groups take turns"


def test_hybrid_payload(hybrid: dict[str, Any]) -> None:
    """Within a group of S ranks 3 P (S - 1) / S a micro-batch, and once a step each rank sums its P / S over the R
    groups: 2 P / S (R - 1) / R."""
    result = hybrid["ranks"][0]["traffic"]
    weights = result["weights"]
    step: Any = SimpleNamespace(trained={"net": weights})
    for count in (1, 2):
        due = 3 * count * weights / 2 + 2 * weights / 2 / 2
        spec = cases.SPECS[HYBRID]
        assert footprint.wire_bytes(step, spec, 4, count, {"net": 1.0}) == due
        assert result["bytes"][str(count)] == pytest.approx(due, rel=0.02), count


def test_deepspeeds_own_secondary_shards_compute_the_same(hybrid: dict[str, Any]) -> None:
    """`zero_hpz_partition_size` gathers for backward within a group of 2 of the 4 ranks."""
    result = hybrid["ranks"][0]
    for way in ("streamed", "given"):
        truth = cases.plain_clip("norm")["weights"]
        assert difference(result[f"hpz-clip-norm-{way}"]["weights"], truth) <= EXACT
    traffic = result["hpz-traffic"]
    due = traffic["weights"] * (2 * 3 / 4 + 1 / 2)
    assert traffic["bytes"]["1"] == pytest.approx(due, rel=0.02)


@pytest.mark.parametrize(
    "move",
    [
        *(f"{a} -> {HYBRID}-4" for a in (f"{HYBRID}-4", "single-1")),
        *(f"{HYBRID}-4 -> {b}-1" for b in ("single", "fsdp2", "zero3")),
    ],
)
def test_hybrid_state_moves_bit_for_bit(hybrid: dict[str, Any], move: str) -> None:
    source, result = move.partition(" -> ")[0], hybrid["loaded"][move]
    due = checkpoint.weights_digest(hybrid["folder"] / source)
    assert checkpoint.weights_digest(Path(result["folder"])) == due
    assert result["steps"] == 3.0
    truth = cases.plain_adamw(4)
    after = {name: result["after"][name] for name in truth}
    assert difference(after, truth) <= 10 * EXACT


def test_ranks_that_use_different_blocks_are_told() -> None:
    """Collectives are paired by their order: blocks of one size would silently be taken for each other."""
    for way in ("forward", "backward"):
        assert set(spawn_ranks(2, cases.at_odds, way, True, timeout=240)) == {""}
    for told in spawn_ranks(2, cases.at_odds, "forward", False, timeout=240):
        assert "called other blocks" in told and "\n" not in told


def test_compiled_blocks_are_gathered_too() -> None:
    """torch's hooks stand outside of a compiled block, and break the graph of a compiled network at each."""
    found = spawn_ranks(2, cases.compiled, timeout=240)[0]
    for what in ("blocks", "network"):
        assert found[what]["frames"] >= 2
        assert difference(found[what]["weights"], found["nothing"]["weights"]) <= EXACT


def test_what_cannot_be_shared_out_is_refused() -> None:
    (told,) = spawn_ranks(1, cases.single_number, timeout=240)
    assert "net.temperature is a single number" in told
    assert "choose zero3 or ddp" in told
    assert "without a call" in spawn_ranks(2, cases.at_odds, "weight", True, timeout=240)[0]


def test_settings() -> None:
    check_strategy({"name": "fsdp2", "shard_degree": 8, "reshard_after_forward": False}, "strategy")
    for wrong, words in (
        ({"shard_degree": 0}, "strategy.shard_degree: got 0, expected a whole number"),
        ({"shard_degree": True}, "strategy.shard_degree: got True"),
        ({"reshard_after_forward": 2}, "expected true or false"),
        ({"shard_degre": 2}, "did you mean 'shard_degree'"),
        ({"offload": "optimizer"}, "strategy.offload"),
        ({"deepspeed": {}}, "unknown key"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            check_strategy({"name": "fsdp2", **wrong}, "strategy")
        assert "\n" not in str(caught.value)
    mics = {"zero_optimization": {"mics_shard_size": 2}}
    with pytest.raises(UserError, match="has removed MiCS"):
        check_strategy({"name": "zero3", "deepspeed": mics}, "strategy")
    with pytest.raises(UserError, match="does not divide 4 ranks; these would: 1, 2, 4"):
        check_ranks({"name": "fsdp2", "shard_degree": 3}, 4, "strategy")
    check_ranks({"name": "fsdp2", "shard_degree": 2}, 4, "strategy")


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.11.0+cu130")
    with pytest.raises(
        UserError, match=r"strategy: fsdp2 needs torch 2\.13 or later, here is 2\.11"
    ):
        check_strategy({"name": "fsdp2"}, "strategy")
    check_strategy({"name": "zero3"}, "strategy")
