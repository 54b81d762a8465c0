"""Whole trainings with labels: sick ones are found at once, and healthy ones raise no alarm."""

import functools
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from lightning_gradflow import FindingKind, GradFlow, GradFlowWarning, VanishingGradientWarning
from tests.benchmarks.zoo import HEALTHY, SICK, Case
from tests.benchmarks.zoo.case import seeded
from tests.benchmarks.zoo.data import digits
from tests.benchmarks.zoo.stacks import mlp
from tests.benchmarks.zoo.task import Task

SEEDS = (0, 1, 2)
DEEP = (
    "sigmoid_10",
    "sigmoid_30",
    "sigmoid_50",
    "tanh_20_small_init",
    "relu_24_default_init",
    "sigmoid_functional",
    "sigmoid_reversed",
    "sigmoid_10_loss_1e-6",
    "sigmoid_10_loss_1e6_sum",
)


@functools.cache
def _watch(name, seed):
    case = (SICK | HEALTHY)[name]
    flow = GradFlow(every_n_steps=10, report=False, console=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", GradFlowWarning)
        case.fit(seed, callbacks=[flow])
    return flow, [warning for warning in told if issubclass(warning.category, GradFlowWarning)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", DEEP)
def test_a_vanishing_gradient_is_named_by_step_2(name, seed):
    flow, told = _watch(name, seed)
    found = [finding for finding in flow.findings if finding.kind is FindingKind.VANISHING_GRADIENT]
    assert found
    assert found[0].step <= 2
    assert found[0].severity.is_alarm
    assert any(warning.category is VanishingGradientWarning for warning in told)


@pytest.mark.parametrize("name", DEEP)
def test_what_follows_from_it_is_no_alarm_of_its_own(name):
    flow, told = _watch(name, seed=0)
    assert len([finding for finding in flow.findings if finding.severity.is_alarm]) == len(told) == 1


# one seed of each; `python -m tests.benchmarks.detection` takes three, and says what comes of them in the README
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_training_raises_no_alarm(name):
    flow, told = _watch(name, seed=0)
    assert [finding for finding in flow.findings if finding.severity.is_alarm] == []
    assert told == []


CAUSES = {
    "sigmoid_10": "saturation",
    "sigmoid_functional": "saturation",
    "sigmoid_reversed": "saturation",
    "tanh_20_small_init": "weight_scale",
    "relu_24_default_init": "weight_scale",
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


@pytest.mark.parametrize("seed", SEEDS)
def test_a_thousandfold_decay_is_a_warning_under_sgd_and_an_info_under_adam(seed):
    def watched(optimize):
        flow = GradFlow(every_n_steps=10, report=False, console=False)
        build = seeded(lambda: Task(mlp(7, nn.GELU), optimize=optimize))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GradFlowWarning)
            Case("gelu_7", build, digits, max_steps=150).fit(seed, callbacks=[flow])
        first = next(finding for finding in flow.findings if finding.kind is FindingKind.VANISHING_GRADIENT)
        assert -4 < first.evidence["span"] <= -3
        return flow, first

    flow, first = watched(partial(torch.optim.SGD, lr=0.1))
    assert (first.step, str(first.severity)) == (0, "warning")
    assert flow.history.losses[-20:].mean() > 0.95 * flow.history.losses[:3].mean()
    flow, first = watched(partial(torch.optim.Adam, lr=1e-3))
    assert (first.step, str(first.severity)) == (0, "info")
    assert flow.history.losses[-20:].mean() < 0.5 * flow.history.losses[:3].mean()
    assert not [finding for finding in flow.findings if finding.severity.is_alarm]
