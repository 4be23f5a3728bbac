"""The order of samples: a bijection for every size, keyed, and evenly spread."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_train.data_shards.order import Order

SEEDS = st.integers(-(2**63), 2**63 - 1)


@given(size=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 1000))
@example(size=1, seed=0, epoch=0)
@example(size=2, seed=0, epoch=0)
@example(size=3, seed=0, epoch=0)
@example(size=997, seed=1, epoch=2)
@example(size=1024, seed=1, epoch=2)
@example(size=2048 + 1, seed=1, epoch=2)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_each_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    epochs, ids = Order(size, seed).at(epoch * size, (epoch + 1) * size)
    assert (epochs == epoch).all()
    assert np.array_equal(np.sort(ids), np.arange(size))


def test_a_million_samples() -> None:
    ids = Order(10**6, 7).at(0, 10**6)[1]
    assert np.array_equal(np.sort(ids), np.arange(10**6))
    assert abs(np.corrcoef(ids, np.arange(10**6))[0, 1]) < 0.005


@given(size=st.integers(1, 50), seed=SEEDS, start=st.integers(0, 500), length=st.integers(0, 300))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_window_equals_the_same_places_asked_one_by_one(
    size: int, seed: int, start: int, length: int
) -> None:
    epochs, ids = Order(size, seed).at(start, start + length)
    order = Order(size, seed)
    single = [order.at(place, place + 1) for place in range(start, start + length)]
    assert epochs.tolist() == [int(e[0]) for e, _ in single]
    assert ids.tolist() == [int(i[0]) for _, i in single]
    assert epochs.dtype == ids.dtype == np.int64


def test_epochs_and_seeds_differ() -> None:
    orders = [
        Order(100, seed).at(e * 100, (e + 1) * 100)[1].tobytes()
        for seed in range(20)
        for e in range(20)
    ]
    assert len(set(orders)) == 400


@pytest.mark.parametrize("size", [3, 10, 64, 97])
def test_places_and_ids_are_independent(size: int) -> None:
    """Chi-square of the table (place, id) over many epochs, and of (id, next id): within 5 sigma of its mean."""
    epochs = 6000
    ids = Order(size, 5).at(0, epochs * size)[1].reshape(epochs, size)
    table = np.stack([np.bincount(ids[:, place], minlength=size) for place in range(size)])
    chi = ((table - epochs / size) ** 2 / (epochs / size)).sum()
    freedom = (size - 1) ** 2
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)
    pairs = np.bincount((ids[:, :-1] * size + ids[:, 1:]).ravel(), minlength=size * size)
    pairs = pairs.reshape(size, size)[~np.eye(size, dtype=bool)]
    expected = epochs * (size - 1) / len(pairs)
    chi, freedom = ((pairs - expected) ** 2 / expected).sum(), len(pairs) - 1
    assert abs(chi - freedom) < 6 * np.sqrt(2 * freedom)


def test_an_empty_set_has_no_order() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Order(0, 1)
