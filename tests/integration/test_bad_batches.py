"""Batches that are no good and come again and again, in real runs: they are left out, and the run goes on."""

import copy
import math
import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradflow import AutoMitigator, GradFlow, GradFlowWarning
from lightning_gradflow.callbacks.rehearsal import _usual

STEPS = 240


class _Net(L.LightningModule):
    def __init__(self, norm=True, adam=True, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.Linear(6, 24), *([nn.BatchNorm1d(24)] if norm else []), nn.SiLU(), nn.Linear(24, 24), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(24, 1))
        self._adam = adam

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        if self._adam:
            return torch.optim.Adam(self.parameters(), lr=3e-3)
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


def _missing(x, y):
    x[3, 1] = math.nan


def _infinite(x, y):
    x[3] = -math.inf


def _spike(x, y):
    y[:2] = -9999.0


def _batches(hurt=None, every=31, first=47):
    generator = torch.Generator().manual_seed(7)
    batches = []
    for step in range(STEPS):
        x = torch.randn(32, 6, generator=generator)
        y = torch.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:3]
        if hurt is not None and step >= first and (step - first) % every == 0:
            hurt(x, y)
        batches.append((x, y))
    return batches


def _fit(net, batches, *callbacks, **kwargs):
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(net, DataLoader(batches, batch_size=None))
    return trainer, [str(w.message) for w in told]


def _flow(**kwargs):
    return GradFlow(every_n_steps=10, report=False, console=False, mitigator=AutoMitigator("apply", **kwargs))


def _loss(net):
    """In evaluation mode, on batches of which none is bad."""
    net.eval()
    with torch.no_grad():
        return sum(float(net.training_step(batch, 0)) for batch in _batches()[:20]) / 20


CASES = [(_missing, True, True), (_missing, False, False), (_infinite, True, True), (_infinite, False, True)]


@pytest.mark.parametrize(("hurt", "norm", "adam"), [*CASES, (_spike, False, False)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_with_bad_batches_ends_near_one_without(hurt, norm, adam, seed):
    start = _loss(_Net(norm, adam, seed))
    sick, twin, net = (_Net(norm, adam, seed) for _ in range(3))
    _fit(sick, _batches(hurt))
    _fit(twin, _batches())
    flow = _flow()
    _fit(net, _batches(hurt), flow)
    assert not _loss(sick) < start
    assert _loss(twin) < 0.5 * start
    assert start - _loss(net) > 0.8 * (start - _loss(twin))
    assert [action.outcome for action in flow.actions] == ["kept"]


@pytest.mark.parametrize(("norm", "adam"), [(True, True), (False, False)])
def test_a_run_without_bad_batches_is_the_same_to_the_bit(norm, adam):
    plain, watched = _Net(norm, adam), _Net(norm, adam)
    flow = _flow()
    _fit(plain, _batches())
    _fit(watched, _batches(), flow)
    assert not flow.actions
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    )


def test_how_many_steps_were_left_out_is_told_once_at_the_end():
    _, told = _fit(_Net(), _batches(_missing), _flow())
    left_out = [text for text in told if "were left out" in text]
    assert len(left_out) == 1
    # of 7 bad batches the first, in step 47, came before; clipping began after step 50
    assert "6 of 189 steps" in left_out[0]


def test_without_bad_batches_nothing_is_told_of_it():
    _, told = _fit(_Net(), _batches(), _flow())
    assert not [text for text in told if "left out" in text]


@pytest.mark.parametrize("allow", [("rollback",), ("reinit", "recycle")])
def test_without_leave_to_clip_nothing_is_left_out(allow):
    flow = _flow(allow=allow)
    _fit(_Net(), _batches(_missing), flow)
    assert all("left out" not in action.reason and action.kind in allow for action in flow.actions)


def test_a_run_that_is_resumed_leaves_them_out_still(tmp_path):
    batches = _batches(_missing)
    flow = _flow()
    trainer, _ = _fit(_Net(), batches[:120], flow)
    assert [action.kind for action in flow.actions] == ["clip"]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    net, resumed = _Net(seed=5), _flow()
    trainer = L.Trainer(
        max_epochs=2,
        callbacks=[resumed],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    bad = copy.deepcopy(batches[:40])
    _missing(*bad[0])  # before there was any sample
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradFlowWarning)
        warnings.filterwarnings("ignore", message=".*left out.*")
        trainer.fit(net, DataLoader(bad, batch_size=None), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert len(resumed.actions) == 1
    assert all(t.isfinite().all() for t in net.state_dict().values())


@pytest.mark.parametrize(
    ("sizes", "left"),
    [
        ((0.5, 3e6, 0.7), (0.5, 0.7)),
        ((-0.5, math.nan, 0.7), (-0.5, 0.7)),
        ((3e6, 2e6), (3e6, 2e6)),
        ((math.inf, math.inf), (math.inf, math.inf)),
        ((math.nan,), (math.nan,)),
    ],
)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_batch_whose_loss_stands_out_has_no_say_in_which_rate_suits(sizes, left, scale):
    kept = _usual([lambda size=size: torch.tensor(size * scale) for size in sizes])
    assert [float(loss()) for loss in kept] == pytest.approx([size * scale for size in left], nan_ok=True)


def test_losses_that_pass_through_zero_all_have_a_say():
    for sizes in ([-0.02, 0.9, -0.7], [0.03, 0.5, 0.8], [0.0, 0.5, 0.6]):
        assert len(_usual([lambda size=size: torch.tensor(size) for size in sizes])) == 3


def test_a_loss_that_is_made_of_gradients_can_be_asked():
    x = torch.ones(3, requires_grad=True)

    def loss():
        (slope,) = torch.autograd.grad((x**2).sum(), x, create_graph=True)
        return slope.square().sum()

    assert len(_usual([loss, loss])) == 2
