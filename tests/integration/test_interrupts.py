"""A fit that dies in the middle of a sampled step, wherever that is, leaves nothing behind and keeps what it saw."""

import importlib
import signal

import lightning as L
import pytest
import torch

from tests.benchmarks.zoo import quiet_trainer
from tests.integration.traces import Tiny, Validated, data, fit, flow, process_traces, traces

STEP = 3
ERRORS = [RuntimeError("out of luck"), KeyboardInterrupt("Ctrl-C")]
PLACES = {  # where it happens -> the steps of the rows that are kept
    "forward": [0, 1, 2],
    "backward": [0, 1, 2],
    "on_before_backward": [0, 1, 2],
    "on_after_backward": [0, 1, 2],
    "on_before_optimizer_step": [0, 1, 2],
    "configure_gradient_clipping": [0, 1, 2],
    "optimizer_step": [0, 1, 2],
    "on_before_zero_grad": [0, 1, 2],
    "on_train_batch_end": [0, 1, 2, 3],
    "validation_step": [0, 1, 2, 3],
}


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, meet):
        ctx.meet = meet
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.meet("backward")
        return gradient, None


class _Meeting(torch.nn.Module):
    """Passes its input on, and calls a function in the forward and in the backward pass."""

    def __init__(self, meet):
        super().__init__()
        self.meet = meet

    def forward(self, x):
        self.meet("forward")
        return _Backward.apply(x, self.meet)


class _Optimizer(torch.optim.SGD):
    meet = None

    def step(self, closure=None):
        loss = super().step(closure)
        self.meet("optimizer_step")
        return loss


class Dies(Validated):
    """Raises an error at a place of the fourth step."""

    def __init__(self, place, error):
        super().__init__()
        self.place, self.error = place, error
        self.met = []
        self.net.insert(3, _Meeting(self.meet))

    def meet(self, place):
        if place == self.place and self.trainer.fit_loop.total_batch_idx == STEP and not self.trainer.sanity_checking:
            self.met.append(place)
            raise self.error

    def validation_step(self, batch, batch_idx):
        self.meet("validation_step")
        return super().validation_step(batch, batch_idx)

    def on_before_backward(self, loss):
        self.meet("on_before_backward")

    def on_after_backward(self):
        self.meet("on_after_backward")

    def on_before_zero_grad(self, optimizer):
        self.meet("on_before_zero_grad")

    def on_before_optimizer_step(self, optimizer):
        self.meet("on_before_optimizer_step")

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.meet("configure_gradient_clipping")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.meet("on_train_batch_end")

    def configure_optimizers(self):
        self.optimizer = _Optimizer(self.parameters(), lr=0.01)
        self.optimizer.meet = self.meet
        return self.optimizer


@pytest.fixture(autouse=True, scope="module")
def a_compiler_that_is_loaded():
    """Without it nothing can have been compiled, and the monitor takes no stance that it could leave behind."""
    return importlib.import_module("torch._dynamo")


@pytest.fixture(autouse=True)
def ctrl_c_works_again():
    """Lightning ignores further signals once it has seen a Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def _die(place, error, **kwargs):
    """Fits to the death; the monitor, the model, and what came out of `fit`."""
    monitor, model = flow(**kwargs), Dies(place, error)
    # Lightning turns a Ctrl-C into an exit of the process
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else type(error)) as caught:
        fit([monitor], model, val=data(2), val_check_interval=STEP + 1)
    assert model.met == [place]
    return monitor, model, caught.value


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", PLACES)
def test_a_fit_that_dies_leaves_nothing_behind(place, error):
    _, model, _ = _die(place, error)
    assert traces(model, model.optimizer) == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", PLACES)
def test_a_fit_that_dies_keeps_the_rows_up_to_there(place, error):
    monitor, _, _ = _die(place, error)
    assert monitor.history.steps.tolist() == PLACES[place]


@pytest.mark.parametrize("place", PLACES)
def test_the_error_of_the_user_arrives_as_it_is(place):
    error = RuntimeError("out of luck")
    _, _, caught = _die(place, error)
    assert caught is error
    assert caught.__cause__ is None
    assert caught.__context__ is None


@pytest.mark.parametrize("place", PLACES)
def test_a_ctrl_c_ends_as_it_does_without_a_monitor(place):
    _, _, caught = _die(place, KeyboardInterrupt())
    with pytest.raises(SystemExit) as alone:
        fit([], Dies(place, KeyboardInterrupt()), val=data(2), val_check_interval=STEP + 1)
    assert caught.code == alone.value.code
    assert type(caught.__context__) is type(alone.value.__context__) is KeyboardInterrupt


@pytest.mark.parametrize("place", ["forward", "backward", "optimizer_step", "validation_step"])
def test_after_a_fit_that_died_functions_are_compiled_and_run_compiled(place):
    _die(place, RuntimeError())
    ran = []

    def backend(graph, inputs):
        def run(*args):
            ran.append(1)
            return graph(*args)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x.sin() + 1, backend=backend)
    for _ in range(2):
        compiled(torch.ones(3))
    assert ran == [1, 1]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_fit_that_dies_in_the_middle_of_a_step_leaves_its_report(tmp_path, monkeypatch, error):
    monkeypatch.chdir(tmp_path)
    monitor, _, _ = _die("backward", error, report=True)
    assert monitor.report_path.is_file()
    assert "3 sampled steps, 0 to 2" in monitor.report_path.read_text(encoding="utf-8")


def test_a_model_whose_fit_died_can_be_fitted_by_another_trainer():
    monitor, model, _ = _die("backward", RuntimeError())
    model.place = ""
    quiet_trainer(max_steps=4, callbacks=[monitor]).fit(model, data(), data(2))
    assert monitor.history.steps.tolist() == [0, 1, 2, 3]


def test_an_error_before_the_first_step_leaves_nothing_behind():
    class DiesEarly(L.Callback):
        def on_train_start(self, trainer, pl_module):
            raise RuntimeError("out of luck")

    monitor, model = flow(), Tiny()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit([monitor, DiesEarly()], model)
    assert traces(model) == []
    assert len(monitor.history) == 0


def test_an_error_in_a_callback_before_the_monitor_leaves_nothing_behind():
    class DiesFirst(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fit([DiesFirst(), flow()])
    assert process_traces() == []


def test_an_epoch_that_is_cut_short_is_not_observed_after_it():
    seen = []

    class Skips(Tiny):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

        def on_train_epoch_end(self):
            seen.append(process_traces())

    fit([flow()], Skips(), max_epochs=2)
    assert seen == [[], []]


def test_after_an_epoch_that_was_cut_short_sampling_goes_on():
    class Skips(Tiny):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    monitor = flow()
    fit([monitor], Skips(), max_epochs=2)
    assert monitor.history.steps.tolist() == [0, 1, 2, 3]
