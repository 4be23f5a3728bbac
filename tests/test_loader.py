"""Batches: the same samples, draws and tensors on any number of ranks and workers, from any step."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.data_shards.assembler import keyed_generator
from dist_train.data_shards.loader import evaluation_batches, training_batches
from dist_train.data_shards.order import Order
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.transforms import HorizontalFlip, RandomCrop
from dist_train.data_shards.write import write_shards
from dist_train.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """41 images (6, 6, 3) and labels for training, 1, 5 and 13 in other sets, 30 texts of unequal length."""
    root = tmp_path_factory.mktemp("loader")
    rng = np.random.default_rng(0)

    def images(count: int):
        for i in range(count):
            image = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            yield "train", f"{i:03d}", {"image.npy": image, "cls": i % 10}

    for count in (41, 1, 5, 13):
        write_shards(root / f"images{count}", "images", images(count), shard_size=9)
    texts = [rng.integers(0, 256, length, dtype=np.uint8) for length in rng.integers(2, 20, 30)]
    pieces = (("train", f"{i:03d}", {"tokens.npy": text}) for i, text in enumerate(texts))
    write_shards(root / "texts", "texts", pieces, shard_size=8)
    return root


def global_step(shards: Shards, world_size: int, step: int, stop: int, **options):
    """All ranks' micro-batches of the steps [step, stop), put together in order of rank."""
    ranks = [
        dict(
            training_batches(
                shards,
                seed=3,
                global_batch=24,
                micro_batch=2,
                rank=rank,
                world_size=world_size,
                **options,
            ).from_(step, stop)
        )
        for rank in range(world_size)
    ]
    assert all(list(steps) == list(range(step, stop)) for steps in ranks)
    return {t: [micro for steps in ranks for micro in steps[t]] for t in range(step, stop)}


def assert_same(got, expected) -> None:
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.index == theirs.index and ours.real == theirs.real
        assert np.array_equal(ours.ids, theirs.ids)
        assert ours.tensors.keys() == theirs.tensors.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours.tensors)


@pytest.fixture(scope="module")
def reference(folder: Path):
    transforms = (RandomCrop(5, padding=1), HorizontalFlip())
    return global_step(Shards(folder / "images41", "train"), 1, 0, 8, transforms=transforms)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(world_size=st.sampled_from([1, 2, 3, 4, 6, 12]), step=st.integers(0, 7))
def test_any_ranks_from_any_step(folder: Path, reference, world_size: int, step: int) -> None:
    shards = Shards(folder / "images41", "train")
    transforms = (RandomCrop(5, padding=1), HorizontalFlip())
    got = global_step(shards, world_size, step, 8, transforms=transforms)
    for t in range(step, 8):
        assert_same(got[t], reference[t])


@pytest.mark.parametrize(("world_size", "step"), [(1, 3), (2, 0), (3, 5), (4, 7)])
def test_workers_change_nothing(folder: Path, reference, world_size: int, step: int) -> None:
    shards = Shards(folder / "images41", "train")
    transforms = (RandomCrop(5, padding=1), HorizontalFlip())
    got = global_step(shards, world_size, step, 8, transforms=transforms, workers=2)
    for t in range(step, 8):
        assert_same(got[t], reference[t])


def test_batches_follow_the_order_over_the_ends_of_epochs(folder: Path, reference) -> None:
    ids = np.concatenate([micro.ids for t in range(8) for micro in reference[t]])
    assert np.array_equal(ids, Order(41, 3).at(0, 8 * 24)[1])
    for epoch in range(4):
        assert sorted(ids[epoch * 41 : (epoch + 1) * 41]) == list(range(41))
    batches = training_batches(
        Shards(folder / "images41", "train"), seed=3, global_batch=24, micro_batch=2
    )
    assert np.array_equal(batches.ids(2), ids[48:72])


def test_a_global_batch_larger_than_the_set(folder: Path) -> None:
    shards = Shards(folder / "images5", "train")
    batches = training_batches(shards, seed=0, global_batch=16, micro_batch=4)
    ids = np.concatenate([micro.ids for _, step in batches.from_(0, 5) for micro in step])
    assert np.bincount(ids).tolist() == [16] * 5


@pytest.mark.parametrize(
    ("count", "world_size", "workers"),
    [(count, world, 0) for count in (1, 5, 13) for world in (1, 2, 3, 4, 7)]
    + [(13, 2, 2), (5, 4, 2), (1, 3, 2)],
)
def test_evaluation_takes_each_sample_once(
    folder: Path, count: int, world_size: int, workers: int
) -> None:
    shards = Shards(folder / f"images{count}", "train")
    seen, lengths = [], set()
    for rank in range(world_size):
        batches = evaluation_batches(
            shards, micro_batch=4, rank=rank, world_size=world_size, workers=workers
        )
        micros = list(batches)
        assert_same(list(batches), micros)
        lengths.add((len(batches), len(micros)))
        for micro in micros:
            assert micro.index % world_size == rank
            assert micro["image"].shape == (4, 3, 6, 6)
            assert (micro.ids[micro.real :] == 0).all()
            seen += micro.ids[: micro.real].tolist()
    assert sorted(seen) == list(range(count))
    length = math.ceil(math.ceil(count / 4) / world_size)
    assert lengths == {(length, length)}


@pytest.mark.parametrize("scale", ["standard", "signed", "unit"])
def test_scales(folder: Path, scale: str) -> None:
    shards = Shards(folder / "images41", "train")
    pixels = np.stack([shards.sample(i)["image"] for i in range(41)]).astype(np.float64)
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    expected = {
        "standard": (pixels - mean) / std,
        "signed": pixels / 127.5 - 1,
        "unit": pixels / 255,
    }
    (micro,) = evaluation_batches(shards, micro_batch=41, scale=scale)
    images = micro["image"]
    assert images.dtype == torch.float32 and images.is_contiguous()
    np.testing.assert_allclose(images.numpy(), expected[scale].transpose(0, 3, 1, 2), atol=2e-6)
    assert micro["label"].tolist() == [i % 10 for i in range(41)]


def test_tokens_are_padded_right(folder: Path) -> None:
    shards = Shards(folder / "texts", "train")
    for micro in evaluation_batches(shards, micro_batch=8):
        texts = [shards.sample(i)["tokens"] for i in micro.ids]
        assert micro["tokens"].shape == (8, max(map(len, texts)))
        assert micro["tokens"].dtype == micro["length"].dtype == torch.int64
        for row, length, text in zip(micro["tokens"], micro["length"], texts, strict=True):
            assert length == len(text) - 1
            assert row.tolist() == text.tolist() + [0] * (len(row) - len(text))


def test_draws_are_keyed(folder: Path, reference) -> None:
    """A sample's crop differs between epochs, and is a function of (seed, epoch, sample) alone."""
    draws = {keyed_generator(*key).integers(2**62) for key in np.ndindex(5, 5, 5)}
    assert len(draws) == 125
    assert keyed_generator(-1, -1, 0).integers(2**62) == keyed_generator(-1, -1, 0).integers(2**62)
    micros = [micro for t in range(8) for micro in reference[t]]
    views = {
        micro["image"][row].numpy().tobytes()
        for micro in micros
        for row in range(2)
        if micro.ids[row] == 7
    }
    assert len(views) > 1


def test_the_default_generators_are_not_touched(folder: Path) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes()
    shards = Shards(folder / "images5", "train")
    for workers in (0, 1):
        list(
            evaluation_batches(
                shards, micro_batch=4, workers=workers, transforms=[HorizontalFlip()]
            )
        )
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tobytes() == before[1]


def test_transforms() -> None:
    rng = np.random.default_rng(0)
    image = np.arange(36, dtype=np.uint8).reshape(6, 6) + 1
    padded = np.pad(image, 2)
    windows = {padded[i : i + 5, j : j + 5].tobytes() for i in range(6) for j in range(6)}
    crops = {RandomCrop(5, padding=2)({"image": image}, rng)["image"].tobytes() for _ in range(600)}
    assert crops == windows
    flips = [HorizontalFlip(0.25)({"image": image}, rng)["image"][0, 0] == 6 for _ in range(2000)]
    assert np.mean(flips) == pytest.approx(0.25, abs=0.04)
    for make in (lambda: RandomCrop(0), lambda: RandomCrop(3, -1), lambda: HorizontalFlip(1.5)):
        with pytest.raises(UserError):
            make()
    with pytest.raises(UserError, match="no window of 9"):
        RandomCrop(9)({"image": image}, rng)


def test_shares_that_do_not_divide(folder: Path) -> None:
    shards = Shards(folder / "images5", "train")
    with pytest.raises(UserError, match=r"micro_batch 5 .*these do: 1, 2, 3, 4, 6, 8, 12, 24"):
        training_batches(shards, seed=0, global_batch=24, micro_batch=5)
    with pytest.raises(UserError, match=r"5 ranks; ranks that divide: 1, 2, 3, 6;.*5 ranks: none"):
        training_batches(shards, seed=0, global_batch=24, micro_batch=4, world_size=5)
    with pytest.raises(UserError, match="micro_batch for 4 ranks: 1, 2, 3, 6"):
        training_batches(shards, seed=0, global_batch=24, micro_batch=4, world_size=4)
    with pytest.raises(UserError, match="scale 'unti', did you mean 'unit'"):
        training_batches(shards, seed=0, global_batch=4, micro_batch=4, scale="unti")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    samples = [
        ("train", f"k{i}", {"image.npy": np.zeros((4, 4 + i // 3), np.uint8)}) for i in range(4)
    ]
    write_shards(tmp_path / "x", "x", samples)
    with pytest.raises(UserError, match=r"'k3', field 'image': has shape \(4, 5\)") as raised:
        list(evaluation_batches(Shards(tmp_path / "x", "train"), micro_batch=4, workers=workers))
    assert "\n" not in str(raised.value)


def test_micro_batch(folder: Path) -> None:
    (micro,) = evaluation_batches(Shards(folder / "images5", "train"), micro_batch=5)
    moved = micro.to("meta")
    assert moved["image"].device.type == "meta" and moved.real == 5
    with pytest.raises(UserError, match="no field 'imag', did you mean 'image'"):
        micro["imag"]


SCRIPT = """
import multiprocessing, os, signal, sys
from dist_train.data_shards.loader import evaluation_batches, training_batches
from dist_train.data_shards.reader import Shards
shards = Shards(sys.argv[1], "train")
evaluation = evaluation_batches(shards, micro_batch=2, workers=1)
ids = [i for micro in evaluation for i in micro.ids.tolist()]
stream = training_batches(shards, seed=0, global_batch=4, micro_batch=4, workers=1).from_(0, 500)
next(stream)
unfinished = iter(evaluation)
next(unfinished)
for child in multiprocessing.active_children():
    os.kill(child.pid, signal.SIGTERM)
    os.kill(child.pid, signal.SIGINT)
assert len(list(zip(stream, range(100)))) == 100
assert [i for micro in unfinished for i in micro.ids.tolist()] == ids[2:]
unfinished = iter(evaluation)
next(unfinished)
print(*[child.pid for child in multiprocessing.active_children()])
if sys.argv[2] == "raise":
    raise SystemExit(7)
"""


@pytest.mark.parametrize(("ending", "code"), [("return", 0), ("raise", 7)])
def test_workers_ignore_signals_and_end_with_the_process(
    folder: Path, ending: str, code: int
) -> None:
    """With both streams still open: no hang at exit, and no worker left."""
    command = [sys.executable, "-c", SCRIPT, str(folder / "images13"), ending]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIG_DFL)
