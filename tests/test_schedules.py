"""Schedules (F6) against their written values."""

from __future__ import annotations

import math

import pytest

from dist_train import schedules
from dist_train.errors import UserError

QUARTERS = (0, 25, 50, 75, 100)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("constant", {}, [1, 1, 1, 1, 1]),
        ("step", {"every": 25}, [1, 0.1, 0.01, 0.001, 0.0001]),
        ("step", {"every": 50, "factor": 0.5}, [1, 1, 0.5, 0.5, 0.25]),
        ("multi_step", {"milestones": [50, 75]}, [1, 1, 0.1, 0.01, 0.01]),
        ("multi_step", {"milestones": [26], "factor": 0.2}, [1, 1, 0.2, 0.2, 0.2]),
        ("exponential", {"gamma": 0.98}, [0.98**step for step in QUARTERS]),
        ("exponential", {"end": 0.0001}, [1, 0.1, 0.01, 0.001, 0.0001]),
        ("linear", {}, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", {"end": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", {"end": 2.0}, [1, 1.25, 1.5, 1.75, 2]),
        ("cosine", {}, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0]),
        ("cosine", {"end": 0.1}, [1, 0.55 + 0.9 * math.sqrt(0.125), 0.55, None, 0.1]),
        ("one_cycle", {"rise": 0.5}, [0.04, 0.52, 1, 0.5 + 2e-6, 4e-6]),
        (
            "one_cycle",
            {"rise": 0.25, "start": 0.2, "end": 0.1},
            [0.2, 1, 0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.25, 0.1],
        ),
        ("plateau", {}, [1, 1, 1, 1, 1]),
        ("inverse_sqrt", {"timescale": 25}, [1, math.sqrt(1 / 2), math.sqrt(1 / 3), 0.5, None]),
    ],
)
def test_values_at_each_quarter(
    name: str, arguments: dict[str, object], expected: list[float | None]
) -> None:
    schedule = schedules.build(name, 100, **arguments)
    for step, value in zip(QUARTERS, expected, strict=True):
        if value is not None:
            assert schedule(step) == pytest.approx(value, abs=1e-12)


NAMES = [
    ("constant", {}),
    ("step", {"every": 30}),
    ("multi_step", {"milestones": [30, 60]}),
    ("exponential", {"gamma": 0.99}),
    ("exponential", {"end": 0.01}),
    ("linear", {}),
    ("cosine", {}),
    ("inverse_sqrt", {}),
]


@pytest.mark.parametrize(("name", "arguments"), NAMES)
def test_warm_up_is_a_straight_line_that_meets_the_decay(
    name: str, arguments: dict[str, object]
) -> None:
    warmup = 19
    schedule = schedules.build(name, 100, warmup, **arguments)
    for step in range(warmup + 1):
        assert schedule(step) == pytest.approx((step + 1) / 20)
    assert schedule(warmup) == 1.0
    # The next value continues the curve: no jump where the warm-up ends.
    assert 0.94 < schedule(warmup + 1) <= 1.0
    values = [schedule(step) for step in range(warmup, 101)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(("name", "arguments"), NAMES)
def test_a_schedule_is_a_pure_function(name: str, arguments: dict[str, object]) -> None:
    forward = schedules.build(name, 100, 10, **arguments)
    straight = [forward(step) for step in range(101)]
    backward = schedules.build(name, 100, 10, **arguments)
    assert [backward(step) for step in reversed(range(101))] == straight[::-1]


def test_plateau_cuts_by_its_factor_down_to_its_end() -> None:
    schedule = schedules.build("plateau", 100, 3, factor=0.5, end=0.2)
    assert [schedule(50, cuts) for cuts in range(4)] == [1.0, 0.5, 0.25, 0.2]
    assert schedule(0, 1) == 0.125  # the warm-up holds all the same


def test_decay_runs_from_the_end_of_the_warm_up() -> None:
    assert schedules.build("cosine", 120, 20)(70) == pytest.approx(0.5)
    assert schedules.build("linear", 120, 20)(95) == pytest.approx(0.25)
    assert schedules.build("exponential", 120, 20, end=0.01)(70) == pytest.approx(0.1)
    # Milestones are dates of the run, wherever the warm-up ends.
    assert schedules.build("step", 120, 20, every=60)(60) == pytest.approx(0.1)


def test_inverse_sqrt_is_that_of_attention_is_all_you_need() -> None:
    warmup = 40
    schedule = schedules.build("inverse_sqrt", 1000, warmup)
    for step in (40, 41, 100, 999):
        assert schedule(step) == pytest.approx(step**-0.5 / warmup**-0.5)


def test_nothing_after_the_end_and_no_division_by_zero() -> None:
    assert schedules.build("linear", 10)(50) == 0.0
    assert schedules.build("cosine", 10, 10, end=0.5)(10) == 1.0
    assert schedules.build("linear", 0)(0) == 1.0


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cosin", {}, "did you mean 'cosine'"),
        ("cosine", {"ende": 0.1}, "did you mean 'end'"),
        ("cosine", {"step": 3}, "no argument 'step'"),
        ("step", {}, "needs this argument"),
        ("step", {"every": 0}, "every must be 1 step or more"),
        ("multi_step", {"milestones": [20, 10]}, "milestones must increase"),
        ("multi_step", {"milestones": 20}, "multi_step"),
        ("exponential", {}, "either gamma"),
        ("exponential", {"gamma": 0.9, "end": 0.1}, "either gamma"),
        ("exponential", {"end": 0}, "end must be more than 0"),
        ("inverse_sqrt", {"timescale": -1}, "timescale must be more than 0"),
        ("one_cycle", {"rise": 1}, "rise must be between 0 and 1, got 1"),
        ("plateau", {"patience": 0}, "patience must be 1"),
        ("plateau", {"factor": 0}, "factor must be more than 0"),
        ("plateau", {"cuts": 1}, "no argument 'cuts'"),
        ("linear", {"end": "low"}, "linear"),
    ],
)
def test_mistakes_are_named(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        schedules.build(name, 100, where="callbacks.decay", **arguments)
    assert str(caught.value).startswith("callbacks.decay")
    assert "\n" not in str(caught.value)


def test_warm_up_must_fit_the_run() -> None:
    with pytest.raises(
        UserError, match=r"warmup: got 101 steps, expected at most the 100 of the run"
    ):
        schedules.build("cosine", 100, 101)


def halving(step: int, half_life: int) -> float:
    return 0.5 ** (step / half_life)


def test_a_function_of_the_users_own_takes_what_it_names() -> None:
    factor = schedules.build(f"{__name__}:halving", 100, 3, half_life=10)
    assert factor(20) == 0.25
    assert factor(0) == 0.25
