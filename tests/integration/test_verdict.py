"""Whole trainings with labels: sick ones are found at once, and healthy ones raise no alarm."""

import functools
import warnings

import pytest

from lightning_gradflow import FindingKind, GradFlow, GradFlowWarning, VanishingGradientWarning
from tests.benchmarks.zoo import HEALTHY, SICK

SEEDS = (0, 1, 2)


@functools.cache
def _watch(name, seed):
    case = (SICK | HEALTHY)[name]
    flow = GradFlow(every_n_steps=10, report=False, console=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", GradFlowWarning)
        case.fit(seed, callbacks=[flow])
    return flow, [warning for warning in told if issubclass(warning.category, GradFlowWarning)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SICK)
def test_a_vanishing_gradient_is_named_by_step_2(name, seed):
    flow, told = _watch(name, seed)
    found = [finding for finding in flow.findings if finding.kind is FindingKind.VANISHING_GRADIENT]
    assert found
    assert found[0].step <= 2
    assert found[0].severity.is_alarm
    assert any(warning.category is VanishingGradientWarning for warning in told)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_training_raises_no_alarm(name, seed):
    flow, told = _watch(name, seed)
    assert [finding for finding in flow.findings if finding.severity.is_alarm] == []
    assert told == []


CAUSES = {
    "sigmoid_10": "saturation",
    "sigmoid_functional": "saturation",
    "sigmoid_reversed": "saturation",
    "tanh_20_small_init": "weight_scale",
    "relu_24_default_init": "depth",
}


@pytest.mark.parametrize(("name", "cause"), CAUSES.items())
def test_the_cause_of_a_vanishing_gradient_is_where_the_signal_is_lost(name, cause):
    flow, _ = _watch(name, seed=0)
    assert flow.findings[0].cause == cause


def test_the_layers_of_a_vanishing_gradient_start_with_the_first_one_executed():
    plain, _ = _watch("sigmoid_10", seed=0)
    backwards, _ = _watch("sigmoid_reversed", seed=0)
    for flow in (plain, backwards):
        executed = [point.module for point in flow.history.points if point.is_layer]
        assert flow.findings[0].layers[0] == executed[0]
        assert executed[-1] not in flow.findings[0].layers


def test_the_size_of_the_loss_changes_no_verdict():
    verdicts = []
    for name in ("sigmoid_10", "sigmoid_10_loss_1e-6", "sigmoid_10_loss_1e6_sum"):
        flow, _ = _watch(name, seed=0)
        verdicts.append([(f.kind, f.severity, f.step, f.cause, f.layers) for f in flow.findings])
    assert verdicts[0] == verdicts[1] == verdicts[2]
