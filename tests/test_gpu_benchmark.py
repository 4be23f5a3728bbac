"""`benchmarks/gpu.py` runs as a whole where there is no GPU, in miniature."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_in_miniature(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--small", "--json", "--out", out]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(out.read_text())
    assert all(value > 0 for value in found["limits"].values())
    for name in ("gpt2-124m", "gpt-1.3b", "resnet-50", "dcgan-64"):
        work = found[name]
        assert work[f"{work['unit']}_per_second"] > 0, name
        assert work[f"raw_{work['unit']}_per_second"] > 0, name
        assert work["tflops_per_second"] > 0 and work["bytes_foreseen"] > 4 * work["parameters"]
        assert work["bytes_measured"] is None and work["mfu"] is None  # no GPU
    # 6 N + 12 L d T a token, N without the table of positions
    work, n = found["gpt2-124m"], found["gpt2-124m"]["parameters"]
    flops = 6 * (n - 32 * 32) + 12 * 2 * 32 * 32
    assert work["tflops_per_second"] * 1e12 / flops == pytest.approx(
        work["tokens_per_second"], rel=1e-3
    )


def test_the_time_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--small", "--minutes", "0", "--out", out]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert json.loads(out.read_text())["dcgan-64"] == {"left_out": "the 0 minutes were over"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: no GPU here; --device cpu --small runs the miniature\n"
