"""The profiler's window, counted FLOPs, and the shares of a step."""

from __future__ import annotations

import gzip
import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch

from dist_train.callbacks.throughput import matmul_ceiling
from dist_train.forecast.hardware import device_like
from dist_train.run_directory import RunDirectory
from dist_train.testing import spawn_ranks, tiny_run


def test_a_window_of_steps_is_traced(tiny_data: Path, tmp_path: Path) -> None:
    recipe = cases.tiny_recipe("wgan_gp", tiny_data, strategy="single")
    recipe = recipe.set("callbacks.profiler", {"steps": 2, "start": 1, "shapes": True})
    run_dir = tiny_run(recipe, tmp_path / "run", steps=4)
    (file,) = (run_dir / "profile").glob("*")
    assert file.name == "rank-0-step-1.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert (
        names.count("Optimizer.step#Adam.step") == 3
    )  # a critic's, a critic's and a generator's turn
    assert "aten::convolution_backward" in names


def test_a_window_beyond_the_end_is_written_as_far_as_it_came(
    tiny_data: Path, tmp_path: Path
) -> None:
    recipe = cases.tiny_recipe("resnet", tiny_data, strategy="single")
    recipe = recipe.set("callbacks.profiler", {"steps": 100, "start": 2})
    run_dir = tiny_run(recipe, tmp_path / "run", steps=4)
    assert (run_dir / "profile" / "rank-0-step-2.json.gz").exists()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for row in RunDirectory(path).rows() if "tflops_per_second" in row]


def test_flops_are_those_of_the_layers(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear layer of 64 x 10 and a batch of 24: 2 B n m forward, as much for the weights' gradient backward; by a
    clock that moves on by 100 s each time it is looked at, which is once a step."""
    clock = SimpleNamespace(perf_counter=itertools.count(0.0, 100.0).__next__)
    monkeypatch.setattr("dist_train.callbacks.throughput.time", clock)
    recipe = cases.tiny_recipe("resnet", tiny_data, strategy="single").set("callbacks", {})
    recipe = recipe.set("model", {"name": "planted:UnseededDropout"})
    recipe = recipe.set("callbacks.throughput", {})
    path = tiny_run(recipe, tmp_path / "run", steps=6)
    rows = rows_of(path)
    assert [row["step"] for row in rows] == [2, 3, 4, 5, 6]  # the first is counted
    for row in rows:
        assert row["tflops_per_second"] * 1e12 == pytest.approx(2 * 2 * 24 * 64 * 10 / 100)
        assert row["mfu"] == pytest.approx(2 * 2 * 24 * 64 * 10 / (2 * 1024**3), rel=1e-3)
        assert 0 <= row["share/data"] <= 1 and 0 <= row["share/callbacks"] <= 1


def test_ranks_add_up(tiny_data: Path, tmp_path: Path) -> None:
    recipe = cases.tiny_recipe("transformer", tiny_data, duration="8 steps")
    recipe = recipe.set("callbacks.throughput", {}).set("log.every", "2 steps")
    spawn_ranks(
        2, cases.train_cases, [[recipe.as_dict(), str(tmp_path / "run"), None]], timeout=240
    )
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert all(0 < row["share/communication"] < 1 for row in rows)


def test_the_ceiling_is_a_measurement() -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    ceiling = matmul_ceiling(torch.float32)
    assert 1e9 < ceiling < 1e13
    assert time.perf_counter() - began < 30


def test_drivers_names_are_known() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-80GB": "a100-80g",
        "NVIDIA A100-SXM4-40GB": "a100",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "Tesla V100-SXM2-32GB": "v100",
        "NVIDIA L40S": "l40s",
        "NVIDIA GH200 144G HBM3e": "h200",
        "NVIDIA A100 80GB PCIe": "a100-80g",
        "NVIDIA H200": "h200",
    }
    for reported, name in names.items():
        found = device_like(reported)
        assert found is not None and found.name == name, reported
    for reported in (
        "Some Other Card",
        "NVIDIA L40",
        "NVIDIA A10G",
        "NVIDIA RTX A1000",
        "NVIDIA T400",
    ):
        assert device_like(reported) is None, reported
