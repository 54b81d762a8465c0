"""Published rules for sick trainings, on one record: what each looks at, its limits, and where it was read.

Each rule is checked at every step, more often than its authors do, so that no training is too short for it. A rule that
says what is wrong names it in our words; one that only says that something is (`PROBLEM`) counts as right whatever it
is. The limits are those of the sources; none was fitted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from .alarms import Alarm, Bools, openings
from .record import Floats, Record

PROBLEM: frozenset[str] = frozenset()
VANISHING = frozenset({"vanishing_gradient"})
EXPLODING = frozenset({"exploding_gradient", "nonfinite_gradient"})
DEAD = frozenset({"dead_units"})
SATURATED = frozenset({"saturated_activation"})
UPDATES = frozenset({"update_ratio"})


Rule = Callable[[Record], list[Alarm]]


def modules(tensors: Iterable[str]) -> list[str]:
    """The modules that hold the tensors.

    Example:
        >>> modules(["net.0.weight", "scale"])
        ['net.0', '']
    """
    return [name.rpartition(".")[0] for name in tensors]


# -- Amazon SageMaker Debugger, "List of Debugger built-in rules", with their default parameters -----------------------


def sagemaker_vanishing(record: Record) -> list[Alarm]:
    """VanishingGradient: the mean absolute value of a gradient is below 1e-7."""
    return openings(record.mean_abs < 1e-7, VANISHING, modules(record.tensors))


def sagemaker_exploding(record: Record) -> list[Alarm]:
    """ExplodingTensor: a gradient holds NaN or infinity."""
    return openings(np.isposinf(record.norm), EXPLODING, modules(record.tensors))


def sagemaker_dead_relu(record: Record) -> list[Alarm]:
    """DeadRelu: over 50 % of the units of a ReLU are active in less than 1 %; read as: of the samples of a step."""
    return openings(record.relu_inactive > 0.5, DEAD, record.relus)


def sagemaker_saturated(record: Record) -> list[Alarm]:
    """SaturatedActivation: more than 50 % of the units have inputs within the extremes in less than 1 % of the samples.

    The extremes are +-9.4999 for tanh, and -23 and 16.99999 for sigmoid.
    """
    return openings(record.saturated > 0.5, SATURATED, record.bounded)


def sagemaker_update_ratio(record: Record) -> list[Alarm]:
    """WeightUpdateRatio: updates over weights above 10 or below 1e-8; read as norms, from each step to the next."""
    return openings((record.update > 10) | (record.update < 1e-8), UPDATES, modules(record.tensors))


def sagemaker_loss(record: Record) -> list[Alarm]:
    """LossNotDecreasing: checked every 10 steps, the loss is not 0.1 % below that of 10 steps before."""
    at = np.arange(10, len(record), 10)
    stands = record.loss[at - 10] - record.loss[at] < 1e-3 * np.abs(record.loss[at - 10])
    return [Alarm(int(at[alarm.step]), alarm.kinds) for alarm in openings(stands, PROBLEM)]


# -- AutoTrainer, Zhang et al., ICSE 2021, and its published code ------------------------------------------------------


def first_and_last(record: Record) -> tuple[Floats, Floats]:
    """(S,) gradient norm of the first and of the last weight that has one, in order of registration."""
    norms = record.norm[:, record.matrices]
    ends: Floats = np.full((2, len(record)), np.nan)
    for step, row in enumerate(norms):
        there = row[~np.isnan(row)]
        if there.size:
            ends[:, step] = there[0], there[-1]
    return ends[0], ends[1]


def _autotrainer_signs(record: Record) -> dict[str, Bools]:
    """(S,) its signs in the gradients: vanish below 1e-3 and 1e-4, explode above 70, dying from 70 % zeros on."""
    first, last = first_and_last(record)
    with np.errstate(all="ignore"):
        ratio = first / last
        zeros = np.nansum(record.zero * record.size, 1) / np.sum(~np.isnan(record.zero) * record.size, 1)
    return {
        "nonfinite": np.isposinf(record.norm).any(1) | np.isposinf(record.loss),
        "dying": zeros >= 0.7,
        "explode": ratio > 70,
        "vanish": (ratio < 1e-3) & (first < 1e-4),
    }


_AUTOTRAINER_KINDS = {"nonfinite": EXPLODING, "dying": DEAD, "explode": EXPLODING, "vanish": VANISHING}


def autotrainer_ungated(record: Record) -> list[Alarm]:
    """The signs in the gradients alone, whether the training learns or not."""
    signs = _autotrainer_signs(record)
    return [alarm for sign, kinds in _AUTOTRAINER_KINDS.items() for alarm in openings(signs[sign], kinds)]


def autotrainer_gated(record: Record) -> list[Alarm]:
    """At the end of an epoch: what was seen in the gradients so far counts only where the accuracy is low.

    From 30 % of the training on, no epoch's accuracy is 0.6 or more, or none is 0.01 above the one before ("slow
    convergence", a problem by itself). An accuracy that is high but swings is "oscillating": maxima and minima at least
    0.03 apart, as many as a fifth of the epochs. Training stops at the first problem. The accuracy is that of training;
    where there is none, the gate stands open.
    """
    signs = _autotrainer_signs(record)
    ends = np.flatnonzero(np.append(np.diff(record.epoch) > 0, len(record) > 0))
    reached: list[float] = []
    for end in ends:
        reached.append(_mean(record.accuracy[record.epoch == record.epoch[end]]))
        seen = [sign for sign, holds in signs.items() if holds[: end + 1].any()]
        kinds: frozenset[str] | None = None
        if "nonfinite" in seen:
            kinds = EXPLODING
        elif end + 1 >= 0.3 * record.planned:
            slow = len(reached) > 1 and bool(np.max(np.diff(reached)) < 0.01)
            if slow or not max(reached) >= 0.6:
                kinds = _AUTOTRAINER_KINDS[seen[0]] if seen else PROBLEM if slow else None
            elif _oscillates(np.array(reached)):
                kinds = PROBLEM
        if kinds is not None:
            return [Alarm(int(end), kinds)]
    return []


def _mean(values: Floats) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else np.nan


def _oscillates(accuracy: Floats) -> bool:
    middle, before, after = accuracy[1:-1], accuracy[:-2], accuracy[2:]
    highs, lows = middle[(middle >= before) & (middle >= after)], middle[(middle <= before) & (middle <= after)]
    both = min(len(highs), len(lows))
    swings = int(np.sum(highs[:both] - lows[:both] >= 0.03))
    return swings > 0 and swings >= 0.2 * len(accuracy)


# -- DeepDiagnosis, Wardat et al., ICSE 2022, and its published code ---------------------------------------------------


def deepdiagnosis(record: Record, held: int = 10) -> list[Alarm]:
    """Dead: 70 % of a ReLU's outputs <= 0. Saturated: over 50 % of inputs at or beyond +-5. Vanishing: mean |g| < 1e-7.

    Each is held for ten checks: at the first sight, as published, it calls more healthy trainings sick. A number that
    is not finite is told at once, and so is a loss that is the same at five checks.
    """
    weights = record.mean_abs[:, record.matrices]
    names = [name for name, is_weight in zip(modules(record.tensors), record.matrices, strict=True) if is_weight]
    same = np.append(np.zeros(min(1, len(record)), dtype=bool), np.diff(record.loss) == 0)
    return [
        *openings(record.relu_flat >= 0.7, DEAD, record.relus, held=held),
        *openings(record.beyond_5 > 0.5, SATURATED, record.bounded, held=held),
        *openings(weights < 1e-7, VANISHING, names, held=held),
        *openings(np.isposinf(record.norm), EXPLODING, modules(record.tensors)),
        *openings(np.isposinf(record.loss), EXPLODING),
        *openings(same, PROBLEM, held=4),
    ]


# -- what tutorials say ------------------------------------------------------------------------------------------------


def tutorial(record: Record) -> list[Alarm]:
    """A recurrent weight's gradient norm below 1e-7; or that of the last weight 0.1 and of the first below 1e-6."""
    first, last = first_and_last(record)
    return [
        *openings((record.norm < 1e-7) & record.recurrent, VANISHING, modules(record.tensors)),
        *openings((last >= 0.1) & (first < 1e-6), VANISHING),
    ]


def patience(record: Record) -> list[Alarm]:
    """The counting of PyTorch's `ReduceLROnPlateau`: more than 10 times in a row the loss is not 1e-4 below the best.

    It counts epochs, of which these trainings have a few; means of ten steps stand in for them.
    """
    best, bad, alarms = np.inf, 0, []
    for block in range(len(record) // 10):
        loss = float(record.loss[10 * block : 10 * block + 10].mean())
        if loss < best - 1e-4 * abs(best) if np.isfinite(best) else loss < best:
            best, bad = loss, 0
        elif not np.isnan(loss):
            bad += 1
        if bad == 11:
            alarms.append(Alarm(10 * block + 9, PROBLEM))
            bad = 0
    return alarms


SUITES: dict[str, tuple[Rule, ...]] = {
    "SageMaker Debugger": (
        sagemaker_vanishing,
        sagemaker_exploding,
        sagemaker_dead_relu,
        sagemaker_saturated,
        sagemaker_update_ratio,
    ),
    "SageMaker LossNotDecreasing": (sagemaker_loss,),
    "AutoTrainer": (autotrainer_gated,),
    "AutoTrainer without its gate": (autotrainer_ungated,),
    "DeepDiagnosis, held for ten checks": (deepdiagnosis,),
    "tutorial rule": (tutorial,),
    "patience": (patience,),
}
"""Name -> the rules that are used together."""

SUITES["all of them but LossNotDecreasing"] = tuple(
    rule for rules in SUITES.values() for rule in rules if rule is not sagemaker_loss
)


def judge(suite: str, record: Record) -> list[Alarm]:
    """What the rules of a suite say of a training, in order of time."""
    return sorted((alarm for rule in SUITES[suite] for alarm in rule(record)), key=lambda alarm: alarm.step)
