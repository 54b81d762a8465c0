"""Output layers that start where the targets are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradflow.remedies.fit_outputs import fit_outputs

X = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
TARGETS = 1000 + 200 * torch.randn(64, 1, generator=torch.Generator().manual_seed(1))


def net(*tail, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1, bias=bias), *tail)


def itself_times(values):
    return values * values


FORMS = {
    "mse_loss": lambda y: F.mse_loss(y, TARGETS),
    "by name": lambda y: F.huber_loss(input=y, target=TARGETS),
    "module": lambda y: nn.L1Loss()(y.squeeze(-1), TARGETS[:, 0]),
    "targets first": lambda y: F.smooth_l1_loss(TARGETS, y),
    "another format": lambda y: F.mse_loss(y.double(), TARGETS.double()),
    "root": lambda y: F.mse_loss(y, TARGETS).sqrt(),
    "power": lambda y: ((y - TARGETS) ** 2).mean(),
    "pow": lambda y: (TARGETS - y).pow(2).mean(),
    "square": lambda y: torch.square(y.view(-1) - TARGETS.view(-1)).mean(),
    "abs": lambda y: (TARGETS - y).abs().mean(),
    "product": lambda y: itself_times(torch.sub(y, TARGETS)).sum(),
    "beside a small one": lambda y: F.mse_loss(y, TARGETS) + 0.1 * y.square().mean(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_outputs_become_what_standardised_targets_would_have_had(form):
    model = net()
    before = model(X).detach()
    done = fit_outputs(model, lambda: form(model(X)))
    assert list(done.changed) == ["2"]
    assert all(a is b for a, b in zip(done.changed["2"], model[2].parameters(), strict=True))
    mean, deviation = TARGETS.mean(), (TARGETS - TARGETS.mean()).square().mean().sqrt()
    torch.testing.assert_close(model(X), mean + deviation * (before - before.mean()), rtol=1e-5, atol=1e-3)
    assert (float(done.scale.mean), done.scale.deviation) == pytest.approx((float(mean), float(deviation)))


@pytest.mark.parametrize(
    ("model", "form"),
    [
        (net(), lambda y: F.mse_loss(y, TARGETS / 200)),  # five times is made up soon
        (net(bias=False), FORMS["mse_loss"]),
        (net(nn.Softplus()), FORMS["mse_loss"]),  # what bounds the outputs has to be known
        (net(), lambda y: F.mse_loss(y, TARGETS * torch.inf)),
        (net(), lambda y: (y - TARGETS).mean()),
        (net(), lambda y: ((y - TARGETS) ** 4).mean()),
        (net(), lambda y: F.mse_loss(y.repeat(1, 2), TARGETS.repeat(1, 2))),
        (net(), lambda y: F.poisson_nll_loss(y, TARGETS)),
        (net(), lambda y: F.mse_loss(y, TARGETS).log()),  # it does not grow with the error
        (net(), lambda y: F.mse_loss(y, TARGETS) + 1e7 * y.square().mean()),
        (net(), lambda y: F.mse_loss(y, TARGETS) / 1e6),  # made small by hand
        (net(), lambda y: F.mse_loss(y, TARGETS) + F.l1_loss(y, 2 * TARGETS)),  # which of them?
        (net(), lambda y: F.mse_loss(y[:7], TARGETS[:7])),
        (net(), lambda y: F.mse_loss(y.squeeze(1), TARGETS.squeeze(1)[:1].expand(64) * 1e38)),
        (net(nn.ReLU(inplace=True)), FORMS["mse_loss"]),
    ],
)
def test_else_nothing_is_touched(model, form):
    before = [p.clone() for p in model.parameters()]
    assert fit_outputs(model, lambda: form(model(X))) is None
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_frozen_and_shared_layers_stay():
    model = net()
    model[2].weight.requires_grad_(False)
    assert fit_outputs(model, lambda: FORMS["mse_loss"](model(X))) is None
    model = net()
    model.twin = nn.Linear(8, 1)
    model.twin.weight = model[2].weight
    assert fit_outputs(model, lambda: FORMS["mse_loss"](model[2](model[1](model[0](X))))) is None


def test_a_layer_that_is_called_twice_stays():
    model = net()

    def loss():
        return F.mse_loss(model(X), TARGETS) + F.mse_loss(model(2 * X), TARGETS)

    assert fit_outputs(model, loss) is None


def test_each_output_has_a_mean_of_its_own_and_all_share_the_deviation():
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    targets = torch.tensor([100.0, -500.0, 70.0]) + torch.tensor([10.0, 50.0, 1.0]) * torch.randn(64, 3)
    before = model(X).detach()
    fit_outputs(model, lambda: F.mse_loss(model(X), targets))
    deviation = (targets - targets.mean(0)).square().mean().sqrt()
    expected = targets.mean(0) + deviation * (before - before.mean(0))
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-3)


def test_outputs_of_which_one_is_well_are_left_alone():
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    targets = torch.tensor([900.0, 0.0]) + torch.randn(64, 2)
    assert fit_outputs(model, lambda: F.mse_loss(model(X), targets)) is None


def test_numbers_that_the_format_of_the_outputs_cannot_hold_are_left_alone():
    for factor, is_fitted in ((1.0, True), (100.0, False)):
        model = net().half()
        done = fit_outputs(model, lambda m=model, f=factor: F.mse_loss(m(X.half()).float(), f * TARGETS))
        assert (done is not None) is is_fitted


def test_so_it_is_for_images():
    torch.manual_seed(0)
    model, image = nn.Conv2d(1, 2, 3, padding=1), torch.randn(8, 1, 6, 6)
    targets = 300 + 40 * torch.randn(8, 2, 6, 6)
    assert fit_outputs(model, lambda: F.mse_loss(model(image), targets)) is not None
    torch.testing.assert_close(model(image).mean((0, 2, 3)), targets.mean((0, 2, 3)), rtol=1e-4, atol=1e-2)


def test_targets_that_are_all_the_same_tell_no_deviation():
    model = net()
    assert fit_outputs(model, lambda: F.mse_loss(model(X), torch.full((64, 1), 70.0))) is None
