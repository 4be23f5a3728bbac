"""G3: a linear bottleneck spans the principal components; damage and sparsity are what they say; a linear probe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_objectives import TURN, Micro, loss_of

from dist_train.diagnose.linear_probe import accuracy, linear_probe
from dist_train.errors import UserError
from dist_train.models.autoencoder import Autoencoder, ConvAutoencoder
from dist_train.networks import Networks
from dist_train.objectives.reconstruction import Reconstruction, damaged
from dist_train.recipe import Recipe
from dist_train.run import train


def test_a_linear_bottleneck_spans_the_principal_components() -> None:
    torch.manual_seed(0)
    scales = torch.tensor([3.0, 2.5, 2.0, 0.7, 0.5, 0.4, 0.3, 0.2], dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    x = (torch.randn(400, 8, dtype=torch.float64) * scales) @ rotation
    x = x - x.mean(dim=0)
    model = Autoencoder(8, code_dim=3, depth=0).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=150, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        error = loss_of(Reconstruction(), model, Micro(image=x))
        error.backward()
        return error

    optimizer.step(loss)
    components = torch.linalg.svd(x, full_matrices=False)[2][:3].T  # (8, 3)
    decoder, encoder = model.decoder[0].weight, model.encoder[0].weight
    for spanned in (decoder, encoder.T):  # what the decoder can make, and what the encoder keeps
        basis = torch.linalg.qr(spanned)[0]
        cosines = torch.linalg.svdvals(components.T @ basis).clamp(max=1)
        assert cosines.arccos().max() < 1e-2
    left = torch.linalg.svdvals(x)[3:].square().sum() / x.numel()
    assert loss().item() == pytest.approx(left.item(), rel=1e-4)


def test_damage_is_on_the_input_alone_and_sparsity_is_the_mean_size_of_the_code() -> None:
    torch.manual_seed(0)
    seen = []

    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(x)
        return x.flatten(1)[:, :5], torch.zeros_like(x)

    x = torch.rand(64, 1, 16, 16) + 1
    objective = Reconstruction(sparsity=0.5, noise=0.3, masking=0.25)
    loss, logged = objective.loss(TURN, Networks({"model": model}), Micro(image=x), {})
    torch.testing.assert_close(logged["reconstruction"], x.square().mean())
    expected = x.square().mean() + 0.5 * seen[0].flatten(1)[:, :5].abs().mean()
    torch.testing.assert_close(loss, expected)
    gone = seen[0] == 0
    assert gone.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert (seen[0] - x)[~gone].std().item() == pytest.approx(0.3, abs=0.01)
    loss, _ = objective.loss(
        TURN,
        Networks({"model": model}),
        Micro(image=x),
        {"sparsity": 0.0, "noise": 0.0, "masking": 0.0},
    )
    torch.testing.assert_close(seen[1], x)  # a schedule has turned all three off
    torch.testing.assert_close(loss, x.square().mean())
    assert damaged(x, 0.0, 0.0) is x


def test_shapes_of_code_and_reconstruction() -> None:
    for model in (
        Autoencoder(2 * 64, code_dim=5, depth=2, width=8, code_activation="relu"),
        ConvAutoencoder(5, width=4, hidden=8, channels=2, image_size=8),
    ):
        code, reconstruction = model(torch.randn(3, 2, 8, 8))
        assert code.shape == (3, 5)
        assert reconstruction.shape == (3, 2, 8, 8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"sparsity": -1.0}, "sparsity"), ({"noise": -1.0}, "noise"), ({"masking": 1.0}, "masking")],
)
def test_what_is_out_of_range_is_named(settings: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Reconstruction(**settings)


def test_probe_finds_what_a_line_can_tell() -> None:
    torch.manual_seed(0)
    label = torch.arange(300) % 3
    centres = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]])
    x = centres[label] + torch.randn(300, 2)
    assert accuracy(x[:200], label[:200], x[200:], label[200:]) > 0.95
    ring = torch.randn(300, 2)
    inside = (ring.norm(dim=1) > 1).long()  # no line tells a disc from a ring around it
    assert accuracy(ring[:200], inside[:200], ring[200:], inside[200:]) < 0.75


def test_probe_of_a_run(tiny_data: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        project="tests",
        duration="120 steps",
        strategy="single",
        threads=1,
        data={"path": str(tiny_data / "digits"), "global_batch": 50, "micro_batch": 50},
        model={"name": "autoencoder", "code_dim": 12, "depth": 0, "in_features": "auto"},
        objective={"name": "reconstruction"},
        optimizer={"name": "adam", "learning_rate": 1e-2},
        callbacks={"checkpoint": {"every": "120 steps"}},
    )
    train(recipe, run_dir=tmp_path / "run")
    found = linear_probe(tmp_path / "run", split="test")
    assert found["numbers"] == 12
    assert found["samples"] > 0
    print(found)
    assert 0.6 < found["accuracy"] <= 1
    assert 0.6 < found["accuracy_of_inputs"] <= 1
