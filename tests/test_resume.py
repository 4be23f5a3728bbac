"""Kill any run, bring it back: the same bits in weights, optimiser and averages, the same samples, the same losses."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import cases
import pytest

from dist_train import checkpoint
from dist_train.testing import RankFailed, assert_same_run, read_trace, sample_ids, spawn_ranks

# a pairwise cover of (model, strategy, ranks), with every fault at least once; the last number is how many times the
# rank has passed the point before: `step` and `backward` in mid-run, `save...` in the second or third checkpoint
rng = random.Random(2026)
COVER = [
    ("resnet", "ddp", 1, f"kill@step:0:{rng.randrange(7, 17)}"),
    ("resnet", "zero1", 2, f"kill@within-backward:1:{rng.randrange(14, 35)}"),
    ("resnet", "zero3", 2, "kill@save-written:0:2"),
    ("transformer", "zero1", 1, f"kill@reduce:0:{rng.randrange(7, 19)}"),
    ("transformer", "zero3", 4, f"kill@step:1:{rng.randrange(7, 19)}"),
    ("transformer", "zero2", 2, "kill@save-publish:0:1"),
    ("wgan_gp", "zero2", 1, f"kill@backward:0:{rng.randrange(40, 70)}"),
    ("wgan_gp", "zero3", 1, "kill@save:0:1"),
    ("wgan_gp", "ddp", 2, "kill@step:1:22"),  # between the critic's turn and the generator's
    ("wgan_gp", "zero2", 2, "kill@saved:1:2"),
    ("wgan_gp", "fsdp2", 2, "kill@step:1:22"),
]
MORE = [
    ("resnet", "zero2", 4, f"kill@reduce:2:{rng.randrange(7, 19)}"),
    ("transformer", "ddp", 4, f"kill@backward:3:{rng.randrange(7, 19)}"),
    ("wgan_gp", "zero1", 4, f"kill@reduce:3:{rng.randrange(10, 27)}"),
    ("wgan_gp", "zero3", 2, "kill@step:0:28"),  # after the last checkpoint but the final one
    ("transformer", "fsdp2", 4, f"kill@reduce:2:{rng.randrange(7, 19)}"),
    ("transformer", "fsdp2-hybrid", 4, f"kill@step:1:{rng.randrange(7, 19)}"),
]
"""For `make soak`: other pairs, on four ranks most of them."""


def settings(model: str, strategy: str, data: Path) -> dict[str, Any]:
    recipe = cases.tiny_recipe(model, data, strategy=cases.strategy(strategy))
    if model == "resnet":
        recipe = recipe.set("objective.name", "cases:Interrupted")
    return recipe.as_dict()


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kill_and_resume(COVER, tiny_data, tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def more_runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kill_and_resume(MORE, tiny_data, tmp_path_factory.mktemp("resume"))


def kill_and_resume(cover: list[Any], tiny_data: Path, folder: Path) -> Path:
    """Every case of a cover: unbroken in `whole-N`, killed and resumed in `killed-N`."""
    for ranks in (1, 2, 4):
        mine = [(n, case) for n, case in enumerate(cover) if case[2] == ranks]
        plans = {n: settings(model, strategy, tiny_data) for n, (model, strategy, _, _) in mine}
        whole = [[plans[n], str(folder / f"whole-{n}"), None] for n in plans]
        spawn_ranks(ranks, cases.train_cases, whole, timeout=240)
        for n, (_, _, _, fault) in mine:
            with pytest.raises(RankFailed):
                spawn_ranks(
                    ranks,
                    cases.train_case,
                    plans[n],
                    str(folder / f"killed-{n}"),
                    fault,
                    None,
                    timeout=240,
                )
        again = [[plans[n], str(folder / f"killed-{n}"), "auto"] for n in plans]
        spawn_ranks(ranks, cases.train_cases, again, timeout=240)
    return folder


@pytest.mark.parametrize("number", range(len(COVER)), ids=lambda n: "-".join(map(str, COVER[n])))
def test_killed_and_resumed_is_the_unbroken_run(runs: Path, number: int) -> None:
    assert_unbroken(runs, number)


@pytest.mark.soak
@pytest.mark.parametrize("number", range(len(MORE)), ids=lambda n: "-".join(map(str, MORE[n])))
def test_more_that_are_killed_and_resumed(more_runs: Path, number: int) -> None:
    assert_unbroken(more_runs, number)


def assert_unbroken(runs: Path, number: int) -> None:
    assert_same_run(runs / f"whole-{number}", runs / f"killed-{number}")
    rows = [row["step"] for row in cases.RunDirectory(runs / f"killed-{number}").rows()]
    assert rows == sorted(set(rows)), "a row stands twice"


def test_elastic_run(tiny_data: Path, tmp_path: Path) -> None:
    """2 -> 1 -> 2 ranks, and ZeRO-2 -> DDP -> ZeRO-3: the same samples, losses within 10x the noise floor."""
    plan = lambda name: settings("transformer", name, tiny_data)
    whole, moved = str(tmp_path / "whole"), str(tmp_path / "moved")
    spawn_ranks(2, cases.train_cases, [[plan("zero2"), whole, None]], timeout=240)
    with pytest.raises(RankFailed):
        spawn_ranks(2, cases.train_case, plan("zero2"), moved, "kill@step:1:7", None, timeout=240)
    with pytest.raises(RankFailed):
        spawn_ranks(1, cases.train_case, plan("ddp"), moved, "kill@step:0:7", "auto", timeout=240)
    spawn_ranks(2, cases.train_cases, [[plan("zero3"), moved, "auto"]], timeout=240)
    floors = [
        spawn_ranks(1, _free, plan("single"), str(tmp_path / order), order, timeout=240)[0]
        for order in ("forward", "reversed")
    ]
    floor = max(abs(a - b) for a, b in zip(*floors, strict=True))
    differences = checkpoint.diff(Path(whole), Path(moved))["differences"]
    found = max(value for name, value in differences.items() if name.startswith("weights/"))
    print(f"largest difference of a weight {found:.1e}, floor of the losses {floor:.1e}")
    rows = [cases.RunDirectory(Path(path)).rows() for path in (whole, moved)]
    losses = [{row["step"]: row["loss"] for row in part} for part in rows]
    assert set(losses[0]) == set(losses[1])
    assert max(abs(losses[0][step] - losses[1][step]) for step in losses[0]) <= 10 * floor


def _free(settings: dict[str, Any], folder: str, order: str) -> list[float]:
    recipe = cases.bare(cases.Recipe(**settings))
    with cases.trainer_of(recipe, cases.World(), Path(folder), order) as trainer:
        kept = cases.parity.Losses()
        cases.parity.watch(trainer, kept)
        trainer.train()
    return kept.losses


def test_tars_from_elsewhere_train_without_conversion(tmp_path: Path) -> None:
    """Written by webdataset's ShardWriter, and by plain `tar`; the index is made on first use."""
    import io
    import subprocess

    import numpy as np
    import webdataset
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[:96] * 15).astype(np.uint8)
    written, plain, loose = (tmp_path / name for name in ("written", "plain", "loose"))
    for folder in (written, plain, loose):
        folder.mkdir()
    with webdataset.ShardWriter(str(written / "%06d.tar"), maxcount=48, verbose=0) as writer:
        for i, image in enumerate(images):
            writer.write({"__key__": f"{i:04d}", "image.npy": image, "cls": int(digits.target[i])})
            content = io.BytesIO()
            np.save(content, image)
            (loose / f"{i:04d}.image.npy").write_bytes(content.getvalue())
            (loose / f"{i:04d}.cls").write_text(str(digits.target[i]))
    names = sorted(path.name for path in loose.iterdir())
    subprocess.run(["tar", "cf", str(plain / "000000.tar"), "-C", str(loose), *names], check=True)
    digests = []
    for folder in (written, plain):
        recipe = cases.tiny_recipe("resnet", tmp_path, duration="4 steps", strategy="single")
        recipe = recipe.set("data.path", str(folder))
        run_dir = tmp_path / f"run-{folder.name}"
        cases.run.train(recipe, run_dir=run_dir)
        digests.append(checkpoint.weights_digest(run_dir))
    assert digests[0] == digests[1]


@pytest.mark.soak  # tests/test_loader.py asserts it of the loader
def test_sample_ids_do_not_depend_on_ranks_or_workers(tiny_data: Path, tmp_path: Path) -> None:
    """12 micro-batches on 1, 2, 3 and 4 ranks, with 0 and 2 loader workers."""
    traces = []
    for ranks in (1, 2, 3, 4):
        for workers in (0, 2):
            path = tmp_path / f"{ranks}-{workers}"
            recipe = cases.tiny_recipe(
                "resnet", tiny_data, micro_batches=12, duration="3 steps", data__workers=workers
            )
            spawn_ranks(
                ranks, cases.train_cases, [[recipe.as_dict(), str(path), None]], timeout=240
            )
            traces.append(sample_ids(read_trace(path)))
    assert len(traces[0]) == 3
    assert all(trace == traces[0] for trace in traces)
