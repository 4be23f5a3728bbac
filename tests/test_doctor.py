"""What doctor finds, and whom a smoke test names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_train.launch import doctor
from dist_train.launch.cli import main
from dist_train.launch.smoke import bad


def test_this_machine_is_smoke_tested(capfd: pytest.CaptureFixture[str]) -> None:
    """Really: two ranks multiply, reduce, and send to each other."""
    words = ["--nodes", "1", "--ranks-per-node", "2", "--seconds", "1", "--json"]
    code = main(["doctor", *words])
    found = json.loads(capfd.readouterr().out)
    assert code == (1 if found["bad"] else 0)  # on a busy machine one of the two may be slow
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    for rank in found["ranks"]:
        assert rank["tflops"] > 0 and rank["reduce_gb_s"] > 0 and rank["link_gb_s"] > 0
        assert not rank["wrong_sums"] and len(rank["checksums"]) == 1
    assert found["ranks"][0]["checksums"] == found["ranks"][1]["checksums"]


def test_one_machine_is_one_node(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--nodes", "2"]) == 2
    assert "expected 1, or --on slurm" in capfd.readouterr().err


def rank(number: int, **changes: Any) -> dict[str, Any]:
    good = {"device": "H100", "tflops": 700.0, "checksums": [1.5], "clock": 100.0}
    good |= {"reduce_gb_s": 40.0, "link_gb_s": 20.0, "wrong_sums": False}
    return {"rank": number, "host": f"node-{number}", **good, **changes}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"tflops": 500.0}, "500 TFLOP/s, the others 700"),
        ({"checksums": [1.25]}, "differs from the others"),
        ({"checksums": [1.5, 1.75]}, "several results"),
        ({"wrong_sums": True}, "wrong sum"),
        ({"clock": 103.0}, "+3.0 s off"),
    ],
)
def test_a_bad_node_is_named_and_why(changes: dict[str, Any], word: str) -> None:
    found = bad([rank(0), rank(1), rank(2, **changes), rank(3)])
    assert list(found) == ["node-2"]
    assert word in found["node-2"][0]


def test_of_two_that_multiply_differently_either_may_be_wrong() -> None:
    found = bad([rank(0), rank(1, checksums=[1.25])])
    assert list(found) == ["node-0", "node-1"]
    assert all("its product differs from the others'" in told for [told] in found.values())


def test_a_bad_link_is_that_of_the_node_on_both_its_sides() -> None:
    slow = {"link_gb_s": 2.0}  # into node-2, and from it into node-3
    found = bad([rank(0), rank(1), rank(2, **slow), rank(3, **slow), rank(4)])
    assert list(found) == ["node-2"]
    assert "2 GB/s to its neighbours, usual are 20" in found["node-2"][0]


def test_good_nodes_are_left_alone() -> None:
    assert bad([rank(n) for n in range(4)]) == {}
    assert bad([rank(0), rank(1, device="A100", tflops=250.0, checksums=[2.0])]) == {}
    assert bad([rank(0)]) == {}


def test_shards_are_digested(
    tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--shards", str(tiny_data / "text"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["damage_of_shards"] == []


def test_what_cannot_be_reached_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("PATH", "/nowhere")
    found = doctor.examine()
    assert found["ray"].startswith("no: http://127.0.0.1:9")
    assert found["slurm"].startswith("no: ")
    assert found["clock_skew_seconds"] < 60
