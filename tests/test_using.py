"""What was trained can be evaluated, drawn from, looked at and carried away, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from safetensors.torch import load_file

from dist_train import components
from dist_train.launch.cli import main
from dist_train.run import train
from dist_train.trained import restore

CARED_FOR = {"split": "test", "every": "3 steps", "best": "loss", "mode": "min", "weights": "ema"}


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of each model, in this process."""
    folder = tmp_path_factory.mktemp("using")
    for model in cases.MODELS:
        recipe = cases.tiny_recipe(model, tiny_data, strategy="single", duration="6 steps")
        if model != "wgan_gp":
            recipe = recipe.set("evaluate", {**CARED_FOR, "metrics": ["loss"]})
        else:
            recipe = recipe.set(
                "callbacks.samples", {"every": "3 steps", "count": 4, "weights": "ema"}
            )
        train(recipe, run_dir=folder / model)
    return folder


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Any:
    capsys.readouterr()
    assert main([str(word) for word in words] + ["--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("model", ["resnet", "transformer"])
def test_evaluate_gives_the_figure_of_the_run(
    runs: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = cases.RunDirectory(runs / model).rows()[-1]["evaluate/loss"]
    assert call(capsys, "evaluate", runs / model)["results"] == {"loss": logged}


def test_generate_draws_the_same_for_the_same_seed(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [
        call(
            capsys,
            "generate",
            runs / "transformer",
            "--out",
            tmp_path / "a.txt",
            "--prompt",
            "The ",
            "--seed",
            seed,
        )
        for seed in ("1", "1", "2")
    ]
    assert texts[0]["text"] == texts[1]["text"] != texts[2]["text"]
    assert (tmp_path / "a.txt").read_bytes().startswith(b"The ") and len(
        (tmp_path / "a.txt").read_bytes()
    ) == 68
    asked = ["generate", runs / "transformer", "--out", tmp_path / "b.txt", "--prompt", "The "]
    ways = [["--temperature", "0"], ["--beam", "1"], ["--beam", "3", "--length-power", "0"]]
    ways += [["--temperature", "0.5", "--top-k", "3", "--top-p", "0.9"]]
    found = [call(capsys, *asked, "--count", "20", *way)["text"] for way in ways]
    assert found[0] == found[1] and all(text.startswith("The ") for text in found)
    for wrong, message in [
        (["--top-k", "3"], "temperature above 0"),
        (["--beam", "0"], "beam must be 1 or more"),
        (["--prefix", "a"], "write them there"),
    ]:
        assert main([str(word) for word in [*asked, *wrong]]) == 2
        assert message in capsys.readouterr().err
    pictures = call(
        capsys, "generate", runs / "wgan_gp", "--out", tmp_path / "a.png", "--count", "4"
    )
    assert pictures["images"] == 4 and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("model", cases.MODELS)
def test_export_gives_back_the_network(
    runs: Path, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / model
    written = call(capsys, "checkpoint", "export", runs / model, out)["written"]
    trainer = restore(runs / model)
    average = "ema" if model != "wgan_gp" else "live"
    for name, folder in written.items():
        config = json.loads((Path(folder) / "config.json").read_text())
        network = components.build("model", config["model"], "model").eval()
        network.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        inputs = {
            "generator": torch.randn(3, 8),
            "model": torch.randint(0, 256, (3, 9))
            if model == "transformer"
            else torch.randn(3, 1, 8, 8),
        }.get(name, torch.randn(3, 1, 8, 8))
        with torch.no_grad():
            assert torch.equal(network(inputs), trainer.view(average)[name](inputs))
    assert main(["checkpoint", "export", str(runs / model), str(out)]) == 2  # it never overwrites


def test_checkpoints_are_inspected_checked_and_compared(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = call(capsys, "checkpoint", "inspect", runs / "wgan_gp")
    assert found["step"] == 6 and any(
        name.startswith("callbacks/ema/generator.") for name in found["tensors"]
    )
    assert list(call(capsys, "checkpoint", "check", runs / "wgan_gp").values()) == [[]]
    same = call(capsys, "checkpoint", "diff", runs / "resnet", runs / "resnet")
    assert same["identical"] and set(same["differences"].values()) == {0.0}


def test_samples_come_from_fixed_noise(runs: Path) -> None:
    names = sorted(path.name for path in (runs / "wgan_gp" / "samples").iterdir())
    assert names == ["generator-00000003.png", "generator-00000006.png"]


def test_report_is_one_file_with_the_figures(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    call(capsys, "report", runs / "resnet", runs / "wgan_gp", "--out", out)
    text = out.read_text()
    assert (
        "resnet" in text
        and "wgan_gp" in text
        and "http://" not in text.replace("http://www.w3.org", "")
    )
