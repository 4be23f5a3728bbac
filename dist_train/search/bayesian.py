"""Bayesian search, by Optuna's tree-structured Parzen estimators. The only file that knows Optuna.

Optuna sees places in the unit cube, and a new study each time: what it has seen before is in the history that it is
given, so nothing of it need be saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dist_train.errors import UserError
from dist_train.search import Leg, Search, Trial, at_least
from dist_train.search.space import Choice, Space, draw


class Bayesian(Search):
    """Tree-structured Parzen estimators (Bergstra et al., 2011): draws where the good trials so far are dense and the
    others are not. Its first trials are those of random search with this seed.

    With several trials at once, those that run count as bad, so that they are not tried twice; then what is asked
    depends on which have ended by then.

    Args:
        trials: how many. start: how many of them are drawn at random first.
    """

    ordered = False

    def __init__(self, space: Space, seed: int, trials: int, start: int = 10) -> None:
        _optuna()
        self.space, self.seed = space, seed
        self.trials, self.start = at_least("trials", trials, 1), at_least("start", start, 1)

    def ask(self, trials: Sequence[Trial]) -> Leg | None:
        number = len(trials)
        if number >= self.trials:
            return None
        if number < self.start:
            return Leg(number, self.space.drawn(self.seed, number))
        sampler = _optuna().samplers.TPESampler(
            seed=int(draw(self.seed, "tpe", number) * 2**32),
            n_startup_trials=1,
            constant_liar=True,
        )
        asked = _study(self.space, trials, sampler).ask()
        found: dict[str, Any] = {}
        for key, dimension in self.space.dimensions.items():
            if not self.space.applies(key, found):
                continue
            if isinstance(dimension, Choice):
                index = asked.suggest_categorical(key, list(range(len(dimension.values))))
                found[key] = dimension.values[index]
            else:
                found[key] = dimension.at(asked.suggest_float(key, 0.0, 1.0))
        return Leg(number, found)

    def legs(self) -> int:
        return self.trials


def importance(space: Space, trials: Sequence[Trial]) -> dict[str, float]:
    """How much each key that all trials have explains of who is among the best (PED-ANOVA, Watanabe et al., 2023), as
    shares of one; {} where there are too few trials, or no Optuna."""
    finished = [trial for trial in trials if math.isfinite(trial.loss)]
    shared = [key for key in space.dimensions if all(key in trial.values for trial in finished)]
    if len(finished) < 10 or not shared:
        return {}
    try:
        optuna = _optuna()
    except UserError:
        return {}
    study = _study(space, finished, None)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=shared)
    return {key: float(value) for key, value in found.items()}


def _study(space: Space, trials: Sequence[Trial], sampler: Any) -> Any:
    """A study that holds these trials, those that run too."""
    optuna = _optuna()
    study = optuna.create_study(sampler=sampler)
    for trial in trials:
        state = optuna.trial.TrialState
        study.add_trial(
            optuna.trial.create_trial(
                params=_places(space, trial.values),
                distributions=_distributions(space, trial.values),
                value=None if trial.running else trial.loss,
                state=state.RUNNING if trial.running else state.COMPLETE,
            )
        )
    return study


def _places(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    places: dict[str, Any] = {}
    for key, value in values.items():
        dimension = space.dimensions[key]
        places[key] = (
            dimension.values.index(value)
            if isinstance(dimension, Choice)
            else dimension.place(value)
        )
    return places


def _distributions(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    distributions = _optuna().distributions
    return {
        key: distributions.CategoricalDistribution(list(range(len(dimension.values))))
        if isinstance(dimension := space.dimensions[key], Choice)
        else distributions.FloatDistribution(0.0, 1.0)
        for key in values
    }


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError("search bayesian needs Optuna: pip install 'dist-train[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
