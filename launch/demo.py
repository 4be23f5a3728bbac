"""`dist-train demo`: three models on real data; then one of them is killed, and comes back as the same run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dist_train import checkpoint, randomness
from dist_train.data import data_folders
from dist_train.data_shards.reader import Shards
from dist_train.launch.ngram import witten_bell_bits_per_byte
from dist_train.recipe import Recipe
from dist_train.report import write_report
from dist_train.run import train
from dist_train.run_directory import RunDirectory
from dist_train.trained import restore

RANKS = 2
RECIPES = ("resnet-mnist", "transformer-text", "wgan-gp-mnist")
JUDGE = "lenet-mnist"
"""Trained on one rank, to say which of the GAN's samples are digits."""
KILLED_AT = 0.97
"""The share of the run after which the killed one dies: late, so that what is left is short."""
CONFIDENT = 0.9
SAMPLES = 1000
SURE_DIGITS = 0.4
"""The share of samples that the judge must be sure about."""


def demo(out: Path = Path("runs")) -> dict[str, Any]:
    """Train the three recipes on two ranks each, judge them, kill one, bring it back; returns the figures."""
    began = time.monotonic()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    root = out / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    root.mkdir(parents=True)
    recipes = {name: Recipe.load(name) for name in RECIPES}
    for folder in sorted(
        {folder for recipe in recipes.values() for folder in data_folders(recipe)}
    ):
        shards = Shards(folder, "train")
        console.print(
            f"packed {folder}: {len(shards)} samples to train on in {len(shards.shards)} shards"
        )

    runs: dict[str, dict[str, Any]] = {}
    for name, recipe in recipes.items():
        console.rule(f"{name}: {RANKS} ranks, {recipe.strategy}")
        runs[name] = train(recipe.set("threads", 1), run_dir=root / name, ranks=RANKS)
    silent = Recipe.load(JUDGE).set("callbacks.console", None)
    train(silent.set("threads", 1), run_dir=root / JUDGE, ranks=1)
    figures = {
        "resnet-mnist": _accuracy(runs["resnet-mnist"]),
        "transformer-text": _against_ngram(recipes["transformer-text"], runs["transformer-text"]),
        "wgan-gp-mnist": _judged(root / "wgan-gp-mnist", root / JUDGE),
    }
    console.rule("wgan-gp-mnist again, killed with SIGKILL")
    figures["killed"] = _killed_and_back(
        recipes["wgan-gp-mnist"], root, runs["wgan-gp-mnist"]["steps"], console
    )

    table = Table(title="dist-train demo", width=console.width)
    for column in ("recipe", "ranks", "strategy", "steps", "seconds", "figure", "report"):
        table.add_column(column)
    for name, run in runs.items():
        row = (
            name,
            RANKS,
            recipes[name].strategy,
            run["steps"],
            round(run["seconds"]),
            figures[name]["text"],
        )
        report = write_report([root / name]).resolve().relative_to(root.resolve())
        table.add_row(*map(str, row), str(report))
    console.print(table)
    console.print(figures["killed"]["text"], soft_wrap=True)
    seconds = time.monotonic() - began
    console.print(
        f"runs, reports and samples are in {root}; {seconds:.0f} s in all", soft_wrap=True
    )
    broken = _broken_promises(figures)
    if broken:
        raise RuntimeError(f"the demo did not keep its promise: {'; '.join(broken)}")
    return {"root": str(root), "seconds": round(seconds, 1), "runs": runs, "figures": figures}


def _broken_promises(figures: dict[str, dict[str, Any]]) -> list[str]:
    """What the README says of the demo and this one did not show."""
    text, gan, killed = figures["transformer-text"], figures["wgan-gp-mnist"], figures["killed"]
    promises = {
        "test accuracy at least 97 %": figures["resnet-mnist"]["accuracy"] >= 0.97,
        "bits per byte 0.2 below a 3-gram": text["bits_per_byte"] <= text["three_gram"] - 0.2,
        f"sure digits at least {SURE_DIGITS:.0%}, and twice as many as noise": gan["confident"]
        >= max(SURE_DIGITS, 2 * gan["noise"]),
        "all 10 digits appear": gan["classes"] == 10,
        "2 ranks: identical weights": killed["identical"],
        "1 rank: within 10 times the noise floor": killed["difference"] <= 10 * killed["floor"],
    }
    return [promise for promise, kept in promises.items() if not kept]


def _accuracy(run: dict[str, Any]) -> dict[str, Any]:
    accuracy = run["results"]["evaluate/accuracy"]
    return {"accuracy": accuracy, "text": f"test accuracy {accuracy:.2%}"}


def _against_ngram(recipe: Recipe, run: dict[str, Any]) -> dict[str, Any]:
    """The model's bits per byte beside a Witten-Bell 3-gram's, fitted to the same split, on the same target bytes."""
    (folder,) = data_folders(recipe)
    baseline = witten_bell_bits_per_byte(
        _documents(folder, "train"), _documents(folder, "test"), order=3
    )
    bits = run["results"]["evaluate/bits_per_byte"]
    text = f"{bits:.3f} bits per byte, 3-gram {baseline:.3f}"
    return {"bits_per_byte": bits, "three_gram": baseline, "text": text}


def _documents(folder: Path, split: str) -> list[bytes]:
    """The documents of a split, put together again from pieces that overlap by a byte."""
    shards = Shards(folder, split)
    documents: dict[str, bytes] = {}
    for i in range(len(shards)):
        document = shards.key(i).rpartition("-")[0]
        piece = shards.sample(i)["tokens"].tobytes()
        documents[document] = documents[document] + piece[1:] if document in documents else piece
    return list(documents.values())


def _judged(gan: Path, classifier: Path) -> dict[str, Any]:
    """How many of the GAN's samples a trained classifier is sure about, beside what it says of noise and real images.

    The classifier is a LeNet: one with batch norm may well be sure that noise is an 8.
    """
    import torch

    judge, artist = restore(classifier), restore(gan)
    statistics = Shards(data_folders(judge.recipe)[0], "train").index.statistics["image"]
    mean, deviation = float(statistics["mean"][0]), float(statistics["std"][0])
    network = judge.view().model

    def sure(images: Any) -> dict[str, Any]:
        probability, chosen = network((images - mean) / deviation).softmax(1).max(1)
        counts = torch.bincount(chosen[probability >= CONFIDENT], minlength=10)
        return {"share": float(counts.sum()) / len(images), "classes": int((counts > 0).sum())}

    randomness.reseed(artist.recipe.seed, artist.step)
    drawn = artist.objective.samples(artist.view("ema"), SAMPLES, artist.world.device)["generator"]
    test = Shards(data_folders(judge.recipe)[0], "test")
    images = np.stack([test.sample(i)["image"] for i in range(len(test))])
    real = torch.from_numpy(images).to(drawn)[:, None] / 255
    pixels = torch.randperm(real[0].numel(), device=real.device)
    judged = {
        "samples": sure(drawn),
        "real": sure(real),
        "uniform noise": sure(torch.rand_like(drawn)),
        "normal noise": sure((torch.randn_like(drawn) * deviation + mean).clamp(0, 1)),
        "real, pixels shuffled": sure(real.flatten(1)[:, pixels].view_as(real)),
    }
    share, classes = judged["samples"]["share"], judged["samples"]["classes"]
    noise = max(
        judged[kind]["share"] for kind in ("uniform noise", "normal noise", "real, pixels shuffled")
    )
    text = f"{share:.0%} of samples are sure digits (noise {noise:.0%}), {classes} classes"
    return {"confident": share, "noise": noise, "classes": classes, "judged": judged, "text": text}


def _killed_and_back(recipe: Recipe, root: Path, steps: int, console: Console) -> dict[str, Any]:
    """Kill a second, equal run late; bring copies of it back on two ranks and on one, and compare with the first."""
    killed = root / "killed"
    until = int(steps * KILLED_AT)
    _run_and_kill(killed, until)
    last = RunDirectory.open(killed).rows()[-1]["step"]
    saved = checkpoint.steps(killed / "checkpoints")[-1]
    console.print(f"killed after step {last} of {steps}; its last checkpoint is of step {saved}")
    silent = recipe.set("callbacks.console", None).set(
        "threads", 1
    )  # as two ranks on two cores have
    places = {"two": (RANKS, "forward"), "one": (1, "forward"), "reversed": (1, "reversed")}
    for name, (ranks, order) in places.items():
        copy = root / f"back-on-{name}"
        shutil.copytree(killed, copy)
        console.print(
            f"  bringing a copy back on {ranks} rank{'s' * (ranks > 1)}, micro-batches {order}"
        )
        train(silent, resume=copy, ranks=ranks, micro_order=order)
    unbroken = root / recipe.name
    digests = [checkpoint.weights_digest(path) for path in (unbroken, root / "back-on-two")]
    same = digests[0] == digests[1]
    difference = _largest(unbroken, root / "back-on-one")
    floor = _largest(root / "back-on-one", root / "back-on-reversed")
    state = (
        f"identical (sha256 {digests[0][:16]})"
        if same
        else f"DIFFERENT ({digests[0][:8]}, {digests[1][:8]})"
    )
    text = f"2 ranks: weights {state} | 1 rank: max difference {difference:.1e}, noise floor {floor:.1e}"
    return {
        "identical": same,
        "sha256": digests[0],
        "difference": difference,
        "floor": floor,
        "text": text,
    }


def _run_and_kill(path: Path, step: int) -> None:
    """Start a run as a user does, and send SIGKILL to all its processes once it has logged `step`."""
    command = [sys.executable, "-m", "dist_train", "train", "wgan-gp-mnist", "--ranks", str(RANKS)]
    process = subprocess.Popen(
        [*command, "--run-dir", str(path), "--set", "callbacks.console=null", "--set", "threads=1"],
        start_new_session=True,
    )
    try:
        while process.poll() is None:
            if (path / "metrics.jsonl").exists():
                rows = RunDirectory(path).rows()
                if rows and rows[-1]["step"] >= step:
                    break
            time.sleep(0.05)
        else:
            raise RuntimeError(f"the run ended by itself, with exit code {process.returncode}")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _largest(first: Path, second: Path) -> float:
    """The largest difference of a weight."""
    differences = checkpoint.diff(first, second)["differences"]
    return float(
        np.max([value for name, value in differences.items() if name.startswith("weights/")])
    )
