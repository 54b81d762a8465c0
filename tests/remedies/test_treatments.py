"""What each remedy does to a run."""

import copy
import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.detectors.inputs import inputs_jumped
from lightning_gradflow.findings import FindingKind
from lightning_gradflow.history import Row
from lightning_gradflow.remedies import treatments
from lightning_gradflow.remedies.held import Held
from lightning_gradflow.remedies.patient import Patient
from lightning_gradflow.remedies.plan import REMEDIES
from lightning_gradflow.remedies.reinit import reinitialise
from lightning_gradflow.remedies.training import RehearsalError
from lightning_gradflow.remedies.treatments import _TREATMENTS, treat
from tests.remedies.made_up_run import Run, finding

RATE = finding(FindingKind.UPDATE_RATIO, "learning_rate_too_large")
BREAKS = finding(FindingKind.NONFINITE_GRADIENT, "unknown")


def _patient(run, found=RATE, has_past=False, good_step=-1, held=None):
    return Patient(run.training, found, held or run.held, has_past, good_step)


def test_every_remedy_is_known():
    assert set(_TREATMENTS) == set(REMEDIES)


def test_clipping_tells_the_norm_and_acts_from_the_next_step_on():
    run = Run()
    run.go(2.0)
    done = treat("clip", _patient(run))
    assert (done.layers, done.before) == ((), {"grad_norm_total": 2.0})
    run.net[0].weight.grad = torch.full((4, 4), 1e9)
    run.mitigation.before_step(run.optimizer)
    assert run.net[0].weight.grad.abs().max() < 1e6


def test_layers_before_a_sigmoid_are_drawn_anew_without_a_rehearsal():
    run = Run()
    before = [p.detach().clone() for p in run.net.parameters()]
    done = treat("reinit", _patient(run, finding()))
    assert done.layers == ("0", "2")
    changed = [not torch.equal(p, q) for p, q in zip(run.net.parameters(), before, strict=True)]
    assert changed == [True, True, True, True, False, False]


def test_the_same_seed_draws_the_same_weights_whatever_the_random_state():
    one, other = Run(), Run()
    treat("reinit", _patient(one, finding()))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    treat("reinit", _patient(other, finding()))
    assert torch.equal(one.weights(), other.weights())
    assert torch.equal(torch.get_rng_state(), state)


def _sampled(ratios, rates=(), every=4):
    """A run with these update ratios and learning rates, one a sample."""
    run = Run()
    run.history.layer_axis.merge(["0"])
    for i, ratio in enumerate(ratios):
        scalars = {"lr": rates[i]} if rates else {}
        run.history.append(Row(every * i, {"update_ratio": np.array([ratio])}, scalars))
    return run


@pytest.mark.parametrize(("ratio", "factor"), [(0.1, 0.1), (1.0, 0.01), (20.0, 0.0005)])
def test_steps_that_were_too_large_from_the_start_are_brought_to_the_usual_size(ratio, factor):
    run = _sampled([ratio, 3.0])
    done = treat("rollback", _patient(run))
    assert done.before == {"lr_factor": 1.0, "lr": 1.0}
    assert done.after == {"lr_factor": pytest.approx(factor), "lr": pytest.approx(factor)}
    assert run.held.rate.factor == pytest.approx(factor)


@pytest.mark.parametrize("ratio", [0.019, 0.01, 1e-4])
def test_a_run_whose_first_step_was_not_too_large_does_not_start_once_more(ratio):
    run = _sampled([ratio, 3.0])
    assert treat("rollback", _patient(run)) is None
    assert (run.held.rate.factor, run.held.rollbacks, run.held.slowest) == (1.0, 0, 1.0)


@pytest.mark.parametrize(
    ("found", "every", "factor"),
    [
        (RATE, 49, 0.1),
        (RATE, 48, None),
        (BREAKS, 49, None),
        (replace(RATE, kind=FindingKind.NONFINITE_GRADIENT), 49, None),
        (replace(RATE, kind=FindingKind.EXPLODING_GRADIENT), 49, None),
    ],
    ids=["late", "soon", "other", "a batch", "a spike"],
)
def test_steps_that_became_too_large_after_a_trial_would_be_over_are_made_ten_times_as_small(found, every, factor):
    run = _sampled([0.001, 3.0], every=every)
    done = treat("rollback", _patient(run, found))
    assert (done is None) == (factor is None)
    assert run.held.rate.factor == (factor or 1.0)


def test_the_next_way_back_is_slower_than_the_slowest_that_was_tried():
    run = _sampled([1.0])
    treat("rollback", _patient(run))
    run.held.rate.factor = 1.0  # it did not help
    assert treat("rollback", _patient(run)).after["lr_factor"] == pytest.approx(0.001)
    assert run.held.slowest == pytest.approx(0.001)


def test_a_run_that_went_well_at_this_rate_goes_on_with_it_the_first_time_and_slower_the_second():
    run = _sampled([0.001] * 6, rates=[0.1] * 6)
    factors = []
    for _ in range(2):
        treat("rollback", _patient(run, BREAKS, has_past=True, good_step=12))
        factors.append(run.held.rate.factor)
    assert factors == [1.0, pytest.approx(0.1)]


def test_a_rate_that_has_risen_since_the_run_went_well_is_brought_back():
    run = _sampled([0.001] * 6, rates=[0.1] * 4 + [2.0] * 2)
    done = treat("rollback", _patient(run, BREAKS, has_past=True, good_step=12))
    assert (done.before, done.after) == ({"lr": 1.0}, {"max_lr": 0.1, "lr": 0.1})
    assert (run.held.rate.factor, run.held.rate.cap) == (1.0, 0.1)


def test_a_schedule_that_rose_from_the_start_is_held_at_the_rate_whose_steps_had_the_usual_size():
    run = _sampled([0.02, 0.4, 9.0], rates=[0.02, 0.4, 1.0])  # the optimizer has 1.0 now
    done = treat("rollback", _patient(run))
    assert (run.held.rate.factor, run.held.rate.cap) == (1.0, pytest.approx(0.01))
    assert done.after == {"max_lr": pytest.approx(0.01), "lr": pytest.approx(0.01)}


def test_a_schedule_that_fell_keeps_its_shape():
    run = _sampled([0.5, 0.4], rates=[2.0, 1.0])
    treat("rollback", _patient(run))
    assert (run.held.rate.factor, run.held.rate.cap) == (pytest.approx(0.02), math.inf)


def test_a_schedule_that_lifts_the_rate_above_what_the_optimizer_was_given_is_held_and_left_alone_below():
    run = _paced(_sampled([0.5, 0.4], rates=[1.0, 1.0]), best=1e-2)
    run.optimizer.param_groups[0]["initial_lr"] = 0.01
    treat("rollback", _patient(run))
    assert (run.held.rate.factor, run.held.rate.cap) == (1.0, pytest.approx(1e-2 / math.sqrt(10)))
    run.training = replace(run.training, pace=None)
    treat("rollback", _patient(run))  # once more: slower than what was held, not than what the schedule asks for
    assert run.held.rate.factor == pytest.approx(1e-3 / math.sqrt(10))


def test_a_schedule_that_came_down_from_what_the_optimizer_was_given_keeps_its_shape():
    run = _paced(_sampled([0.5, 0.4], rates=[2.0, 1.0]), best=1e-2)
    run.optimizer.param_groups[0]["initial_lr"] = 2.0
    treat("rollback", _patient(run))
    assert (run.held.rate.factor, run.held.rate.cap) == (pytest.approx(1e-2 / math.sqrt(10)), math.inf)


def test_of_several_groups_no_rate_is_named_and_none_is_capped():
    run = _sampled([0.02, 0.4, 9.0], rates=[0.02, 0.4, 1.0])
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.1})
    done = treat("rollback", _patient(run))
    assert done is None or set(done.after) == {"lr_factor"}
    assert run.held.rate.cap == math.inf


@pytest.mark.parametrize("groups", [1, 2])
def test_a_start_at_the_same_rate_as_before_is_no_cure(groups):
    run = _sampled([0.001], rates=[1e-3])
    run.optimizer.param_groups[0]["lr"] = 1e-3
    for _ in range(groups - 1):
        run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 1e-3})
    assert treat("rollback", _patient(run, BREAKS)) is None
    assert run.held.rollbacks == 0


def _paced(run, best):
    """The same run, in which a trial of learning rates does best with one factor."""

    def pace(factor, steps, scaling=None):
        return np.linspace(2.0, 1.0 + abs(math.log10(factor / best)) / 10, steps)

    run.training = replace(run.training, pace=pace)
    return run


def test_a_rate_that_was_tried_out_says_more_than_the_size_of_the_first_step():
    run = _paced(_sampled([0.1, 3.0]), best=1e-3)
    treat("rollback", _patient(run))
    assert run.held.rate.factor == pytest.approx(1e-3 / math.sqrt(10))


@pytest.mark.parametrize(
    ("other", "factor", "cap"), [(0.11, 1e-3 / math.sqrt(10), math.inf), (0.1, 1.0, 1e-3 / math.sqrt(10))]
)
@pytest.mark.parametrize("remedy", ["rollback", "reinit"])
def test_of_groups_whose_rates_are_far_apart_the_largest_is_capped(other, factor, cap, remedy):
    run = _paced(_sampled([0.1, 3.0]), best=1e-3)  # its rate is 1.0
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": other})
    found = RATE if remedy == "rollback" else finding()
    done = treat(remedy, replace(_patient(run, found), allow=frozenset(REMEDIES)))
    assert (run.held.rate.factor, run.held.rate.cap) == (pytest.approx(factor), pytest.approx(cap))
    assert done.after.get("max_lr", math.inf) == pytest.approx(cap)


def test_the_next_way_back_lowers_the_same_groups_again():
    run = _paced(_sampled([0.1, 3.0]), best=1e-2)
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 1e-4})
    caps = []
    for _ in range(3):
        treat("rollback", _patient(run))
        caps.append(run.held.rate.cap)
    first = 1e-2 / math.sqrt(10)
    assert caps == pytest.approx([first, first / 10, first / 100])
    assert run.held.rate.factor == 1.0


def _recurrent(clipped, slow=1.2, adam=False, module=nn.LSTM):
    """A run with a recurrence and far too large steps, and what trials of it reach at a smaller rate and clipped."""
    run = Run(model=nn.Sequential(nn.Linear(4, 4), module(4, 4)))
    if adam:
        run.training = replace(run.training, optimizers=[torch.optim.Adam(run.net.parameters(), lr=1.0)])
    run.history.layer_axis.merge(["0", "1"])
    run.history.append(Row(0, {"update_ratio": np.array([2.0, 2.0])}))

    def pace(factor, steps, scaling=None, max_ratio=None):
        if max_ratio is not None:
            assert (factor, max_ratio) == (1.0, 0.03)
            return [clipped] * steps
        return np.linspace(2.0, slow, steps) if factor < 1 else [2.0, math.nan]

    run.training = replace(run.training, pace=pace)
    return run


def test_a_gated_recurrence_is_clipped_at_its_rate_where_that_does_as_well_and_slowed_the_next_time():
    run = _recurrent(clipped=1.2)
    patient = replace(_patient(run), allow=REMEDIES)
    done = treat("rollback", patient)
    assert (run.held.rate.factor, run.held.rollbacks) == (1.0, 1)
    assert done.after == {"max_update_ratio": 0.03}
    assert "clipped" in done.note
    for parameter in run.net.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.held.before_step(run.optimizer, None)
    size, step = (
        nn.utils.get_total_norm(x) for x in zip(*((p.data, p.grad) for p in run.net.parameters()), strict=True)
    )
    assert step * 10 <= 0.03 * math.hypot(size, 1.0) * 1.001  # a momentum of 0.9 makes ten of a step
    treat("rollback", patient)
    assert run.held.rate.factor < 1


@pytest.mark.parametrize(
    "run",
    [
        lambda: _recurrent(clipped=1.5),
        lambda: _recurrent(clipped=math.nan),
        lambda: _recurrent(clipped=1.2, adam=True),
        lambda: _recurrent(clipped=1.2, module=nn.RNN),
    ],
    ids=["slower is better", "it diverges", "steps are even", "no gates"],
)
def test_any_other_is_slowed(run):
    run = run()
    held = Held(run.training)
    done = treat("rollback", replace(_patient(run, held=held), allow=REMEDIES))
    assert held.rate.factor < 1
    assert held.clipper is None
    assert "max_update_ratio" not in done.after


def test_a_gated_recurrence_is_clipped_where_the_smaller_rate_diverges():
    run = _recurrent(clipped=1.2, slow=math.nan)
    assert treat("rollback", replace(_patient(run), allow=REMEDIES)).after == {"max_update_ratio": 0.03}


def test_a_run_whose_schedule_starts_at_a_rate_of_zero_is_slowed_as_any_other():
    run = _sampled([2.0])
    run.optimizer.param_groups[0]["lr"] = 0.0
    assert treat("rollback", _patient(run)) is not None
    assert run.held.rate.factor < 1


def test_without_leave_to_clip_a_gated_recurrence_is_slowed():
    run = _recurrent(clipped=1.2)
    treat("rollback", replace(_patient(run), allow=("rollback",)))
    assert run.held.rate.factor < 1


def test_under_a_schedule_that_rises_what_was_tried_out_is_a_limit():
    run = _paced(_sampled([0.1, 3.0], rates=[0.1, 1.0]), best=1e-3)
    treat("rollback", _patient(run))
    assert (run.held.rate.factor, run.held.rate.cap) == (1.0, pytest.approx(1e-3 / math.sqrt(10)))


def test_where_the_present_rate_does_best_the_size_of_the_first_step_decides():
    run = _paced(_sampled([0.1, 3.0]), best=1.0)
    treat("rollback", _patient(run))
    assert run.held.rate.factor == pytest.approx(0.1)


def test_where_no_rate_gains_anything_the_size_of_the_first_step_decides():
    run = _sampled([0.1, 3.0])
    run.training = replace(run.training, pace=lambda factor, steps, scaling=None: [1.0] * steps)
    treat("rollback", _patient(run))
    assert run.held.rate.factor == pytest.approx(0.1)


def test_where_no_copy_can_be_trained_the_size_of_the_first_step_decides():
    def fails(factor, steps, scaling=None):
        raise RehearsalError("no copy")

    run = _sampled([0.1, 3.0])
    run.training = replace(run.training, pace=fails)
    treat("rollback", _patient(run))
    assert run.held.rate.factor == pytest.approx(0.1)


def test_a_run_that_went_well_is_slowed_to_what_was_tried_out_where_its_rate_is_far_too_large():
    run = _paced(_sampled([0.001] * 6, rates=[1.0] * 6), best=1e-2)
    treat("rollback", _patient(run, has_past=True, good_step=12))
    assert (run.held.rate.factor, run.held.rate.cap) == (pytest.approx(1e-2 / math.sqrt(10)), math.inf)


@pytest.mark.parametrize("best", [1.0, 10**-0.5])
def test_a_run_that_went_well_at_about_the_rate_that_does_best_is_hardly_slowed(best):
    run = _paced(_sampled([0.001] * 6, rates=[1.0] * 6), best=best)
    treat("rollback", _patient(run, has_past=True, good_step=12))
    assert run.held.rate.factor == 0.5


def test_a_schedule_that_has_risen_too_far_is_held_at_what_was_tried_out():
    run = _paced(_sampled([0.001] * 6, rates=[0.1] * 4 + [1.0] * 2), best=1e-2)
    treat("rollback", _patient(run, has_past=True, good_step=12))
    assert (run.held.rate.factor, run.held.rate.cap) == (1.0, pytest.approx(1e-2 / math.sqrt(10)))


def test_the_second_time_nothing_is_tried_out_again():
    run = _paced(_sampled([1.0]), best=1e-2)
    treat("rollback", _patient(run))
    run.training = replace(run.training, pace=None)
    first = run.held.rate.factor
    treat("rollback", _patient(run))
    assert run.held.rate.factor == pytest.approx(first / 10)


def test_where_no_step_was_measured_the_rate_is_lowered_all_the_same():
    run = Run()
    run.history.append(Row(0))
    treat("rollback", _patient(run))
    assert 0 < run.held.rate.factor < 1


def test_the_rate_has_an_end_downwards():
    run = _sampled([1e3])
    for _ in range(12):
        treat("rollback", _patient(run))
    assert run.held.rate.factor == 1e-6


def test_a_rate_that_cannot_be_lowered_is_no_way_back():
    run = _sampled([1.0])
    run.training = type(run.training)(run.net, [torch.optim.Rprop(run.net.parameters())], run.history)
    assert treat("rollback", _patient(run, held=Held(run.training))) is None


def test_inputs_are_not_scaled_under_weights_that_have_learnt_their_scale():
    assert treat("scale_inputs", _patient(Run(), has_past=True)) is None


@pytest.mark.parametrize("remedy", ["recycle", "scale_inputs"])
def test_what_needs_a_rehearsal_does_nothing_without_one(remedy):
    run = Run()
    before = run.weights()
    assert treat(remedy, _patient(run, finding(FindingKind.DEAD_UNITS))) is None
    assert torch.equal(run.weights(), before)


@contextmanager
def _cannot_be_copied():
    raise RehearsalError("the model can't be copied")
    yield


@pytest.mark.parametrize("remedy", ["recycle", "scale_inputs"])
def test_where_the_rehearsal_fails_what_needs_one_does_nothing(remedy):
    run = Run(rehearse=_cannot_be_copied)
    before = run.weights()
    assert treat(remedy, _patient(run, finding(FindingKind.DEAD_UNITS))) is None
    assert torch.equal(run.weights(), before)


def test_where_the_rehearsal_fails_layers_are_drawn_by_the_book():
    by_the_book, run = Run(), Run(rehearse=_cannot_be_copied)
    treat("reinit", _patient(by_the_book, finding()))
    assert treat("reinit", _patient(run, finding())).layers == ("0", "2")
    assert torch.equal(run.weights(), by_the_book.weights())


def test_scaled_inputs_are_scaled_and_the_scale_is_held():
    run = Run(rehearse=None)
    x = 1000 * torch.randn(32, 4, generator=torch.Generator().manual_seed(0))

    @contextmanager
    def rehearse():
        yield run.net, lambda: run.net(x)

    run.training = type(run.training)(run.net, [run.optimizer], run.history, rehearse)
    usual = nn.Sequential(*Run().net)(x / x.std(0)).detach()
    done = treat("scale_inputs", _patient(run, finding(FindingKind.DEAD_UNITS, "unscaled_inputs")))
    assert done.layers == ("0",)
    assert run.held.scaling.layers == ("0",)
    torch.testing.assert_close(run.net(x), usual, atol=0.05, rtol=0)


# -- two faults at once


def _allowed(run, found, *allow):
    return replace(_patient(run, found), allow=allow)


@pytest.mark.parametrize(("best", "factor"), [(1e-1, 10**-1.5), (1e-2, 10**-2.5), (10**-0.5, 1.0), (1.0, 1.0)])
def test_a_rate_that_is_far_too_large_for_the_new_weights_is_lowered_with_them(best, factor):
    run = _paced(_sampled([0.1]), best)
    done = treat("reinit", _allowed(run, finding(), "rollback"))
    assert run.held.rate.factor == pytest.approx(factor)
    assert ("lr_factor" in done.after) == (factor < 1)
    assert done.after.get("lr_factor", 1.0) == run.held.rate.factor


def test_for_new_weights_a_schedule_that_rises_is_held_at_what_was_tried_out():
    run = _paced(_sampled([0.1, 0.1], rates=[0.1, 1.0]), best=1e-2)
    treat("reinit", _allowed(run, finding(), "rollback"))
    assert (run.held.rate.factor, run.held.rate.cap) == (1.0, pytest.approx(1e-2 / math.sqrt(10)))


def test_without_leave_to_lower_the_rate_new_weights_keep_it():
    run = _paced(_sampled([0.1]), best=1e-3)
    assert treat("reinit", _allowed(run, finding(), "clip")) is not None
    assert (run.held.rate.factor, run.held.rate.cap) == (1.0, math.inf)


def test_where_there_was_nothing_to_draw_the_rate_is_not_tried_out():
    run = _paced(_sampled([0.1]), best=1e-3)
    nothing = replace(finding(), layers=(), kind=FindingKind.SATURATED_ACTIVATION)
    assert treat("reinit", _allowed(run, nothing, "rollback")) is None
    assert run.held.rate.factor == 1.0


UNSCALED = finding(FindingKind.DEAD_UNITS, "unscaled_inputs")


def _raw(hurt, allow=REMEDIES, seed=0, sizes=(), remedy="scale_inputs"):
    """What is done to a net on inputs around 500, after `hurt` did something to its weights."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight)
    with torch.no_grad():
        hurt(net)
    x = 500.0 + 100.0 * torch.randn(128, 8)

    @contextmanager
    def rehearse():
        twin = copy.deepcopy(net)
        yield twin, lambda: twin(x)

    run = Run(model=net, rehearse=rehearse)
    run.history.add_features(8)
    for step, size in enumerate(sizes):
        run.history.append(Row(step, {"input_rms": np.full(8, size)}))
    before = [p.detach().clone() for p in net.parameters()]
    done = treat(remedy, replace(_patient(run, UNSCALED), allow=allow))
    return run, net, x, before, done


def _usual(net):
    pass


def _dead(net):
    for layer in net[::2]:
        layer.bias.fill_(-20.0)


def _large(net):
    for layer in net[::2]:
        layer.weight.mul_(20.0)


def test_what_is_well_on_scaled_inputs_is_not_drawn_anew():
    run, net, _, before, done = _raw(_usual)
    assert (done.layers, done.note) == (("0",), "")
    assert all(torch.equal(p, q) for p, q in zip(list(net.parameters())[2:], before[2:], strict=True))
    assert run.held.clipper is None


@pytest.mark.parametrize("hurt", [_dead, _large])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_far_off_on_scaled_inputs_too_is_drawn_with_them(hurt, seed):
    run, net, x, _, done = _raw(hurt, seed=seed)
    assert done.layers == ("0",)
    assert done.note.startswith("drawn anew as well: 0, 2")
    with torch.no_grad():
        first = net[0](x)
        hidden = net[:4](x)
        output = net(x)
    assert first.std() == pytest.approx(1.0, rel=0.3)
    assert (hidden > 0).float().mean() > 0.2
    assert output.std() < 5
    assert run.held.clipper is not None


def test_without_leave_to_draw_the_inputs_are_scaled_alone():
    _, net, _, before, done = _raw(_dead, allow=("scale_inputs", "clip"))
    assert (done.layers, done.note) == (("0",), "")
    assert all(torch.equal(p, q) for p, q in zip(list(net.parameters())[2:], before[2:], strict=True))


@pytest.mark.parametrize("remedy", ["scale_inputs", "reinit"])
@pytest.mark.parametrize(("sizes", "acts"), [([500.0, 500.0], True), ([1.0, 1.0], True), ([1.0, 1.0, 500.0], False)])
def test_a_batch_that_stands_out_is_no_measure_of_the_inputs(remedy, sizes, acts):
    run, net, _, before, done = _raw(_large, sizes=sizes, remedy=remedy)
    assert inputs_jumped(run.history) == (not acts)
    assert (done is not None) == acts
    assert acts or all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


# -- weights that are too small, on inputs that are too large


def _columns(std, scale, allow=REMEDIES, has_past=False):
    """What `reinit` does to a net whose weights have this deviation, on columns of these sizes."""
    torch.manual_seed(0)
    layers = [m for i in range(4) for m in (nn.Linear(8 if i == 0 else 32, 32), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(32, 1))
    for layer in net[::2]:
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    x = torch.randn(256, 8) * torch.tensor(scale)

    @contextmanager
    def rehearse():
        twin = copy.deepcopy(net)
        yield twin, lambda: twin(x)

    run = Run(model=net, rehearse=rehearse)
    done = treat("reinit", replace(_patient(run, finding(cause="weight_scale"), has_past), allow=allow))
    return run, net, x, done


_MIXED = [1e-2, 1.0, 30.0, 1e-1, 5.0, 300.0, 1.0, 10.0]


def _shares(net, x):
    """How much of the first layer's output each column makes, over the mean of all."""
    made = (net[0].weight.detach() * x.std(0)).square().sum(0).sqrt()
    return made / made.mean()


def test_first_layers_that_are_drawn_anew_are_drawn_for_standardised_inputs():
    run, net, x, done = _columns(0.001, _MIXED)
    assert done.layers[0] == "0"
    assert done.note == "the scale of the inputs folded into 0"
    assert run.held.scaling.layers == ("0",)
    assert _shares(net, x).min() > 0.3
    first = net[0](x).detach()
    assert 0.5 < float(first.std()) < 2


@pytest.mark.parametrize(
    ("scale", "allow"), [([1.0] * 8, REMEDIES), (_MIXED, ("reinit", "clip", "rollback"))], ids=["usual", "forbidden"]
)
def test_inputs_of_a_usual_size_and_without_leave_stay_as_they_are(scale, allow):
    run, _, _, done = _columns(0.001, scale, allow)
    assert (done.layers[0], done.note) == ("0", "")
    assert run.held.scaling.layers == ()


def test_the_largest_column_drowns_the_others_where_inputs_may_not_be_scaled():
    _, net, x, _ = _columns(0.001, _MIXED, ("reinit",))
    assert _shares(net, x).min() < 0.001


def test_a_first_layer_that_stays_is_made_for_the_inputs_as_they_are(monkeypatch):
    """What was tried on scaled inputs leaves nothing behind."""

    def later_ones_alone(training, found, **limits):
        done = reinitialise(training, found, **limits)
        return None if done is None else replace(done, layers=done.layers[1:])

    monkeypatch.setattr(treatments, "reinitialise", later_ones_alone)
    run, _, _, done = _columns(0.001, _MIXED)
    assert (done.layers[0], done.note) == ("2", "")
    assert run.held.scaling.layers == ()


def test_under_weights_that_have_learnt_their_inputs_these_stay_as_they_are():
    run, _, _, done = _columns(0.001, _MIXED, has_past=True)
    assert (done.layers[0], done.note) == ("0", "")
    assert run.held.scaling.layers == ()


# -- steps that were too large for weights that grow the gradient


def _deep(std, decades, *, rehearses):
    """A deep network whose weights are of a size, and a gradient that grew with depth in the first sample."""
    torch.manual_seed(0)
    layers = [part for _ in range(12) for part in (nn.Linear(16, 16), nn.SELU())]
    net = nn.Sequential(*layers, nn.Linear(16, 2))
    for part in net[::2]:
        nn.init.normal_(part.weight, 0, std / 4)
    x = torch.randn(64, 16)

    @contextmanager
    def rehearse():
        twin = copy.deepcopy(net)
        yield twin, lambda: twin(x)

    run = Run(model=net, rehearse=rehearse if rehearses else None)
    if not math.isnan(decades):
        run.go(2.0, decades=-decades)
    return treat("reinit", _patient(run, finding(FindingKind.NONFINITE_GRADIENT, "learning_rate_too_large")))


@pytest.mark.parametrize(
    ("std", "decades", "rehearses", "drawn"),
    [
        (1.6, 1.1, True, True),
        (1.6, 0.9, True, False),  # and none of the layers is far off
        (1.6, -1.1, True, False),
        (1.6, math.nan, True, False),
        (1.6, 1.1, False, False),
        (1.0, 1.1, True, False),  # all of them are well
    ],
)
def test_weights_that_grow_the_gradient_together_are_drawn_where_steps_were_too_large_for_them(
    std, decades, rehearses, drawn
):
    done = _deep(std, decades, rehearses=rehearses)
    assert (done is not None) == drawn
