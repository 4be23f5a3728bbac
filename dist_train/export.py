"""A trained run as files that others can load: config.json, model.safetensors and a README for each network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_train import components
from dist_train.data import describe
from dist_train.errors import UserError
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory, write_file
from dist_train.trained import restore

CARD = """---
library_name: dist-train
tags: [dist-train]
---
# {name}

`{model}`, trained by dist-train: recipe `{recipe}`, step {step}, {weights} weights.

```python
import json
from safetensors.torch import load_file
from dist_train import components

config = json.load(open("config.json"))
network = components.build("model", config["model"], "model")
network.load_state_dict(load_file("model.safetensors"))
```
"""


def export(run_dir: str | Path, out: str | Path, weights: str | None = None) -> dict[str, Any]:
    """Write a run's networks to `out` (a folder each where there are several), then load them back and compare.

    Args:
        weights: "live", or the callback whose average to take; by default what the recipe evaluates with.
    Raises: UserError when `out` exists, or the run has no checkpoint.
    """
    import torch
    from safetensors.torch import load_file, save_file

    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: exists already; name a new folder")
    recipe = Recipe.load(RunDirectory.open(run_dir).path)
    weights = weights or (recipe.evaluate.weights if recipe.evaluate else "live")
    trainer = restore(run_dir, recipe)
    averages = {} if weights == "live" else trainer.callback(weights).weights(trainer)
    known = describe(recipe)
    written = {}
    for player, specs in recipe.networks.items():
        whole = averages.get(player) or trainer.full_weights(player)
        for name, spec in specs.items():
            folder = out / name if len(list(recipe.networks)) > 1 or len(specs) > 1 else out
            folder.mkdir(parents=True)
            model = {key: known[key] if value == "auto" else value for key, value in spec.items()}
            kept = (
                trainer.engines[player].player.networks[name].state_dict()
            )  # what a checkpoint of torch would hold
            state = {key: whole[f"{name}.{key}"].contiguous() for key in kept}
            config = {
                "model": model,
                "recipe": recipe.name,
                "step": trainer.step,
                "weights": weights,
            }
            write_file(folder / "config.json", json.dumps(config, indent=2).encode())
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
            card = CARD.format(
                name=name,
                model=spec["name"],
                recipe=recipe.name,
                step=trainer.step,
                weights=weights,
            )
            write_file(folder / "README.md", card.encode())
            network = components.build("model", model, "model")
            network.load_state_dict(load_file(folder / "model.safetensors"))
            back = network.state_dict()
            assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
            written[name] = str(folder)
    return {"step": trainer.step, "weights": weights, "written": written}
