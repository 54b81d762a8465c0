"""Weights that were drawn too large for the steps of the run: each condition from both sides, and in real runs."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow import GradFlow
from lightning_gradflow.detectors.large_weights import LargeWeights
from lightning_gradflow.history import History, Row
from tests.detectors.runs import stack, verdict

nan = math.nan
DOWN = np.linspace(9.0, 4.0, 101)
SIDE = 64  # of the matrices


def run(
    size=8.0,
    edge=1.0,
    output=9.0,
    ratio=1e-3,
    losses=DOWN,
    planned=400.0,
    layers=4,
    normal=0,
    left=None,
    saturated=nan,
    gate=nan,
    first_step=1.0,
    initial=nan,
    unmoved=0,
    **scalars,
):
    """Square matrices with weights of this size; of `normal` layers it is 1."""
    history, points = History(), stack(layers)
    names = [point.module for point in points if point.is_layer]
    history.layer_axis.merge(names)
    history.add_points(points)
    sizes = np.where(np.arange(len(names)) < normal, 1.0, size)
    values = {
        "weight_norm": sizes * math.sqrt(SIDE),
        "spectral_norm": 2 * sizes * edge,
        "grad_norm": np.full(len(names), 3.0),
        "grad_rms": np.full(len(names), 3.0 / SIDE),
        "update_ratio": np.full(len(names), ratio),
        "output_rms": np.array([1.0] * (len(points) - 1) + [output]),
        "initial_size": np.broadcast_to(np.array(initial, dtype=float), len(names)),
    }
    last = -1
    for step in range(0, len(losses), 10):
        said = {"planned_steps": planned, **scalars}
        now = {**values, "update_ratio": values["update_ratio"] * (1.0 if step else first_step)}
        if step == 0:
            now["grad_norm"] = np.where(np.arange(len(names)) < unmoved, 0.0, 3.0)
            now["grad_rms"] = now["grad_norm"] / SIDE
        if left is not None:
            now["delta_norm"] = np.full(len(points), left if step else 1.0)
        if not math.isnan(saturated):
            now["saturated_fraction"] = np.array([nan] * (len(points) - 1) + [saturated])
            now["gate_fraction"] = np.array([nan] * (len(points) - 1) + [gate])
        history.append(Row(step, now, said, losses=np.array(losses[last + 1 : step + 1])))
        last = step
    return history


def told(**changes):
    return verdict(LargeWeights().judge(run(**changes)))


FOUND = [("warning", "weight_scale", ("fc0", "fc1", "fc2", "fc3"))]


@pytest.mark.parametrize(
    ("sick", "well"),
    [
        ({"size": 4.1}, {"size": 3.9}),
        ({"edge": 1.29}, {"edge": 1.31}),  # what was learnt stands out
        ({"output": 3.1}, {"output": 2.9}),
        ({"output": 0.5, "score_deviation": 3.1}, {"score_deviation": 2.9}),  # what comes last may scale the scores
        ({"ratio": 2.4e-3}, {"ratio": 2.6e-3}),
        ({"planned": 500.0}, {"planned": nan}),
        ({}, {"losses": np.geomspace(9.0, 0.2, 101)}),  # it gets there
        ({}, {"losses": DOWN[:71]}),  # too early to say
        ({"optimizers": 1.0}, {"optimizers": 2.0}),
    ],
)
def test_each_condition_from_both_sides(sick, well):
    assert told(**sick) == FOUND
    assert told(**well) == []


EARLY = DOWN[:11]
FAR = {"compared_rms": 9.0, "residual_rms": 9.0, "target_deviation": 2.9}
SCORES = {"score_deviation": 2.1, "score_classes": 8.0, "output": 0.5}  # 1.5 times the logarithm of 8 is 3.1


@pytest.mark.parametrize(
    ("sick", "well"),
    [
        (FAR, {**FAR, "target_deviation": 3.1}),
        (FAR, {**FAR, "residual_rms": 8.6}),  # the targets are as large, as those that are not standardised
        (FAR, {**FAR, "compared_rms": 8.6}),
        (FAR, {}),
        (FAR, {**FAR, "target_deviation": 0.0}),  # a residual that is compared with zeros
        (FAR, {**FAR, "target_deviation": nan}),
        (FAR, {**FAR, "residual_rms": nan}),
        (FAR, {**FAR, "compared_rms": nan}),
        (FAR, {**FAR, "normal": 2}),
        (FAR, {**FAR, "ratio": 1.01e-2}),
        ({**FAR, "ratio": 9.9e-3}, {**FAR, "losses": DOWN[:1]}),
        (SCORES, {**SCORES, "score_deviation": 1.9}),
        (SCORES, {**SCORES, "score_classes": 600.0}),
        ({**FAR, "size": 3.9, "initial": 4.1}, {**FAR, "size": 3.9, "initial": 3.9}),
        (
            {**FAR, "unmoved": 4, "edge": 1.31},
            {**FAR, "unmoved": 4, "planned": nan},
        ),  # the gradient may be zero at first
    ],
)
def test_what_the_first_outputs_say_needs_no_time(sick, well):
    assert told(**{"losses": EARLY, **sick}) == FOUND
    assert told(**{"losses": EARLY, **well}) == []


@pytest.mark.parametrize(("initial", "told_of"), [(33.0, ("fc3",)), (31.0, ())])
@pytest.mark.parametrize("changes", [{}, {"compared_rms": 8.6}, {"ratio": 1.01e-2}])
def test_a_single_layer_that_is_larger_by_far_is_enough(initial, told_of, changes):
    huge = {"normal": 3, "size": 40.0, "edge": 1.31, "initial": (1.0, 1.0, 1.0, initial)}
    found = told(losses=EARLY, **{**FAR, **huge, **changes})
    assert found == ([("warning", "weight_scale", told_of)] if told_of and not changes else [])


@pytest.mark.parametrize(("down_to", "is_found"), [(1.7, True), (1.6, False)])  # equal scores of 8 classes: 2.08
def test_what_is_past_chance_has_learnt_more_than_its_size(down_to, is_found):
    losses = np.append(np.linspace(9.0, down_to, 41), np.full(60, down_to))
    assert bool(told(losses=losses, **{**SCORES, "score_deviation": 3.1})) is is_found


@pytest.mark.parametrize(("normal", "is_found"), [(1, True), (2, False)])
def test_most_layers_have_to_be_too_large(normal, is_found):
    assert bool(told(normal=normal)) is is_found


@pytest.mark.parametrize(
    ("sick", "well"),
    [
        ({}, {"left": 0.4}),  # more than a constant was learnt
        ({}, {"left": None}),
        ({"normal": 3}, {"normal": 4}),
        ({"size": 4.1}, {"size": 3.9}),
        ({"edge": 1.29}, {"edge": 1.31}),
        ({"output": 3.1}, {"output": 2.9}),
        ({"output": 0.5, "score_deviation": 3.1}, {"score_deviation": 2.9}),  # what comes last may scale the scores
        ({"ratio": 2.4e-3}, {"ratio": 2.6e-3}),
        ({"first_step": 10.0}, {"planned": nan}),  # one large step does not take them far
        ({"output": 0.4, "saturated": 0.6}, {"output": 0.4, "saturated": 0.4}),
        ({"output": 0.4, "saturated": 0.6}, {"output": 0.4, "saturated": 0.6, "gate": 0.9}),
        ({}, {"losses": np.geomspace(9.0, 0.2, 101)}),
        ({}, {"losses": DOWN[:71]}),
        ({"optimizers": 1.0}, {"optimizers": 2.0}),
    ],
)
def test_a_few_layers_are_enough_where_nothing_was_learnt(sick, well):
    base = {"normal": 3, "left": 0.6}
    assert told(**{**base, **sick}) == [("warning", "weight_scale", ("fc3",))]
    assert told(**{**base, **well}) == []


def test_the_evidence_of_a_few_layers_goes_by_their_usual_steps():
    evidence = LargeWeights().judge(run(normal=3, left=0.6, first_step=10.0))[0].evidence
    assert evidence["usual_reach"] == pytest.approx(0.4)
    assert "reach" not in evidence


def test_a_single_layer_is_left_alone():
    assert told(layers=1) == []


def test_the_evidence_is_the_size_and_how_far_steps_get():
    evidence = LargeWeights().judge(run())[0].evidence
    assert evidence["weight_size"] == pytest.approx(8.0)
    assert evidence["reach"] == pytest.approx(0.4)


@pytest.mark.parametrize(("large", "others", "is_found"), [(1e-3, 1e-1, True), (1e-1, 1e-3, False)])
def test_what_counts_is_how_far_those_layers_get_that_are_too_large(large, others, is_found):
    """Gains of norms, and a last layer, move as usual."""
    history, rows = run(), History()
    names = [*history.layers, "norm0", "norm1", "norm2", "norm3", "norm4"]
    rows.layer_axis.merge(names)
    rows.add_points(history.points)
    for row in history.rows:
        values = {
            name: value if name == "output_rms" else np.append(value, [nan] * 5) for name, value in row.values.items()
        }
        values["update_ratio"] = np.array([large] * 4 + [others] * 5)
        rows.append(Row(row.step, values, row.scalars, losses=row.losses))
    assert bool(LargeWeights().judge(rows)) is is_found


def test_a_limit_of_ones_own_and_nothing_measured():
    assert LargeWeights(max_size=10.0).judge(run()) == []
    history = History()
    history.append(Row(99, scalars={"planned_steps": 400.0}, losses=DOWN))
    assert LargeWeights().judge(history) == []
    with pytest.raises(ValueError, match="max_size"):
        LargeWeights(max_size=0.0)


class Scaled(nn.Linear):
    """Weights that are drawn with 1, and scaled in the forward pass."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight * math.sqrt(2 / self.in_features), self.bias)


class Run(L.LightningModule):
    def __init__(self, kind, std, rate=1e-3):
        super().__init__()
        torch.manual_seed(1)
        sizes = ((32, 96), (96, 96), (96, 8))
        layers = [kind(*size) for size in sizes]
        for layer, deviation in zip(layers, np.broadcast_to(std, 3), strict=True) if std else ():
            nn.init.normal_(layer.weight, std=float(deviation))
        first, second, last = layers
        self.net = nn.Sequential(first, nn.LayerNorm(96), nn.GELU(), second, nn.LayerNorm(96), nn.GELU(), last)
        self.rate = rate

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.rate)


def _fit(module, mitigate="suggest", steps=300):
    torch.manual_seed(0)
    x = torch.randn(1024, 32)
    y = (nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))(x) * 10).argmax(1)
    flow = GradFlow(every_n_steps=10, report=False, console=False, mitigate=mitigate)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64, shuffle=True)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    L.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=[flow], **quiet).fit(module, loader)
    return flow


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_weights_drawn_with_one_are_found_and_drawn_anew():
    flow = _fit(Run(nn.Linear, 1.0))
    assert [(f.cause, f.layers) for f in flow.findings if f.severity.is_alarm] == [
        ("weight_scale", ("net.0", "net.3", "net.6"))
    ]
    cured = _fit(Run(nn.Linear, 1.0), "apply")
    assert [(a.kind, a.outcome) for a in cured.actions] == [("reinit", "kept")]
    sick, well = (float(np.median(one.history.losses[-30:])) for one in (flow, cured))
    assert well < 0.7 * sick


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_what_was_drawn_as_badly_is_drawn_with_the_layers_that_a_norm_hides():
    flow = _fit(Run(nn.Linear, (2.0, 1.0, 0.37)), "apply")
    assert [f.layers for f in flow.findings if f.severity.is_alarm] == [("net.0", "net.3")]
    assert [(a.kind, a.layers, a.outcome) for a in flow.actions] == [("reinit", ("net.0", "net.3", "net.6"), "kept")]


@pytest.mark.parametrize(
    "module",
    [lambda: Run(nn.Linear, None), lambda: Run(Scaled, 1.0), lambda: Run(nn.Linear, 1.0, rate=3e-2)],
    ids=["usual", "scaled in the forward pass", "steps that get away from them"],
)
def test_runs_that_are_well_are_left_alone(module):
    assert not [f for f in _fit(module(), steps=150).findings if f.severity.is_alarm]


class Attention(L.LightningModule):
    """Looks up the value of the pair whose key is asked for, by matrices of its own."""

    def __init__(self, std):
        super().__init__()
        torch.manual_seed(1)
        self.key, self.value = nn.Embedding(16, 48), nn.Embedding(8, 48)
        self.w_q, self.w_k, self.w_v = (nn.Parameter(std * torch.randn(48, 48)) for _ in range(3))
        self.out = nn.Linear(48, 8)

    def training_step(self, batch, _):
        keys, values, asked, target = batch
        memory = self.key(keys) + self.value(values)
        scores = torch.einsum("bd,bpd->bp", self.key(asked) @ self.w_q, memory @ self.w_k) / math.sqrt(48)
        found = torch.einsum("bp,bpd->bd", scores.softmax(-1), memory @ self.w_v)
        return nn.functional.cross_entropy(self.out(found), target)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


def _attend(std, mitigate="suggest"):
    module = Attention(std)
    keys, values = torch.rand(3000, 16).argsort(1)[:, :6], torch.randint(0, 8, (3000, 6))
    at, rows = torch.randint(0, 6, (3000,)), torch.arange(3000)
    data = torch.utils.data.TensorDataset(keys, values, keys[rows, at], values[rows, at])
    flow = GradFlow(every_n_steps=25, report=False, console=False, mitigate=mitigate)
    loader = torch.utils.data.DataLoader(data, batch_size=128, shuffle=True)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    L.Trainer(max_steps=350, max_epochs=-1, accelerator="cpu", callbacks=[flow], **quiet).fit(module, loader)
    return flow


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_attention_that_picks_one_position_from_the_start_is_found_and_drawn_anew():
    flow = _attend(1.0, "apply")
    assert [f.cause for f in flow.findings if f.severity.is_alarm] == ["score_scale"]
    assert [(a.kind, a.step, a.outcome) for a in flow.actions] == [("reinit", 0, "kept")]
    assert np.median(flow.history.losses[-30:]) < 0.5


def test_attention_of_usual_size_is_left_alone():
    assert not [f for f in _attend(48**-0.5).findings if f.severity.is_alarm]
