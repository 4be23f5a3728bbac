"""A trained run as files that others can load: safetensors in the layout of the Hugging Face hub, ONNX, or pt2.

Whatever is written is loaded back and compared: safetensors bit for bit, programs by running them beside the network.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train import components, randomness
from dist_train.callbacks.scheduled import Scheduled
from dist_train.data import describe
from dist_train.errors import UserError, nearest, writing
from dist_train.networks import Networks
from dist_train.networks.members import member_state
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory, write_file
from dist_train.trained import restore
from dist_train.trainer import Trainer

if TYPE_CHECKING:
    from torch import Tensor, nn

CARD = """---
library_name: dist-train
tags: [dist-train]
---
# {name}

`{model}`, trained by dist-train: recipe `{recipe}`, step {step}, {weights} weights.

```python
{usage}
```
"""
USAGE = {
    "hf": """import json
from safetensors.torch import load_file
from dist_train import components

config = json.load(open("config.json"))
network = components.build("model", config["model"], "model")
network.load_state_dict(load_file("model.safetensors"))""",
    "pt2": """import torch

network = torch.export.load("model.pt2").module()  # needs no dist-train""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
outputs = session.run(None, {session.get_inputs()[0].name: inputs})  # numpy arrays""",
}
TOLERANCE = 1e-4
"""Largest difference of a program's outputs from the network's, relative to their largest."""


def export(
    run_dir: str | Path, out: str | Path, weights: str | None = None, format: str = "hf"
) -> dict[str, Any]:
    """Write a run's networks to `out` (a folder each where there are several), load them back and compare.

    Args:
        weights: "live", or the callback whose average to take; by default what the recipe evaluates with.
        format: "hf": config.json and model.safetensors; "pt2" (torch.export) or "onnx": a program, in evaluation mode,
            for any batch size.
    Raises: UserError when `out` exists, the run has no checkpoint, or a network cannot be written so.
    """
    import torch
    from safetensors.torch import load_file, save_file

    if format not in USAGE:
        raise UserError(
            f"format: got '{format}', expected one of {', '.join(USAGE)}{nearest(format, USAGE)}"
        )
    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: exists already; name a new folder")
    recipe = Recipe.load(RunDirectory.open(run_dir).path)
    weights = weights or (recipe.evaluate.weights if recipe.evaluate else "live")
    trainer = restore(run_dir, recipe)
    averages = {} if weights == "live" else trainer.callback(weights).weights(trainer)
    inputs = {} if format == "hf" else _inputs(trainer)
    known = describe(recipe)
    written, differences = {}, {}
    for player, specs in recipe.networks.items():
        whole = averages.get(player) or trainer.full_weights(player)
        for name, spec in specs.items():
            place = out / name if len(list(recipe.networks)) > 1 or len(specs) > 1 else out
            model = {key: known[key] if value == "auto" else value for key, value in spec.items()}
            # what a checkpoint of torch would hold
            live = trainer.engines[player].player.networks[name]
            state = {key: whole[f"{name}.{key}"].contiguous().cpu() for key in live.state_dict()}
            if format != "hf" and name not in inputs:
                raise UserError(f"{run_dir}: the objective never calls '{name}'")
            for label, folder, own, seen in _members(recipe, name, place, live, state, inputs):
                with writing(out):
                    folder.mkdir(parents=True)
                network = components.build("model", model, "model")
                if format == "hf":
                    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
                    network.load_state_dict(load_file(folder / "model.safetensors"))
                    back = network.state_dict()
                    assert all(torch.equal(back[key], tensor) for key, tensor in own.items())
                else:
                    network.load_state_dict(own)
                    write = {"pt2": _write_pt2, "onnx": _write_onnx}[format]
                    differences[label] = _checked(label, network.eval(), seen, write, folder)
                config = {
                    "model": model,
                    "recipe": recipe.name,
                    "step": trainer.step,
                    "weights": weights,
                }
                write_file(folder / "config.json", json.dumps(config, indent=2).encode())
                card = CARD.format(
                    name=label,
                    model=spec["name"],
                    recipe=recipe.name,
                    step=trainer.step,
                    weights=weights,
                    usage=USAGE[format],
                )
                write_file(folder / "README.md", card.encode())
                written[label] = str(folder)
    result = {"step": trainer.step, "weights": weights, "format": format, "written": written}
    return result | ({"differences": differences} if differences else {})


def _members(
    recipe: Recipe,
    name: str,
    place: Path,
    network: nn.Module,
    state: dict[str, Tensor],
    inputs: Mapping[str, tuple[Tensor, ...]],
) -> Iterator[tuple[str, Path, dict[str, Tensor], tuple[Tensor, ...]]]:
    """(label, folder, state, inputs) of a network, or of each of its members as a network of its own."""
    seen = inputs.get(name, ())
    if recipe.members is None:
        yield name, place, state, seen
        return
    for number in range(recipe.members.count):
        label = f"member-{number}"
        own = {k: t.contiguous() for k, t in member_state(network, state, number).items()}
        rows = seen if recipe.members.heads else tuple(x[:, number] for x in seen)
        yield label, place / label, own, rows


def _inputs(trainer: Trainer) -> dict[str, tuple[Tensor, ...]]:
    """{network: what the objective calls it with}, from the first micro-batch."""
    found: dict[str, tuple[Tensor, ...]] = {}
    _, batch = next(iter(trainer.data.from_(0, 1)))
    micro = batch[0].to(trainer.world.device)
    for callback in trainer.callbacks:
        if isinstance(callback, Scheduled):
            callback.step_begins(trainer)

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*inputs: Any) -> Any:
            found.setdefault(name, tuple(x.detach().cpu() for x in inputs))
            return call(*inputs)

        return noted

    for player in trainer.objective.players:
        turn = next(
            t for step in range(1000) for t in trainer.objective.turns(step) if t.player == player
        )
        seen = trainer.seen_by(turn)
        networks = Networks({name: noting(name, seen[name]) for name in seen})
        randomness.reseed(trainer.seed, 0, turn.index, micro.index)
        trainer.objective.loss(turn, networks, micro, trainer.scalars)
    return found


Program = Callable[..., Any]


def _checked(
    name: str,
    network: nn.Module,
    inputs: tuple[Tensor, ...],
    write: Callable[[nn.Module, tuple[Tensor, ...], Any, Path], Program],
    folder: Path,
) -> float:
    """Write the network as a program and run that on another batch size; how far its outputs are from the network's."""
    import torch
    from torch.export import Dim

    inputs = tuple(
        torch.cat([x, x])[: max(2, len(x))] for x in inputs
    )  # a batch of 1 would be fixed
    # the batch may have any size, and of whole numbers (tokens) also the length
    shapes = tuple(
        dict.fromkeys(range(1 if x.is_floating_point() else min(2, x.ndim)), Dim.AUTO)
        for x in inputs
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = write(network, inputs, shapes, folder)
        except UserError:
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"'{name}' cannot be written as a program: {reason}") from error
        more = tuple(torch.cat([x, x[:1]]) for x in inputs)
        expected, found = list(_leaves(network(*more))), list(_leaves(program(*more)))
    assert len(expected) == len(found)
    pairs = zip(expected, found, strict=True)
    difference = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in pairs)
    if not difference <= TOLERANCE:
        raise UserError(
            f"'{name}': the program that was written gives other outputs, by {difference:.1e} of the largest"
        )
    return difference


def _write_pt2(
    network: nn.Module, inputs: tuple[Tensor, ...], shapes: Any, folder: Path
) -> Program:
    import torch

    torch.export.save(
        torch.export.export(network, inputs, dynamic_shapes=shapes), folder / "model.pt2"
    )
    return torch.export.load(folder / "model.pt2").module()


def _write_onnx(
    network: nn.Module, inputs: tuple[Tensor, ...], shapes: Any, folder: Path
) -> Program:
    import torch

    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ModuleNotFoundError as error:
        raise UserError(
            f"format: onnx needs {error.name}: pip install 'dist-train[export]'"
        ) from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    made = torch.onnx.export(network, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert made is not None
    made.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_inputs()]

    def program(*tensors: Tensor) -> list[Tensor]:
        arrays = {name: x.numpy() for name, x in zip(names, tensors, strict=True)}
        return [torch.from_numpy(y) for y in session.run(None, arrays)]

    return program


def _leaves(output: Any) -> Iterator[Tensor]:
    if isinstance(output, tuple | list):
        for part in output:
            yield from _leaves(part)
    elif isinstance(output, dict):
        for part in output.values():
            yield from _leaves(part)
    else:
        yield output
