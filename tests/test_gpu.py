"""What only a GPU can show. Skipped on a machine without one; the figures are benchmarks/gpu.py's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import engine_cases
import pytest
import torch
from parity_models import family_recipe

from dist_train.callbacks import Callback
from dist_train.diagnose.landscape import landscape
from dist_train.run_directory import RunDirectory
from dist_train.testing import assert_same_run, spawn_ranks, tiny_run
from dist_train.trainer import Trainer
from dist_train.verify import verify

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
STEPS = 8


@pytest.mark.parametrize("model", cases.MODELS)
def test_a_run_that_is_killed_comes_back_bit_for_bit(
    model: str, tiny_data: Path, tmp_path: Path
) -> None:
    recipe = cases.tiny_recipe(model, tiny_data, deterministic=True)
    whole = tiny_run(recipe, tmp_path / "whole", steps=6)
    tiny_run(recipe, tmp_path / "halves", steps=6, until=3)
    halves = tiny_run(recipe, tmp_path / "halves", steps=6, resume="auto")
    assert_same_run(whole, halves)


@pytest.mark.parametrize("model", cases.MODELS)
def test_one_process_is_two_ranks_is_every_stage(model: str, tiny_data: Path) -> None:
    """Two ranks share the GPU, over gloo."""
    found = verify(cases.tiny_recipe(model, tiny_data), ranks=2, steps=3)
    print(found)
    assert found["passed"] and found["device"].startswith("cuda")
    assert [row["run"] for row in found["rows"][2:7]] == list(STRATEGIES)
    assert all(row["verdict"] == "pass" for row in found["rows"])


MORE = ("zero3-layers", "fsdp2-layers", "zero1-offload", "zero2-disk", "zero3-disk")
"""What is run for the Transformer only."""


def alone(data: str, folder: str) -> dict[str, list[float]]:
    """The losses of a rank alone with its GPU, over NCCL, by model, precision and strategy."""
    found = {}
    for model in cases.MODELS:
        for precision in ("fp32", "bf16", "fp16"):
            more = MORE if model == "transformer" and precision != "fp16" else ()
            for name in (*STRATEGIES, *more):
                recipe = cases.tiny_recipe(model, data, precision=precision)
                recipe = recipe.set("strategy", engine_cases.SPECS[name])
                case = f"{model}-{precision}-{name}"
                try:
                    run = tiny_run(recipe, Path(folder) / case, steps=STEPS)
                    rows = RunDirectory.open(run).rows()
                    losses = [v for k, v in rows[-1].items() if k.endswith("loss")]
                    found[case] = losses
                except Exception as error:
                    found[case] = [f"{type(error).__name__}: {error}"]  # type: ignore[list-item]
    return found


def test_every_precision_under_every_stage(tiny_data: Path, tmp_path: Path) -> None:
    (found,) = spawn_ranks(1, alone, str(tiny_data), str(tmp_path), timeout=240)
    print(found)
    for case, losses in found.items():
        model, precision, _ = case.split("-", maxsplit=2)
        bound = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 2e-2}[precision]
        exact = found[f"{model}-fp32-ddp"]
        assert losses == pytest.approx(exact, rel=bound, abs=bound), case


class NoWaiting(Callback):
    """From step 3 to the one before the next row, whatever waits for the GPU is an error."""

    def step_begins(self, run: Trainer) -> None:
        if run.step == 3:
            torch.cuda.set_sync_debug_mode("error")

    def step_ends(self, run: Trainer) -> None:
        if run.step == STEPS - 1:
            torch.cuda.set_sync_debug_mode("default")

    def run_ends(self, run: Trainer) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", cases.MODELS)
def test_no_step_waits_for_the_gpu(
    model: str, precision: str, tiny_data: Path, tmp_path: Path
) -> None:
    from dist_train import run

    recipe = cases.tiny_recipe(model, tiny_data, precision=precision, strategy="single")
    recipe = recipe.set("log.every", f"{STEPS} steps").set("duration", f"{STEPS} steps")
    recipe = recipe.set("callbacks.checkpoint", None).set("callbacks.ema", {"decay": 0.9})
    recipe = recipe.set("callbacks.no_waiting", {"name": "test_gpu:NoWaiting"})
    try:
        run.train(recipe, run_dir=tmp_path / "run")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("model", ["resnet", "wgan_gp"])
def test_images_are_transformed_on_the_gpu(model: str, tiny_data: Path, tmp_path: Path) -> None:
    """The same draws and the same pixels as on the CPU."""
    recipe = cases.tiny_recipe(model, tiny_data, strategy="single", deterministic=True)
    crop = {"train": [{"name": "random_crop", "size": 8, "padding": 1}]}
    rows = []
    for where in ("cpu", "device"):
        here = recipe.set("data.transforms", crop | ({"on": where} if where == "device" else {}))
        run = tiny_run(here, tmp_path / where, steps=STEPS)
        rows.append([v for k, v in RunDirectory.open(run).rows()[-1].items() if "loss" in k])
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)


def test_the_landscape_is_that_of_the_cpu(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics of batch norm are on the GPU; checkpoints and evaluation batches come from the CPU."""
    recipe = cases.tiny_recipe("resnet", tiny_data, strategy="single")
    section = {"split": "test", "every": f"{STEPS} steps", "metrics": ["loss"]}
    run = tiny_run(recipe.set("evaluate", section), tmp_path / "run", steps=STEPS)
    here = landscape(run, batches=1, steps=2, grid=3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    there = landscape(run, batches=1, steps=2, grid=3)
    assert here["loss"] == pytest.approx(there["loss"], rel=1e-3)
    assert here["gradient_norm"] == pytest.approx(there["gradient_norm"], rel=1e-2)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_graphs_compute_what_their_kernels_compute(
    precision: str, micro_batches: int, tiny_data: Path, tmp_path: Path
) -> None:
    """A GAN with batch norm, three turns a step: the same losses with graphs and without, and none is left out."""
    recipe = family_recipe("DCGAN", tiny_data, micro_batches, "norm").set("strategy", "single")
    recipe = recipe.set("precision", precision)
    counters = torch._dynamo.utils.counters
    losses = []
    for compiled in (True, "cuda_graphs"):
        torch._dynamo.reset()
        counters.clear()
        run = tiny_run(recipe.set("compile", compiled), tmp_path / str(compiled), steps=STEPS)
        losses.append([v for k, v in RunDirectory.open(run).rows()[-1].items() if "loss" in k])
    print(dict(counters["inductor"]), losses)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def four(data: str, folder: str) -> dict[str, float]:
    """The last loss of four ranks that share the GPU, by strategy."""
    found = {}
    for name in ("ddp", "zero3-layers", "fsdp2-layers", *engine_cases.FOUR_RANKS):
        recipe = cases.tiny_recipe("wgan_gp", data).set("strategy", engine_cases.SPECS[name])
        run = tiny_run(recipe, Path(folder) / name, steps=STEPS)
        row = RunDirectory.open(run).rows()[-1]
        found[name] = next(v for k, v in row.items() if k.endswith("loss"))
    return found


def test_four_ranks_that_share_a_gpu_are_sharded_in_every_way(
    tiny_data: Path, tmp_path: Path
) -> None:
    found = spawn_ranks(4, four, str(tiny_data), str(tmp_path), timeout=240)[0]
    print(found)
    for name, loss in found.items():
        assert loss == pytest.approx(found["ddp"], rel=1e-4, abs=1e-5), name


def test_a_gpu_and_a_cpu_agree(tiny_data: Path, tmp_path: Path) -> None:
    """Without dropout and noise, whose draws differ between devices."""
    recipe = cases.tiny_recipe("resnet", tiny_data, strategy="single", duration="4 steps")
    recipe = recipe.set("log.every", "1 step")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    rows: dict[str, list[dict[str, Any]]] = {}
    for device, visible in (("gpu", "0"), ("cpu", "")):
        words = ["train", str(tmp_path / "recipe.yaml"), "--run-dir", str(tmp_path / device)]
        subprocess.run(
            [sys.executable, "-m", "dist_train", *words],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": visible},
            check=True,
            timeout=120,
        )
        rows[device] = RunDirectory.open(tmp_path / device).rows()
    for gpu, cpu in zip(rows["gpu"], rows["cpu"], strict=True):
        assert gpu["loss"] == pytest.approx(cpu["loss"], rel=1e-4)
