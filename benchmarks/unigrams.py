"""What a text costs without a model: bits a token of the test split under the frequencies of the training split.

    python benchmarks/unigrams.py captions-emoji

The floor of the course's captions. A token that training has not shown counts as seen once, like all others once more.
"""

import argparse
import math

import torch

from dist_train.data import evaluation_batches
from dist_train.recipe import Recipe
from dist_train.world import World


def counts(recipe: Recipe, split: str, vocabulary: int) -> torch.Tensor:
    """How often each token is a target: (V,)."""
    found = torch.zeros(vocabulary, dtype=torch.float64)
    for micro in evaluation_batches(recipe, World(), split):
        targets, length = micro["tokens"][:, 1:], micro["length"].clone()
        length[micro.real :] = 0
        real = torch.arange(targets.shape[1]) < length[:, None]
        found += torch.bincount(targets[real], minlength=vocabulary)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    recipe = Recipe.load(parser.parse_args().recipe)
    vocabulary = int(recipe.model["vocab_size"])
    seen = counts(recipe, "train", vocabulary) + 1
    test = counts(recipe, "test", vocabulary)
    bits = -(test * (seen / seen.sum()).log2()).sum() / test.sum()
    print(f"{recipe.name}: {bits:.3f} bits a token over {int(test.sum())} tokens of the split test")
    assert math.isfinite(bits)


if __name__ == "__main__":
    main()
