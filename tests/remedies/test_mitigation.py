"""From a finding to what is done about it."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Point, Row
from lightning_gradflow.remedies.mitigation import REMEDIES, Mitigation

LAYERS = ("0", "2", "4")


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2))


def _history(losses=(1.0,), norms=(2.0,)):
    history = History()
    ops = {"1": "sigmoid", "3": "sigmoid"}
    history.add_points([Point(str(i), str(i), ops.get(str(i), "")) for i in range(5)])
    for step, norm in enumerate(norms):
        history.append(Row(step, scalars={"grad_norm_total": norm}))
    history.append(Row(len(losses) + len(norms), scalars={"grad_norm_total": norms[-1]}, losses=np.array(losses)))
    return history


def _finding(kind=FindingKind.VANISHING_GRADIENT, severity=Severity.CRITICAL, layers=LAYERS[:2]):
    return Finding(kind, severity, 3, layers, "saturation", evidence={"span": -9.0})


def _act(finding, mitigation=None, net=None, history=None, optimizers=()):
    mitigation = mitigation or Mitigation(REMEDIES, 3)
    return mitigation.act([finding], history or _history(), net or _net(), optimizers)


def _changed(net):
    fresh = _net()
    return [
        name for name in LAYERS if not torch.equal(net.get_submodule(name).weight, fresh.get_submodule(name).weight)
    ]


def test_layers_whose_gradient_vanishes_are_drawn_anew_and_no_others():
    net = _net()
    (action,) = _act(_finding(), net=net)
    assert (action.kind, action.layers) == ("reinit", ("0", "2"))
    assert _changed(net) == ["0", "2"]


def test_the_optimizer_forgets_what_was_drawn_anew():
    net = _net()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    _act(_finding(), net=net, optimizers=[optimizer])
    assert set(optimizer.state) == set(net[4].parameters())


def test_a_run_that_has_learnt_keeps_its_weights():
    net = _net()
    falling = np.linspace(1.0, 0.5, 60)
    assert _act(_finding(), net=net, history=_history(falling)) == []
    assert _changed(net) == []


@pytest.mark.parametrize(
    "losses", [np.ones(60), np.linspace(1.0, 0.97, 60), np.full(60, np.nan), np.linspace(1, 2, 60)]
)
def test_a_run_that_has_learnt_nothing_may_be_drawn_anew(losses):
    assert len(_act(_finding(), history=_history(losses))) == 1


def test_the_weights_are_the_same_in_every_run():
    one, other = _net(), _net()
    _act(_finding(), net=one)
    torch.manual_seed(1)
    _act(_finding(), net=other)
    assert torch.equal(one[0].weight, other[0].weight)


def test_an_explosion_is_clipped_from_then_on():
    mitigation = Mitigation(REMEDIES, 3)
    net = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    history = _history(norms=(2.0,) * 6)
    (action,) = _act(_finding(FindingKind.EXPLODING_GRADIENT), mitigation, net, history)
    net.weight.grad = torch.full((1, 1), 1e6)
    mitigation.before_optimizer_step(optimizer)
    assert action.after == {"max_norm": 2.0}
    assert net.weight.grad.item() == pytest.approx(2.0)


def test_before_an_explosion_gradients_are_not_touched():
    net = nn.Linear(1, 1, bias=False)
    net.weight.grad = torch.full((1, 1), 1e6)
    Mitigation(REMEDIES, 3).before_optimizer_step(torch.optim.SGD(net.parameters(), lr=1.0))
    assert net.weight.grad.item() == 1e6


def test_clipping_starts_once():
    mitigation = Mitigation(REMEDIES, 3)
    explosion = _finding(FindingKind.EXPLODING_GRADIENT)
    assert [len(_act(explosion, mitigation)) for _ in range(2)] == [1, 0]


@pytest.mark.parametrize(
    ("allow", "kinds"), [((), []), (("clip",), ["clip"]), (("reinit",), ["reinit"]), (REMEDIES, ["clip", "reinit"])]
)
def test_only_what_is_allowed_is_done(allow, kinds):
    both = [_finding(FindingKind.EXPLODING_GRADIENT), _finding()]
    actions = Mitigation(allow, 3).act(both, _history(), _net(), [])
    assert [action.kind for action in actions] == kinds


def test_there_are_no_more_actions_than_the_maximum():
    mitigation = Mitigation(REMEDIES, 2)
    assert [len(_act(_finding(), mitigation)) for _ in range(4)] == [1, 1, 0, 0]


def test_what_is_no_alarm_is_not_treated():
    assert _act(_finding(severity=Severity.INFO)) == []


@pytest.mark.parametrize("kind", [FindingKind.DEAD_UNITS, FindingKind.LOSS_PLATEAU, FindingKind.SATURATED_ACTIVATION])
def test_other_findings_have_no_remedy_yet(kind):
    assert _act(_finding(kind)) == []


def test_layers_that_cannot_be_drawn_are_no_action():
    assert _act(_finding(), net=nn.Sequential(*(nn.Identity() for _ in range(5)))) == []


def test_a_resumed_run_goes_on_clipping_and_counting():
    first, second = Mitigation(REMEDIES, 1), Mitigation(REMEDIES, 1)
    _act(_finding(FindingKind.EXPLODING_GRADIENT), first, history=_history(norms=(2.0,) * 6))
    second.load_state_dict(first.state_dict())
    assert second.max_norm == 2.0
    assert _act(_finding(), second) == []


def test_a_weight_that_two_modules_share_is_left_as_it_is():
    net = _net()
    first, second = LAYERS[:2]
    net.get_submodule(second).weight = net.get_submodule(first).weight
    before = net.get_submodule(first).weight.detach().clone()
    actions = _act(_finding(), net=net)
    assert torch.equal(net.get_submodule(first).weight, before)
    assert not {first, second} & set(actions[0].layers if actions else ())
