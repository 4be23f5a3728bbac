"""Checkpoints: no damage goes unseen, no run silently starts over, nothing half-written is ever read."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
import torch

from dist_train import checkpoint
from dist_train.engine import Slice
from dist_train.errors import CheckpointError
from dist_train.run import train
from dist_train.testing import assert_same_run
from dist_train.world import World, pin_threads

STEPS = 8
FLIPS = 300


def plan(data: Path, **settings: Any) -> cases.Recipe:
    """8 steps in one process, with a checkpoint every 2 steps."""
    recipe = cases.tiny_recipe("resnet", data, strategy="single", duration=f"{STEPS} steps")
    recipe = recipe.set("callbacks.checkpoint", {"every": "2 steps", "keep": 9})
    recipe = recipe.set("callbacks.trace", {"name": "dist_train.testing:Trace"})
    for key, value in settings.items():
        recipe = recipe.set(key.replace("__", "."), value)
    return recipe


@pytest.fixture(scope="module")
def unbroken(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "run"
    pin_threads(1, 1)
    train(plan(tiny_data), run_dir=path)
    return path


@pytest.fixture
def run(unbroken: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(unbroken, tmp_path / "run"))


@pytest.fixture
def folder(run: Path) -> Path:
    return run / "checkpoints"


def write(folder: Path, step: int, value: float = 0.0) -> Path:
    """A checkpoint of one small tensor."""
    part = Slice("w", (2, 3), 0, torch.full((6,), value))
    return checkpoint.save(folder, step, [("weights/w", part)], {"step": step}, World())


def rewrite(path: Path, folder: Path, change: Any) -> Path:
    """The checkpoint `path` again, whole and with right digests, after `change(tensors, values)`."""
    reader = checkpoint.Reader(path)
    tensors = {name: reader.whole(name).clone() for name in reader.tensors}
    values = dict(reader.values)
    change(tensors, values)
    slices = [(n, Slice(n, tuple(t.shape), 0, t.view(-1))) for n, t in tensors.items()]
    return checkpoint.save(folder, reader.step, slices, values, World())


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def test_every_single_bit_flip_is_found(folder: Path) -> None:
    path = checkpoint.at(folder, STEPS)
    assert checkpoint.problems(path) == []
    files = sorted(path.iterdir())
    assert [f.name for f in files] == ["index.json", "manifest.json", "rank-00000.safetensors"]
    rng = random.Random(300)
    missed = []
    for number in range(FLIPS):
        file = files[number % len(files)]
        content = file.read_bytes()
        bit = rng.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        found = checkpoint.problems(path)
        if not found or not any(line.startswith(file.name) for line in found):
            missed.append((file.name, bit, found))
        file.write_bytes(content)
    assert missed == []
    assert checkpoint.problems(path) == []


def damage(kind: str, path: Path) -> None:
    """Do to the file `path` what disks and people do."""
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "missing":
        path.unlink()


DAMAGES = ("truncated", "longer", "empty", "missing")


@pytest.mark.parametrize("name", ("index.json", "manifest.json", "rank-00000.safetensors"))
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_named(folder: Path, name: str, kind: str) -> None:
    path = checkpoint.at(folder, STEPS)
    damage(kind, path / name)
    found = checkpoint.problems(path)
    assert len(found) == 1
    assert found[0].startswith(f"{name}: ")
    with pytest.raises(CheckpointError, match=name):
        checkpoint.open_whole(path)
    assert checkpoint.check(folder)[path.name] == found


def test_a_foreign_file_is_named(folder: Path) -> None:
    path = checkpoint.at(folder, STEPS)
    (path / "rank-00001.safetensors").write_bytes(b"")
    assert checkpoint.problems(path) == ["rank-00001.safetensors: not in the manifest"]


def test_a_swapped_file_is_found(folder: Path) -> None:
    """A file of another checkpoint of the same size, whole in itself."""
    path, other = checkpoint.at(folder, STEPS), checkpoint.at(folder, STEPS - 2)
    shutil.copy(other / "rank-00000.safetensors", path)
    assert checkpoint.problems(path) == ["rank-00000.safetensors: SHA-256 differs"]


def test_an_empty_folder_is_no_checkpoint(folder: Path) -> None:
    path = checkpoint.at(folder, STEPS + 2)
    path.mkdir()
    assert checkpoint.problems(path) == ["manifest.json: unreadable (FileNotFoundError)"]
    assert checkpoint.last_good(folder)[0] == checkpoint.at(folder, STEPS)


# ---------------------------------------------------------------------------------------------------------------------
# Which one a run goes on from


def test_last_good_passes_over_the_damaged(folder: Path) -> None:
    assert checkpoint.last_good(folder) == (checkpoint.at(folder, STEPS), [])
    damage("truncated", checkpoint.at(folder, STEPS) / "index.json")
    damage("missing", checkpoint.at(folder, STEPS - 2) / "manifest.json")
    found, skipped = checkpoint.last_good(folder)
    assert found == checkpoint.at(folder, STEPS - 4)
    assert [line.split(":")[0] for line in skipped] == [
        "step-00000008/index.json",
        "step-00000006/manifest.json",
    ]


@pytest.mark.parametrize("kind", ("truncated", "missing"))
def test_a_damaged_one_is_looked_at_in_vain(folder: Path, kind: str) -> None:
    path, other = checkpoint.at(folder, STEPS), checkpoint.at(folder, STEPS - 2)
    damage(kind, other / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors"):
        checkpoint.diff(path, other)
    damage(kind, path / "index.json")
    with pytest.raises(CheckpointError, match=r"index\.json: unreadable"):
        checkpoint.inspect(path)


def test_none_whole_is_an_error(folder: Path, run: Path, tiny_data: Path) -> None:
    for step in checkpoint.steps(folder):
        damage("empty", checkpoint.at(folder, step) / "index.json")
    with pytest.raises(CheckpointError, match="none of 4 checkpoints is whole") as caught:
        checkpoint.last_good(folder)
    assert "\n" not in str(caught.value)
    rows = cases.RunDirectory(run).rows()
    with pytest.raises(CheckpointError, match="none of 4 checkpoints is whole"):
        train(plan(tiny_data), run_dir=run, resume="auto")
    assert cases.RunDirectory(run).rows() == rows, "the log of the run is still there"


def test_none_at_all_is_a_fresh_start(tmp_path: Path) -> None:
    assert checkpoint.last_good(tmp_path) == (None, [])
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        checkpoint.resolve(tmp_path)


def test_resumed_from_the_one_before_a_damaged_one(
    folder: Path, run: Path, unbroken: Path, tiny_data: Path
) -> None:
    damage("truncated", checkpoint.at(folder, STEPS) / "rank-00000.safetensors")
    result = train(plan(tiny_data), run_dir=run, resume="auto")
    assert result["steps"] == STEPS
    assert checkpoint.problems(checkpoint.at(folder, STEPS)) == [], "written anew in its place"
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    assert_same_run(unbroken, run)


@pytest.mark.parametrize(("older", "newer"), [(9_999, 10_000), (99_999_999, 100_000_000)])
def test_newest_is_by_number(tmp_path: Path, older: int, newer: int) -> None:
    for step in (newer, older, 7):
        write(tmp_path, step)
    assert checkpoint.steps(tmp_path) == [7, older, newer]
    assert checkpoint.last_good(tmp_path)[0] == checkpoint.at(tmp_path, newer)


# ---------------------------------------------------------------------------------------------------------------------
# What a killed save leaves


@pytest.mark.parametrize("rest", (".writing-00000010", ".replaced-00000008", ".deleting-00000002"))
def test_leftovers_are_ignored_and_cleaned(folder: Path, rest: str) -> None:
    """Of a save killed before its rename, or between a new folder and the old one's end, or of a killed deletion."""
    shutil.copytree(checkpoint.at(folder, STEPS), folder / rest)
    (folder / rest / "index.json").unlink()
    assert checkpoint.steps(folder) == [2, 4, 6, 8]
    assert checkpoint.last_good(folder)[0] == checkpoint.at(folder, STEPS)
    assert rest not in checkpoint.check(folder)
    write(folder, 10)
    assert checkpoint.steps(folder) == [2, 4, 6, 8, 10]
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_a_save_in_place_of_a_damaged_one(tmp_path: Path) -> None:
    path = write(tmp_path, 5, value=1.0)
    damage("truncated", path / "index.json")
    assert write(tmp_path, 5, value=2.0) == path
    assert checkpoint.problems(path) == []
    assert checkpoint.Reader(path).whole("weights/w").tolist() == [[2.0] * 3] * 2
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.fixture
def parts(tmp_path: Path) -> checkpoint.Reader:
    """A tensor (4, 5) in slices [0, 3), [3, 11), [11, 20), as three ranks would have cut it."""
    whole = torch.arange(20.0)
    cuts = [(0, 3), (3, 11), (11, 20)]
    slices = [("w", Slice("w", (4, 5), a, whole[a:b].clone())) for a, b in cuts]
    return checkpoint.Reader(checkpoint.save(tmp_path, 1, slices, {}, World()))


def test_any_range_can_be_read(parts: checkpoint.Reader) -> None:
    for start in range(20):
        for stop in range(start + 1, 21):
            expected = [float(i) for i in range(start, stop)]
            assert parts.read("w", start, stop).tolist() == expected
    assert torch.equal(parts.whole("w"), torch.arange(20.0).view(4, 5))


def test_what_is_not_there_is_an_error(parts: checkpoint.Reader) -> None:
    with pytest.raises(CheckpointError, match="holds no tensor 'v'"):
        parts.read("v", 0, 1)
    with pytest.raises(CheckpointError, match="lacks 2 elements"):
        parts.read("w", 15, 22)
    with pytest.raises(CheckpointError, match=r"shape \[4, 5\], the model's is \[5, 4\]"):
        parts.fill("w", Slice("w", (5, 4), 0, torch.zeros(20)))


def test_a_hole_is_an_error(tmp_path: Path) -> None:
    slices = [("w", Slice("w", (20,), a, torch.zeros(5))) for a in (0, 10, 15)]
    reader = checkpoint.Reader(checkpoint.save(tmp_path, 1, slices, {}, World()))
    with pytest.raises(CheckpointError, match="'w' lacks 5 elements"):
        reader.whole("w")


@pytest.mark.parametrize("shape", ((), (0,), (3, 0)))
def test_scalars_and_empty_tensors(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape)
    slices = [("w", Slice("w", shape, 0, tensor.view(-1)))]
    reader = checkpoint.Reader(checkpoint.save(tmp_path, 1, slices, {}, World()))
    assert torch.equal(reader.whole("w"), tensor)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.int64, torch.bool))
def test_every_type_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    path = checkpoint.save(tmp_path, 1, [("w", Slice("w", (5,), 0, tensor))], {}, World())
    back = checkpoint.Reader(path).whole("w")
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    assert len(checkpoint.weights_digest(path)) == 64


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint that lacks what the run needs


@pytest.fixture
def trainer(tiny_data: Path, tmp_path: Path) -> Iterator[Any]:
    with cases.trainer_of(plan(tiny_data), World(), tmp_path / "fresh") as made:
        yield made


def drop(name: str) -> Any:
    def change(tensors: dict[str, Any], values: dict[str, Any]) -> None:
        assert name in tensors
        del tensors[name]

    return change


@pytest.mark.parametrize("kind", ("weights", "optimizer/momentum_buffer", "buffers"))
def test_a_missing_tensor_of_the_engine(trainer: Any, folder: Path, kind: str) -> None:
    path = checkpoint.at(folder, STEPS)
    name = checkpoint.Reader(path).names(f"{kind}/")[-1]
    broken = checkpoint.Reader(rewrite(path, folder, drop(name)))
    assert checkpoint.problems(broken.path) == [], "whole in itself"
    with pytest.raises(CheckpointError, match=f"holds no tensor '{name}'"):
        trainer.load(broken)


def test_a_missing_tensor_of_a_callback(trainer: Any, folder: Path) -> None:
    path = checkpoint.at(folder, STEPS)
    name = checkpoint.Reader(path).names("callbacks/ema/")[-1]
    broken = checkpoint.Reader(rewrite(path, folder, drop(name)))
    trainer.load(broken)
    with pytest.raises(CheckpointError, match=f"holds no tensor '{name}'"):
        trainer.load_callbacks(broken)


def test_a_missing_state_of_a_callback(trainer: Any, folder: Path) -> None:
    def change(tensors: dict[str, Any], values: dict[str, Any]) -> None:
        values["callbacks"] = {k: v for k, v in values["callbacks"].items() if k != "ema"}

    broken = checkpoint.Reader(rewrite(checkpoint.at(folder, STEPS), folder, change))
    with pytest.raises(CheckpointError, match="holds no state of callback 'ema'"):
        trainer.load(broken)


def test_another_optimiser(tiny_data: Path, tmp_path: Path, folder: Path) -> None:
    recipe = plan(tiny_data).set("optimizer", {"name": "adamw", "learning_rate": 0.01})
    with cases.trainer_of(recipe, World(), tmp_path / "adamw") as made:
        reader = checkpoint.Reader(checkpoint.at(folder, STEPS))
        with pytest.raises(CheckpointError, match="holds no tensor 'optimizer/exp_avg/"):
            made.load(reader)


def test_other_shards(trainer: Any, folder: Path) -> None:
    def change(tensors: dict[str, Any], values: dict[str, Any]) -> None:
        values["data"] = values["data"] | {"index": "0" * 64}

    broken = checkpoint.Reader(rewrite(checkpoint.at(folder, STEPS), folder, change))
    with pytest.raises(CheckpointError, match="was trained on other shards"):
        trainer.load(broken)


# ---------------------------------------------------------------------------------------------------------------------
# dist_train.testing: a difference is never passed over


def test_same_run_of_a_copy(unbroken: Path, run: Path) -> None:
    assert_same_run(unbroken, run)


def test_same_run_tells_steps_apart(unbroken: Path, run: Path, folder: Path) -> None:
    shutil.rmtree(checkpoint.at(folder, STEPS))
    with pytest.raises(AssertionError, match=r"run is at step-00000008, .*run at step-00000006"):
        assert_same_run(unbroken, run)


@pytest.mark.parametrize(
    "kind", ("weights", "optimizer/momentum_buffer", "callbacks/ema", "buffers")
)
def test_same_run_names_the_tensor_that_differs(
    unbroken: Path, run: Path, folder: Path, kind: str
) -> None:
    path = checkpoint.at(folder, STEPS)
    name = next(n for n in checkpoint.Reader(path).names(f"{kind}/") if "tracked" not in n)

    def change(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        flat = tensors[name].view(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))  # the smallest difference there is

    rewrite(path, folder, change)
    with pytest.raises(AssertionError, match=f"1 tensors differ, the first is {name}: "):
        assert_same_run(unbroken, run)


def test_same_run_sees_the_sign_of_zero(run: Path, folder: Path) -> None:
    """0.0 and -0.0 differ by nothing, but they are not the same bits."""
    path = checkpoint.at(folder, STEPS)
    name = checkpoint.Reader(path).names("weights/")[0]

    def with_zero(zero: float) -> Path:
        def change(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
            tensors[name].view(-1)[0] = zero

        other = run.with_name(f"zero{zero}")
        (other / "checkpoints").mkdir(parents=True)
        rewrite(path, other / "checkpoints", change)
        return other

    with pytest.raises(AssertionError, match=name):
        assert_same_run(with_zero(0.0), with_zero(-0.0))


def test_same_run_names_what_only_one_has(unbroken: Path, run: Path, folder: Path) -> None:
    path = checkpoint.at(folder, STEPS)
    name = checkpoint.Reader(path).names("weights/")[0]
    rewrite(path, folder, drop(name))
    for pair in ((unbroken, run), (run, unbroken)):
        with pytest.raises(AssertionError, match=name):
            assert_same_run(*pair)


@pytest.mark.parametrize("field", ("ids", "losses"))
def test_same_run_names_the_step_that_differs(unbroken: Path, run: Path, field: str) -> None:
    path = run / "logs" / "trace-0.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[4])
    if field == "ids":
        record["ids"][0][1].reverse()
    else:
        bits = float.fromhex(record["losses"]["model"])
        record["losses"]["model"] = (bits * (1 + 2**-40)).hex()
    lines[4] = json.dumps(record)
    path.write_text("\n".join(lines) + "\n")
    for pair in ((unbroken, run), (run, unbroken)):
        with pytest.raises(AssertionError, match="step 5 took other samples or had another loss"):
            assert_same_run(*pair)


def test_same_run_wants_the_trace_of_both(unbroken: Path, run: Path) -> None:
    (run / "logs" / "trace-0.jsonl").unlink()
    for pair in ((unbroken, run), (run, unbroken)):
        with pytest.raises(AssertionError, match="step 1 "):
            assert_same_run(*pair)


def test_a_step_run_twice_must_be_the_same_twice(unbroken: Path, run: Path) -> None:
    path = run / "logs" / "trace-0.jsonl"
    lines = path.read_text().splitlines()
    again = lines[2].replace('"step": 3', '"step": 4')
    path.write_text("\n".join([*lines, again]) + "\n")
    with pytest.raises(AssertionError, match="step 4 of rank 0 was not the same the second time"):
        assert_same_run(unbroken, run)
