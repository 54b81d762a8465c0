"""Which suggestions are made, and what they name."""

import re
from dataclasses import replace
from math import inf, nan

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.advice import explain, suggest, too_often_clipped, with_rate_of
from lightning_gradflow.advice.explanations import BECAUSE, SEEN, UNKNOWN
from lightning_gradflow.advice.site import survey
from lightning_gradflow.advice.suggestions import CURES
from lightning_gradflow.findings import Action, Finding, FindingKind, Severity, Suggestion
from lightning_gradflow.history import History, Point, Row
from tests.advice.cases import PAIRS, Net, finding, history_of

ANY_MODEL = {
    "clip",
    "find_rate",
    "keep_float32",
    "larger_eps",
    "loosen_clipping",
    "lower_decay",
    "lower_rate",
    "lower_rate_where_clipped",
    "master_weights",
    "outputs_without_bounds",
    "overfit_batch",
    "raise_rate",
    "same_shape",
    "scale_gradients",
    "scale_loss",
    "read_all_steps",
    "scale_targets",
    "scores_for_classes",
    "scores_without_bounds",
    "scores_for_yes_or_no",
    "stable_loss",
    "warm_up",
    "wider_format",
    "initialise_scores",
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
        assert ('"act"' in suggestion.code) == (shared and "ReLU" in suggestion.title)
        assert re.search(r"\bfc1\b", suggestion.code)


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


@pytest.mark.parametrize(
    ("rates", "ratios", "rate"),
    [
        ([0.02, 0.02], [[0.5, 0.5], [40.0, 40.0]], "0.0004"),  # by the step before all broke, not by the largest
        ([0.001, 0.02], [[0.5, 0.5], [2.0, 2.0]], "0.0001"),  # not by one of a warm-up
        ([0.02, 0.02], [[np.nan, 0.0], [np.nan, 1.0]], "0.0002"),  # nor by one that tells nothing
        ([0.02, 0.02], [[0.01, 0.01], [40.0, 40.0]], "0.002"),  # at most a tenth
    ],
)
def test_a_rate_that_is_too_large_is_lowered_so_that_the_first_steps_have_the_usual_size(rates, ratios, rate):
    history = history_of(Net())
    history.layer_axis.merge(["a", "b"])
    for step, (lr, ratio) in enumerate(zip(rates, ratios, strict=True), 1):
        history.append(Row(step, {"update_ratio": np.array(ratio)}, {"lr": lr}))
    found = Finding(FindingKind.UPDATE_RATIO, Severity.WARNING, 2, cause="learning_rate_too_large")
    assert f'group["lr"] = {rate}  # it was 0.02' in suggest(found, history)[0].code


@pytest.mark.parametrize(
    ("title", "after", "code"),
    [
        ("Lower the learning rate", {"lr": 0.253, "lr_factor": 0.0316}, "0.25  # it was 8"),
        ("Lower the learning rate", {"lr": 8.0, "lr_factor": 1.0}, "0.8  # it was 8"),  # it was not for the rate
        ("Lower the learning rate", {"span": 0.1}, "0.8  # it was 8"),
        ("Clip the gradient norm", {"lr": 0.253, "lr_factor": 0.0316}, "0.8  # it was 8"),
        ("Lower the learning rate", {"lr": 0.25, "lr_factor": 0.03, "clip_limit": 0.512}, "(gradient_clip_val=0.51)"),
    ],
)
def test_the_rate_that_an_action_found_takes_the_place_of_the_one_that_was_guessed(title, after, code):
    advice = Suggestion(title, 'group["lr"] = 0.8  # it was 8', "why", "who")
    action = Action(8, "rollback", before={"lr": 8.0, "lr_factor": 1.0}, after=after, outcome="kept")
    assert with_rate_of(advice, action).code.endswith(code)


def test_where_clipping_has_helped_at_the_rate_as_it_is_the_advice_is_to_clip():
    advice = Suggestion("Lower the learning rate", 'group["lr"] = 0.8  # it was 8', "why", "who")
    action = Action(8, "rollback", after={"max_update_ratio": 0.03, "clip_limit": 0.512}, outcome="kept")
    assert with_rate_of(advice, action).title == "Clip the gradient norm"
    assert "gradient_clip_val=0.51 " in with_rate_of(advice, action).code


@pytest.mark.parametrize(("planned", "steps"), [(nan, 500), (306.0, 30), (40.0, 10), (1e6, 500)])
def test_a_warm_up_takes_a_tenth_of_the_run(planned, steps):
    history = history_of(Net())
    history.append(Row(1, scalars={} if planned != planned else {"planned_steps": planned}))
    found = Finding(FindingKind.UPDATE_RATIO, Severity.WARNING, 2, cause="learning_rate_too_large")
    codes = [suggestion.code for suggestion in suggest(found, history)]
    assert sum(f"total_iters={steps})" in code for code in codes) == 1


class Normed(nn.Module):
    """Three layers, of which the outer two have a norm before their activation."""

    def __init__(self):
        super().__init__()
        blocks = [(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()), (nn.Linear(8, 8), nn.ReLU())]
        self.net = nn.Sequential(*blocks[0], *blocks[1], nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def _history_of_normed():
    history, net = History(), Normed().net
    points = [Point(f"net.{i}", f"net.{i}", "relu" if isinstance(m, nn.ReLU) else "") for i, m in enumerate(net)]
    history.layer_axis.merge([point.name for point in points if point.is_layer])
    history.add_points(points)
    gains = [
        1.0 if isinstance(net.get_submodule(name.split(".")[1]), nn.BatchNorm1d) else nan for name in history.layers
    ]
    history.append(Row(0, {"gain_rms": np.array(gains)}, {"lr": 0.01}))
    return history


def test_code_is_for_the_layers_before_a_norm_and_does_something():
    history = _history_of_normed()
    found = finding(FindingKind.VANISHING_GRADIENT, "depth", layers=("net.1", "net.6"))
    by_title = {suggestion.title.split(",")[0]: suggestion.code for suggestion in suggest(found, history)}
    he = by_title["Initialise these layers by He's rule"]
    assert '("net.0", "net.3", "net.5")' in he
    model = Normed()
    before = [p.detach().clone() for p in model.parameters()]
    exec(he, {"self": model})
    changed = [name for (name, p), old in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, old)]
    assert {name for name in changed if "weight" in name} == {"net.0.weight", "net.3.weight", "net.5.weight"}
    assert '("net.3",)' in by_title["Normalise before each activation (BatchNorm)"]
    assert '("net.3", "net.4")' in by_title["Let a gate decide how much of each layer is used (highway connections)"]


def test_the_layers_of_dead_units_are_those_before_the_norm():
    found = finding(FindingKind.DEAD_UNITS, "unknown", layers=("net.1",))
    assert '("net.0",)' in next(s.code for s in suggest(found, _history_of_normed()) if "He's rule" in s.title)


def test_what_is_normalised_everywhere_is_not_told_to_be():
    history, net = History(), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    points = [Point(str(i), str(i), "relu" if isinstance(m, nn.ReLU) else "") for i, m in enumerate(net)]
    history.layer_axis.merge(["0", "1", "3"])
    history.add_points(points)
    history.append(Row(0, {"gain_rms": np.array([nan, 1.0, nan])}))
    titles = [s.title for s in suggest(finding(FindingKind.VANISHING_GRADIENT, "depth", layers=("1",)), history)]
    assert not any(title.startswith(("Normalise before", "Let a gate")) for title in titles)


def test_a_rate_that_was_lowered_twice_is_told_against_the_one_in_the_code():
    advice = Suggestion("Lower the learning rate", "", "", "")
    action = Action(8, "rollback", before={"lr": 0.8, "lr_factor": 0.1}, after={"lr": 0.2, "lr_factor": 0.025})
    assert 'group["lr"] = 0.2  # it was 8' in with_rate_of(advice, action).code


def history_with(**scalars):
    history = history_of(Net(act=nn.ReLU), lr=0.02)
    for step in range(1, 6):
        history.append(Row(step, scalars={"lr": 0.02, **scalars}))
    return history


@pytest.mark.parametrize(("share", "is_told"), [(0.9, True), (0.51, True), (0.5, False), (0.0, False)])
@pytest.mark.parametrize("cause", ["unknown", "weight_scale", "depth", "recurrence"])
def test_where_more_than_half_of_the_steps_are_clipped_a_lower_rate_comes_before_clipping(cause, share, is_told):
    titles = [
        cure.title for cure in suggest(finding("exploding_gradient", cause), history_with(clipped_fraction=share))
    ]
    wanted = f"Lower the learning rate, for {share:.0%} of the recent steps were clipped"
    assert (wanted in titles) == is_told
    assert not is_told or titles.index(wanted) < titles.index("Clip the gradient norm")


def test_the_rate_of_steps_that_are_clipped_too_often_is_halved():
    assert "= 0.01  # it was 0.02" in too_often_clipped(0.8, 0.02).code
    assert "0.5 * lr" in too_often_clipped(0.8).code


@pytest.mark.parametrize(("left", "is_told"), [(1e-3, True), (0.5, False), (nan, False)])
def test_clipping_that_leaves_next_to_nothing_is_loosened_to_the_usual_norm(left, is_told):
    found = finding("update_ratio", "learning_rate_too_small", evidence={"update_ratio": 1e-7, "clip_factor": left})
    first = suggest(found, history_with(grad_norm_total=37.0))[0]
    assert ("gradient_clip_val=37)" in first.code) == is_told


def test_clipping_is_loosened_from_the_first_samples_on():
    history = history_of(Net(act=nn.ReLU), lr=0.02)
    history.append(Row(1, scalars={"lr": 0.02, "grad_norm_total": 37.0}))
    found = finding("update_ratio", "learning_rate_too_small", evidence={"update_ratio": 1e-7, "clip_factor": 1e-5})
    assert "gradient_clip_val=37)" in suggest(found, history)[0].code


@pytest.mark.parametrize(("ratio", "is_offered"), [(1e-8, False), (1e-4, True)])
def test_no_rate_above_one_is_proposed_to_make_up_for_clipping(ratio, is_offered):
    found = finding("update_ratio", "learning_rate_too_small", evidence={"update_ratio": ratio, "clip_factor": 1e-5})
    titles = [cure.title for cure in suggest(found, history_with(grad_norm_total=37.0))]
    assert titles[0] == "Clip at a larger norm"
    assert ("Raise the learning rate" in titles) == is_offered


@pytest.mark.parametrize(
    ("cause", "norms", "limit"),
    [
        ("learning_rate_too_large", [3.0, 4.0, 5.0, 6.0, 1e9], "5.0"),
        ("learning_rate_too_large", [3.0, 4.0, inf], "1.0"),  # too few to know what is usual
        ("weight_scale", [3.0, 4.0, 5.0, 6.0, 1e9], "1.0"),  # it was so from the start
    ],
)
def test_the_limit_for_clipping_is_the_usual_norm_where_there_was_one(cause, norms, limit):
    history = history_of(Net(act=nn.ReLU))
    for step, norm in enumerate(norms, 1):
        history.append(Row(step, scalars={"grad_norm_total": norm}))
    (cure,) = [cure for cure in suggest(finding("exploding_gradient", cause), history) if cure.title.startswith("Clip")]
    limits = {}
    exec(cure.code.replace("L.Trainer(", "limits.update("), {"limits": limits})
    assert limits == {"gradient_clip_val": float(limit)}


@pytest.mark.parametrize(
    ("kind", "cause", "hinted"),
    [
        ("vanishing_gradient", "weight_scale", {"initialise"}),
        ("vanishing_gradient", "recurrence", {"initialise_recurrence"}),
        ("exploding_gradient", "unscaled_inputs", {"scale_inputs", "clip"}),
        ("dead_units", "learning_rate_too_large", {"lower_rate", "clip"}),
        ("dead_units", "unscaled_inputs", {"scale_inputs"}),
        ("loss_plateau", "dead_units", {"initialise"}),
        ("update_ratio", "learning_rate_too_small", set()),
    ],
)
@pytest.mark.parametrize("severity", Severity)
def test_what_apply_could_have_done_is_said_of_alarms(kind, cause, hinted, severity):
    found = replace(finding(kind, cause), severity=severity)
    history = history_of(Net(act=nn.ReLU))
    told = {cure.title for cure in suggest(found, history) if 'GradFlow(mitigate="apply")' in cure.reason}
    site = survey(found, history)
    wanted = {s.title for cure in CURES[kind, cause] if cure.__name__ in hinted for s in cure(site)}
    assert bool(wanted) == bool(hinted)
    assert told == (wanted if severity.is_alarm else set())


def test_no_normalisation_and_no_initialisation_is_proposed_for_inputs_that_are_too_large():
    for kind in ("dead_units", "saturated_activation", "update_ratio", "exploding_gradient", "nonfinite_gradient"):
        names = {cure.__name__ for cure in CURES[kind, "unscaled_inputs"]}
        assert not names & {"normalise", "initialise"}, "one large column drowns the others in every unit"
        assert CURES[kind, "unscaled_inputs"][0].__name__ == "scale_inputs"


def test_units_that_were_dead_from_the_start_are_offered_a_slope():
    found = finding("dead_units", "initialisation", layers=("net.1",))
    assert any("LeakyReLU" in cure.code for cure in suggest(found, history_of(Net(act=nn.ReLU))))


def test_a_detached_trunk_is_checked_where_lightning_has_a_hook_for_it():
    model = Net(act=nn.ReLU)
    (cure,) = suggest(finding("no_gradient", "detached", layers=("net.0",)), history_of(model))
    with pytest.raises(AssertionError, match=r"net\.0"):
        exec(cure.code, {"self": model})
    model(torch.rand(8, 32)).sum().backward()
    exec(cure.code, {"self": model})


def functional(*ops):
    """The history of Linear layers with activations that are calls."""
    history = History()
    history.layer_axis.merge([f"fc{i}" for i in range(len(ops) + 1)])
    points = [[Point(f"fc{i}", f"fc{i}"), Point(f"fc{i}/{op}", f"fc{i}", op)] for i, op in enumerate(ops)]
    history.add_points([*(point for pair in points for point in pair), Point(f"fc{len(ops)}", f"fc{len(ops)}")])
    return history


def test_code_that_changes_nothing_by_itself_comes_last():
    cures = suggest(finding("vanishing_gradient", "saturation", layers=("fc0",)), functional("tanh", "tanh"))
    by_hand = ["# in forward(): " in cure.code for cure in cures]
    assert by_hand == [False, False, True, True]
    assert cures[2].title.startswith("Add residual")
    named = suggest(finding("vanishing_gradient", "saturation", layers=("net.0",)), history_of(Net()))
    assert named[0].title.startswith("Add residual")


def test_weights_of_a_wrong_size_are_drawn_anew_behind_the_last_activation_too():
    history = functional("relu", "relu")
    found = finding("exploding_gradient", "weight_scale", layers=("fc2", "fc1", "fc0"))
    first = suggest(found, history)[0]
    assert (
        first.title
        == "Initialise these layers by He's rule, with biases at zero, and these layers with orthogonal weights"
    )
    by_he, orthogonal = first.code.split("nn.init.orthogonal_")[0].split("for name in ")[1:]
    assert by_he.startswith('("fc0", "fc1")')
    assert orthogonal.startswith('("fc2",)')
    others = suggest(replace(found, layers=("fc1", "fc0")), history)
    assert not any('("fc2",)' in cure.code for cure in others)
    vanishing = finding("vanishing_gradient", "depth", layers=("fc2", "fc1", "fc0"))
    assert not any("orthogonal" in cure.title for cure in suggest(vanishing, history))


def test_inputs_are_scaled_where_they_go_in():
    history = functional("relu", "relu")
    history.append(Row(0, scalars={"input_layer": 1.0}))
    code = suggest(finding("dead_units", "unscaled_inputs"), history)[0].code
    assert 'first = model.get_submodule("fc1")' in code


def test_tables_that_are_too_large_get_rows_of_length_one():
    model = nn.ModuleDict({"user": nn.Embedding(400, 64, padding_idx=3), "other": nn.Embedding(400, 64)})
    (cure,) = suggest(finding("loss_plateau", "weight_scale", layers=("user",)), history_of(Net()))
    exec(cure.code, {"self": model})
    assert float(model["user"].weight.detach().square().sum(1).mean()) == pytest.approx(1, rel=0.05)
    assert not model["user"].weight[3].any()
    assert float(model["other"].weight.detach().std()) == pytest.approx(1, rel=0.05)
