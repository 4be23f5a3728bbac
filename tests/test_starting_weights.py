"""Starting weights: every kind of source, under every strategy, is exactly what one loads by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import weights_cases as cases
from cases import tiny_recipe
from safetensors.torch import load_file, save_file

from dist_train import checkpoint, components, run
from dist_train.errors import UserError
from dist_train.recipe import Recipe
from dist_train.recipe.sections import Rename
from dist_train.starting_weights.match import fit
from dist_train.testing import assert_same_run, spawn_ranks, tiny_run
from dist_train.trained.export import export
from dist_train.world import World, pin_threads


@pytest.fixture(scope="module")
def places(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run, and its weights in every form that can be loaded."""
    pin_threads(1, 1)
    folder = tmp_path_factory.mktemp("weights")
    run.train(tiny_recipe("resnet", tiny_data, duration="3 steps"), run_dir=folder / "run")
    export(folder / "run", folder / "export", weights="live")
    export(folder / "run", folder / "averaged", weights="ema")
    tensors = load_file(folder / "export" / "model.safetensors")
    save_file(tensors, folder / "plain.safetensors")
    shutil.copy(folder / "averaged" / "model.safetensors", folder / "average.safetensors")
    renamed = {
        "head.kernel" if name == "classifier.weight" else f"trunk.{name}": t
        for name, t in tensors.items()
    }
    save_file(renamed, folder / "renamed.safetensors")
    (folder / "parts").mkdir()
    names = sorted(tensors)
    place = {}
    for part, chosen in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in chosen}, folder / "parts" / part)
        place |= dict.fromkeys(chosen, part)
    index = {"metadata": {}, "weight_map": place}
    (folder / "parts" / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def found(places: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    environ = {"TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("extensions"))}
    one = cases.load_all(World(), str(tiny_data), str(places), ("single",))
    (two, _) = spawn_ranks(
        2, cases.two_ranks, str(tiny_data), str(places), environ=environ, timeout=200
    )
    return one | two


@pytest.mark.parametrize("spread", ("single", *cases.STRATEGIES))
@pytest.mark.parametrize("source", cases.sources(""))
def test_what_is_loaded_is_what_one_loads_by_hand(
    found: dict[str, Any], places: Path, spread: str, source: str
) -> None:
    """A frozen stem included."""
    different, evaluated = found[f"{spread}/{source}"]
    assert different == []
    folder = places / ("averaged" if source == "average" else "export")
    config = json.loads((folder / "config.json").read_text())
    network = components.build("model", config["model"], "model").eval()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    expected = network(torch.linspace(-1, 1, 64).view(1, 1, 8, 8))
    torch.testing.assert_close(torch.tensor(evaluated), expected)


def fine_tune(data: Path, weights: dict[str, Any], **settings: Any) -> Recipe:
    return cases.fine_tuned(str(data), weights, "single", **settings)


def test_a_frozen_trunk_stays_as_it_was_and_is_exported(
    places: Path, tiny_data: Path, tmp_path: Path
) -> None:
    frozen = [{"match": "s*", "frozen": True}]  # stem and stages
    recipe = fine_tune(tiny_data, {"from": str(places / "run")}).set("optimizer.groups", frozen)
    tiny_run(recipe, tmp_path / "tuned", steps=3)
    export(tmp_path / "tuned", tmp_path / "out", weights="live")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (places / "export", tmp_path / "out")
    )
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if not name.startswith("s")} & same == set()
    moved = {name for name in before if name.startswith("s")} - same
    assert all("running" in name or "num_batches" in name for name in moved)
    held = checkpoint.Reader(checkpoint.resolve(tmp_path / "tuned"))
    assert set(held.names("weights/")) == set(
        checkpoint.Reader(checkpoint.resolve(places / "run")).names("weights/")
    )
    assert sorted(held.names("optimizer/")) == [
        "optimizer/momentum_buffer/model.classifier.bias",
        "optimizer/momentum_buffer/model.classifier.weight",
    ]


def test_a_resume_does_not_load_again(places: Path, tiny_data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(places / "run", source)
    recipe = fine_tune(tiny_data, {"from": str(source)})
    tiny_run(recipe, tmp_path / "whole", steps=4)
    tiny_run(recipe, tmp_path / "halves", steps=4, until=2)
    shutil.rmtree(source)
    tiny_run(recipe, tmp_path / "halves", steps=4, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    noted = json.loads((tmp_path / "halves" / "weights.json").read_text())["model"]
    manifest = json.loads(
        (places / "run" / "checkpoints" / "step-00000003" / "manifest.json").read_text()
    )
    assert (noted["step"], noted["sha256"]) == (3, manifest["sha256"])
    assert (noted["missing"], noted["extra"], noted["mismatched"]) == ([], [], {})


def test_what_does_not_fit_is_told_or_allowed(
    places: Path, tiny_data: Path, tmp_path: Path
) -> None:
    tensors = load_file(places / "plain.safetensors")
    tensors["classifier.weight"] = torch.zeros(3, 16)
    del tensors["stem.1.bias"]
    tensors["decoder.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / "other.safetensors")
    weights: dict[str, Any] = {"from": str(tmp_path / "other.safetensors")}
    with pytest.raises(UserError) as caught:
        tiny_run(fine_tune(tiny_data, weights), tmp_path / "strict", steps=3)
    message = str(caught.value)
    assert "missing: 1 (stem.1.bias)" in message
    assert "extra: 1 (decoder.weight)" in message
    assert "mismatched: 1 (classifier.weight [10, 16] from [3, 16])" in message
    assert "missing: ignore, extra: ignore, mismatched: ignore" in message
    weights |= dict.fromkeys(("missing", "extra", "mismatched"), "ignore")
    recipe = fine_tune(tiny_data, weights, optimizer__learning_rate=0.0)
    tiny_run(recipe, tmp_path / "partly", steps=3)
    noted = json.loads((tmp_path / "partly" / "weights.json").read_text())["model"]
    assert noted["missing"] == ["stem.1.bias"]
    assert noted["extra"] == ["decoder.weight"]
    assert noted["mismatched"] == {"classifier.weight": [[10, 16], [3, 16]]}
    from_seed = tiny_run(
        fine_tune(tiny_data, weights, optimizer__learning_rate=0.0).set("weights", None),
        tmp_path / "seed",
        steps=3,
    )
    seed, ours = (
        checkpoint.Reader(checkpoint.resolve(p)) for p in (from_seed, tmp_path / "partly")
    )
    for name, expected in tensors.items():
        if f"weights/model.{name}" in ours.tensors:
            found = ours.whole(f"weights/model.{name}")
            start = seed.whole(f"weights/model.{name}") if name == "classifier.weight" else expected
            assert torch.equal(found, start), name


def test_players_have_sources_of_their_own(tiny_data: Path, tmp_path: Path) -> None:
    """The generator from a run of both, the critic from the seed; then both, and from their export."""
    first = tiny_run(tiny_recipe("wgan_gp", tiny_data), tmp_path / "first", steps=3)
    still: dict[str, Any] = {"optimizer__learning_rate": 0.0, "seed": 5}
    plain = tiny_recipe("wgan_gp", tiny_data, **still)
    export(first, tmp_path / "export", weights="live")
    runs = {
        name: tiny_run(plain.set("weights", weights), tmp_path / f"from-{name}", steps=3)
        for name, weights in {
            "seed": None,
            "generator": {"generator": {"from": str(first)}},
            "both": {"from": str(first)},
            "export": {p: {"from": str(tmp_path / "export" / p)} for p in ("generator", "critic")},
        }.items()
    }
    readers = {name: checkpoint.Reader(checkpoint.resolve(path)) for name, path in runs.items()}
    source = checkpoint.Reader(checkpoint.resolve(first))
    for name in source.names("weights/"):
        of_generator = name.startswith("weights/generator.")
        expected = {
            "generator": source if of_generator else readers["seed"],
            "both": source,
            "export": source,
        }
        for run_name, reader in expected.items():
            assert torch.equal(readers[run_name].whole(name), reader.whole(name)), (run_name, name)


def test_the_hub_is_read_from_its_cache(
    places: Path, tiny_data: Path, tmp_path: Path, found: dict[str, Any]
) -> None:
    """A real cache of the hub, offline: what is in it loads, what is not is one line."""
    model = tmp_path / "hub" / "models--somebody--tiny"
    snapshot = model / "snapshots" / "0123456789abcdef"
    shutil.copytree(places / "export", snapshot)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(snapshot.name)
    environ = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    ((evaluated, refused),) = spawn_ranks(
        1, cases.from_hub, str(tiny_data), str(tmp_path), environ=environ, timeout=240
    )
    assert evaluated == found["single/folder"][1]
    assert refused.startswith("weights.from: hf://somebody/other could not be fetched: ")
    assert "\n" not in refused


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"from": "nowhere"}, "weights.from: got 'nowhere', expected a run directory"),
        ({"from": "mlp-fashion"}, "first `dist-train train mlp-fashion --run-dir .*mlp-fashion`"),
        ({"from": "{places}/run", "averages": "emma"}, "did you mean 'ema'"),
        (
            {"from": "{places}/export", "averages": "ema"},
            "weights.averages: got 'ema', but .* no run",
        ),
        (
            {"from": "{places}/gan"},
            "holds the networks critic, generator, but the player has model",
        ),
        ({"from": "{places}/pickled"}, "only pytorch_model.bin, a pickle, which is never read"),
        ({"from": "{places}/torn.safetensors"}, "torn.safetensors: is no safetensors file"),
        ({"from": 3}, "weights.from: got 3"),
        ({"form": "x"}, "weights.form: "),
        ({"from": "x", "mising": "ignore"}, "weights.mising: unknown key, did you mean 'missing'"),
        (
            {"from": "x", "missing": "allow"},
            "weights.missing: got 'allow', expected error or ignore",
        ),
        (
            {"from": "x", "rename": [{"from": "a.*", "to": "b"}]},
            "rename.0.to: .*both or in neither",
        ),
        (
            {"from": "{places}/run", "rename": [{"from": "trunk.*", "to": "*"}]},
            "'trunk.*' matches no",
        ),
        ({"model": {"from": "x"}, "critic": {"from": "x"}}, "weights.critic: .*'from', or .*model"),
    ],
)
def test_mistakes_are_one_line(
    places: Path, tiny_data: Path, tmp_path: Path, weights: dict[str, Any], message: str
) -> None:
    (places / "pickled").mkdir(exist_ok=True)
    (places / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (places / "torn.safetensors").write_bytes(b"not so")
    if "{places}/gan" in str(weights):
        tiny_run(tiny_recipe("wgan_gp", tiny_data), places / "gan", steps=3)
    text = json.dumps(weights).replace("{places}", str(places))
    with pytest.raises(UserError, match=message) as caught:
        run.train(fine_tune(tiny_data, json.loads(text)), run_dir=tmp_path / "run")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Names


def renames(*pairs: tuple[str, str]) -> list[Rename]:
    return [Rename(**{"from": old, "to": new}) for old, new in pairs]


def test_the_first_rename_that_matches_wins() -> None:
    wanted = {"a.weight": (2,), "b.weight": (2,), "c": (2,)}
    offered = {"net.a.weight": (2,), "net.b.kernel": (2,), "c": (2,)}
    match = fit(wanted, offered, renames(("net.*.kernel", "*.weight"), ("net.*", "*")))
    assert match.pairs == {"a.weight": "net.a.weight", "b.weight": "net.b.kernel", "c": "c"}
    assert (match.missing, match.extra, match.mismatched) == ([], [], {})
    with pytest.raises(UserError, match="two tensors become 'c', the second is 'd'"):
        fit({"c": (2,)}, {"c": (2,), "d": (2,)}, renames(("d", "c")))


def test_tied_tensors_and_derived_buffers_are_no_misfits() -> None:
    match = fit(
        {"table": (2,)},
        {"head": (2,), "table": (2,), "mask": (3,)},
        (),
        {"head": "table"},
        ["mask"],
    )
    assert match.pairs == {"table": "head"}
    assert (match.missing, match.extra) == ([], [])
