"""When steps are sampled, and what a row is made of."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.callbacks.sampler import Sampler, is_due
from lightning_gradflow.history import History
from lightning_gradflow.metrics import METRICS


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (1, list(range(12))),
        (2, [0, 1, 2, 4, 6, 8, 10]),
        (5, [0, 1, 2, 4, 5, 10]),
        (8, [0, 1, 2, 4, 8]),
        (100, [0, 1, 2, 4, 8]),
    ],
)
def test_the_first_steps_are_sampled_densely_then_every_interval(interval, expected):
    assert [step for step in range(12) if is_due(step, interval)] == expected


def _step(sampler, model, step=0, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    sampler.start_batch(step)
    loss = model(torch.ones(4, 3)).square().mean()
    sampler.before_backward()
    loss.backward()
    sampler.after_backward(more_to_come=False)
    sampler.read_gradients(optimizer)
    sampler.take_loss(step, loss)
    return sampler.finish({"lr": 0.1})


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))


def test_a_row_holds_every_metric_and_is_in_order_of_execution():
    history, model = History(), _model()
    row = _step(Sampler(model, history), model)
    assert (row.step, row.scalars["lr"]) == (0, 0.1)
    assert history.layers == ("0", "2")
    assert [point.name for point in history.points] == ["0", "1", "2"]
    assert set(row.values) == set(METRICS) - {"saturated_fraction"}  # nothing in the model is bounded


def test_the_total_norm_is_that_over_all_parameters():
    history, model = History(), _model()
    row = _step(Sampler(model, history), model)
    naive = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm().item()
    assert row.scalars["grad_norm_total"] == pytest.approx(naive, rel=1e-6)


def test_without_gradients_only_signals_are_measured():
    history, model = History(), _model()
    row = _step(Sampler(model, history, gradients=False), model)
    assert "grad_norm" not in row.values
    assert "delta_norm" in row.values


def test_losses_of_one_step_are_averaged_and_kept_in_order():
    model = _model()
    sampler = Sampler(model, History())
    for step, loss in [(0, 1.0), (0, 3.0), (1, 5.0)]:
        sampler.take_loss(step, torch.tensor(loss))
    np.testing.assert_array_equal(sampler.rest(), [2.0, 5.0])
    assert len(sampler.rest()) == 0


def test_a_loss_that_is_no_number_makes_the_mean_infinite_and_not_missing():
    model = _model()
    sampler = Sampler(model, History())
    sampler.take_loss(0, torch.tensor(float("nan")))
    assert _step(sampler, model, step=1).scalars["loss"] == float("inf")


def test_losses_are_bounded_in_number():
    sampler = Sampler(_model(), History())
    for step in range(5000):
        sampler.take_loss(step, torch.tensor(float(step)))
    losses = sampler.rest()
    assert losses[-1] == 4999
    assert len(losses) == 1024


def test_an_optimizer_is_read_once_a_step():
    model = _model()
    sampler, optimizer = Sampler(model, History()), torch.optim.SGD(model.parameters(), lr=0.1)
    sampler.start_batch(0)
    loss = model(torch.ones(4, 3)).sum()
    sampler.before_backward()
    loss.backward()
    sampler.after_backward(more_to_come=False)
    sampler.read_gradients(optimizer)
    for p in model.parameters():
        p.grad.zero_()
    sampler.read_gradients(optimizer)
    assert sampler.finish({}).scalars["grad_norm_total"] > 0


def test_stale_gradients_are_not_read():
    model = _model()
    model(torch.ones(4, 3)).sum().backward()
    sampler = Sampler(model, History())
    sampler.start_batch(0)
    sampler.read_gradients(torch.optim.SGD(model.parameters(), lr=0.1))
    sampler.drop()
    assert not sampler.has_gradients


def test_a_frozen_layer_is_not_measured_rather_than_zero():
    history, model = History(), _model()
    model[0].requires_grad_(False)
    history.append(_step(Sampler(model, history), model, optimizer=torch.optim.SGD(model[2].parameters(), lr=0.1)))
    assert np.isnan(history["grad_norm"][0]).tolist() == [True, False]


def test_a_layer_that_is_replaced_in_the_run_is_measured():
    history, model = History(), _model()
    sampler = Sampler(model, history)
    history.append(_step(sampler, model))
    model[2] = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
    history.append(_step(sampler, model, step=1))
    assert history.layers == ("0", "2.0", "2.1", "2")
    measured = ~np.isnan(history["grad_norm"])
    assert measured.tolist() == [[True, False, False, True], [True, True, True, False]]
