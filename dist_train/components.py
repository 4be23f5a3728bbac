"""The catalogue of named parts, and how a recipe's `{name: ..., arguments}` becomes an object.

A part is a row `name -> "module:attribute"`, so listing and checking names imports nothing heavy. A user's own part
is named by its import path (`my_package.nets:Net`, also `my_package.nets:Net.small`).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from dist_train.errors import UserError, nearest

CATALOGUE: dict[str, dict[str, str]] = {
    "model": {
        "mlp": "dist_train.models.mlp:MLP",
        "lenet": "dist_train.models.lenet:LeNet",
        "alexnet": "dist_train.models.alexnet:AlexNet",
        "vgg": "dist_train.models.vgg:VGG",
        "resnet": "dist_train.models.resnet:ResNet",
        "resnet_imagenet": "dist_train.models.resnet:ImageNetResNet",
        "transformer": "dist_train.models.transformer:Transformer",
        "recurrent_language_model": "dist_train.models.recurrent:RecurrentLanguageModel",
        "recurrent_classifier": "dist_train.models.recurrent:RecurrentClassifier",
        "captioner": "dist_train.models.captioner:Captioner",
        "temporal_convolution": "dist_train.models.temporal_convolution:TemporalConvolution",
        "seq2seq": "dist_train.models.seq2seq:Seq2Seq",
        "encoder_decoder": "dist_train.models.encoder_decoder:EncoderDecoder",
        "conv_generator": "dist_train.models.gan:ConvGenerator",
        "conv_critic": "dist_train.models.gan:ConvCritic",
        "autoencoder": "dist_train.models.autoencoder:Autoencoder",
        "conv_autoencoder": "dist_train.models.autoencoder:ConvAutoencoder",
        "vae_encoder": "dist_train.models.vae:VAEEncoder",
        "vae_decoder": "dist_train.models.vae:VAEDecoder",
        "vae_conv_encoder": "dist_train.models.vae:VAEConvEncoder",
        "vae_conv_decoder": "dist_train.models.vae:VAEConvDecoder",
        "vae_table": "dist_train.models.vae:VAETable",
        "mlp_generator": "dist_train.models.gan_mlp:MLPGenerator",
        "mlp_discriminator": "dist_train.models.gan_mlp:MLPDiscriminator",
        "dcgan_generator": "dist_train.models.dcgan:DCGANGenerator",
        "dcgan_discriminator": "dist_train.models.dcgan:DCGANDiscriminator",
        "biggan_generator": "dist_train.models.biggan:BigGANGenerator",
        "biggan_discriminator": "dist_train.models.biggan:BigGANDiscriminator",
        "translator": "dist_train.models.cyclegan:Translator",
        "patch_discriminator": "dist_train.models.cyclegan:PatchDiscriminator",
        "nice": "dist_train.models.flow:NICE",
        "realnvp": "dist_train.models.flow:RealNVP",
        "pixel_cnn": "dist_train.models.pixel_cnn:PixelCNN",
        "row_lstm": "dist_train.models.pixel_rnn:RowLSTM",
        "pixel_transformer": "dist_train.models.pixel_transformer:PixelTransformer",
    },
    "objective": {
        "classification": "dist_train.objectives.classification:Classification",
        "regression": "dist_train.objectives.regression:Regression",
        "language_modelling": "dist_train.objectives.language_modelling:LanguageModelling",
        "translation": "dist_train.objectives.translation:Translation",
        "wgan_gp": "dist_train.objectives.wgan_gp:WassersteinGradientPenalty",
        "reconstruction": "dist_train.objectives.reconstruction:Reconstruction",
        "elbo": "dist_train.objectives.elbo:EvidenceLowerBound",
        "gan": "dist_train.objectives.gan:GAN",
        "cyclegan": "dist_train.objectives.cyclegan:CycleGAN",
        "likelihood": "dist_train.objectives.likelihood:Likelihood",
        "autoregression": "dist_train.objectives.autoregression:Autoregression",
    },
    "optimizer": {
        "sgd": "dist_train.optimizers:sgd",
        "adam": "dist_train.optimizers:adam",
        "adamw": "dist_train.optimizers:adamw",
        "rmsprop": "dist_train.optimizers:rmsprop",
        "adagrad": "dist_train.optimizers:adagrad",
        "adafactor": "dist_train.optimizers:adafactor",
        "muon": "dist_train.optimizers:muon",
    },
    "init": {
        "gaussian": "dist_train.networks.initialisation:gaussian",
        "xavier": "dist_train.networks.initialisation:xavier",
        "he": "dist_train.networks.initialisation:he",
        "lecun": "dist_train.networks.initialisation:lecun",
        "orthogonal": "dist_train.networks.initialisation:orthogonal",
    },
    "schedule": {
        "constant": "dist_train.schedules:constant",
        "step": "dist_train.schedules:step",
        "multi_step": "dist_train.schedules:multi_step",
        "exponential": "dist_train.schedules:exponential",
        "linear": "dist_train.schedules:linear",
        "cosine": "dist_train.schedules:cosine",
        "inverse_sqrt": "dist_train.schedules:inverse_sqrt",
        "one_cycle": "dist_train.schedules:one_cycle",
        "swa": "dist_train.schedules:swa",
        "cyclic_cosine": "dist_train.schedules:cyclic_cosine",
        "plateau": "dist_train.schedules:plateau",
    },
    "callback": {
        "clip_gradients": "dist_train.callbacks.clip_gradients:ClipGradients",
        "clip_weights": "dist_train.callbacks.clip_weights:ClipWeights",
        "translations": "dist_train.callbacks.translations:Translations",
        "mode_watch": "dist_train.callbacks.mode_watch:ModeWatch",
        "learning_rate_decay": "dist_train.callbacks.learning_rate_decay:LearningRateDecay",
        "activation_scale": "dist_train.callbacks.activation_scale:ActivationScale",
        "schedule": "dist_train.callbacks.schedule:Schedule",
        "ema": "dist_train.callbacks.ema:ExponentialMovingAverage",
        "swa": "dist_train.callbacks.swa:StochasticWeightAverage",
        "snapshot_ensemble": "dist_train.callbacks.snapshot_ensemble:SnapshotEnsemble",
        "early_stopping": "dist_train.callbacks.early_stopping:EarlyStopping",
        "checkpoint": "dist_train.callbacks.checkpoint:CheckpointCallback",
        "console": "dist_train.callbacks.console:Console",
        "wandb": "dist_train.callbacks.wandb:WandbMirror",
        "samples": "dist_train.callbacks.samples:Samples",
        "dead_units": "dist_train.callbacks.dead_units:DeadUnits",
        "profiler": "dist_train.callbacks.profiler:Profiler",
        "throughput": "dist_train.callbacks.throughput:Throughput",
        "confusion": "dist_train.callbacks.confusion:Confusion",
        "singular_values": "dist_train.callbacks.singular_values:SingularValues",
        "similarity": "dist_train.callbacks.similarity:Similarity",
    },
    "metric": {
        "accuracy": "dist_train.metrics:accuracy",
        "error": "dist_train.metrics:error",
        "top_2": "dist_train.metrics:top_2",
        "top_5": "dist_train.metrics:top_5",
        "calibration_error": "dist_train.metrics:CalibrationError",
        "brier": "dist_train.metrics:brier",
        "nll": "dist_train.metrics:nll",
        "r2": "dist_train.metrics:R2",
        "rmse": "dist_train.metrics:RootMeanSquaredError",
        "constant_variance_nll": "dist_train.metrics:ConstantVarianceNLL",
        "elbo": "dist_train.metrics:elbo",
        "importance_bound": "dist_train.metrics:importance_bound",
        "kl": "dist_train.metrics:kl",
        "bits_per_dim": "dist_train.metrics:bits_per_dim",
        "loss": "dist_train.metrics:loss",
        "bits_per_byte": "dist_train.metrics:bits_per_byte",
        "perplexity": "dist_train.metrics:perplexity",
        "edit_error": "dist_train.metrics:edit_error",
        "frechet_distance": "dist_train.sample_quality:FrechetDistance",
        "covered_modes": "dist_train.sample_quality:CoveredModes",
        "label_agreement": "dist_train.sample_quality:label_agreement",
        "paired_l1": "dist_train.sample_quality:paired_l1",
        "paired_l1_back": "dist_train.sample_quality:paired_l1_back",
        "identity_l1": "dist_train.sample_quality:identity_l1",
        "bleu": "dist_train.metrics:BLEU",
    },
    "transform": {
        "random_crop": "dist_train.data_shards.transforms:RandomCrop",
        "center_crop": "dist_train.data_shards.transforms:CenterCrop",
        "random_resized_crop": "dist_train.data_shards.transforms:RandomResizedCrop",
        "resize": "dist_train.data_shards.transforms:Resize",
        "pad": "dist_train.data_shards.transforms:Pad",
        "horizontal_flip": "dist_train.data_shards.transforms:HorizontalFlip",
        "colour_jitter": "dist_train.data_shards.transforms:ColourJitter",
        "cutout": "dist_train.data_shards.transforms:Cutout",
        "standardise": "dist_train.data_shards.transforms:Standardise",
        "tokenise": "dist_train.data_shards.transforms:Tokenise",
        "tokenise_pair": "dist_train.data_shards.transforms:TokenisePair",
    },
    "search": {
        "grid": "dist_train.search.grid:Grid",
        "random": "dist_train.search.random_search:RandomSearch",
        "coordinate_descent": "dist_train.search.coordinate_descent:CoordinateDescent",
        "bayesian": "dist_train.search.bayesian:Bayesian",
        "coarse_to_fine": "dist_train.search.coarse_to_fine:CoarseToFine",
        "asha": "dist_train.search.asha:AsynchronousSuccessiveHalving",
        "population": "dist_train.search.population:PopulationBasedTraining",
    },
    "source": {
        "austen": "dist_train.data_shards.sources.named.austen:austen",
        "ddtp-en-de": "dist_train.data_shards.sources.named.ddtp:ddtp_en_de",
        "ddtp-en-fr": "dist_train.data_shards.sources.named.ddtp:ddtp_en_fr",
        "diabetes": "dist_train.data_shards.sources.named.scikit_learn:diabetes",
        "digits": "dist_train.data_shards.sources.named.scikit_learn:digits",
        "digits-by-class": "dist_train.data_shards.sources.named.scikit_learn:digits_by_class",
        "emoji-google": "dist_train.data_shards.sources.named.emoji:emoji_google",
        "emoji-twitter": "dist_train.data_shards.sources.named.emoji:emoji_twitter",
        "fashion-mnist": "dist_train.data_shards.sources.named.fashion_mnist:fashion_mnist",
        "mnist5k": "dist_train.data_shards.sources.named.mnist5k:mnist5k",
        "python-text": "dist_train.data_shards.sources.named.python_text:python_text",
    },
}


def import_path(kind: str, name: str, where: str = "") -> str:
    """`module:Attribute` of the part called `name`: by the catalogue, or the name itself where it is one."""
    where = where or kind
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: expected the name of a {kind}, got {name!r}")
    target = CATALOGUE[kind].get(name)
    if target is None and ":" not in name:
        meant = nearest(name, CATALOGUE[kind])
        known = "" if meant else f"there are {', '.join(sorted(CATALOGUE[kind]))}, "
        raise UserError(
            f"{where}: no {kind} is called '{name}'{meant} ({known}or package.module:Name)"
        )
    return target or name


def resolve(kind: str, name: str, where: str = "") -> Any:
    """Return the part called `name`: a row of the catalogue, or the user's own `package.module:Attribute`."""
    where = where or kind
    module_name, _, attribute = import_path(kind, name, where).partition(":")
    try:
        part = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise UserError(
                f"{where}: '{name}' needs the package '{error.name}', which is not installed"
            ) from error
        raise UserError(
            f"{where}: cannot import '{module_name}' for '{name}' (is its folder the recipe's project root?)"
        ) from error
    for piece in attribute.split("."):
        if not hasattr(part, piece):
            raise UserError(
                f"{where}: '{module_name}' has no '{attribute}'{nearest(piece, dir(part))}"
            )
        part = getattr(part, piece)
    return part


def arguments(part: Any) -> Mapping[str, inspect.Parameter]:
    """The named arguments that a part's constructor takes."""
    return inspect.signature(part).parameters


def check(kind: str, spec: Mapping[str, Any], where: str, provided: tuple[str, ...] = ()) -> Any:
    """Check a spec's arguments against its part's signature; `provided` are given by the trainer, not the recipe.

    Returns the part. Raises UserError that names `where`, the argument and the nearest valid one.
    """
    part = resolve(kind, spec.get("name", ""), where if "name" not in spec else f"{where}.name")
    parameters = arguments(part)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return part
    own = [name for name in parameters if name not in provided]
    for key in spec:
        if key != "name" and key not in own:
            takes = ", ".join(own) or "no arguments"
            raise UserError(
                f"{where}.{key}: {spec['name']} has no argument '{key}'{nearest(key, own)} (it takes {takes})"
            )
    for name in own:
        if parameters[name].default is inspect.Parameter.empty and name not in spec:
            raise UserError(f"{where}.{name}: {spec['name']} needs this argument")
    return part


def build(kind: str, spec: Mapping[str, Any], where: str, **provided: Any) -> Any:
    """Construct the part that `spec` describes, adding those of `provided` that its signature takes."""
    part = check(kind, spec, where, tuple(provided))
    given = {key: value for key, value in spec.items() if key != "name"}
    taken = {key: value for key, value in provided.items() if key in arguments(part)}
    try:
        return part(**taken, **given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {spec['name']} refused its arguments: {error}") from error
