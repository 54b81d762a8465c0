"""Residual steps that share their weights, and explode, get smaller ones."""

import contextlib
import copy
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.probes.shards import whole
from lightning_gradflow.remedies.recurrent_treatment import treat
from tests.remedies.test_recurrent_treatment import SIZE, STEPS, _history, _seeded, _training


class Steps(nn.Module):
    """Residual steps that share their weights."""

    def __init__(self, scale=1.0, keeps=1.0):
        super().__init__()
        self.keeps = keeps
        self.wide, self.narrow = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)
        for layer in (self.wide, self.narrow):
            nn.init.orthogonal_(layer.weight, scale)

    def forward(self, x):
        x = x[0]
        for _ in range(STEPS):
            x = self.keeps * x + self.narrow(nn.functional.gelu(self.wide(x)))
        return x


def _treat_steps(kind, change=lambda net: None, keeps=1.0, optimizers=()):
    model = _seeded(lambda: Steps(keeps=keeps))
    change(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    finding = Finding(kind, Severity.WARNING, 0, ("wide", "narrow"), "recurrence")
    return model, before, treat(_training(model, _history(["wide", "narrow"]), optimizers), finding)


def test_weights_of_steps_without_a_map_of_the_state_are_halved_until_nothing_explodes():
    model, before, treatment = _treat_steps(FindingKind.EXPLODING_GRADIENT)
    assert treatment.layers == ("wide", "narrow")
    assert treatment.before["time_decades"] > 3
    assert -0.5 < treatment.after["time_decades"] <= 0.5
    factor = model.wide.weight[0, 0] / before["wide.weight"][0, 0]
    assert factor < 1
    for name in ("wide", "narrow"):
        assert torch.allclose(getattr(model, name).weight, before[f"{name}.weight"] * factor)
        assert torch.equal(getattr(model, name).bias, before[f"{name}.bias"])


def test_and_left_where_something_else_is_wrong_or_they_look_trained():
    def learnt(net):
        with torch.no_grad():
            for layer in (net.wide, net.narrow):
                layer.weight += 5 * torch.outer(layer.weight[:, 0], layer.weight[0])

    for kind, change in ((FindingKind.VANISHING_GRADIENT, lambda net: None), (FindingKind.EXPLODING_GRADIENT, learnt)):
        model, before, treatment = _treat_steps(kind, change)
        assert treatment is None
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def _stepped(model):
    """Adam, which has something to remember of each parameter."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_weights_come_back_where_it_is_not_they_that_make_it_explode():
    optimizers = []
    model, before, treatment = _treat_steps(
        FindingKind.EXPLODING_GRADIENT, lambda net: optimizers.append(_stepped(net)), 1.5, optimizers
    )
    assert treatment is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {*optimizers[0].state} == {*model.parameters()}


def test_weights_come_back_where_what_came_of_it_can_not_be_measured():
    def overflows(net):
        net.keeps = 1e30

    model, before, treatment = _treat_steps(FindingKind.EXPLODING_GRADIENT, overflows)
    assert treatment is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_optimizer_forgets_what_it_knew_of_weights_that_were_halved():
    optimizers = []
    model, _, treatment = _treat_steps(
        FindingKind.EXPLODING_GRADIENT, lambda net: optimizers.append(_stepped(net)), 1.0, optimizers
    )
    assert {*treatment.changed} == {model.wide.weight, model.narrow.weight}
    assert {*optimizers[0].state} == {model.wide.bias, model.narrow.bias}


def test_steps_that_are_spread_over_ranks_are_made_smaller_where_they_look_as_drawn():
    """A small matrix that was trained is compared with its own entries in random order."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net, drawn = _seeded(Steps), _seeded(Steps)
        with torch.no_grad():
            net.wide.weight += 5 * torch.outer(net.wide.weight[:, 0], net.wide.weight[0])
        trained = net.wide.weight.detach().clone()
        twin = copy.deepcopy(net)
        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
        training = _training(twin, _history(["wide", "narrow"]))
        finding = Finding(FindingKind.EXPLODING_GRADIENT, Severity.WARNING, 0, ("wide", "narrow"), "recurrence")

        @contextlib.contextmanager
        def rehearse():
            with torch.no_grad():
                for mine, its in zip(twin.parameters(), net.parameters(), strict=True):
                    mine.copy_(whole(its))
            with training.rehearse() as rehearsed:
                yield rehearsed

        treatment = treat(replace(training, model=net, rehearse=rehearse), finding)
        assert treatment.layers == ("narrow",)
        assert torch.equal(whole(net.wide.weight), trained)
        assert float(whole(net.narrow.weight).detach().norm()) < 0.6 * float(drawn.narrow.weight.detach().norm())
    finally:
        dist.destroy_process_group()
