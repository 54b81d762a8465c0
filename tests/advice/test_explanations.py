"""What is said about findings."""

from math import inf, nan

import pytest

from lightning_gradflow.advice import explain
from lightning_gradflow.advice.explanations import UNKNOWN
from lightning_gradflow.findings import Finding, FindingKind, Severity
from tests.advice.cases import EVIDENCE, PAIRS, finding


@pytest.mark.parametrize(("kind", "cause"), PAIRS)
def test_every_cause_has_a_text_with_its_layers_and_numbers(kind, cause):
    text = explain(finding(kind, cause))
    assert "{" not in text
    assert text.endswith(".")
    assert ": :" not in text
    assert cause == "unknown" or UNKNOWN not in text
    assert kind in {"loss_plateau", "loss_mismatch", "nonfinite_gradient"} or "net.0" in text
    assert "\n" not in text


@pytest.mark.parametrize("value", [nan, inf, -inf, 0.0, 1e300])
@pytest.mark.parametrize(("kind", "cause"), PAIRS)
def test_odd_numbers_do_not_break_a_text(kind, cause, value):
    text = explain(finding(kind, cause, evidence=dict.fromkeys(EVIDENCE, value)))
    assert value == value or "nan" not in text.replace("loss is nan", "").replace("at nan", "")


def test_the_text_of_a_vanishing_gradient_reads_as_a_person_would_write_it():
    assert explain(finding("vanishing_gradient", "saturation")) == (
        "The gradient vanishes from net.6 down to net.0 (4 layers): "
        "it gets 1.8e6 times smaller over 21 points of the network. "
        "Most of it is lost in the bounded activations, which pass little on even where they do not saturate: "
        "each multiplies the gradient by 0.24 (median); "
        "the weights of a layer by 0.58."
    )


def test_the_text_of_an_underflow_tells_how_near_the_smallest_number_the_loss_is():
    evidence = {"lost_share": 0.44, "points": 9.0, "headroom": -1.0}
    assert explain(finding("vanishing_gradient", "underflow", layers=("fc0", "fc1"), evidence=evidence)) == (
        "The gradient vanishes from fc1 down to fc0 (2 layers). "
        "It falls below the smallest number of its format, such as 6e-8 in fp16, and is rounded to zero: "
        "nothing is left at 44% of the 9 points; "
        "where it comes from the loss it is 0.5 times that number."
    )


def test_the_text_of_inputs_that_are_too_large_begins_with_them():
    evidence = {
        "output_rms": 513.0,
        "output_growth": 0.0228,
        "features": 2.0,
        "feature_2": 49892.0,
        "feature_1": 1984.0,
    }
    layers = ("net.2", "net.0")
    assert explain(finding("exploding_gradient", "unscaled_inputs", layers=layers, evidence=evidence)) == (
        "Inputs are far too large, and make the gradient explode: feature 2 (rms 49892), 1 (rms 1984); "
        "such features in all: 2. "
        "Weights are made for inputs of about 1, so all that follows from these is too large: "
        "the first outputs of the network are 513; "
        "the gradients of net.2 and net.0 are so too."
    )
    assert explain(finding("exploding_gradient", "weight_scale", layers=layers, evidence=evidence)).startswith(
        "The gradient explodes in net.2 and net.0: the first outputs of the network, 513, are 0.0228 times"
    )


def test_a_loss_that_is_not_a_number_is_told():
    text = explain(finding("nonfinite_gradient", "loss", evidence={"nonfinite_layers": 3.0, "loss": nan}))
    assert "the loss is nan" in text


@pytest.mark.parametrize(("layers", "text"), [(1.0, "in 1 layer."), (3.0, "in 3 layers.")])
def test_layers_are_counted_as_people_do(layers, text):
    found = Finding(
        FindingKind.NONFINITE_GRADIENT, Severity.CRITICAL, 0, ("fc",), "initialisation", "", {"spoilt_layers": layers}
    )
    assert explain(found).endswith(text)
