"""A limit that follows the run, against a loop in plain Python, in real runs and on two ranks."""

import copy
import math

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.history import History, Row
from lightning_gradflow.remedies.clip import Clipper
from lightning_gradflow.remedies.training import Training
from tests.benchmarks.zoo import HEALTHY, SICK
from tests.distributed.launcher import launch
from tests.distributed.program import HAS_FSDP2


def _linear(weight=1.0, size=1):
    net = nn.Linear(size, 1, bias=False)
    nn.init.constant_(net.weight, weight)
    return net


def _past(*norms, ratio=1e-3, layer="(root)"):
    """A history of one layer whose steps changed its weights by `ratio`."""
    history = History()
    history.layer_axis.merge([layer])
    for step, norm in enumerate(norms):
        values = {"grad_norm": norm, "update_norm": ratio * 5.0, "weight_norm": 5.0}
        history.append(Row(step, {name: np.array([value]) for name, value in values.items()}))
    return history


def _adam(net, history=None, **kwargs):
    optimizer = torch.optim.Adam(net.parameters())
    return Clipper(Training(net, [optimizer], history or History()), **kwargs), optimizer


def _feed(clipper, optimizer, parameter, *norms, scale=None):
    """What is left of gradients of these norms."""
    left = []
    for norm in norms:
        parameter.grad = torch.full_like(parameter, norm)
        clipper.before_step(optimizer, scale)
        left.append(parameter.grad.flatten()[0].item())
    return left


def _naive(norms, window=32, max_factor=2.0, warm_up=25):
    """The same in plain Python, without a past or a ceiling."""
    kept, left = [], []
    for norm in norms:
        known = sorted(kept[-window:])
        limit = max_factor * known[(len(known) - 1) // 2] if len(known) >= warm_up else math.inf
        left.append(min(norm, limit))
        if norm > 0:
            kept.append(left[-1])
    return left


def test_it_clips_as_a_loop_in_plain_python_does():
    norms = torch.randn(150, generator=torch.Generator().manual_seed(0)).double().mul(1.5).exp().tolist()
    norms[40] = norms[90] = 0.0
    net = _linear().double()
    clipper, adam = _adam(net)
    assert _feed(clipper, adam, net.weight, *norms) == pytest.approx(_naive(norms), rel=1e-12)
    assert _naive(norms) != norms


def test_with_a_past_it_clips_from_its_first_step():
    net = _linear()
    clipper, adam = _adam(net, _past(2.0, 2.0, 3.0, 4.0, 4.0))
    assert _feed(clipper, adam, net.weight, 1e9) == [6.0]


def test_fewer_than_five_rows_are_no_past():
    net = _linear()
    clipper, adam = _adam(net, _past(2.0, 2.0, 3.0, 4.0))
    assert _feed(clipper, adam, net.weight, 1e9) == [1e9]


def test_rows_that_are_not_finite_are_no_past():
    net = _linear()
    clipper, adam = _adam(net, _past(3.0, 3.0, 3.0, 3.0, 3.0, math.inf, math.inf))
    assert _feed(clipper, adam, net.weight, 1e9) == [6.0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_becomes_zero_and_leaves_no_trace_in_the_limit(bad):
    net = _linear(size=2)
    clipper, adam = _adam(net, _past(*[3.0] * 5))
    _feed(clipper, adam, net.weight, 1.0)
    norms = clipper.state_dict()["optimizers"][0]["norms"].nan_to_num(-1)
    net.weight.grad = torch.tensor([[bad, 1.0]])
    clipper.before_step(adam)
    assert net.weight.grad.tolist() == [[0.0, 0.0]]
    assert torch.equal(clipper.state_dict()["optimizers"][0]["norms"].nan_to_num(-1), norms)
    assert _feed(clipper, adam, net.weight, 1e9)[0] == pytest.approx(6.0 / math.sqrt(2))


def test_under_a_scaler_a_gradient_that_is_not_finite_stays_for_it_to_see_and_is_not_counted():
    net = _linear()
    clipper, adam = _adam(net, _past(*[3.0] * 5))
    assert _feed(clipper, adam, net.weight, math.inf, scale=1024.0) == [math.inf]
    assert math.isnan(clipper.clipped_share())


def test_a_gradient_that_carries_a_loss_scale_is_measured_without_it():
    net = _linear()
    clipper, adam = _adam(net, _past(*[3.0] * 5))
    assert _feed(clipper, adam, net.weight, 5.0 * 1024, 9.0 * 1024, scale=torch.tensor(1024.0)) == [5 * 1024, 6 * 1024]


def test_gradients_up_to_1e19_are_clipped_and_beyond_are_dropped():
    net = _linear(size=2)
    clipper, adam = _adam(net, _past(*[3.0] * 5))
    assert _feed(clipper, adam, net.weight, 1e19, 1e30) == pytest.approx([6 / math.sqrt(2), 0.0])


def test_a_burst_of_15_steps_does_not_move_the_limit():
    net = _linear()
    clipper, adam = _adam(net)
    assert _feed(clipper, adam, net.weight, *[1.0] * 32, *[1e6] * 15)[32:] == [2.0] * 15


def test_an_explosion_lifts_the_limit_by_two_in_half_a_window_and_no_faster():
    net = _linear()
    clipper, adam = _adam(net)
    left = _feed(clipper, adam, net.weight, *[1.0] * 32, *[1e18] * 64)[32:]
    assert all(norm <= 2.0 ** (1 + step // 16) for step, norm in enumerate(left))
    assert left[-1] > 8.0


def test_a_pause_without_gradients_does_not_set_the_limit_to_zero():
    net = _linear()
    clipper, adam = _adam(net)
    assert _feed(clipper, adam, net.weight, *[1.0] * 32, *[0.0] * 100, 1.5)[-1] == 1.5


def _sgd(weight, history=None, **kwargs):
    net = _linear(weight)
    optimizer = torch.optim.SGD(net.parameters(), **kwargs)
    return net, optimizer, Clipper(Training(net, [optimizer], history or History()))


def test_without_a_past_a_step_of_sgd_changes_a_hundredth_of_the_weights():
    net, sgd, clipper = _sgd(2.0, lr=0.3)
    _feed(clipper, sgd, net.weight, 1e20)
    sgd.step()
    assert net.weight.item() == pytest.approx(2.0 - 0.02)


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.0}])
def test_all_the_steps_that_momentum_makes_of_a_gradient_change_a_hundredth_together(options):
    net, sgd, clipper = _sgd(2.0, lr=0.3, **options)
    for _ in range(300):  # of a steady gradient, to reach the full speed
        before = net.weight.detach().clone()
        _feed(clipper, sgd, net.weight, 1e20)
        sgd.step()
    lost = 1 - net.weight.item() / before.item()
    assert lost == pytest.approx(0.01, rel=0.15)  # the speed is that of weights some steps ago


def test_a_learning_rate_in_a_tensor_gives_the_same_ceiling():
    limits = []
    for lr in (0.3, torch.tensor(0.3)):
        net, sgd, clipper = _sgd(2.0, lr=lr)
        _feed(clipper, sgd, net.weight, 1e20)
        limits.append(clipper.limits()[0])
    assert limits[1] == pytest.approx(limits[0])


def test_weights_that_are_all_zero_set_no_ceiling():
    net, sgd, clipper = _sgd(0.0, lr=0.3)
    assert _feed(clipper, sgd, net.weight, 7.0) == [7.0]


def test_a_learning_rate_of_zero_sets_no_ceiling():
    net, sgd, clipper = _sgd(2.0, lr=0.0)
    assert _feed(clipper, sgd, net.weight, 7.0) == [7.0]


def test_for_sgd_only_rows_whose_step_was_in_proportion_are_a_past():
    for ratio, expected in ((0.05, 6e3), (0.5, 0.01 * 2.0 / 0.3)):
        net, sgd, clipper = _sgd(2.0, _past(*[3e3] * 5, ratio=ratio), lr=0.3)
        assert _feed(clipper, sgd, net.weight, 1e9)[0] == pytest.approx(expected)


def test_each_optimizer_has_its_own_usual_norm():
    net = nn.ModuleDict({"small": _linear(), "large": _linear()})
    optimizers = [torch.optim.Adam(part.parameters()) for part in net.values()]
    history = History()
    history.layer_axis.merge(["small", "large"])
    for step in range(5):
        history.append(Row(step, {"grad_norm": np.array([1.0, 100.0])}))
    clipper = Clipper(Training(net, optimizers, history))
    left = [_feed(clipper, o, part.weight, 1e9)[0] for o, part in zip(optimizers, net.values(), strict=True)]
    assert left == [2.0, 200.0]
    assert clipper.limits() == (2.0, 200.0)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_the_scale_of_the_loss_changes_nothing_but_the_unit(factor, kind):
    norms = torch.randn(80, generator=torch.Generator().manual_seed(1)).double().mul(2).exp()
    left = []
    for unit in (1.0, factor):
        net = _linear(3.0).double()
        optimizer = (
            torch.optim.Adam(net.parameters()) if kind == "adam" else torch.optim.SGD(net.parameters(), 1 / unit)
        )
        clipper = Clipper(Training(net, [optimizer], _past(*[unit] * 5)))
        left.append(np.array(_feed(clipper, optimizer, net.weight, *(norms * unit).tolist())) / unit)
    assert left[0] == pytest.approx(left[1], rel=1e-9)
    assert (left[0] < norms.numpy()).any()


def test_a_sparse_gradient_counts_a_row_that_was_used_twice_as_one():
    table = nn.Embedding(4, 1, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters())
    clipper = Clipper(Training(table, [optimizer], _past(*[3.0] * 5)))
    (6 * table(torch.tensor([1, 1, 2])).sum()).backward()  # 12 and 6
    clipper.before_step(optimizer)
    whole = table.weight.grad.to_dense().flatten()
    assert whole == pytest.approx(torch.tensor([0.0, 12.0, 6.0, 0.0]) * 6 / math.hypot(12, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_gradients_of_other_types_are_clipped_in_place(dtype):
    net = nn.ParameterDict({"weight": torch.ones(4, dtype=dtype)})
    clipper, adam = _adam(net, _past(*[3.0] * 5))
    net.weight.grad = gradient = torch.full_like(net.weight, 30 + 40j if dtype.is_complex else 50)
    clipper.before_step(adam)
    assert net.weight.grad is gradient
    assert gradient.abs().tolist() == pytest.approx([3.0] * 4, rel=1e-2)


def test_a_gradient_below_the_limit_stays_as_it_is_to_the_bit():
    net = _linear(size=50)
    clipper, adam = _adam(net, _past(*[1e3] * 5))
    net.weight.grad = torch.randn(1, 50)
    before = net.weight.grad.clone()
    clipper.before_step(adam)
    assert torch.equal(net.weight.grad, before)


def test_a_step_without_gradients_and_a_strange_optimizer_are_passed_over():
    net = _linear()
    clipper, adam = _adam(net, _past(*[3.0] * 5))
    clipper.before_step(adam)
    assert net.weight.grad is None
    stranger = torch.optim.Adam(net.parameters())
    assert _feed(clipper, stranger, net.weight, 1e9) == [1e9]
    assert math.isnan(clipper.clipped_share())


def test_once_released_it_clips_no_more():
    net = _linear()
    clipper, adam = _adam(net, _past(*[3.0] * 5))
    clipper.release()
    clipper.release()
    assert _feed(clipper, adam, net.weight, 1e9) == [1e9]


def test_a_state_that_was_read_after_the_release_goes_on_clipping():
    net = _linear()
    clipper, _ = _adam(net, _past(*[3.0] * 5))
    clipper.release()
    other, other_adam = _adam(net)
    other.load_state_dict(clipper.state_dict())
    assert _feed(other, other_adam, net.weight, 1e9) == [6.0]


def test_after_a_restart_new_weights_say_what_is_usual():
    net = _linear()
    clipper, adam = _adam(net, _past(*[1e-12] * 5))
    assert _feed(clipper, adam, net.weight, 1.0)[0] == pytest.approx(2e-12)
    clipper.restart()
    assert _feed(clipper, adam, net.weight, *[1.0] * 25, 9.0) == [1.0] * 25 + [2.0]


def test_the_share_is_that_of_the_last_hundred_steps():
    net = _linear()
    clipper, adam = _adam(net, _past(*[1.0] * 5))
    _feed(clipper, adam, net.weight, *[1.0, 1.0, 1.0, 9.0] * 5)
    assert clipper.clipped_share() == 0.25
    _feed(clipper, adam, net.weight, *[1.0] * 100)
    assert clipper.clipped_share() == 0.0


def test_more_than_half_clipped_names_the_learning_rate_that_makes_the_same_steps():
    net, sgd, clipper = _sgd(1.0, lr=1.0)
    _feed(clipper, sgd, net.weight, *[0.5] * 49)
    assert clipper.advice() == ""
    _feed(clipper, sgd, net.weight, 0.5)
    assert clipper.clipped_share() == 1.0
    assert clipper.advice() == (
        "100% of the last 50 steps were clipped, which is a smaller learning rate in disguise: lower the learning rate "
        "to about 0.02 times what it is, and clip outliers only."
    )


def test_outliers_alone_are_no_reason_for_advice():
    net = _linear()
    clipper, adam = _adam(net, _past(*[1.0] * 5))
    _feed(clipper, adam, net.weight, *[1.0, 1.0, 9.0] * 33)
    assert clipper.advice() == ""


def test_a_resumed_clipper_clips_as_one_that_went_on(tmp_path):
    norms = torch.randn(120, generator=torch.Generator().manual_seed(2)).mul(1.5).exp().tolist()
    net, sgd, clipper = _sgd(2.0, _past(*[1.0] * 6), lr=0.01)
    _feed(clipper, sgd, net.weight, *norms[:60], math.nan)
    torch.save(clipper.state_dict(), tmp_path / "state")
    other_net, other_sgd, other = _sgd(2.0, lr=0.01)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert other.clipped_share() == clipper.clipped_share()
    first, second = [], []
    for norm in norms[60:]:
        first += [*_feed(clipper, sgd, net.weight, norm), *clipper.limits()]
        second += [*_feed(other, other_sgd, other_net.weight, norm), *other.limits()]
    assert first == second


def test_a_resumed_clipper_has_the_same_ceiling():
    net = _linear(2.0)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    training = Training(net, [sgd], History())
    clipper, other = Clipper(training, max_ratio=0.05), Clipper(training)
    other.load_state_dict(clipper.state_dict())
    assert _feed(other, sgd, net.weight, 1e9) == [pytest.approx(0.05 * 2.0 / 0.1)]


def test_a_state_that_was_read_is_not_changed_by_later_steps():
    net = _linear()
    clipper, adam = _adam(net, _past(*[3.0] * 5))
    state = clipper.state_dict()
    before = copy.deepcopy(state)
    _feed(clipper, adam, net.weight, 1.0, 9.0)
    clipper.restart()
    kept, was = state["optimizers"][0], before["optimizers"][0]
    assert all(torch.equal(kept[k].nan_to_num(-1), was[k].nan_to_num(-1)) for k in ("norms", "factors", "limit"))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [("max_factor", 0.5, r"\[1, inf\)"), ("window", 1, r"\[2, inf\)"), ("max_ratio", 0.0, r"\(0, inf\)")],
)
def test_an_argument_out_of_range_is_named_with_its_range(name, value, allowed):
    with pytest.raises(ValueError, match=rf"{name} must be in {allowed}, got {value}"):
        _adam(_linear(), **{name: value})


# -- real runs --------------------------------------------------------------------------------------------------------


class _Clipped(L.Callback):
    """Clips from a step on, and keeps the losses."""

    def __init__(self, at=0, **kwargs):
        self.at, self.kwargs, self.clipper, self.losses = at, kwargs, None, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at:
            self.clipper = Clipper(Training(pl_module, trainer.optimizers, History()), **self.kwargs)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.clipper is not None:
            self.clipper.before_step(optimizer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_learning_rate_600_times_too_large_trains_as_a_good_one_does(seed):
    ends = []
    for case in (SICK["sgd_lr_30"], SICK["sgd_lr_30"].without_fault):
        kept = _Clipped(at=0 if case.name == "sgd_lr_30" else -1)
        case.fit(seed, callbacks=[kept])
        ends.append(float(np.mean(kept.losses[-20:])))
    assert ends[0] < 1.2 * ends[1]


def test_a_healthy_run_ends_as_well_with_it():
    ends = []
    for at in (-1, 0):
        kept = _Clipped(at)
        HEALTHY["relu_mlp"].fit(0, callbacks=[kept])
        ends.append(float(np.mean(kept.losses[-20:])))
    assert ends[1] < 1.1 * ends[0]


# -- several ranks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks():
    if not HAS_FSDP2:
        pytest.skip("FSDP2 runs on the CPU from torch 2.7 on")
    return launch("tests.remedies.clip_program", timeout=120)


def test_sharded_gradients_are_clipped_as_whole_ones_are(ranks):
    for answer in ranks:
        assert answer["sharded"] == pytest.approx(answer["whole"], rel=1e-5)
        assert answer["limits"] == pytest.approx(answer["limits_of_whole"], rel=1e-5)
        assert answer["clipped_share"] == answer["clipped_share_of_whole"] > 0.3


def test_a_nan_on_one_rank_drops_the_gradients_of_all(ranks):
    assert [answer["dropped"] for answer in ranks] == [0.0, 0.0]


def test_a_rank_without_gradients_does_not_let_the_other_wait(ranks):
    assert ranks[0]["lonely"] == pytest.approx(6.0, rel=1e-5)
    assert ranks[1]["lonely"] is None
