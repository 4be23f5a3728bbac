"""A trained classifier that looks at pictures which others have made: what it calls them, and the features it sees."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dist_train import checkpoint, components
from dist_train.data_shards.index import Index
from dist_train.data_shards.sources import locate
from dist_train.errors import UserError
from dist_train.recipe import Recipe
from dist_train.settings import how_to_make

WHERE = "objective.judge"


class Judge:
    """The network of a finished classification run, in evaluation mode; no player, it never learns again.

    Its features are what its last linear layer is given (of LeNet-5: 84 numbers), the class is that layer's largest.

    Args:
        run: the run directory of a classifier of one network, whose data stand in the index with their statistics.
    """

    def __init__(self, run: Path) -> None:
        if not (run / "recipe.yaml").is_file():
            raise UserError(
                f"judge: got '{run}', expected the run directory of a classifier{how_to_make(run)}"
            )
        recipe = Recipe.load(run)
        if recipe.objective["name"] != "classification" or recipe.members is not None:
            raise UserError(
                f"judge: '{run}' trained '{recipe.objective['name']}', expected one classifier"
            )
        index = _index(recipe)
        known = index.describe()
        spec = {
            key: known.get(key) if value == "auto" else value for key, value in recipe.model.items()
        }
        self.network: nn.Module = components.build("model", spec, WHERE)
        reader = checkpoint.Reader(checkpoint.resolve(run))
        self.network.load_state_dict(
            {
                name.removeprefix(f"{kind}/model."): reader.whole(name)
                for kind in ("weights", "buffers")
                for name in reader.names(f"{kind}/model.")
            }
        )
        self.network.requires_grad_(False).eval()
        linear = [m for m in self.network.modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise UserError(f"judge: '{run}' has no linear layer, whose input would be features")
        linear[-1].register_forward_pre_hook(self._note)
        moments = index.statistics["image"]
        self._mean = torch.tensor(moments["mean"]).view(-1, 1, 1)
        self._deviation = torch.tensor([value or 1.0 for value in moments["std"]]).view(-1, 1, 1)
        if recipe.data.scale != "standard":
            raise UserError(f"judge: '{run}' has data.scale {recipe.data.scale}, expected standard")

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, C, S, S) in [0, 1] -> features (B, F) and the class (B,) of each."""
        if self._mean.device != image.device:
            self.network.to(image.device)
            self._mean, self._deviation = (
                self._mean.to(image.device),
                self._deviation.to(image.device),
            )
        with torch.no_grad():
            logits = self.network((image - self._mean) / self._deviation)
        return self._features, logits.argmax(dim=1)

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0].flatten(1)


def _index(recipe: Recipe) -> Index:
    """The index of the only shards that a classifier was trained on."""
    [stream, *more] = recipe.data.named.values()
    if more or stream.sources is not None or stream.is_remote:
        raise UserError("judge: was trained on several or remote shards, expected one local source")
    source = stream.origins[0]
    return Index.load(locate(source.name or str(source.path), recipe.root, **source.options))
