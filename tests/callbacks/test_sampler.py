"""What a row is made of."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack

from lightning_gradflow.callbacks.sampler import Sampler
from lightning_gradflow.history import MAX_CALLS, History
from lightning_gradflow.metrics import METRICS


def _backward(sampler, model, step=0, scale=1.0):
    """A batch up to the end of its backward pass."""
    sampler.start_batch(step)
    loss = model(torch.ones(4, 3)).square().mean()
    sampler.before_backward()
    (loss * scale).backward()
    sampler.after_backward(more_to_come=False, scale=None if scale == 1.0 else torch.tensor(scale))
    sampler.take_loss(step, loss)


def _read_and_step(sampler, optimizer, scale=None, factor=1.0, raw=False, clip=None):
    if sampler.is_first_reading(optimizer):
        sampler.read_gradients(optimizer, scale, factor, raw)
    if clip is not None:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()
    sampler.after_optimizer_step(optimizer)


def _descent(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def _step(sampler, model, step=0, optimizer=None, **kwargs):
    optimizer = optimizer or _descent(model)
    optimizer.zero_grad()
    _backward(sampler, model, step)
    _read_and_step(sampler, optimizer, **kwargs)
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
    # nothing is bounded, nothing runs twice, nothing is recurrent, and the inputs are few
    absent = {"saturated_fraction", "gate_fraction", "calls", "recurrent_radius", "hh_to_ih", "silent_fraction"}
    absent |= {"unchanged_fraction", "not_optimized_fraction"}  # no weight is in 16 bits, and all are held
    absent |= {"recurrent_gates", "loop_radius", "stack_gain", "embedding_rms", "table_cosine", "matrix_spread"}
    absent |= {"gain_rms", "gain_mean"}  # nor are there loops, tables and norms
    absent |= {"steps_as_samples", "softmax_gap", "output_gap"}  # nor sequences and choices
    assert set(row.values) == set(METRICS) - absent


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
    np.testing.assert_array_equal(sampler.rest()[0], [2.0, 5.0])
    assert len(sampler.rest()[0]) == 0


def test_a_loss_that_is_no_number_makes_the_mean_infinite_and_not_missing():
    model = _model()
    sampler = Sampler(model, History())
    sampler.take_loss(0, torch.tensor(float("nan")))
    assert _step(sampler, model, step=1).scalars["loss"] == float("inf")


def test_losses_are_bounded_in_number():
    sampler = Sampler(_model(), History())
    for step in range(5000):
        sampler.take_loss(step, torch.tensor(float(step)))
    losses, _ = sampler.rest()
    assert losses[-1] == 4999
    assert len(losses) == 1024


def test_an_optimizer_is_read_once_a_step():
    sampler, optimizer = Sampler(_model(), History()), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    sampler.start_batch(0)
    readings = [sampler.is_first_reading(optimizer) for _ in range(3)]
    sampler.drop()
    assert readings == [True, False, False]


def test_an_optimizer_is_read_again_in_the_next_sample():
    model = _model()
    sampler, optimizer = Sampler(model, History()), _descent(model)
    rows = [_step(sampler, model, step, optimizer) for step in range(2)]
    assert all("grad_norm" in row.values for row in rows)


def test_a_sample_without_a_reading_has_no_gradients():
    model = _model()
    sampler = Sampler(model, History())
    _backward(sampler, model)
    assert (sampler.has_gradients, "grad_norm" in sampler.finish({}).values) == (False, False)


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


# -- factors


def _same(first, second, metric, factor=1.0):
    np.testing.assert_allclose(first.values[metric], second.values[metric] * factor, rtol=1e-5)
    return True


def _row(**kwargs):
    """The row of a step of the same model, whatever the arguments."""
    model = _model()
    return _step(Sampler(model, History()), model, **kwargs)


@pytest.mark.parametrize("metric", ["grad_norm", "grad_mean_abs", "grad_max_abs", "delta_norm"])
def test_gradients_of_a_short_window_are_those_of_its_mean_loss(metric):
    assert _same(_row(factor=4.0), _row(), metric, 4.0)


@pytest.mark.parametrize("metric", ["update_norm", "weight_norm", "output_rms", "delta_headroom", "grad_zero_fraction"])
def test_a_short_window_leaves_what_is_as_it_is(metric):
    assert _same(_row(factor=4.0), _row(), metric)


def test_the_total_norm_of_a_short_window_is_that_of_its_mean_loss():
    assert _row(factor=4.0).scalars["grad_norm_total"] == pytest.approx(4 * _row().scalars["grad_norm_total"])


def test_the_clip_factor_of_a_short_window_is_that_of_what_was_clipped():
    limit = 0.5 * _row().scalars["grad_norm_total"]
    assert _row(factor=4.0, clip=limit).scalars["clip_factor"] == pytest.approx(0.5, rel=1e-4)


def _scaled_row(raw, factor=1.0, spoil=False):
    """The row of a step whose loss is multiplied by 1024, and whose gradients may be divided again before."""
    model = _model()
    sampler, optimizer = Sampler(model, History()), _descent(model)
    _backward(sampler, model, scale=1024.0)
    if not raw:
        for parameter in model.parameters():
            parameter.grad.div_(1024.0)
    if spoil:
        model[0].weight.grad[0, 0] = math.inf
        optimizer.param_groups[0]["lr"] = 0.0
    _read_and_step(sampler, optimizer, torch.tensor(1024.0), factor, raw)
    return sampler.finish({})


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("metric", ["grad_norm", "delta_norm"])
def test_the_scale_of_a_gradient_scaler_is_taken_out(metric, raw):
    assert _same(_scaled_row(raw), _row(), metric)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("metric", ["grad_norm", "delta_norm"])
def test_the_scale_and_the_factor_of_a_short_window_go_together(metric, raw):
    assert _same(_scaled_row(raw, 4.0), _row(), metric, 4.0)


def test_headroom_is_that_with_the_scale():
    np.testing.assert_allclose(
        _scaled_row(False).values["delta_headroom"], _row().values["delta_headroom"] + 10, rtol=1e-5
    )


def test_the_scale_is_told():
    assert _scaled_row(False).scalars["loss_scale"] == 1024.0


@pytest.mark.parametrize("name", ["loss_scale", "step_skipped"])
def test_without_a_scaler_nothing_is_told_of_it(name):
    assert name not in _row().scalars


@pytest.mark.parametrize(("spoil", "skipped"), [(False, 0.0), (True, 1.0)])
def test_a_step_is_skipped_where_a_gradient_is_not_finite(spoil, skipped):
    assert _scaled_row(False, spoil=spoil).scalars["step_skipped"] == skipped


def test_a_skipped_step_has_an_infinite_gradient_and_no_update():
    row = _scaled_row(False, spoil=True)
    assert row.values["grad_norm"].max() == math.inf
    assert "update_norm" not in row.values


# -- clipping


def test_the_clip_factor_is_what_clipping_left():
    limit = 0.25 * _row().scalars["grad_norm_total"]
    assert _row(clip=limit).scalars["clip_factor"] == pytest.approx(0.25, rel=1e-4)


def test_the_share_of_clipped_steps_is_that_over_the_samples_so_far():
    model, history = _model(), History()
    sampler = Sampler(model, history)
    for step, clip in enumerate([None, 1e-3, 1e-3, None]):
        history.append(_step(sampler, model, step, clip=clip))
    np.testing.assert_allclose(history.scalar("clipped_fraction"), [0, 1 / 2, 2 / 3, 1 / 2])


def test_the_share_of_clipped_steps_is_that_over_the_last_fifty_samples():
    model, history = _model(), History()
    sampler = Sampler(model, history)
    for step in range(60):
        history.append(_step(sampler, model, step, clip=1e-3 if step < 20 else None))
    assert history.scalar("clipped_fraction")[-1] == pytest.approx(10 / 50)


# -- calls


class Doubling(nn.Module):
    """Doubles its input by a cell in a loop: the gradient at call k of a sum is 2^(turns - 1 - k) at each output."""

    def __init__(self, turns):
        super().__init__()
        self.turns = turns
        self.cell = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(self.cell.weight, 2.0)

    def forward(self):
        x = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(self.turns):
            x = self.cell(x)
        return x


def _turns(turns):
    """The row of such a loop, and the calls that it holds, by their place in the loop."""
    model = Doubling(turns)
    sampler = Sampler(model, History())
    sampler.start_batch(0)
    loss = model().sum()
    sampler.before_backward()
    loss.backward()
    sampler.after_backward(more_to_come=False)
    row = sampler.finish({})
    return row, turns - 1 - np.log2(row.calls["cell"])


@pytest.mark.parametrize("turns", [2, MAX_CALLS])
def test_the_calls_of_a_loop_are_kept(turns):
    np.testing.assert_allclose(_turns(turns)[1], np.arange(turns))


@pytest.mark.parametrize("turns", [MAX_CALLS + 1, 130, 500])
def test_a_long_loop_is_thinned_to_so_many_calls(turns):
    assert len(_turns(turns)[1]) == MAX_CALLS


@pytest.mark.parametrize("turns", [MAX_CALLS + 1, 130, 500])
def test_of_a_long_loop_the_first_and_the_last_call_are_kept(turns):
    kept = _turns(turns)[1]
    assert (kept[0], kept[-1]) == pytest.approx((0, turns - 1))


@pytest.mark.parametrize("turns", [MAX_CALLS + 1, 130, 500])
def test_a_long_loop_is_thinned_evenly(turns):
    gaps = np.rint(np.diff(_turns(turns)[1]))
    assert gaps.max() - gaps.min() <= 1


def test_the_number_of_calls_is_that_before_thinning():
    assert _turns(130)[0].values["calls"].tolist() == [130.0]


# -- samples that wait


def test_a_step_without_backward_pass_is_left_behind():
    model = _model()
    sampler = Sampler(model, History())
    sampler.start_batch(0)
    assert _step(sampler, model, step=1).step == 1


def test_the_batches_that_a_sample_has_waited_are_counted():
    model = _model()
    sampler = Sampler(model, History())
    for step in (4, 5, 6):
        sampler.start_batch(step)
    waited = sampler.waited
    sampler.drop()
    assert waited == 3


def test_the_next_sample_waits_anew():
    model = _model()
    sampler = Sampler(model, History())
    sampler.start_batch(0)
    sampler.drop()
    sampler.start_batch(1)
    waited = sampler.waited
    sampler.drop()
    assert waited == 1


def test_backward_passes_of_one_step_are_counted():
    model = _model()
    sampler, optimizer = Sampler(model, History()), _descent(model)
    for _ in range(3):
        _backward(sampler, model)
    backwards = sampler.backwards
    _read_and_step(sampler, optimizer)
    sampler.finish({})
    assert backwards == 3


def _wide(sampler, model, step=0):
    """A batch with large outputs whose training_step returns None."""
    sampler.start_batch(step)
    model(torch.full((4, 3), 1e6))


def test_of_a_step_without_backward_pass_nothing_gets_into_the_next_one():
    model = _model()
    sampler = Sampler(model, History())
    _wide(sampler, model)
    sampler.end_batch(needs_backward=True)
    assert _same(_step(sampler, model, step=1), _row(), "output_rms")


def test_the_optimizers_that_stepped_are_told():
    model = _model()
    sampler, optimizer = Sampler(model, History()), _descent(model)
    _backward(sampler, model)
    _read_and_step(sampler, optimizer)
    stepped = sampler.stepped
    sampler.drop()
    assert stepped == (id(optimizer),)


# -- losses that wait for the next row


def test_losses_that_wait_go_on_in_a_resumed_run():
    first, second = Sampler(_model(), History()), Sampler(_model(), History())
    for step, loss, factor in [(3, 1.0, 2), (3, 3.0, 2), (4, 0.1, 1)]:
        first.take_loss(step, torch.tensor(loss, dtype=torch.float64), factor)
    second.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(second.rest()[0], first.rest()[0])
    np.testing.assert_array_equal(first.rest()[0], [])


def test_the_state_of_a_sampler_does_not_empty_it():
    sampler = Sampler(_model(), History())
    sampler.take_loss(0, torch.tensor(3.0), 2)
    sampler.state_dict()
    assert sampler.rest()[0].tolist() == [6.0]


def test_silent_units_go_on_in_a_resumed_run():
    model, shares = _model(), []
    samplers = [Sampler(model, History(), window=2) for _ in range(2)]
    model[0].bias.data.fill_(-100.0)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    shares.append(_step(samplers[0], model, 0, frozen).values["dead_fraction"][1])
    samplers[1].load_state_dict(samplers[0].state_dict())
    shares.append(_step(samplers[1], model, 1, frozen).values["dead_fraction"][1])
    np.testing.assert_array_equal(shares, [math.nan, 1.0])


def test_a_loss_is_multiplied_by_its_factor():
    sampler = Sampler(_model(), History())
    sampler.take_loss(0, torch.tensor(1.5), 4)
    assert sampler.rest()[0].tolist() == [6.0]


def test_the_validation_loss_is_the_mean_of_what_was_summed():
    model = _model()
    sampler = Sampler(model, History())
    _backward(sampler, model)
    row = sampler.finish({}, torch.tensor([6.0, 4.0], dtype=torch.float64))
    assert row.scalars["val_loss"] == 1.5


def test_the_validation_loss_of_the_rest_is_told():
    assert Sampler(_model(), History()).rest(torch.tensor([6.0, 4.0], dtype=torch.float64))[1] == 1.5


def test_without_validation_there_is_no_validation_loss():
    assert math.isnan(Sampler(_model(), History()).rest()[1])


def test_what_the_other_ranks_are_not_here_for_is_taken_alone():
    sampler = Sampler(_model(), History())
    sampler.take_loss(0, torch.tensor(2.0))
    losses, validation = sampler.rest(torch.tensor([3.0, 1.0], dtype=torch.float64), together=False)
    assert (losses.tolist(), validation) == ([2.0], 3.0)


# -- errors


def _nothing_is_left():
    return not (module_hooks._global_forward_hooks or _get_current_function_mode_stack())


def test_a_muted_sampler_leaves_nothing_behind():
    sampler = Sampler(_model(), History())
    sampler.start_batch(0)
    sampler.mute()
    assert _nothing_is_left()


def test_a_muted_sampler_observes_no_more():
    model = _model()
    sampler = Sampler(model, History())
    sampler.mute()
    sampler.start_muted(0)
    assert _nothing_is_left()


def test_a_muted_sampler_keeps_the_schedule():
    sampler = Sampler(_model(), History())
    sampler.mute()
    sampler.start_muted(7)
    sampler.start_muted(7)
    assert (sampler.step, sampler.waited) == (7, 2)


def test_a_failure_that_is_reported_ends_the_sample():
    model = _model()
    sampler = Sampler(model, History())
    _backward(sampler, model)
    sampler.mute()
    sampler.report_failure()
    assert (sampler.is_open, sampler.others_know) == (False, True)


def test_an_error_of_the_probes_ends_the_sample_and_is_raised(monkeypatch):
    def breaks(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("lightning_gradflow.probes.gathering._waits", breaks)
    model = _model()
    sampler = Sampler(model, History())
    _backward(sampler, model)
    with pytest.raises(ZeroDivisionError):
        sampler.finish({})
    assert (sampler.is_open, sampler.others_know) == (False, True)


def test_a_sample_that_is_dropped_leaves_nothing_behind():
    model = _model()
    sampler = Sampler(model, History())
    _backward(sampler, model)
    sampler.drop()
    assert (sampler.is_open, _nothing_is_left()) == (False, True)


def test_of_a_sample_that_is_dropped_nothing_gets_into_the_next_one():
    model = _model()
    sampler = Sampler(model, History())
    _backward(sampler, model)
    sampler.drop()
    assert _same(_step(sampler, model, step=1), _row(), "delta_norm")


def test_a_network_that_is_replaced_while_a_rank_is_muted_is_not_looked_at():
    model = _model()
    history = History()
    sampler = Sampler(model, history)
    sampler.mute()
    model[2] = nn.Sequential(nn.Linear(4, 1))
    sampler.start_muted(0)
    assert history.layers == ("0", "2")
