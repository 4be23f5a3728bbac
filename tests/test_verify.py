"""`verify` finds the bugs that people have, names the tensor, and passes what is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import planted
import pytest

from dist_train.errors import UserError
from dist_train.launch.cli import main
from dist_train.testing import spawn_ranks
from dist_train.verify import RECIPE, STRATEGIES, _strategies, parity, verdict, verify
from dist_train.world import World

STEPS = 3
BUGS = {  # bug: (model, a strategy beside fsdp2, what differs first, part of the cause)
    "WrongLossScale": ("transformer", "zero2", "gradient of step 0, ", "divided by the ranks"),
    "ForgottenReduction": ("resnet", "ddp", "gradient of step 0, ", "not, or not all, summed"),
    "NoBug": ("unseeded", "ddp", "loss of step 0, ", "a generator of the model's own"),
    "RepeatingSampler": ("resnet", "zero1", "samples of step 1, ", "a sampler that repeats"),
    "LocalClip": ("transformer", "ddp", "state of step 0, ", "a local norm"),
    "LocalMean": ("transformer", "zero3", "loss of step 0, ", "its own count (of tokens"),
    "TwiceUpdatedBuffer": ("resnet", "zero2", "state of step 0, buffers/", "2 times as far"),
}


def settings(model: str, strategy: str, data: Path) -> dict[str, Any]:
    recipe = cases.tiny_recipe("resnet" if model == "unseeded" else model, data, micro_batches=4)
    if model == "unseeded":
        recipe = recipe.set("model", {"name": "planted:UnseededDropout"})
    if model == "transformer":  # clipped in every step
        recipe = recipe.set("callbacks.clip_gradients", {"norm": 0.1})
    recipe = recipe.set("callbacks.bug", {"name": "planted:NoBug"})
    return recipe.set("strategy", cases.strategy(strategy)).as_dict()


@pytest.fixture(scope="module")
def found(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("planted"))
    models = sorted({model for model, *_ in BUGS.values()})
    plans = {model: settings(model, "ddp", tiny_data) for model in models}
    (truth,) = spawn_ranks(1, cases.references, plans, folder, STEPS, timeout=240)
    grid = [
        [f"{bug}-{strategy}", model, settings(model, strategy, tiny_data)]
        for bug, (model, own, *_) in BUGS.items()
        for strategy in (own, "fsdp2")
    ]
    return spawn_ranks(2, cases.planted_grid, grid, truth, folder, timeout=240)[0] | {"one": truth}


@pytest.mark.parametrize(
    ("strategy", "own"),
    [
        ("auto", None),
        ({"name": "auto"}, None),
        ({"name": "single"}, None),
        ({"name": "zero2"}, None),
        ({"generator": "zero1", "critic": {"name": "zero1"}}, None),
        ({"generator": "auto", "critic": "zero1"}, [{"name": "ddp"}, {"name": "zero1"}]),
        ({"name": "zero3", "view_elements": 9}, [{"name": "zero3", "view_elements": 9}] * 2),
    ],
    ids=str,
)
def test_the_strategy_of_the_recipe_is_a_row_where_it_is_another(
    tiny_data: Path, strategy: Any, own: list[Any] | None
) -> None:
    recipe = cases.tiny_recipe("wgan_gp", tiny_data, strategy=strategy)
    chosen = _strategies(recipe)
    assert list(chosen) == [*STRATEGIES, RECIPE] if own else [*STRATEGIES]
    if own:
        assert list(recipe.set("strategy", chosen[RECIPE]).strategies.values()) == own


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("fsdp2", (False, True), ids=("own", "fsdp2"))
def test_a_planted_bug_is_found_and_named(found: dict[str, Any], bug: str, fsdp2: bool) -> None:
    _, strategy, first, cause = BUGS[bug]
    result = found[f"{bug}-{'fsdp2' if fsdp2 else strategy}"]
    print(result["first"], "|", result["cause"])
    assert not result["passed"]
    assert result["first"].startswith(first)
    assert cause in result["cause"]


def test_one_process_that_draws_for_itself_does_not_repeat_itself(found: dict[str, Any]) -> None:
    repeat = verdict.judge_repeat(found["one"]["unseeded"]["repeat"])
    assert not verdict.summary(repeat, 1)["passed"]
    for model in ("resnet", "transformer"):
        repeat = verdict.judge_repeat(found["one"][model]["repeat"])
        assert verdict.summary(repeat, 1)["passed"], model
        assert verdict.summary(verdict.judge_floor(found["one"][model]["floor"]), 1)["passed"]


def test_the_bound_follows_the_floor() -> None:
    floor = {"0/gradient/a": [3e-7, 1.0], "free/loss/loss 0": [2e-3, 1.0]}
    found = {
        "0/gradient/a": [2.9e-6, 1.0],
        "0/gradient/b": [2.9e-6, 1.0],
        "free/loss/loss 4": [1.9e-2, 1.0],
    }
    judged = verdict.judge(found, floor)
    assert [one.bound for one in judged] == pytest.approx([3e-6, 1e-6, 2e-2])
    assert [one.broken for one in judged] == [False, True, False]
    assert verdict.summary(judged, 2)["first"] == "gradient of step 0, b"
    for difference, low in ((float("nan"), 0.0), (0.1, 0.1)):  # the second: no floor is so high
        name = "0/loss/model"
        assert verdict.judge({name: [difference, 1.0]}, {name: [low, 1.0]})[0].broken


def test_steps_whose_fp16_gradients_overflow_are_the_same_and_do_not_count(
    tiny_data: Path, tmp_path: Path
) -> None:
    recipe = cases.tiny_recipe("resnet", tiny_data, strategy="single", precision="fp16")
    recipe = recipe.set("objective", {"name": "planted:Loud"}).set("callbacks", {})
    with parity.trainer_of(recipe, World(), tmp_path / "reference") as trainer:
        parity.write_reference(trainer, 2)
        skipped = trainer.engines["model"].loss_scale.skipped
        assert skipped > 0 and trainer.step == 2 + skipped
    with parity.trainer_of(recipe, World(), tmp_path / "again") as trainer:
        found = parity.step_locked(trainer, tmp_path / "reference", 2 + skipped)
    assert sum("overflowed" in name for name in found) == skipped
    assert all(difference == 0 for difference, _ in found.values())


def test_the_command_proves_a_recipe_with_parts_of_its_own(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = cases.tiny_recipe("wgan_gp", tiny_data, duration="9 steps", strategy="zero1")
    recipe = recipe.set("callbacks.bug", {"name": "planted:NoBug"})
    file = tmp_path / "recipe.yaml"
    (tmp_path / "planted.py").write_text(Path(planted.__file__).read_text())
    file.write_text(recipe.to_yaml())
    assert main(["verify", str(file), "--steps", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] and result["steps"] == 3
    names = [row["run"] for row in result["rows"]]
    assert names[2:7] == ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
    assert names[7:] == ["killed, resumed (zero1)", "killed, resumed (zero1 to zero2)"]
    assert [row["verdict"] for row in result["rows"]] == ["pass"] * 9
    assert all(row["worst"]["gradient"]["difference"] <= 1e-6 for row in result["rows"][:6])


def test_the_command_ends_in_1_where_a_recipe_hides_state(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = cases.tiny_recipe("resnet", tiny_data)
    recipe = recipe.set("model", {"name": "planted:UnseededDropout"})
    (tmp_path / "planted.py").write_text(Path(planted.__file__).read_text())
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert main(["verify", str(tmp_path / "recipe.yaml"), "--steps", "2"]) == 1
    out = capsys.readouterr().out
    assert "one process, again: first to differ: loss of step 0, model" in out
    assert "a generator of the model's own" in out
    assert "is in no checkpoint" in out


def test_a_run_too_short_to_be_killed_and_go_on(tiny_data: Path) -> None:
    with pytest.raises(UserError, match="duration: 1 step, expected 2 steps or more: a run is k"):
        verify(cases.tiny_recipe("resnet", tiny_data, duration="1 step").set("callbacks", {}))
    with pytest.raises(UserError, match="--steps 1: expected 2 or more"):
        verify(cases.tiny_recipe("resnet", tiny_data), steps=1)


def test_ranks_that_cannot_share_the_batch(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(cases.tiny_recipe("resnet", tiny_data).to_yaml())
    assert main(["verify", str(file), "--ranks", "3"]) == 2
    assert "ranks that divide them: 2, 4; data.micro_batch for 3 ranks: 1, 2, 4" in (
        capsys.readouterr().err
    )
