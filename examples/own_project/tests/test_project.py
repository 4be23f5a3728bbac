"""The project's own parts, trained for a few steps on the real data."""

from pathlib import Path

import torch
from own_project.objectives import focal_loss

from dist_train.recipe import Recipe
from dist_train.run import train

RECIPE = Path(__file__).parents[1] / "digits.yaml"


def test_focal_loss_without_focus_is_cross_entropy():
    logits, labels = torch.randn(8, 3), torch.arange(8) % 3
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(focal_loss(logits, labels, gamma=0.0), expected)


def test_training_learns_and_logs_images(tmp_path):
    quick = ["duration=60 steps", "threads=1", "callbacks.filters.every=20 steps"]
    result = train(Recipe.load(RECIPE, quick), run_dir=tmp_path / "run")
    assert result["results"]["evaluate/accuracy"] > 0.7  # chance: 0.1
    images = (tmp_path / "run" / "samples").glob("filters-*.png")
    assert [image.stem[-2:] for image in sorted(images)] == ["20", "40", "60"]
