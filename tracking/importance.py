"""How much each parameter of a search matters, by Optuna's fANOVA."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tracking.plots import LOG_RANGE

FEW = 4  # trials below which nothing can be said


def parameter_importance(parameters: Mapping[str, Sequence[Any]], scores: Sequence[float]) -> dict[str, float]:
    """{parameter: its share in the variance of the scores} of trials (Hutter 2014, ICML; `optuna.importance`, seed 0).

    `parameters` {name: the value of each trial, as text or number}. Trials whose score is not finite are left out.
    Empty if fewer than FEW trials are left, or if all scores or all values of every parameter are equal.
    """
    import optuna

    kept = [k for k, score in enumerate(scores) if math.isfinite(score)]
    columns = {name: _numbers([values[k] for k in kept]) for name, values in parameters.items()}
    columns = {name: values for name, values in columns.items() if len(set(values)) > 1}
    if len(kept) < FEW or len({scores[k] for k in kept}) < 2 or not columns:
        return {}
    distributions = {name: _distribution(values) for name, values in columns.items()}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study
    study = optuna.create_study(direction="maximize")
    optuna.logging.set_verbosity(verbosity)
    for place, k in enumerate(kept):
        params = {name: values[place] for name, values in columns.items()}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=scores[k]))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _numbers(values: Sequence[Any]) -> list[float] | list[str]:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        return [str(value) for value in values]


def _distribution(values: Sequence[float] | Sequence[str]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if isinstance(values[0], str):
        return CategoricalDistribution(sorted({str(value) for value in values}))
    low, high = float(min(values)), float(max(values))
    return FloatDistribution(low, high, log=low > 0 and high / low >= LOG_RANGE)
