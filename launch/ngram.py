"""Witten-Bell interpolated n-gram model over bytes: the baseline that a language model has to beat.

    p_n(byte | context) = (count(context, byte) + kinds(context) p_(n-1)(byte | shorter)) /
                          (count(context) + kinds(context))

where kinds(context) is how many different bytes were seen after the context, and p_0 = 1/256
(Witten and Bell 1991; Chen and Goodman 1998, section 2.5).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence


class WittenBell:
    """An n-gram model of `order` bytes, `order` - 1 of them context, fitted to whole documents."""

    def __init__(self, documents: Iterable[bytes], order: int) -> None:
        if order < 1:
            raise ValueError(f"order must be 1 or more, got {order}")
        self.order = order
        # By context length: how often a context with its next byte was seen, and of each context
        # the sum of that and the number of different next bytes.
        self.grams: list[Counter[bytes]] = [Counter() for _ in range(order)]
        for text in documents:
            for length, grams in enumerate(self.grams):
                grams.update(text[i : i + length + 1] for i in range(len(text) - length))
        self.totals: list[Counter[bytes]] = []
        self.kinds: list[Counter[bytes]] = []
        for grams in self.grams:
            totals: Counter[bytes] = Counter()
            for gram, count in grams.items():
                totals[gram[:-1]] += count
            self.totals.append(totals)
            self.kinds.append(Counter(gram[:-1] for gram in grams))

    def probability(self, byte: bytes, context: bytes) -> float:
        """Of the one `byte` after `context`, of which the last `order` - 1 bytes count."""
        estimate = 1.0 / 256.0
        for length in range(min(self.order, len(context) + 1)):
            history = context[len(context) - length :]
            kinds = self.kinds[length][history]
            if kinds == 0:
                break  # what ends in an unseen context is itself unseen
            seen = self.grams[length][history + byte]
            estimate = (seen + kinds * estimate) / (self.totals[length][history] + kinds)
        return estimate

    def bits_per_byte(self, documents: Iterable[bytes]) -> float:
        """Mean of -log2 p over every byte but a document's first."""
        nats = 0.0
        count = 0
        for text in documents:
            for i in range(1, len(text)):
                context = text[max(0, i - self.order + 1) : i]
                nats -= math.log(self.probability(text[i : i + 1], context))
            count += max(0, len(text) - 1)
        if count == 0:
            raise ValueError("no bytes to score: every document has less than 2")
        return nats / count / math.log(2.0)


def witten_bell_bits_per_byte(
    train_documents: Sequence[bytes], test_documents: Sequence[bytes], order: int
) -> float:
    """Bits per byte of an n-gram model of `order` bytes, over all but each document's first."""
    return WittenBell(train_documents, order).bits_per_byte(test_documents)
