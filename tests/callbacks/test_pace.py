"""Copies of a run are trained on its batches, and the run hears nothing of it."""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow.callbacks.copies import copy_of
from lightning_gradflow.callbacks.rehearsal import pace
from lightning_gradflow.remedies.training import RehearsalError
from tests.callbacks.test_treating import _surroundings
from tests.callbacks.treated import TOO_FAST, Doctor, Net, weights
from tests.integration.traces import fit

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")


class Plain(Net):
    """Without dropout, so that a second implementation needs no random numbers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dropout = nn.Dropout(0.0)


class Tries(L.Callback):
    """Trains copies at the end of the sixth batch, on the last two."""

    def __init__(self, factor=1.0, steps=5, max_ratio=None):
        self.factor, self.steps, self.max_ratio = factor, steps, max_ratio
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append((copy_of(batch), batch_idx))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx != 5:
            return
        self.before = (_surroundings(module), weights(module), copy.deepcopy(trainer.optimizers[0].state_dict()))
        self.twin = copy.deepcopy(module)
        self.given = self.batches[-2:]
        self.losses = pace(trainer, module, self.given)(self.factor, self.steps, None, self.max_ratio)
        self.after = (_surroundings(module), weights(module), copy.deepcopy(trainer.optimizers[0].state_dict()))


def _by_hand(tries, clip=0.0):
    """The same with a loop of our own."""
    twin, (_, _, state) = tries.twin, tries.before
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    optimizer.load_state_dict(copy.deepcopy(state))
    optimizer.param_groups[0]["lr"] *= tries.factor
    losses = []
    for step in range(tries.steps):
        loss = twin.loss(tries.given[step % 2][0])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if tries.max_ratio is not None:
            parameters = list(twin.parameters())
            size = nn.utils.get_total_norm([p.detach() for p in parameters])
            # all the steps that momentum makes of one gradient together
            longest = tries.max_ratio * size * (1 - 0.9) / (0.05 * tries.factor)
            nn.utils.clip_grad_norm_(parameters, longest)
        if clip:
            nn.utils.clip_grad_norm_(twin.parameters(), clip)
        optimizer.step()
    return losses


def _momentum(*args, **kwargs):
    return torch.optim.SGD(*args, momentum=0.9, **kwargs)


@pytest.mark.parametrize("factor", [1.0, 0.1, 3.0])
@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_the_losses_are_those_of_a_training_by_hand(factor, clip):
    tries = Tries(factor)
    fit([tries], Plain(optimizer=_momentum), **({"gradient_clip_val": clip} if clip else {}))
    assert tries.losses == pytest.approx(_by_hand(tries, clip), rel=1e-5)


@pytest.mark.parametrize("max_ratio", [0.001, 0.03])
def test_a_copy_trains_with_steps_of_a_share_of_its_weights_at_most(max_ratio):
    tries = Tries(factor=30.0, max_ratio=max_ratio)
    fit([tries], Plain(optimizer=_momentum))
    assert tries.losses == pytest.approx(_by_hand(tries), rel=1e-4)


def test_the_run_stays_as_it_was():
    tries = Tries()
    fit([tries], Net(optimizer=_momentum))
    (around, at, optimizer), (around_after, at_after, optimizer_after) = tries.before, tries.after
    assert all(torch.equal(around[name], around_after[name]) for name in around)
    assert torch.equal(at, at_after)
    assert optimizer["param_groups"] == optimizer_after["param_groups"]
    assert all(
        torch.equal(optimizer["state"][k]["momentum_buffer"], optimizer_after["state"][k]["momentum_buffer"])
        for k in optimizer["state"]
    )


class _Scaled(Tries):
    """The same in the coordinates of inputs that are scaled and shifted."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 5:
            self.twin, self.given = copy.deepcopy(module), self.batches[-2:]
            scale, shift = torch.full((4,), 8.0), torch.full((4,), 3.0)
            state = {"layers": {"net.0": {"scale": scale, "shift": shift}}}
            self.losses = pace(trainer, module, self.given)(self.factor, self.steps, state)


def test_a_copy_trains_in_the_coordinates_that_are_in_force():
    tries = _Scaled(steps=6)
    fit([tries], Plain())
    twin, given = tries.twin, tries.given
    first = twin.net[0]
    with torch.no_grad():  # the same function of (x - 3) / 8
        first.bias += 3.0 * first.weight.sum(1)
        first.weight *= 8.0
    first.register_forward_pre_hook(lambda _, args: ((args[0] - 3.0) / 8.0,))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    losses = []
    for step in range(6):
        loss = twin.loss(given[step % 2][0])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert tries.losses == pytest.approx(losses, rel=1e-4)


def test_a_rate_that_diverges_ends_where_the_loss_is_not_finite():
    tries = Tries(factor=1e12, steps=20)
    fit([tries], Plain())
    assert 1 < len(tries.losses) < 20
    assert not torch.tensor(tries.losses[-1]).isfinite()


class _Refuses(Plain):
    """Can't be copied once it trains."""

    def __deepcopy__(self, memo):
        raise TypeError("no copies")


def test_what_cannot_be_copied_is_said_to_be_so():
    class Asks(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            with pytest.raises(RehearsalError, match="no copies"):
                pace(trainer, module, [(batch, batch_idx)])(1.0, 3)

    fit([Asks()], _Refuses())


def _learnable():
    x = torch.randn(192, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :1] - x[:, 1:2]), 16)


def test_a_rate_that_is_far_too_large_is_brought_to_one_that_learns():
    doctor = Doctor(TOO_FAST, allow=("rollback",))
    fit([doctor], Plain(lr=30.0), train=_learnable())
    (action, *_) = doctor.actions
    assert action.kind == "rollback"
    assert action.before["lr"] == 30.0
    assert 0.01 < action.after["lr"] < 3.0
    assert action.after["lr"] == pytest.approx(30.0 * action.after["lr_factor"])
