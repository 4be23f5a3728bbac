"""Programs that `checkpoint export` writes, run here beside what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import pytest
import torch

from dist_train.errors import UserError
from dist_train.launch.cli import main
from dist_train.testing import tiny_run
from dist_train.trained import export as exports
from dist_train.trained import restore
from dist_train.trained.export import export
from dist_train.world import pin_threads


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pin_threads(1, 1)
    folder = tmp_path_factory.mktemp("runs")
    return {
        model: tiny_run(
            cases.tiny_recipe(model, tiny_data, strategy="single"), folder / model, steps=3
        )
        for model in cases.MODELS
    }


def inputs(model: str, count: int) -> dict[str, tuple[torch.Tensor, ...]]:
    torch.manual_seed(count)
    return {
        "resnet": {"model": (torch.randn(count, 1, 8, 8),)},
        "transformer": {"model": (torch.randint(256, (count, 7 + count)),)},
        "wgan_gp": {
            "generator": (torch.randn(count, 8),),
            "critic": (torch.randn(count, 1, 8, 8),),
        },
    }[model]


def run_pt2(folder: Path, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.export.load(folder / "model.pt2").module()(*given)


def run_onnx(folder: Path, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [entry.name for entry in session.get_inputs()]
    (found,) = session.run(None, {n: x.numpy() for n, x in zip(names, given, strict=True)})
    return torch.from_numpy(found)


@pytest.mark.parametrize("format", ("pt2", "onnx"))
@pytest.mark.parametrize("model", cases.MODELS)
def test_a_program_does_what_the_run_does(
    runs: dict[str, Path], tmp_path: Path, model: str, format: str
) -> None:
    """At batch sizes 1 and 5, and for text of other lengths than it was traced with."""
    if format == "onnx":
        pytest.importorskip("onnxscript")
    result = export(runs[model], tmp_path / "out", weights="ema", format=format)
    assert all(difference <= exports.TOLERANCE for difference in result["differences"].values())
    view = restore(runs[model]).view("ema")
    execute = run_pt2 if format == "pt2" else run_onnx
    for count in (1, 5):
        for name, given in inputs(model, count).items():
            folder = tmp_path / "out" / name if model == "wgan_gp" else tmp_path / "out"
            expected = view[name](*given)
            torch.testing.assert_close(execute(folder, given), expected, rtol=1e-4, atol=1e-5)
            assert json.loads((folder / "config.json").read_text())["step"] == 3
            assert f"model.{format}" in (folder / "README.md").read_text()


def test_a_program_that_differs_is_refused(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exports._write_pt2

    def wrong(*arguments: Any) -> Any:
        program = right(*arguments)
        return lambda *inputs: program(*inputs) * 1.001

    monkeypatch.setattr(exports, "_write_pt2", wrong)
    with pytest.raises(
        UserError, match="'model': the program that was written gives other outputs"
    ):
        export(runs["resnet"], tmp_path / "out", format="pt2")


def test_the_command_names_the_formats(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["checkpoint", "export", str(runs["resnet"]), out, "--format", "onx"]) == 2
    assert "expected one of hf, pt2, onnx, did you mean 'onnx'" in capsys.readouterr().err
