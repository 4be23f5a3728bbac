"""Every model x objective: documented shapes, a gradient everywhere, a falling loss, exact resume, 2 ranks = 1 rank."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import mean
from typing import Any

import curriculum
import pytest
import torch

from dist_train.components import CATALOGUE
from dist_train.data import evaluation_batches
from dist_train.data_shards.tokens import ByteTokenizer
from dist_train.testing import assert_same_run, spawn_ranks
from dist_train.trained import restore
from dist_train.trained.predict import predict

STEP_LOCKED = 1e-6
every_case = pytest.mark.parametrize("case", curriculum.CASES)


@pytest.fixture(scope="module")
def folder(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curriculum")
    curriculum.pack_pictures(tiny_data / "pictures")
    curriculum.pack_pairs(tiny_data / "pairs")
    return folder


@pytest.fixture(scope="module")
def alone(tiny_data: Path, folder: Path) -> dict[str, Any]:
    return spawn_ranks(1, curriculum.alone, str(tiny_data), str(folder), timeout=250)[0]


@pytest.fixture(scope="module")
def together(tiny_data: Path, folder: Path, alone: dict[str, Any]) -> dict[str, Any]:
    return spawn_ranks(2, curriculum.together, str(tiny_data), str(folder), timeout=250)[0]


PLAYERS_OF = {
    "classification": [*curriculum.ON_IMAGES, "recurrent_classifier"],
    "regression": curriculum.ON_IMAGES,
    "language_modelling": [
        *("transformer", "recurrent_language_model", "temporal_convolution", "captioner")
    ],
    "translation": curriculum.TRANSLATORS,
    "wgan_gp": ["conv_generator-conv_critic"],
    "gan": [
        "mlp_generator-mlp_discriminator",
        "dcgan_generator-dcgan_discriminator",
        "biggan_generator-biggan_discriminator",
    ],
    "cyclegan": ["translator-patch_discriminator"],
    "reconstruction": ["autoencoder", "conv_autoencoder"],
    "elbo": [
        "vae_encoder-vae_decoder",
        "vae_conv_encoder-vae_conv_decoder",
        "vae_table-vae_conv_decoder",
    ],
    "likelihood": ["nice", "realnvp"],
    "autoregression": ["pixel_cnn", "row_lstm", "pixel_transformer", "pixel_cnn-mlp"],
}
"""The models that give what an objective takes: a vector a picture, logits a token, a picture and its score."""


def test_every_registered_model_is_trained_by_every_objective_that_can() -> None:
    assert set(PLAYERS_OF) == set(CATALOGUE["objective"])
    named = {name for models in PLAYERS_OF.values() for one in models for name in one.split("-")}
    assert named == set(CATALOGUE["model"])
    pairs = {f"{model}-{objective}" for objective, models in PLAYERS_OF.items() for model in models}
    assert pairs == set(curriculum.CASES)
    for name, case in curriculum.CASES.items():
        assert "-".join([*curriculum.networks_of(case), case["objective"]["name"]]) == name


@every_case
def test_shapes_are_as_documented(alone: dict[str, Any], case: str) -> None:
    found = alone[case]["shapes"]
    for name, shape in curriculum.CASES[case]["shapes"].items():
        assert tuple(found[name]) == shape, name


@every_case
def test_every_weight_gets_a_gradient(alone: dict[str, Any], case: str) -> None:
    assert alone[case]["without_gradient"] == []


@every_case
def test_loss_is_finite_and_falls(alone: dict[str, Any], case: str) -> None:
    losses = alone[case]["losses"]
    assert len(losses) == curriculum.LEARNS.get(case, 30)
    assert all(map(math.isfinite, losses))
    assert mean(losses[-5:]) < mean(losses[:5]) - 0.05 * abs(mean(losses[:5]))


@every_case
def test_resumed_is_unbroken(alone: dict[str, Any], folder: Path, case: str) -> None:
    assert_same_run(folder / case / "whole", folder / case / "halves")


@every_case
def test_two_ranks_are_one(together: dict[str, Any], case: str) -> None:
    found = together[case]
    print(case, found)
    assert found["samples"][0] == 0
    for kind in ("loss", "gradient"):
        difference, where = found[kind]
        assert difference <= STEP_LOCKED, where


def test_a_captioner_names_pictures(
    alone: dict[str, Any], folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """What `predict` writes is, letter by letter, the likeliest after those before."""
    run_dir = folder / "captioner-language_modelling" / "whole"
    found = predict(run_dir, tiny_data / "pictures", tmp_path / "names.csv")
    with (tmp_path / "names.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert found["inputs"] == len(rows) == 200
    trainer = restore(run_dir)
    model = trainer.view().model
    micro = next(iter(evaluation_batches(trainer.recipe, trainer.world, "test")))
    tokens = micro["tokens"][:, :1]
    for _ in range(3):
        tokens = torch.cat([tokens, model(tokens, micro["image"])[:, -1:].argmax(dim=-1)], dim=1)
    texts = [ByteTokenizer().decode(row).decode(errors="replace") for row in tokens.tolist()]
    assert set(texts) <= {row["text"] for row in rows}
