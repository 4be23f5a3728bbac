"""`clip_gradients: {suggest: true}` (F7): the bound that it names, from the norms that it saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import pytest
import torch

from dist_train import checkpoint
from dist_train.report import RunRecord, verdict
from dist_train.run_directory import RunDirectory
from dist_train.testing import assert_same_run, tiny_run
from dist_train.world import pin_threads


def clipping(data: Path, spec: dict[str, Any] | None, model: str = "resnet") -> Any:
    pin_threads(1, 1)
    recipe = cases.tiny_recipe(model, data, strategy="single")
    return recipe.set("callbacks.clip_gradients", spec)


def test_the_suggested_bound_acts_on_one_step_in_20(tiny_data: Path, tmp_path: Path) -> None:
    recipe = clipping(tiny_data, {"norm": 0.5, "suggest": True})
    whole = tiny_run(recipe, tmp_path / "whole", steps=12)
    rows = RunDirectory(whole).rows()
    norms = torch.tensor([row["gradient_norm"] for row in rows], dtype=torch.float64)
    for i, row in enumerate(rows, 1):
        assert row["suggested_norm"] == pytest.approx(float(norms[:i].quantile(0.95)))
        assert row["share_clipped"] == pytest.approx(float((norms[:i] > 0.5).double().mean()))
    assert 0 < rows[-1]["share_clipped"] < 1
    text = " ".join(verdict(RunRecord.read(whole)))
    assert "would act on one step in 20; the present bound acted on" in text
    tiny_run(recipe, tmp_path / "halves", steps=12, until=7)
    assert_same_run(whole, tiny_run(recipe, tmp_path / "halves", steps=12, resume="auto"))
    last = RunDirectory(tmp_path / "halves").rows()[-1]
    assert last["suggested_norm"] == rows[-1]["suggested_norm"]


def test_watching_changes_nothing(tiny_data: Path, tmp_path: Path) -> None:
    plain = tiny_run(clipping(tiny_data, None, "wgan_gp"), tmp_path / "plain", steps=4)
    watched = tiny_run(
        clipping(tiny_data, {"suggest": True}, "wgan_gp"), tmp_path / "watched", steps=4
    )
    assert checkpoint.weights_digest(plain) == checkpoint.weights_digest(watched)
    row = RunDirectory(watched).rows()[-1]
    assert {"generator/suggested_norm", "critic/suggested_norm"} <= set(row)
    assert "critic/share_clipped" not in row
