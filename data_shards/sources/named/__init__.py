"""Real data sets by name: each from a package that registries hold, or from Hugging Face, with its licence."""

from __future__ import annotations

from collections.abc import Callable

from dist_train.data_shards.sources.named.austen import austen
from dist_train.data_shards.sources.named.ddtp import ddtp_en_de, ddtp_en_fr
from dist_train.data_shards.sources.named.emoji import emoji_google, emoji_twitter
from dist_train.data_shards.sources.named.fashion_mnist import fashion_mnist
from dist_train.data_shards.sources.named.mnist5k import mnist5k
from dist_train.data_shards.sources.named.python_text import python_text
from dist_train.data_shards.sources.named.scikit_learn import diabetes, digits, digits_by_class
from dist_train.data_shards.sources.source import Source

NAMED: dict[str, Callable[..., Source]] = {
    "austen": austen,
    "ddtp-en-de": ddtp_en_de,
    "ddtp-en-fr": ddtp_en_fr,
    "diabetes": diabetes,
    "digits": digits,
    "digits-by-class": digits_by_class,
    "emoji-google": emoji_google,
    "emoji-twitter": emoji_twitter,
    "fashion-mnist": fashion_mnist,
    "mnist5k": mnist5k,
    "python-text": python_text,
}
