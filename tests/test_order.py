"""The order of samples: a bijection for every size, keyed, and evenly spread."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_train.data_shards.mixture import Mixture
from dist_train.data_shards.order import SHUFFLES, Bootstrap, Order, default_streams
from dist_train.errors import UserError

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


def test_what_cannot_be_an_order() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Order(0, 1)
    with pytest.raises(UserError, match="shuffle 'globel', did you mean 'global'"):
        Order(5, 1, shuffle="globel")
    with pytest.raises(UserError, match=r"streams 5: must divide the global batch 12, like 12"):
        Order(5, 1, batch=12, streams=5)


SETS = st.lists(st.integers(0, 25), min_size=1, max_size=20).filter(sum)
ORDERS = st.fixed_dictionaries(
    {
        "shuffle": st.sampled_from(SHUFFLES),
        "window": st.integers(1, 6),
        "streams": st.integers(1, 7),
    }
)


@given(
    shards=SETS, seed=SEEDS, epoch=st.integers(0, 10**6), rows=st.integers(1, 9), settings=ORDERS
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_every_kind_of_order_is_a_permutation_of_each_epoch(
    shards: list[int], seed: int, epoch: int, rows: int, settings: dict
) -> None:
    size, batch = sum(shards), rows * settings["streams"]
    order = Order(size, seed, shards=shards, batch=batch, **settings)
    epochs, ids = order.at(epoch * size, (epoch + 2) * size)
    assert np.array_equal(epochs, np.repeat([epoch, epoch + 1], size))
    for half in (ids[:size], ids[size:]):
        assert np.array_equal(np.sort(half), np.arange(size))
    middle = Order(size, seed, shards=shards, batch=batch, **settings).at(
        epoch * size + size // 3, epoch * size + size // 3 + size
    )[1]
    assert np.array_equal(middle, ids[size // 3 : size // 3 + size])


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_million_million_samples(shuffle: str) -> None:
    """Any place at once; places far apart give ids that differ, and lie where their streams are."""
    size, shards = 10**12, [10**10] * 100
    order = Order(size, 1, shuffle=shuffle, shards=shards, batch=256, streams=64)
    for start in (0, 3 * 10**12 - 100, 10**15):
        epochs, ids = order.at(start, start + 2560)
        assert len(np.unique(ids)) == 2560 and ids.min() >= 0 and ids.max() < size
        assert np.array_equal(epochs, np.arange(start, start + 2560) // size)
        stream = np.arange(start, start + 2560) % 256 // 4
        assert (abs(ids // (size // 64) - stream) <= 1).all()


@pytest.mark.parametrize("streams", [1, 4])
def test_a_window_bounds_how_many_shards_are_needed_at_once(streams: int) -> None:
    """Each shard is read in one stretch, and any stretch of places needs few shards."""
    shards = np.random.default_rng(0).integers(20, 80, 120)
    size, window = int(shards.sum()), 8
    order = Order(
        size, 2, shuffle="window", shards=shards, window=window, batch=16, streams=streams
    )
    ids = order.at(0, size)[1]
    shard = np.searchsorted(np.cumsum(shards), ids, "right")
    for stream in range(streams):
        own = shard[np.arange(size) % 16 // (16 // streams) == stream]
        first = {s: int(np.flatnonzero(own == s)[0]) for s in np.unique(own)}
        last = {s: int(np.flatnonzero(own == s)[-1]) for s in np.unique(own)}
        opened = [sum(first[s] <= place <= last[s] for s in first) for place in range(len(own))]
        assert max(opened) <= window // streams
        places = np.arange(len(own))
        assert abs(np.corrcoef(places, own)[0, 1]) < 0.5  # and the shards come shuffled
    assert not np.array_equal(ids, order.at(size, 2 * size)[1])


@pytest.mark.parametrize("batch", [256, 96, 60])
def test_streams_serve_every_number_of_ranks_that_divides_the_batch(batch: int) -> None:
    """Each rank stays within its own part of the samples, and the parts hardly overlap."""
    size, steps = 10_000, 100
    order = Order(size, 0, batch=batch, streams=default_streams(batch))
    ids = order.at(0, steps * batch)[1].reshape(steps, batch)
    for ranks in (n for n in range(1, 65) if batch % n == 0):
        parts = ids.reshape(steps, ranks, batch // ranks).swapaxes(0, 1).reshape(ranks, -1)
        for rank, part in enumerate(parts):
            assert part.min() >= rank * size / ranks - batch
            assert part.max() < (rank + 1) * size / ranks + batch


def test_no_shuffle_is_the_order_of_the_files() -> None:
    epochs, ids = Order(7, 3, shuffle="none").at(5, 16)
    assert ids.tolist() == [5, 6, 0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert epochs.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2]


def test_bootstrap_draws_with_replacement() -> None:
    """1 / e of the samples are never drawn, counts are Poisson, and epochs hold the same draws in other orders."""
    size = 20_000
    orders = [Bootstrap(Order(size, 0), seed) for seed in (0, 1)]
    draws = [np.bincount(order.at(0, size)[1], minlength=size) for order in orders]
    for counts in draws:
        assert (counts == 0).mean() == pytest.approx(np.exp(-1), abs=0.02)
        assert counts.var() == pytest.approx(1, abs=0.05)
    assert abs(np.corrcoef(*draws)[0, 1]) < 0.03
    again = np.bincount(orders[0].at(size, 2 * size)[1], minlength=size)
    assert np.array_equal(again, draws[0])


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    weights=st.lists(st.sampled_from([0.1, 0.25, 1, 3, 7.5, 1 / 3]), min_size=5, max_size=5),
    start=st.integers(0, 10**13),
    length=st.integers(1, 400),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_a_mixture_takes_what_the_weights_say(
    sizes: list[int], weights: list[float], start: int, length: int
) -> None:
    weights = weights[: len(sizes)]
    orders = [Order(size, number) for number, size in enumerate(sizes)]
    mixture = Mixture(orders, weights)
    epochs, ids = mixture.at(start, start + length)
    source = np.searchsorted(np.cumsum(sizes), ids, "right")
    counts = np.bincount(source, minlength=len(sizes))
    expected = np.array(weights) / sum(weights) * length
    assert (abs(counts - expected) < len(sizes) + 1e-5 * length).all()
    cut = length // 2
    halves = [mixture.at(start, start + cut)[1], mixture.at(start + cut, start + length)[1]]
    assert np.array_equal(np.concatenate(halves), ids)
    for number, size in enumerate(sizes):  # each source runs through its own epochs
        own = epochs[source == number] * size
        assert (np.diff(own) >= 0).all()


def test_each_source_of_a_mixture_runs_its_own_epochs() -> None:
    mixture = Mixture([Order(10, 1), Order(30, 2)], [0.7, 0.3])
    epochs, ids = mixture.at(0, 1000)
    small, large = ids < 10, ids >= 10
    assert small.sum() == 700 and large.sum() == 300
    assert np.array_equal(ids[small], Order(10, 1).at(0, 700)[1])
    assert np.array_equal(ids[large], Order(30, 2).at(0, 300)[1] + 10)
    assert np.array_equal(epochs[large], np.arange(300) // 30)
    for start in range(990):
        assert small[start : start + 10].sum() == 7
