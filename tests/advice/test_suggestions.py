"""Which suggestions are made, and what they name."""

import re

import pytest
import torch
from torch import nn

from lightning_gradflow.advice import explain, suggest
from lightning_gradflow.advice.explanations import BECAUSE, SEEN, UNKNOWN
from lightning_gradflow.advice.site import survey
from lightning_gradflow.advice.suggestions import CURES
from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Point
from tests.advice.cases import PAIRS, Net, finding, history_of

ANY_MODEL = {
    "clip",
    "find_rate",
    "larger_eps",
    "lower_rate",
    "overfit_batch",
    "raise_rate",
    "scale_gradients",
    "scale_loss",
    "read_all_steps",
    "stable_loss",
    "warm_up",
    "wider_format",
}
"""Cures of the run: their code is the same for every model."""


@pytest.mark.parametrize(("kind", "cause"), PAIRS)
@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh, nn.ReLU])
def test_every_cause_has_suggestions_whose_code_compiles(kind, cause, act):
    suggestions = suggest(finding(kind, cause), history_of(Net(act=act)))
    assert suggestions
    for suggestion in suggestions:
        compile(suggestion.code, suggestion.title, "exec")
        assert suggestion.title[0].isupper()
        assert not suggestion.title.endswith(".")
        assert suggestion.reason.endswith(".")
        assert any(character.isdigit() for character in suggestion.reference), "a year"


@pytest.mark.parametrize(("kind", "cause"), PAIRS)
def test_code_that_is_about_layers_names_them(kind, cause):
    site = survey(finding(kind, cause), history_of(Net(act=nn.Sigmoid)))
    for cure in CURES[kind, cause]:
        named = [re.search(r"net\.[01]\b", suggestion.code) is not None for suggestion in cure(site)]
        assert all(named) or cure.__name__ in ANY_MODEL


def test_no_row_of_the_tables_lies_outside_the_vocabulary():
    assert set(BECAUSE) | {(kind, "unknown") for kind in FindingKind} >= set(CURES)
    assert set(BECAUSE) <= set(PAIRS)
    assert set(SEEN) == set(FindingKind)


@pytest.mark.parametrize("kind", FindingKind)
def test_a_cause_that_nobody_has_heard_of_is_called_unknown(kind):
    assert explain(finding(kind, "moon phase")).endswith(f"{UNKNOWN}.")
    assert suggest(finding(kind, "moon phase"), history_of(Net()))


@pytest.mark.parametrize(("kind", "cause"), PAIRS)
def test_without_evidence_layers_and_history_there_is_still_a_text(kind, cause):
    bare = finding(kind, cause, layers=(), evidence={})
    assert explain(bare).endswith(".")
    for suggestion in suggest(bare, History()):
        compile(suggestion.code, suggestion.title, "exec")


@pytest.mark.parametrize("shared", [True, False], ids=["one module called twice", "functional"])
def test_activations_that_have_no_place_of_their_own_are_told_in_words(shared):
    history = History()
    history.layer_axis.merge(["fc1", "fc2", "fc3"])
    history.add_points(
        [
            Point("fc1", "fc1"),
            Point("act" if shared else "fc1/sigmoid", "act" if shared else "fc1", "sigmoid"),
            Point("fc2", "fc2"),
            Point("fc2/act" if shared else "fc2/sigmoid", "act" if shared else "fc2", "sigmoid"),
            Point("fc3", "fc3"),
        ]
    )
    for suggestion in suggest(finding("vanishing_gradient", "saturation", layers=("fc1",)), history):
        compile(suggestion.code, "code", "exec")
        assert '"act"' not in suggestion.code
        assert '"fc1"' in suggestion.code or "self.fc1" in suggestion.code


def test_a_finding_that_names_an_activation_is_cured_at_the_layer_before_it():
    model = Net(act=nn.ReLU)
    cures = suggest(finding("dead_units", "initialisation", layers=("net.3",)), history_of(model))
    assert '("net.2",)' in cures[0].code
    (leak,) = (cure for cure in suggest(finding("dead_units", "unknown", layers=("net.3",)), history_of(model))[:1])
    assert '("net.3",)' in leak.code


def test_inputs_that_are_too_large_are_named_by_their_index():
    cure = suggest(finding("dead_units", "unscaled_inputs"), history_of(Net(act=nn.ReLU)))[0]
    assert cure.title.endswith("above all feature 12")
    assert "i = 12, 4" in cure.code


def test_an_underflow_is_cured_by_a_scaler_a_wider_format_or_a_larger_loss():
    cures = suggest(finding("vanishing_gradient", "underflow"), history_of(Net(), lr=0.02))
    wanted = ['precision="16-mixed"', 'precision="bf16-mixed"', "loss = 1024 * loss"]
    assert [code in cure.code for code, cure in zip(wanted, cures, strict=True)] == [True, True, True]


def test_the_learning_rate_is_given_as_a_number_to_write():
    history = history_of(Net(), lr=0.02)
    assert "= 0.002  # it was 0.02" in suggest(finding("loss_plateau", "learning_rate_too_large"), history)[0].code
    assert "0.1 * lr" in suggest(finding("loss_plateau", "learning_rate_too_large"), History())[0].code


@pytest.mark.parametrize(
    ("cause", "ratio", "rate"),
    [
        ("learning_rate_too_small", 1e-7, "2e+02"),
        ("learning_rate_too_small", 1e-3, "0.2"),  # at least ten times
        ("learning_rate_too_large", 40.0, "5e-07"),
        ("learning_rate_too_large", 1e-3, "0.002"),  # at most a tenth
    ],
)
def test_the_rate_to_write_makes_a_step_a_thousandth_of_the_weights(cause, ratio, rate):
    found = Finding(FindingKind.UPDATE_RATIO, Severity.WARNING, 2, cause=cause, evidence={"update_ratio": ratio})
    code = suggest(found, history_of(Net(), lr=0.02))[0].code
    assert f'group["lr"] = {rate}  # it was 0.02' in code


def test_a_detached_trunk_is_checked_where_lightning_has_a_hook_for_it():
    model = Net(act=nn.ReLU)
    (cure,) = suggest(finding("no_gradient", "detached", layers=("net.0",)), history_of(model))
    with pytest.raises(AssertionError, match=r"net\.0"):
        exec(cure.code, {"model": model})
    model(torch.rand(8, 32)).sum().backward()
    exec(cure.code, {"model": model})
