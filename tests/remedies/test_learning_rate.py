"""The factor on the learning rate: what the optimizer uses, and that nobody else sees it."""

import copy
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import lr_scheduler as schedulers

from lightning_gradflow.remedies.learning_rate import RateFactor
from tests.benchmarks.zoo import quiet_trainer
from tests.integration.traces import traces

STEPS = 12
SCHEDULES = {
    "none": None,
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: schedulers.StepLR(o, 3, gamma=0.5),
    "multi_step": lambda o: schedulers.MultiStepLR(o, [2, 5], gamma=0.1),
    "constant": lambda o: schedulers.ConstantLR(o, 0.3, total_iters=4),
    "linear": lambda o: schedulers.LinearLR(o, 0.1, total_iters=6),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.8),
    "polynomial": lambda o: schedulers.PolynomialLR(o, 10, power=2.0),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "warm_restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.2, step_size_up=3, cycle_momentum=False),
    "one_cycle": lambda o: schedulers.OneCycleLR(o, 0.5, total_steps=STEPS + 1, cycle_momentum=False),
    "plateau": lambda o: {
        "scheduler": schedulers.ReduceLROnPlateau(o, factor=0.5, patience=1),
        "monitor": "always_one",
        "interval": "step",
    },
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.ExponentialLR(o, 0.7)], [4]
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.2, total_iters=3), schedulers.ExponentialLR(o, 0.9)]
    ),
}


class Ramp(L.LightningModule):
    """The gradient of each weight is 1, so that a step of SGD moves it by the learning rate that was used."""

    def __init__(self, schedule=None, lr=0.1):
        super().__init__()
        self.weights = nn.ParameterList([torch.zeros(1, dtype=torch.float64) for _ in range(2)])
        self.schedule, self.lr = schedule, lr
        self.used, self.seen, self.inside = [], [], []
        self.before = None

    def training_step(self, batch, batch_idx):
        self.inside.append(self._rates())
        self.log("always_one", 1.0)
        return self.loss()

    def loss(self):
        return sum(weight.sum() for weight in self.weights)

    def _rates(self):
        return [group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups]

    def on_train_batch_start(self, *args):
        self.seen.append(self._rates())
        self.before = [weight.item() for weight in self.weights]

    def on_train_batch_end(self, *args):
        self.used.append([b - w.item() for b, w in zip(self.before, self.weights, strict=True)])

    def configure_optimizers(self):
        groups = [{"params": [self.weights[0]]}, {"params": [self.weights[1]], "lr": self.lr / 4}]
        optimizer = torch.optim.SGD(groups, lr=self.lr)
        if self.schedule is None:
            return optimizer
        scheduler = self.schedule(optimizer)
        scheduler = scheduler if isinstance(scheduler, dict) else {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Holds(L.Callback):
    """Uses the remedy as it is to be used, with a factor from a step on."""

    def __init__(self, factor, first=0):
        self.factor, self.first = factor, first

    def on_train_start(self, trainer, module):
        assert RateFactor.can_treat(trainer.optimizers)
        self.rate = RateFactor(trainer.optimizers)
        if self.first == 0:
            self.rate.factor = self.factor

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rate.batch_end()
        if batch_idx + 1 == self.first:
            self.rate.factor = self.factor

    def on_exception(self, trainer, module, exception):
        self.rate.release()

    def on_train_end(self, trainer, module):
        self.rate.release()


def _fit(module, *callbacks, steps=STEPS, **kwargs):
    L.seed_everything(0, verbose=False)
    batches = torch.utils.data.DataLoader(torch.zeros(steps, 1), batch_size=1)
    quiet_trainer(max_epochs=1, callbacks=list(callbacks), **kwargs).fit(module, batches)
    return module


def _times(rates, factor, first=0):
    return [[rate * (factor if i >= first else 1.0) for rate in step] for i, step in enumerate(rates)]


def _close(one, other):
    return torch.allclose(torch.tensor(one), torch.tensor(other), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_used_is_the_schedulers_times_the_factor_and_the_scheduler_goes_its_way(name, first):
    plain = _fit(Ramp(SCHEDULES[name]))
    assert _close(plain.used, plain.seen)
    treated = _fit(Ramp(SCHEDULES[name]), Holds(0.3, first))
    assert treated.seen == plain.seen  # to the last bit
    assert treated.inside == plain.inside  # what a training step reads and logs is the scheduler's
    assert _close(treated.used, _times(plain.seen, 0.3, first))
    assert traces(treated, *treated.trainer.optimizers) == []


@pytest.mark.parametrize("every", [2, 5])
def test_accumulated_steps_use_the_factor_too(every):
    plain = _fit(Ramp(SCHEDULES["exponential"]), accumulate_grad_batches=every)
    treated = _fit(Ramp(SCHEDULES["exponential"]), Holds(0.5), accumulate_grad_batches=every)
    assert treated.seen == plain.seen
    assert sum(step[0] > 0 for step in plain.used) == math.ceil(STEPS / every)
    assert _close(treated.used, _times(plain.used, 0.5))


class TwoOptimizers(Ramp):
    """One with a scheduler of its own, which the module steps; the other steps every second time."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in [first, second][: 1 + batch_idx % 2]:
            optimizer.zero_grad()
            self.manual_backward(self.loss())
            optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD([weight], lr=lr) for weight, lr in zip(self.weights, (0.1, 0.02), strict=True)]
        return optimizers, [schedulers.ExponentialLR(optimizers[0], 0.8)]


def test_in_manual_optimization_each_optimizer_uses_the_factor():
    plain, treated = _fit(TwoOptimizers()), _fit(TwoOptimizers(), Holds(0.25))
    assert treated.seen == plain.seen
    assert [step[1] > 0 for step in plain.used] == [i % 2 == 1 for i in range(STEPS)]
    assert _close(treated.used, _times(plain.used, 0.25))


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_leave_nothing_behind(fused):
    class Overflows(Ramp):
        def loss(self):
            return super().loss() * (float("inf") if self.trainer.global_step in (2, 3, 7) else 1.0)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)
            return [optimizer], [{"scheduler": schedulers.ExponentialLR(optimizer, 0.8), "interval": "step"}]

    def scaled():
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=64.0))]}

    plain, treated = _fit(Overflows(), **scaled()), _fit(Overflows(), Holds(0.5), **scaled())
    assert treated.seen == plain.seen
    assert [i for i, step in enumerate(plain.used) if step[0] == 0] == [2, 3, 7]
    assert _close(treated.used, _times(plain.used, 0.5))


@pytest.mark.parametrize("where", ["training_step", "on_before_optimizer_step", "on_train_batch_start"])
def test_a_rate_that_the_user_sets_is_kept_and_multiplied(where):
    class Sets(Ramp):
        def set(self, place):
            if place == where:
                for group in self.trainer.optimizers[0].param_groups:
                    group["lr"] = group["lr"] * 0.5

        def training_step(self, batch, batch_idx):
            self.set("training_step")
            return super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer):
            self.set("on_before_optimizer_step")

        def on_train_batch_start(self, *args):
            self.set("on_train_batch_start")
            super().on_train_batch_start(*args)

    plain, treated = _fit(Sets()), _fit(Sets(), Holds(0.25))
    assert plain.seen[-1][0] < 1e-3
    assert treated.seen == plain.seen
    assert _close(treated.used, _times(plain.used, 0.25))


def test_a_checkpoint_holds_the_rate_of_the_scheduler(tmp_path):
    module = _fit(Ramp(), Holds(0.5))
    module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["optimizer_states"][0]
    assert [group["lr"] for group in saved["param_groups"]] == [0.1, 0.025]


def test_an_exception_in_the_training_step_leaves_the_rate_as_it_was():
    class Fails(Ramp):
        def training_step(self, batch, batch_idx):
            raise KeyError("data")

    module = Fails()
    with pytest.raises(KeyError, match="data"):
        _fit(module, Holds(0.5))
    assert module._rates() == [0.1, 0.025]
    assert traces(module, *module.trainer.optimizers) == []


# -- without a Trainer -------------------------------------------------------------------------------------------------


def _weight(value=0.0):
    weight = nn.Parameter(torch.full((1,), value, dtype=torch.float64))
    weight.grad = torch.ones_like(weight)
    return weight


def _factor(optimizer, factor=0.5):
    rate = RateFactor([optimizer])
    rate.factor = factor
    return rate


class Breaks(torch.optim.SGD):
    """Its update fails half way."""

    broken = True

    def step(self, closure=None):
        loss = super().step(closure)
        if self.broken:
            raise MemoryError
        return loss


@pytest.mark.parametrize("repair", ["batch_end", "release"])
def test_an_exception_in_the_update_is_repaired_at_the_end_of_the_batch(repair):
    weight = _weight()
    optimizer = Breaks([weight], lr=0.1)
    rate = _factor(optimizer)
    with pytest.raises(MemoryError):
        optimizer.step()
    getattr(rate, repair)()
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.broken = False
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert weight.item() == pytest.approx(-0.05 - (0.05 if repair == "batch_end" else 0.1))


def test_a_step_that_calls_the_step_of_its_base_is_multiplied_once():
    class Decays(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            after.append(self.param_groups[0]["lr"])
            return loss

    torch.optim.SGD([_weight()], lr=0.1)  # torch hooks the step of a class as its first object is made
    weight, after, calls = _weight(), [], []
    optimizer = Decays([weight], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    _factor(optimizer)
    optimizer.step(lambda: calls.append(optimizer.param_groups[0]["lr"]))
    assert calls == [1, 1, 0.1]
    assert after == [0.05]
    assert weight.item() == pytest.approx(-0.05)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("how", ["keyword", "position"])
def test_the_closure_gives_its_loss_and_sees_the_own_rate(how):
    weight = _weight()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    _factor(optimizer)

    def closure():
        return optimizer.param_groups[0]["lr"]

    assert (optimizer.step(closure=closure) if how == "keyword" else optimizer.step(closure)) == 0.1
    assert weight.item() == pytest.approx(-0.05)


@pytest.mark.parametrize(("closure", "used"), [(lambda: None, 0.2), (None, 0.4)])
def test_a_rate_that_another_hook_sets_is_kept(closure, used):
    """Set after the product was taken, it is multiplied where a closure gives the occasion."""
    weight = _weight()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    _factor(optimizer)
    optimizer.register_step_pre_hook(lambda *_: optimizer.param_groups[0].update(lr=0.4))
    optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 0.4
    assert weight.item() == pytest.approx(-used)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_which_reads_the_rate_before_its_closure_uses_the_factor(line_search):
    def after(lr, factor):
        weight = _weight(3.0)
        optimizer = torch.optim.LBFGS([weight], lr=lr, max_iter=4, line_search_fn=line_search)
        _factor(optimizer, factor)

        def closure():
            optimizer.zero_grad()
            loss = (weight - 1).pow(4).sum() / 9
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return weight.item()

    assert after(1.0, 0.25) == after(0.25, 1.0) != after(1.0, 1.0)


def test_the_remedy_released_inside_of_a_closure_leaves_the_own_rate():
    weight = _weight()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    rate = _factor(optimizer)
    optimizer.step(rate.release)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert weight.item() == pytest.approx(-0.1)


def test_the_remedy_begun_inside_of_a_closure_holds_from_the_next_step_on():
    weight = _weight()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    rate = RateFactor([optimizer])
    optimizer.step(lambda: setattr(rate, "factor", 0.5))
    optimizer.step()
    assert weight.item() == pytest.approx(-0.15)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_at_factor_one_there_is_no_hook():
    optimizer = torch.optim.SGD([_weight()], lr=0.1)
    rate = _factor(optimizer, 1.0)
    assert traces(nn.Identity(), optimizer) == []
    rate.factor = 0.5
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1
    rate.factor = 0.25
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    rate.factor = 1.0
    assert traces(nn.Identity(), optimizer) == []


@pytest.mark.parametrize("options", [{"foreach": False}, {"capturable": False, "fused": True}])
def test_a_rate_that_is_a_tensor_is_multiplied_and_the_same_object_comes_back(options):
    def after(lr, factor):
        weights = [_weight(), _weight()]
        rate = torch.tensor(lr, dtype=torch.float64)
        # one tensor for both groups, as the constructor hands it on
        optimizer = torch.optim.Adam([{"params": [w]} for w in weights], lr=rate, **options)
        _factor(optimizer, factor)
        for _ in range(3):
            optimizer.step()
        assert all(group["lr"] is rate for group in optimizer.param_groups)
        assert rate.item() == lr
        return [weight.item() for weight in weights]

    assert after(0.25, 0.5) == after(0.125, 1.0)


def test_the_factor_survives_a_checkpoint_and_a_release():
    optimizer = torch.optim.SGD([_weight()], lr=0.1)
    rate = _factor(optimizer, 0.5)
    rate.cap = 3.0
    rate.release()
    rate.release()
    assert rate.state_dict() == {"factor": 0.5, "cap": 3.0}
    weight = _weight()
    resumed = RateFactor([torch.optim.SGD([weight], lr=0.1)])
    resumed.load_state_dict(rate.state_dict())
    resumed._rates[0].optimizer.step()
    assert weight.item() == pytest.approx(-0.05)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(("factor", "moved"), [(1.0, 0.15), (0.5, 0.1)])
def test_no_step_is_made_at_more_than_the_cap(factor, moved, as_tensor):
    weight = _weight()
    own = torch.tensor(0.2) if as_tensor else 0.2
    optimizer = torch.optim.SGD([weight], lr=own)
    rate = RateFactor([optimizer])
    rate.factor, rate.cap = factor, 0.15
    optimizer.step()
    assert weight.item() == pytest.approx(-moved)
    assert optimizer.param_groups[0]["lr"] is own


def test_a_schedule_that_grows_is_held_at_the_cap_and_left_alone_below_it():
    weight = _weight()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1, 10, 100, 0.5)[min(step, 3)])
    RateFactor([optimizer]).cap = 0.2
    moved = []
    for _ in range(4):
        before = weight.item()
        optimizer.step()
        scheduler.step()
        moved.append(round(before - weight.item(), 6))
    assert moved == [0.1, 0.2, 0.2, 0.05]


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan")])
def test_a_cap_that_is_no_rate_is_refused(cap):
    with pytest.raises(ValueError, match="cap must be above 0"):
        RateFactor([torch.optim.SGD([_weight()], lr=0.1)]).cap = cap


def test_a_group_that_is_added_later_is_multiplied_too():
    first, second = _weight(), _weight()
    optimizer = torch.optim.SGD([first], lr=0.1)
    _factor(optimizer)
    optimizer.add_param_group({"params": [second], "lr": 0.2})
    optimizer.step()
    assert (first.item(), second.item()) == (pytest.approx(-0.05), pytest.approx(-0.1))


def test_a_copy_of_the_optimizer_is_free_of_the_factor():
    optimizer = torch.optim.SGD([_weight()], lr=0.1)
    _factor(optimizer)
    copied = copy.deepcopy(optimizer)
    copied.param_groups[0]["params"][0].grad = torch.ones(1, dtype=torch.float64)
    copied.step()
    assert copied.param_groups[0]["params"][0].item() == pytest.approx(-0.1)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_factor_that_is_not_above_zero_or_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="finite number above 0, got"):
        RateFactor([]).factor = value


class NoRate(torch.optim.Optimizer):
    """As the original Adafactor: it finds its rate itself."""

    def __init__(self, params):
        super().__init__(params, {"lr": None})

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(parameter.grad)


class Wrapper(torch.optim.Optimizer):
    """As some wrappers are written: it never calls the constructor of its base."""

    def __init__(self, base):
        self.base = base

    @property
    def param_groups(self):
        return self.base.param_groups

    def step(self, closure=None):
        return self.base.step(closure)


@pytest.mark.parametrize(
    ("make", "treatable"),
    [
        (lambda: torch.optim.AdamW([_weight()]), True),
        (lambda: torch.optim.Adam([_weight()], lr=torch.tensor(0.1)), True),
        (lambda: torch.optim.Rprop([_weight()]), False),
        (lambda: NoRate([_weight()]), False),
        (lambda: Wrapper(torch.optim.SGD([_weight()], lr=0.1)), False),
    ],
)
def test_what_cannot_be_treated_is_said(make, treatable):
    assert RateFactor.can_treat([make()]) is treatable
    assert RateFactor.can_treat([torch.optim.SGD([_weight()], lr=0.1), make()]) is treatable


def test_without_optimizers_there_is_nothing_to_treat():
    assert not RateFactor.can_treat([])


def test_what_cannot_be_treated_is_left_as_it_is():
    weights = [_weight(), _weight()]
    optimizers = [NoRate([weights[0]]), Wrapper(torch.optim.SGD([weights[1]], lr=0.1))]
    rate = RateFactor(optimizers)
    rate.factor = 0.5
    for optimizer in optimizers:
        optimizer.step()
    assert [weight.item() for weight in weights] == [-1.0, -0.1]


def test_the_rate_in_force_can_be_looked_at_without_a_step():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rate = RateFactor([optimizer, other])
    rate.factor, rate.cap = 0.5, 0.25
    with rate.in_force(optimizer):
        assert (optimizer.param_groups[0]["lr"], other.param_groups[0]["lr"]) == (0.25, 1.0)
        with rate.in_force(optimizer):  # once, however often it is asked
            assert optimizer.param_groups[0]["lr"] == 0.25
        assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["lr"] == 1.0
