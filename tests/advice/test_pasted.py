"""Code for the end of `__init__`, pasted there as it stands: into a class in a file, with lines above that go on."""

import re
import runpy
from textwrap import dedent, indent

import pytest
import torch

from lightning_gradflow.advice import suggest
from lightning_gradflow.advice.site import BY_HAND, PASTE, survey
from lightning_gradflow.advice.suggestions import CURES
from lightning_gradflow.history import History, Point, Row
from tests.advice.cases import PAIRS, finding

FILE = """\
import copy

import torch
from torch import nn


class Residual(nn.Sequential):
    "A class of the user's own, with a name that code to paste may have too."


class BatchNorm(nn.Identity):
    pass


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(()))
        self.kept = copy.copy(Residual(BatchNorm()))
{built}
{pasted}

    def forward(self, x):
{forward}
"""

SEQUENTIAL = (
    """
    blocks = [module for _ in range(4) for module in (nn.Linear(8, 8), nn.{act}())]
    self.net = nn.Sequential(*blocks, nn.Linear(8, 4))
    """,
    "return self.kept(self.net(x))",
)
SHARED = (
    """
    self.act = nn.{act}()
    self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
    self.head = nn.Linear(8, 4)
    """,
    """
    for layer in self.layers:
        x = self.act(layer(x))
    return self.head(x)
    """,
)
TWICE = (
    """
    act = nn.{act}()
    self.net = nn.Sequential(*[module for _ in range(4) for module in (nn.Linear(8, 8), act)], nn.Linear(8, 4))
    """,
    "return self.net(x)",
)
RECURRENT = ("self.rnn = nn.{act}(8, 4, batch_first=True)", "return self.rnn(x[:, None])[0][:, -1]")


def pasted(tmp_path, kind, code="", act="Sigmoid"):
    """The model that a file makes into which the code was pasted."""
    built, forward = (dedent(text.replace("{act}", act)) for text in kind)
    path = tmp_path / "users_file.py"
    eight = " " * 8
    path.write_text(FILE.format(built=indent(built, eight), pasted=indent(code, eight), forward=indent(forward, eight)))
    torch.manual_seed(0)
    return runpy.run_path(str(path))["Model"]()


def history_of(*points, scalars=None, values=None):
    history = History()
    points = [Point(*point) for point in points]
    history.layer_axis.merge(dict.fromkeys(point.module for point in points if point.is_layer))
    history.add_points(points)
    history.append(Row(0, values or {}, scalars or {"lr": 0.01}))
    return history


def stack(op):
    pairs = [(f"net.{2 * i}", f"net.{2 * i + 1}") for i in range(4)]
    return history_of(*(p for a, b in pairs for p in ((a, a), (b, b, op))), ("net.8", "net.8"))


def shared(layers, head, name, op, output=""):
    points = [point for layer in layers for point in ((layer, layer), (f"{layer}/{name}", name, op))]
    return history_of(*points, (head, head), *([(f"{head}/{name}", name, output)] if output else []))


@pytest.mark.parametrize("act", ["Sigmoid", "Tanh", "ReLU"])
def test_what_is_pasted_at_the_end_of_init_runs_and_hides_nothing_from_the_lines_above(act, tmp_path):
    codes = {
        suggestion.code
        for kind, cause in PAIRS
        for suggestion in suggest(finding(kind, cause, layers=("net.0", "net.2")), stack(act.lower()))
        if suggestion.code.startswith(PASTE)
    }
    assert len(codes) >= 8
    for code in codes:
        assert pasted(tmp_path, SEQUENTIAL, code, act)(torch.rand(6, 8)).shape == (6, 4), code


@pytest.mark.parametrize("act", ["RNN", "LSTM", "GRU"])
def test_cures_of_recurrences_do_so_too(act, tmp_path):
    found = finding("vanishing_gradient", "recurrence", layers=("rnn",))
    codes = [s.code for s in suggest(found, history_of(("rnn", "rnn"))) if s.code.startswith(PASTE)]
    assert len(codes) == 3
    for code in codes:
        assert pasted(tmp_path, RECURRENT, code, act)(torch.rand(6, 8)).shape == (6, 4), code


@pytest.mark.parametrize(("kind", "cause"), PAIRS)
def test_no_import_stands_outside_of_a_function_where_it_would_hide_the_users_own(kind, cause):
    for suggestion in suggest(finding(kind, cause, layers=("net.0",)), stack("tanh")):
        names = re.findall(r"^(?:from \S+ )?import (.+)$", suggestion.code, re.MULTILINE)
        assert names in ([], ["Tuner"])


@pytest.mark.parametrize(
    ("kind", "layers", "head", "name"),
    [
        (SHARED, [f"layers.{i}" for i in range(4)], "head", "act"),
        (TWICE, [f"net.{2 * i}" for i in range(4)], "net.8", "net.1"),
    ],
    ids=["one name", "several names"],
)
def test_one_activation_module_for_all_layers_is_replaced_wherever_it_is(kind, layers, head, name, tmp_path):
    found = finding("vanishing_gradient", "saturation", layers=(layers[0],))
    titles = [s.title for s in suggest(found, shared(layers, head, name, "sigmoid"))]
    assert titles[0].startswith("Use ReLU")
    assert titles[-1].startswith("Add residual")
    code = suggest(found, shared(layers, head, name, "sigmoid"))[0].code
    model = pasted(tmp_path, kind, code)
    kinds = [type(module).__name__ for _, module in model.named_modules(remove_duplicate=False)]
    assert "Sigmoid" not in kinds
    assert "ReLU" in kinds
    assert model(torch.rand(6, 8)).shape == (6, 4)


def test_one_that_makes_the_output_too_is_left_and_told_in_words_once():
    layers = [f"layers.{i}" for i in range(4)]
    history = shared(layers, "head", "act", "sigmoid", output="sigmoid")
    cures = suggest(finding("vanishing_gradient", "saturation", layers=("head",)), history)
    told = [line for line in cures[-1].code.splitlines() if line.startswith(BY_HAND)]
    assert told == [
        "# in forward(): nn.functional.relu(...) in the place of sigmoid(...) after layers.0, layers.1,",
    ]
    assert [cure.code.startswith(BY_HAND) for cure in cures] == [False, False, True, True]
    assert not any("set_submodule(name, nn.ReLU())" in cure.code for cure in cures)


@pytest.mark.parametrize("cause", ["initialisation", "unknown"])
def test_dead_units_behind_a_shared_activation_are_cured_at_all_layers_before_it(cause, tmp_path):
    layers = [f"layers.{i}" for i in range(4)]
    found = finding("dead_units", cause, layers=("act",))
    cures = suggest(found, shared(layers, "head", "act", "relu"))
    assert any('("layers.0", "layers.1", "layers.2", "layers.3")' in cure.code for cure in cures)
    (leak,) = [cure for cure in cures if "LeakyReLU" in cure.title]
    assert type(pasted(tmp_path, SHARED, leak.code, "ReLU").act).__name__ == "LeakyReLU"


@pytest.mark.parametrize(("gates", "is_told"), [(0.0, True), (2.0, False), (3.0, False), (None, True)])
def test_a_gated_recurrence_is_offered_where_it_may_be_plain(gates, is_told):
    values = {} if gates is None else {"recurrent_gates": torch.tensor([gates]).double().numpy()}
    site = survey(
        finding("vanishing_gradient", "recurrence", layers=("rnn",)), history_of(("rnn", "rnn"), values=values)
    )
    (cure,) = [cure for cure in CURES[site.finding.kind, "recurrence"] if cure.__name__ == "gate_recurrence"]
    assert bool(cure(site)) == is_told


@pytest.mark.parametrize(("fraction", "is_told"), [(0.0, True), (1.0, False)])
def test_a_cell_of_the_users_own_with_gates_is_gated_too(fraction, is_told):
    values = {"gate_fraction": torch.tensor([float("nan"), fraction]).double().numpy()}
    history = history_of(("cell", "cell"), ("cell/sigmoid", "cell", "sigmoid"), values=values)
    titles = [s.title for s in suggest(finding("vanishing_gradient", "recurrence", layers=("cell",)), history)]
    assert any("use a gated one" in title for title in titles) == is_told
