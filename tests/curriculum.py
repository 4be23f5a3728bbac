"""Every model of the catalogue with every objective that can train it, in tiny; and what ranks do with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cases import strategy

from dist_train import assembly, run
from dist_train.recipe import Recipe
from dist_train.verify import parity
from dist_train.world import World

STEPS = 4
"""Reference states of each case."""

ON_IMAGES: dict[str, dict[str, Any]] = {
    "mlp": {"depth": 2, "width": 16, "in_features": "auto"},
    "lenet": {"image_size": "auto", "in_channels": "auto", "activation": "relu"},
    "alexnet": {
        "stem": "small",
        "width": 6,
        "dropout": 0.1,
        "hidden": 16,
        "image_size": "auto",
        "in_channels": "auto",
    },
    "vgg": {
        "depth": 11,
        "width": 4,
        "hidden": 16,
        "image_size": "auto",
        "in_channels": "auto",
        "norm": "batch",
    },
    "resnet": {"depth": 8, "width": 4, "in_channels": "auto"},
    "resnet_imagenet": {"depth": 50, "width": 4, "in_channels": "auto", "norm": "group"},
}
PAIRS = [{"name": "tokenise_pair", "source": "en", "target": "back", "length": 12}]
TRANSLATORS: dict[str, dict[str, Any]] = {
    "seq2seq": {"attention": "additive", "feed": "output"},
    "encoder_decoder": {"depth": 1, "num_heads": 2},
}
OUTPUTS = {"mlp": "num_outputs"}
"""What a model calls the number of its outputs, if not `num_classes`."""
CANCELLED = {"critic/critic.score.bias"}
"""Weights whose gradient is 0 by the mathematics: a Wasserstein loss is a difference of scores."""
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ADAM = {"name": "adam", "learning_rate": 3e-3}

SIZES = {"channels": "auto", "image_size": "auto"}
LABELLED = {**SIZES, "num_classes": "auto"}
TRANSLATOR = {"name": "translator", "width": 2, "blocks": 1, "channels": "auto"}
HALVED = [{"name": "resize", "size": 16}]
PATCHES = {"name": "patch_discriminator", "width": 2, "channels": "auto"}

RIVALS = ("generator", "discriminators")
"""Players whose loss need not fall, since the other learns too."""

LEARNS = {"resnet_imagenet-regression": 60}
"""After how many steps a loss has surely fallen, if not after 30: 50 layers take longer."""


def names(**arguments: Any) -> dict[str, Any]:
    """The transforms that make tokens of the pictures' names."""
    spec = {"name": "tokenise", "field": "text", "length": 8, **arguments}
    return {"train": [spec], "evaluate": [spec]}


SMALL = {"latent_dim": 4, "width": 4}
EIGHTH = [{"name": "resize", "size": 8}]
EIGHTHS = {
    "path": "pictures",
    "scale": "unit",
    "transforms": {"train": EIGHTH, "evaluate": EIGHTH},
}
PICTURE = {"hidden": 16, "channels": "auto", "image_size": "auto"}


def vae(encoder: dict[str, Any], decoder: dict[str, Any]) -> dict[str, Any]:
    """Two networks of one player."""
    return {"model": {"encoder": encoder, "decoder": decoder}}


CASES: dict[str, dict[str, Any]] = {
    **{
        f"{name}-classification": {
            "data": {"path": "pictures"},
            "model": {"name": name, **arguments, OUTPUTS.get(name, "num_classes"): "auto"},
            "objective": {"name": "classification", "label_smoothing": 0.05, "mixup": 0.2},
            "shapes": {"logits": (4, 10), "nll": (4,)},
        }
        for name, arguments in ON_IMAGES.items()
    },
    **{
        f"{name}-regression": {
            "data": {"path": "pictures"},
            "model": {"name": name, **arguments, OUTPUTS.get(name, "num_classes"): 4},
            "objective": {"name": "regression", "inputs": "image", "variance": "predicted"},
            "shapes": {"prediction": (4, 2), "deviation": (4, 2), "nll": (4,)},
        }
        for name, arguments in ON_IMAGES.items()
    },
    "transformer-language_modelling": {
        "data": {"path": "text"},
        "model": {
            "name": "transformer",
            "vocab_size": "auto",
            "dim": 16,
            "num_heads": 2,
            "max_length": 32,
            "dropout": 0.1,
        },
        "objective": {"name": "language_modelling"},
        "shapes": {"loss_sum": (), "loss_count": ()},
    },
    "recurrent_language_model-language_modelling": {
        "data": {"path": "text"},
        "model": {
            "name": "recurrent_language_model",
            "vocab_size": "auto",
            "width": 12,
            "embedding": 8,
            "dropout": 0.1,
        },
        "objective": {"name": "language_modelling", "teacher_forcing": 0.8, "free_running": 3},
        "shapes": {"loss_sum": (), "written": (4, 3), "written_length": (4,)},
    },
    "temporal_convolution-language_modelling": {
        "data": {"path": "text"},
        "model": {
            "name": "temporal_convolution",
            "vocab_size": "auto",
            "width": 12,
            "depth": 2,
            "embedding": 8,
            "dropout": 0.1,
        },
        "objective": {"name": "language_modelling"},
        "shapes": {"loss_sum": (), "loss_count": ()},
    },
    "captioner-language_modelling": {
        "data": {"path": "pictures", "transforms": names(ends=True)},
        "model": {
            "name": "captioner",
            "vocab_size": 257,
            "in_channels": "auto",
            "width": 12,
            "cell": "gru",
            "embedding": 8,
            "encoder_width": 4,
        },
        "objective": {"name": "language_modelling", "describes": "image", "free_running": 3},
        "shapes": {"loss_sum": (), "written": (4, 3), "written_length": (4,)},
    },
    "recurrent_classifier-classification": {
        "data": {"path": "pictures", "transforms": names()},
        "model": {
            "name": "recurrent_classifier",
            "vocab_size": 257,
            "num_classes": "auto",
            "width": 12,
            "embedding": 8,
            "bidirectional": True,
        },
        "objective": {"name": "classification", "inputs": "tokens"},
        "shapes": {"logits": (4, 10), "nll": (4,)},
    },
    **{
        f"{name}-translation": {
            "data": {"path": "pairs", "transforms": {"train": PAIRS, "evaluate": PAIRS}},
            "model": {"name": name, "vocab_size": "auto", "dim": 12, "dropout": 0.1, **arguments},
            "objective": {"name": "translation", "label_smoothing": 0.1},
            "shapes": {"loss_sum": (), "loss_count": ()},
        }
        for name, arguments in TRANSLATORS.items()
    },
    "conv_generator-conv_critic-wgan_gp": {
        "data": {"path": "pictures", "scale": "signed"},
        "model": {
            "generator": {
                "name": "conv_generator",
                "latent_dim": 8,
                "width": 4,
                "channels": "auto",
                "image_size": "auto",
            },
            "critic": {
                "name": "conv_critic",
                "width": 4,
                "channels": "auto",
                "image_size": "auto",
            },
        },
        "objective": {"name": "wgan_gp", "latent_dim": 8, "critic_steps": 2},
        "shapes": {"generated": (4, 1, 32, 32)},
    },
    "mlp_generator-mlp_discriminator-gan": {
        "data": {"path": "pictures", "scale": "signed"},
        "model": {
            "generator": {"name": "mlp_generator", "latent_dim": 8, "hidden": 16, **LABELLED},
            "discriminator": {"name": "mlp_discriminator", "hidden": 16, **LABELLED},
        },
        "objective": {
            "name": "gan",
            "loss": "minimax",
            "latent_dim": 8,
            "discriminator_steps": 2,
            "num_classes": 10,
        },
        "callbacks": {"noise": {"name": "schedule", "scalar": "instance_noise", "value": 0.1}},
        "shapes": {"generated": (4, 1, 32, 32)},
    },
    "dcgan_generator-dcgan_discriminator-gan": {
        "data": {"path": "pictures", "scale": "signed"},
        "model": {
            "generator": {"name": "dcgan_generator", "latent_dim": 8, "width": 4, **SIZES},
            "discriminator": {
                "name": "dcgan_discriminator",
                "width": 4,
                "norm": "spectral",
                **SIZES,
            },
        },
        "objective": {"name": "gan", "loss": "hinge", "latent_dim": 8},
        "callbacks": {"clip_weights": {"bound": 0.5, "players": ["discriminator"]}},
        "shapes": {"generated": (4, 1, 32, 32)},
    },
    "biggan_generator-biggan_discriminator-gan": {
        "data": {
            "path": "pictures",
            "scale": "signed",
            "transforms": {"train": HALVED, "evaluate": HALVED},
        },
        "model": {
            "generator": {
                "name": "biggan_generator",
                "latent_dim": 6,
                "width": 4,
                "embedding": 4,
                **LABELLED,
                "image_size": 16,
            },
            "discriminator": {
                "name": "biggan_discriminator",
                "width": 4,
                **LABELLED,
                "image_size": 16,
            },
        },
        "objective": {
            "name": "gan",
            "loss": "hinge",
            "latent_dim": 6,
            "orthogonal": 1e-2,
            "num_classes": 10,
        },
        "callbacks": {"ema": {"players": ["generator"], "decay": 0.9}},
        "shapes": {"generated": (4, 1, 16, 16)},
    },
    "translator-patch_discriminator-cyclegan": {
        "data": {
            "a": {"path": "pictures", "scale": "signed"},
            "b": {"path": "pictures", "scale": "signed"},
        },
        "model": {
            "translators": {"to_b": TRANSLATOR, "to_a": TRANSLATOR},
            "discriminators": {"of_a": PATCHES, "of_b": PATCHES},
        },
        "objective": {"name": "cyclegan", "identity": 0.5, "pool": 6},
        "shapes": {"paired_l1": (4,), "identity_l1": (4,), "to_b": (4, 1, 32, 32)},
    },
    "autoencoder-reconstruction": {
        "data": {"path": "pictures", "scale": "unit"},
        "model": {"name": "autoencoder", "code_dim": 8, "width": 16, "in_features": "auto"},
        "objective": {"name": "reconstruction", "sparsity": 0.01, "masking": 0.1},
        "shapes": {"code": (4, 8), "prediction": (4, 1024), "target": (4, 1024)},
    },
    "conv_autoencoder-reconstruction": {
        "data": {"path": "pictures"},
        "model": {
            "name": "conv_autoencoder",
            "code_dim": 8,
            "width": 4,
            "hidden": 16,
            "channels": "auto",
            "image_size": "auto",
        },
        "objective": {"name": "reconstruction", "noise": 0.1},
        "shapes": {"code": (4, 8), "prediction": (4, 1024), "target": (4, 1024)},
    },
    "vae_encoder-vae_decoder-elbo": {
        "data": {"path": "pictures", "scale": "unit"},
        "model": vae(
            {"name": "vae_encoder", **SMALL, "in_features": "auto", "num_classes": "auto"},
            {"name": "vae_decoder", **SMALL, "shape": [1, 32, 32], "num_classes": "auto"},
        ),
        "objective": {
            "name": "elbo",
            "latent_dim": 4,
            "num_classes": 10,
            "estimator": "score_function",
            "draws": 2,
            "binarise": "sampled",
        },
        "shapes": {"elbo": (4,), "importance_bound": (4,), "code": (4, 4)},
    },
    "vae_conv_encoder-vae_conv_decoder-elbo": {
        "data": {"path": "pictures", "scale": "unit"},
        "model": vae(
            {"name": "vae_conv_encoder", **SMALL, **PICTURE},
            {"name": "vae_conv_decoder", **SMALL, **PICTURE, "per_element": 2},
        ),
        "objective": {"name": "elbo", "latent_dim": 4, "likelihood": "discretised_logistic"},
        "shapes": {"elbo": (4,), "bits_per_dim": (4,)},
    },
    "vae_table-vae_conv_decoder-elbo": {
        "data": {"path": "pictures", "scale": "unit"},
        "model": vae(
            {"name": "vae_table", "num_samples": "auto", "latent_dim": 4},
            {"name": "vae_conv_decoder", **SMALL, **PICTURE},
        ),
        "objective": {"name": "elbo", "latent_dim": 4, "inference": "per_sample"},
        "shapes": {},  # it knows of no other samples
    },
    "nice-likelihood": {
        "data": {"path": "pictures", "scale": "unit"},
        "model": {"name": "nice", "width": 8, "in_features": "auto"},
        "objective": {"name": "likelihood", "shape": [1, 32, 32], "prior": "logistic"},
        "shapes": {"nll": (4,), "bits_per_dim": (4,)},
    },
    "realnvp-likelihood": {
        "data": {"path": "pictures", "scale": "unit"},
        "model": {"name": "realnvp", "width": 4, "channels": "auto", "image_size": "auto"},
        "objective": {"name": "likelihood", "shape": [1, 32, 32]},
        "shapes": {"nll": (4,), "bits_per_dim": (4,)},
    },
    **{
        f"{name}-autoregression": {
            "data": EIGHTHS,
            "model": {"name": name, "levels": 16, "channels": "auto", **arguments},
            "objective": {"name": "autoregression", "shape": [1, 8, 8], "levels": 16, **condition},
            "shapes": {"nll": (4,), "bits_per_dim": (4,)},
        }
        for name, arguments, condition in (
            ("pixel_cnn", {"width": 8, "depth": 2, "num_classes": "auto"}, {"num_classes": 10}),
            ("row_lstm", {"width": 8, "depth": 1}, {}),
            ("pixel_transformer", {"dim": 16, "depth": 1, "image_size": 8, "dropout": 0.1}, {}),
        )
    },
    "pixel_cnn-mlp-autoregression": {
        "data": EIGHTHS,
        "model": {
            "model": {
                "model": {"name": "pixel_cnn", "levels": 16, "width": 8, "context_dim": 4},
                "encoder": {"name": "mlp", "in_features": 64, "num_outputs": 4, "width": 16},
            }
        },
        "objective": {
            "name": "autoregression",
            "shape": [1, 8, 8],
            "levels": 16,
            "context": "upper_half",
        },
        "shapes": {"nll": (4,), "bits_per_dim": (4,)},
    },
}


def networks_of(case: dict[str, Any]) -> list[str]:
    """The names of a case's models, each once: one, one a player, or several of one player."""

    def found(tree: dict[str, Any]) -> list[str]:
        return (
            [tree["name"]] if "name" in tree else [n for part in tree.values() for n in found(part)]
        )

    return list(dict.fromkeys(found(case["model"])))


def pack_pictures(folder: Path) -> None:
    """200 digits of 32 x 32, their class, its name, and two numbers to predict: how much ink, how far right it lies.

    Where another file's tests have packed them they stay.
    """
    if folder.exists():
        return
    import numpy as np
    from sklearn.datasets import load_digits

    from dist_train.data_shards.write import write_shards

    digits = load_digits()

    def samples() -> Iterator[Any]:
        for i in range(200):
            small = digits.images[i]
            image = np.kron(small * 15, np.ones((4, 4))).astype("uint8")
            right = (small.sum(0) * np.arange(8)).sum() / small.sum()
            target = np.array([small.mean(), right], np.float32)
            split = "test" if i % 10 == 0 else "train"
            label = int(digits.target[i])
            fields = {"image.npy": image, "cls": label, "target.npy": target, "txt": NAMES[label]}
            yield split, f"{i:05d}", fields

    write_shards(folder, "pictures", samples(), shard_size=60, classes=list("0123456789"))


def pack_pairs(folder: Path) -> None:
    """100 words, and each written backwards."""
    from pydoc_data.topics import topics

    from dist_train.data_shards.tokens import ByteTokenizer
    from dist_train.data_shards.write import write_shards

    words = sorted({word for word in topics["class"].split() if 2 < len(word) < 12})[:100]
    samples = (
        ("test" if i % 10 == 0 else "train", f"{i:05d}", {"en.txt": word, "back.txt": word[::-1]})
        for i, word in enumerate(words)
    )
    tokenizer = ByteTokenizer()
    write_shards(folder, "pairs", samples, vocabulary=tokenizer.vocabulary, tokenizer=tokenizer)


def recipe_of(case: str, data: str, **settings: Any) -> Recipe:
    """A case as a recipe: steps of 16 samples in 4 micro-batches."""
    parts = CASES[case]
    recipe = Recipe(
        project="tests",
        name=case,
        seed=3,
        duration="6 steps",
        threads=1,
        log={"every": "2 steps"},
        data={**_located(parts["data"], data), "global_batch": 16, "micro_batch": 4},
        model=parts["model"],
        objective=parts["objective"],
        optimizer=ADAM,
        callbacks={
            "clip_gradients": {"norm": 1.0},
            "checkpoint": {"every": "3 steps", "keep": 2},
            **parts.get("callbacks", {}),
        },
    )
    for key, value in settings.items():
        recipe = recipe.set(key.replace("__", "."), value)
    return recipe


def _located(section: dict[str, Any], data: str) -> dict[str, Any]:
    """A case's data, of one stream or of several by name, with the folder that they lie in."""
    if "path" in section:
        return {**section, "path": str(Path(data) / section["path"])}
    return {name: _located(stream, data) for name, stream in section.items()}


def alone(data: str, folder: str) -> dict[str, Any]:
    """What one process finds of each case, and leaves for two: `{case: {shapes, losses, without_gradient}}`."""
    found = {}
    for case in CASES:
        here = Path(folder) / case
        recipe = recipe_of(case, data, strategy="single")
        bare = recipe.set("callbacks.checkpoint", None)
        with parity.trainer_of(bare, World(), here / "reference") as trainer:
            parity.write_reference(trainer, STEPS)
        run.train(recipe, run_dir=here / "whole")
        run.train(recipe, run_dir=here / "halves", until=3)
        run.train(recipe, run_dir=here / "halves", resume="auto")
        steps = f"{LEARNS.get(case, 30)} steps"
        found[case] = _learns(bare.set("duration", steps), here / "learns", case)
    return found


def _learns(recipe: Recipe, folder: Path, case: str) -> dict[str, Any]:
    """Steps on one batch."""
    with parity.trainer_of(recipe, World(), folder) as trainer:
        trainer.data = assembly.Repeated(trainer.data, 1)
        gradients = parity.Gradients()
        parity.watch(trainer, gradients)
        trainer.train()
        turns = gradients.take()
        touched = {
            f"{turn.player}/{name}"
            for turn in turns
            for name, gradient in turn.gradients.items()
            if gradient.any()
        }
        names = {f"{player}/{name}" for player, e in trainer.engines.items() for name in e.trained}
        shapes = {}
        if CASES[case]["shapes"]:
            networks = trainer.view()
            outputs = trainer.objective.evaluate(networks, trainer.batch[0])
            shapes = {name: list(value.shape) for name, value in outputs.items()}
        return {
            "shapes": shapes,
            "losses": [turn.loss for turn in turns if turn.player not in RIVALS],
            "without_gradient": sorted(names - touched - CANCELLED),
        }


def together(data: str, folder: str) -> dict[str, Any]:
    """Of two ranks under ZeRO-2: the largest step-locked difference of a loss and of a gradient from one process."""
    world = World.join(group=True)
    found = {
        case: _locked(world, data, case, "zero2", Path(folder) / case, STEPS) for case in CASES
    }
    world.leave()
    return found


def under(data: str, folder: str, case: str, strategies: list[str]) -> dict[str, Any]:
    """Of one case the same under each of these strategies, at its first state."""
    world = World.join(group=True)
    found = {name: _locked(world, data, case, name, Path(folder), 1) for name in strategies}
    world.leave()
    return found


def _locked(
    world: World, data: str, case: str, name: str, folder: Path, steps: int
) -> dict[str, Any]:
    recipe = recipe_of(case, data, strategy=strategy(name)).set("callbacks.checkpoint", None)
    with parity.trainer_of(recipe, world, folder / f"locked-{name}") as trainer:
        differences = parity.step_locked(trainer, folder / "reference", steps)
    return {
        kind: max((pair[0], entry) for entry, pair in differences.items() if f"/{kind}/" in entry)
        for kind in ("samples", "loss", "gradient")
    }
