"""`diagnose learning-rate`: the sweep, its end, and what it suggests."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import cases
import pytest

from dist_train.callbacks.rate_sweep import RateSweep, steepest
from dist_train.diagnose.sweep_rate import sweep_rate
from dist_train.errors import UserError
from dist_train.launch.cli import main
from dist_train.run_directory import RunDirectory
from dist_train.testing import tiny_run
from dist_train.world import pin_threads


def test_the_suggestion_is_where_the_loss_falls_fastest() -> None:
    """A logistic fall by the logarithm of the rate, centred at 0.01, which breaks above 1."""
    rates = [1e-5 * 10 ** (i / 40) for i in range(241)]
    curve = [
        (rate, 2 / (1 + math.exp(3 * math.log10(rate / 0.01))) + max(0.0, rate - 1) ** 2)
        for rate in rates
    ]
    assert steepest(curve) == pytest.approx(0.01, rel=0.15)
    rising = [(rate, 1 + i) for i, rate in enumerate(rates)]
    assert steepest(rising) == rates[0]


def test_a_sweep_goes_up_until_the_loss_breaks(tiny_data: Path, tmp_path: Path) -> None:
    pin_threads(1, 1)
    recipe = cases.tiny_recipe("resnet", tiny_data, strategy="single")
    recipe = recipe.set("callbacks.clip_gradients", None).set("log.every", "1 step")
    found = sweep_rate(recipe, low=1e-4, high=1e3, steps=80, run_dir=tmp_path / "sweep")
    told = json.loads((tmp_path / "sweep" / "learning-rate.json").read_text())
    rates = [rate for rate, _ in told["points"]]
    ratio = (1e3 / 1e-4) ** (1 / 79)
    assert all(b / a == pytest.approx(ratio) for a, b in itertools.pairwise(rates))
    assert 10 < len(rates) < 80  # it broke on the way
    assert "broke at a learning rate of" in found["broke"] or "not finite" in found["broke"]
    assert rates[0] <= found["suggested"] < rates[-1]
    assert Path(found["plot"]).read_bytes()[:4] == b"\x89PNG"
    assert not list((tmp_path / "sweep" / "checkpoints").iterdir())
    suggested = recipe.set("callbacks.learning_rate_decay", None)
    run = tiny_run(
        suggested, tmp_path / "run", steps=60, optimizer__learning_rate=found["suggested"]
    )
    losses = [row["loss"] for row in RunDirectory(run).rows()]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_by_the_command(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = cases.tiny_recipe("transformer", tiny_data, strategy="single")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    arguments = ["diagnose", "learning-rate", str(file), "--steps", "20", "--to", "0.1"]
    arguments += ["--run-dir", str(tmp_path / "run"), "--json"]
    assert main(arguments) == 0
    assert 1e-6 <= json.loads(capsys.readouterr().out.splitlines()[-1])["suggested"] <= 0.1


def test_mistakes(tiny_data: Path, tmp_path: Path) -> None:
    gan = cases.tiny_recipe("wgan_gp", tiny_data, strategy="single")
    with pytest.raises(UserError, match="needs one player, but there are generator, critic"):
        sweep_rate(gan, run_dir=tmp_path / "gan")
    with pytest.raises(UserError, match=r"expected rates 0 < from < to, got 1\.0 and 0\.1"):
        RateSweep(1.0, 0.1)
