"""Which knobs of a search mattered: the importance of each in what sets the best trials apart from all of them.

In: what each trial was asked (its knobs) and how it stood (bytes, delta NE). Out: a share for each knob.
"""

from __future__ import annotations

import math
import random
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compress.search.halving import fronts

TOP = 0.2  # the share of trials that PED-ANOVA compares with all of them
ENOUGH_TRIALS = 16  # with fewer, the top fifth is three trials or less: no importance is told
FEW_VALUES = 8  # numbers of so few values are choices
SHUFFLES = 19  # a knob without effect beats them all one time in twenty

Params = Mapping[str, Any]
Values = tuple[float, float]


def importance(trials: Sequence[tuple[Params, Values]]) -> dict[str, float]:
    """How much of what sets the best fifth of the trials apart is in each knob: shares of 1, the largest first.

    A trial is its knobs and its two objectives, both of which are better small (bytes, delta NE). The best lie on the
    first Pareto fronts, so a knob that only trades one objective for the other counts for little. Chance alone gives a
    knob of many values some importance: what the same trials get on average with their results shuffled is taken off,
    and a knob that does not beat all of 19 shuffles counts 0. Empty with too few trials, or when all knobs do.
    Source: PED-ANOVA, Watanabe, Bansal and Hutter, 2023 (arXiv 2304.10255), as Optuna has it.
    """
    knobs = varying([params for params, _ in trials])
    if len(trials) < ENOUGH_TRIALS or not knobs:
        return {}
    study = _study([params for params, _ in trials], knobs)
    layers = fronts(np.array([values for _, values in trials])).tolist()
    raw = _ped_anova(study, layers)
    shuffle, by_chance = random.Random(0), []
    for _ in range(SHUFFLES):
        shuffle.shuffle(layers)
        by_chance.append(_ped_anova(study, layers))
    above = {}
    for knob in knobs:
        chance = [found[knob] for found in by_chance]
        above[knob] = raw[knob] - sum(chance) / SHUFFLES if raw[knob] > max(chance) else 0.0
    total = sum(above.values())
    shares = {knob: value / total for knob, value in above.items()} if total > 0 and math.isfinite(total) else {}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def varying(trials: Sequence[Params]) -> list[str]:
    """Knobs that took more than one value, in the order they first appear."""
    seen: dict[str, set[str]] = {}
    for params in trials:
        for knob, value in params.items():
            seen.setdefault(knob, set()).add(str(value))
    return [knob for knob, values in seen.items() if len(values) > 1]


def numeric(values: Sequence[Any]) -> bool:
    """Whether the values of a knob are all finite numbers."""
    return all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def is_choice(values: Sequence[Any]) -> bool:
    """Whether a knob's values are words, or numbers of which there are only a few."""
    return not numeric(values) or len(set(values)) <= FEW_VALUES


def spread_out(values: Sequence[float]) -> bool:
    """Whether numbers are better compared by their logarithms: their median is nearer to the middle there."""
    low, middle, high = min(values), statistics.median(values), max(values)
    if low <= 0 or low == high:
        return False
    linear = abs(2 * middle - low - high) / (high - low)
    return abs(2 * math.log(middle) - math.log(low * high)) / math.log(high / low) < linear


def _distribution(values: Sequence[Any]) -> Any:
    """What Optuna would have drawn such values from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if is_choice(values):
        return CategoricalDistribution(sorted({str(v) for v in values}))
    return FloatDistribution(float(min(values)), float(max(values)), log=spread_out(values))


def _study(trials: Sequence[Params], knobs: Sequence[str]) -> Any:
    """The trials as Optuna holds them; their results are told later."""
    import optuna
    from optuna.distributions import CategoricalDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spaces = {knob: _distribution([params[knob] for params in trials if knob in params]) for knob in knobs}
    study = optuna.create_study()
    for params in trials:
        here = {knob: space for knob, space in spaces.items() if knob in params}
        drawn = {
            knob: str(params[knob]) if isinstance(space, CategoricalDistribution) else float(params[knob])
            for knob, space in here.items()
        }
        study.add_trial(optuna.trial.create_trial(params=drawn, distributions=here, value=0.0))
    return study


def _ped_anova(study: Any, layers: Sequence[int]) -> dict[str, float]:
    """Importance of each knob, not normalized, in reaching a low front number; trial n of the study has layers[n]."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    evaluator = PedAnovaImportanceEvaluator(target_quantile=TOP)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of choices that few trials took, which then count for little
        return get_param_importances(study, evaluator=evaluator, target=lambda t: layers[t.number], normalize=False)
