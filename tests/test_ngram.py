"""The Witten-Bell baseline against hand computation and the axioms of probability."""

from __future__ import annotations

import math
import random

import pytest

from dist_train.launch.ngram import WittenBell, witten_bell_bits_per_byte


def test_by_hand() -> None:
    # Training text "abac": a 2, b 1, c 1 are 4 bytes of 3 kinds; after "a" come b and c, once each.
    model = WittenBell([b"abac"], order=2)
    uniform = 1 / 256
    unigram_b = (1 + 3 * uniform) / (4 + 3)
    unseen = (0 + 3 * uniform) / (4 + 3)
    assert model.probability(b"b", b"") == pytest.approx(unigram_b)
    assert model.probability(b"b", b"a") == pytest.approx((1 + 2 * unigram_b) / (2 + 2))
    assert model.probability(b"z", b"a") == pytest.approx((0 + 2 * unseen) / (2 + 2))
    assert model.probability(b"b", b"z") == pytest.approx(unigram_b)  # a context never seen
    # Of a longer context only the last order - 1 bytes count.
    assert model.probability(b"b", b"xxa") == model.probability(b"b", b"a")

    after_a = (1 + 2 * unigram_b) / 4
    unigram_a = (2 + 3 * uniform) / 7
    after_b = (1 + 1 * unigram_a) / (1 + 1)
    bits = -(math.log2(after_a) + math.log2(after_b)) / 2
    assert witten_bell_bits_per_byte([b"abac"], [b"aba", b"x", b""], 2) == pytest.approx(bits)


def test_documents_do_not_run_into_each_other() -> None:
    assert WittenBell([b"ab", b"cd"], 2).grams[1] == {b"ab": 1, b"cd": 1}


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one(order: int) -> None:
    draw = random.Random(order)
    documents = [bytes(draw.choices(b"abcdef ", k=200)) for _ in range(5)]
    model = WittenBell(documents, order)
    for _ in range(20):
        context = bytes(draw.choices(b"abcdefxyz ", k=draw.randrange(8)))
        total = math.fsum(model.probability(bytes([byte]), context) for byte in range(256))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_more_context_helps_on_english() -> None:
    topics = pytest.importorskip("pydoc_data.topics").topics
    documents = [topics[name].encode() for name in sorted(topics)][:30]
    bits = [witten_bell_bits_per_byte(documents[:27], documents[27:], order) for order in (1, 2, 3)]
    assert 8 > bits[0] > bits[1] > bits[2] > 1


def test_refusals() -> None:
    with pytest.raises(ValueError, match="order must be 1 or more"):
        WittenBell([b"ab"], 0)
    with pytest.raises(ValueError, match="no bytes to score"):
        witten_bell_bits_per_byte([b"ab"], [b"a"], 2)
