"""`diagnose linear-probe`: how much of the classes a straight cut through the codes of a trained network tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train import randomness
from dist_train.data import evaluation_batches
from dist_train.errors import UserError
from dist_train.trained import restore
from dist_train.trainer import Trainer

RIDGE = 1e-4
STEPS = 100


def linear_probe(run_dir: str | Path, *, split: str = "test") -> dict[str, Any]:
    """Fit softmax regression to the codes of the training split, and say its accuracy on another (Alain and Bengio
    2016, arXiv:1610.01644); beside it that of the inputs themselves. The network stays as it is."""
    trainer = restore(run_dir)
    known = _codes(trainer, trainer.recipe.data.named[""].split)
    asked = _codes(trainer, split)
    found = {
        name: accuracy(known[name], known["label"], asked[name], asked["label"])
        for name in ("code", "input")
    }
    return {
        "run_dir": str(run_dir),
        "step": trainer.step,
        "split": split,
        "samples": len(asked["label"]),
        "numbers": known["code"].shape[1],
        "accuracy": found["code"],
        "accuracy_of_inputs": found["input"],
    }


def accuracy(x: Tensor, label: Tensor, other: Tensor, other_label: Tensor) -> float:
    """That of softmax regression fitted to x (N, F) and label (N,), on others: standardised, with a small ridge."""
    mean, std = x.mean(dim=0), x.std(dim=0)
    x, other = ((values - mean) / torch.where(std > 0, std, 1.0) for values in (x, other))
    classes = int(label.max()) + 1
    weight = torch.zeros(x.shape[1], classes, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight + bias, label)
        loss = loss + RIDGE * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float(((other @ weight + bias).argmax(dim=1) == other_label).double().mean())


def _codes(trainer: Trainer, split: str) -> dict[str, Tensor]:
    """`code` (N, Z), `input` (N, F) and `label` (N,) of a split, on the CPU."""
    networks = trainer.view()
    parts: dict[str, list[Tensor]] = {"code": [], "input": [], "label": []}
    field = getattr(trainer.objective, "inputs", "image")
    for micro in evaluation_batches(trainer.recipe, trainer.world, split):
        micro = micro.to(trainer.world.device)
        randomness.reseed(trainer.seed, trainer.step, randomness.EVALUATION, micro.index)
        with torch.no_grad():
            found = trainer.objective.predict(networks, micro)
        if "code" not in found:
            name = trainer.recipe.objective["name"]
            raise UserError(f"objective: '{name}' has no code to probe (reconstruction, elbo have)")
        rows = {"code": found["code"], "input": micro[field], "label": micro["label"]}
        for name, values in rows.items():
            parts[name].append(values[: micro.real].cpu())
    return {
        name: torch.cat(values) if name == "label" else torch.cat(values).flatten(1)
        for name, values in parts.items()
    }
