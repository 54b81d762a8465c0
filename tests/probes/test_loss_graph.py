"""What goes into a loss function, as autograd tells it."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_gradflow.metrics import MISMATCHES
from lightning_gradflow.probes.loss_graph import LossProbe, mismatches, told
from lightning_gradflow.probes.transfer import Transfer

N, CLASSES = 8, 5
TARGET = torch.arange(N) % CLASSES
ONES = torch.ones(N)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def classes():
    return nn.Linear(3, CLASSES)(torch.randn(N, 3))


def column():
    return nn.Linear(3, 1)(torch.randn(N, 3))


def pixels():
    return nn.Conv2d(3, CLASSES, 1)(torch.randn(N, 3, 4, 4))


PIXELS = torch.zeros(N, 4, 4, dtype=torch.long)


def energy(outputs):
    """The energy distance to a sample of targets."""
    return 2 * (outputs - ONES[None]).abs().mean() - (outputs - outputs.T).abs().mean()


WRONG = {
    "softmax_twice": [
        lambda: F.cross_entropy(classes().softmax(1), TARGET),
        lambda: nn.CrossEntropyLoss()(nn.Softmax(dim=-1)(classes()), TARGET),
        lambda: F.cross_entropy(classes().softmax(1), TARGET, label_smoothing=0.1),
        lambda: F.cross_entropy(classes().softmax(1), F.one_hot(TARGET, CLASSES).float()),
        lambda: 0.5 * F.cross_entropy(classes().softmax(1), TARGET, reduction="none").mean() + column().mean(),
        lambda: F.cross_entropy(pixels().softmax(1), PIXELS),
        # another shape between them, in which the classes are at another place
        lambda: F.cross_entropy(pixels().permute(0, 2, 3, 1).softmax(-1).reshape(-1, CLASSES), PIXELS.flatten()),
        lambda: F.cross_entropy(classes()[None].softmax(-1).transpose(1, 2), TARGET[None]),
        lambda: F.cross_entropy(classes().softmax(1).half().float(), TARGET),
    ],
    "bounded_scores": [
        lambda: F.cross_entropy(classes().sigmoid(), TARGET),
        lambda: nn.CrossEntropyLoss()(nn.Tanh()(classes()), TARGET),
        lambda: F.nll_loss(F.log_softmax(pixels().sigmoid().squeeze(0), 1), PIXELS),
    ],
    "sigmoid_twice": [
        lambda: F.binary_cross_entropy_with_logits(column().sigmoid(), ONES[:, None]),
        lambda: nn.BCEWithLogitsLoss()(column().sigmoid().squeeze(1), ONES),
    ],
    "no_log_softmax": [
        lambda: F.nll_loss(classes(), TARGET),
        lambda: F.nll_loss(classes().softmax(1), TARGET),
        lambda: F.nll_loss(pixels().softmax(1), PIXELS),
    ],
    "broadcast": [
        lambda: F.mse_loss(column(), ONES),
        lambda: F.mse_loss(column().squeeze(1), ONES[:, None]),
        lambda: F.l1_loss(column(), ONES),
        lambda: F.smooth_l1_loss(column(), ONES),
        lambda: F.huber_loss(column(), ONES),
        lambda: (column() - ONES).square().mean(),
        lambda: (ONES - column()).abs().sum(),
    ],
}
RIGHT = [
    lambda: F.cross_entropy(classes(), TARGET),
    lambda: F.cross_entropy(classes().log_softmax(1), TARGET),
    lambda: F.cross_entropy(30 * (classes() / 30).tanh(), TARGET),  # scores that are capped
    lambda: F.cross_entropy(nn.Linear(CLASSES, CLASSES)(classes().sigmoid()), TARGET),
    lambda: F.cross_entropy(pixels(), PIXELS),
    lambda: F.nll_loss(classes().log_softmax(1), TARGET),
    lambda: F.nll_loss((classes().softmax(1) + 1e-8).log(), TARGET),
    lambda: F.cross_entropy(classes().softmax(1) @ torch.randn(CLASSES, 4), TARGET % 4),  # an attention
    lambda: F.kl_div(classes().log_softmax(1), torch.randn(N, CLASSES).softmax(1), reduction="batchmean"),
    lambda: F.binary_cross_entropy_with_logits(column(), ONES[:, None]),
    lambda: F.binary_cross_entropy(column().sigmoid(), ONES[:, None]),
    lambda: F.binary_cross_entropy_with_logits(2 * column().sigmoid() - 1, ONES[:, None]),
    lambda: F.mse_loss(column(), ONES[:, None]),
    lambda: F.mse_loss(column().squeeze(1), ONES),
    lambda: F.mse_loss(classes(), torch.zeros(CLASSES).expand(N, CLASSES)),
    lambda: (column().squeeze(1) - ONES).square().mean(),
    lambda: (classes() - torch.zeros(CLASSES)).square().mean(),  # one target for all
    # pairs that are meant
    lambda: (column() - column().T).square().mean(),
    lambda: energy(column()),
    lambda: ((column() - ONES).square() * -0.5).exp().mean(),  # a kernel
    lambda: (nn.Parameter(torch.randn(N, 1)) - ONES).square().mean(),  # levels of quantiles, centres
    lambda: ((column() - 1) ** 2).mean(),
    lambda: column().sum(),
]


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(("cause", "loss"), [(cause, loss) for cause, losses in WRONG.items() for loss in losses])
def test_a_loss_of_the_wrong_thing_is_told(cause, loss):
    assert mismatches(loss()) == {cause}


@pytest.mark.parametrize("loss", RIGHT)
def test_a_loss_of_the_right_thing_is_none(loss):
    assert not mismatches(loss())


def test_every_one_has_a_meaning():
    assert set(WRONG) == set(MISMATCHES)


def test_under_autocast_too():
    with torch.autocast("cpu", torch.bfloat16):
        assert mismatches(F.cross_entropy(classes().softmax(1), TARGET)) == {"softmax_twice"}
        assert not mismatches(F.cross_entropy(classes(), TARGET))


def test_a_loss_without_a_graph_tells_nothing():
    assert not mismatches(torch.tensor(1.0))
    assert not mismatches(torch.tensor(1.0, requires_grad=True))


def test_the_graph_is_not_walked_to_its_end():
    x = column()
    for _ in range(10_000):
        x = x + 1
    assert not mismatches(F.mse_loss(x, ONES[:, None]))
    assert not mismatches(x.sum())


def test_what_lies_deep_in_the_network_is_not_its_loss():
    x = F.cross_entropy(classes().softmax(1), TARGET)
    for _ in range(200):
        x = x + 1
    assert not mismatches(x)


def test_what_was_seen_in_a_sample_comes_to_the_row():
    probe, transfer = LossProbe(), Transfer()
    outputs = torch.zeros(4, 1, requires_grad=True)
    for target in (3.0, 5.0, 4.0):  # of several pairs the one that is farthest
        targets = torch.full((4, 1), target)
        probe.see(F.mse_loss, F.mse_loss(outputs, targets), (outputs, targets), {})
    probe.before_backward(F.cross_entropy(classes().softmax(1), TARGET))
    probe.share(transfer)
    assert told(transfer.fetch()) == {"residual_rms": 5.0, "compared_rms": 0.0, "softmax_twice": 1.0}
    probe.share(transfer)  # nothing is left of it
    assert told(transfer.fetch()) == {}


def _classes_last(scores):
    return scores.detach().double() - scores.detach().double().mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("func", "scores", "args", "kwargs", "last"),
    [
        (F.cross_entropy, (6, 5), (torch.arange(6) % 5,), {}, lambda x: x),
        (F.cross_entropy, (6, 5, 3), (torch.zeros(6, 3, dtype=torch.long),), {}, lambda x: x.movedim(1, -1)),
        (F.cross_entropy, (5,), (torch.tensor(2),), {}, lambda x: x),
        (torch.log_softmax, (6, 5), (1,), {}, lambda x: x),
        (F.log_softmax, (6, 3, 5), (), {"dim": -1}, lambda x: x),
        (torch.Tensor.log_softmax, (5, 6), (0,), {}, lambda x: x.T),
    ],
)
def test_the_scores_of_classes_tell_their_deviation(func, scores, args, kwargs, last):
    probe, transfer = LossProbe(), Transfer()
    given = (7 + 3 * torch.randn(scores, generator=torch.Generator().manual_seed(0))).requires_grad_()
    probe.see(func, func(given, *args, **kwargs), (given, *args), kwargs)
    probe.share(transfer)
    expected = float(_classes_last(last(given)).square().mean().sqrt())
    classes = last(given).shape[-1]
    assert told(transfer.fetch()) == {"score_deviation": pytest.approx(expected), "score_classes": classes}


def test_masked_classes_have_no_score_and_other_softmaxes_are_no_loss():
    probe, transfer = LossProbe(), Transfer()
    scores = torch.tensor([[1.0, 3.0, -math.inf], [2.0, 2.0, 2.0]], requires_grad=True)
    probe.see(F.cross_entropy, None, (scores, torch.tensor([0, 1])), {})
    probe.see(torch.log_softmax, None, (scores.detach(), 1), {})  # a target
    probe.share(transfer)
    assert told(transfer.fetch()) == {"score_deviation": pytest.approx(math.sqrt(2 / 5)), "score_classes": 2.5}


def test_losses_that_are_left_out_of_some_steps_change_nothing_that_ranks_agree_on():
    lengths = []
    for count in (1, 3, 20):
        probe, transfer = LossProbe(), Transfer()
        outputs, targets = torch.zeros(8, 1, requires_grad=True), torch.ones(8, 1)
        for _ in range(count):
            probe.see(F.mse_loss, F.mse_loss(outputs, targets), (outputs, targets), {})
        probe.share(transfer)
        found = transfer.fetch()["compared"]
        lengths.append(len(found))
        assert told({"compared": found}) == {"residual_rms": 1.0, "compared_rms": 0.0, "target_deviation": 0.0}
    assert len({*lengths}) == 1


def test_of_large_outputs_some_entries_are_enough():
    probe, transfer = LossProbe(), Transfer()
    outputs = torch.ones(300, 1000, requires_grad=True).T  # no copy is made of it, either
    probe.see(F.l1_loss, F.l1_loss(outputs, outputs.detach() + 2), (outputs, outputs.detach() + 2), {})
    probe.share(transfer)
    found = transfer.fetch()["compared"]
    assert 8_000 < found[4] <= 16_384
    assert told({"compared": found}) == {"residual_rms": 2.0, "compared_rms": 1.0, "target_deviation": 0.0}


def test_the_targets_of_a_batch_tell_their_deviation_where_they_are_enough():
    for count, deviation in ((8, 2.0), (7, None)):
        probe, transfer = LossProbe(), Transfer()
        outputs, targets = torch.zeros(count, 1, requires_grad=True), 293 + 2 * (-1.0) ** torch.arange(count)[:, None]
        probe.see(F.mse_loss, F.mse_loss(outputs, targets), (outputs, targets), {})
        probe.share(transfer)
        found = told(transfer.fetch()).get("target_deviation")
        assert found == (None if deviation is None else pytest.approx(deviation))


ENDS = {
    "relu": (torch.relu, 0.0, math.inf),
    "softplus": (F.softplus, 0.0, math.inf),
    "sigmoid": (torch.sigmoid, 0.0, 1.0),
    "tanh": (torch.tanh, -1.0, 1.0),
    "behind a view": (lambda x: torch.tanh(x).view(-1, 2).float(), -1.0, 1.0),
    "none": (lambda x: x, -math.inf, math.inf),
    "leaky": (F.leaky_relu, -math.inf, math.inf),
    "with a residual": (lambda x: x + torch.relu(x), -math.inf, math.inf),
    "scaled": (lambda x: 3 * torch.sigmoid(x), -math.inf, math.inf),
}


def _beyond(*pairs):
    probe, transfer = LossProbe(), Transfer()
    for outputs, targets in pairs:
        probe.see(F.mse_loss, F.mse_loss(outputs, targets), (outputs, targets), {})
    probe.share(transfer)
    return told(transfer.fetch()).get("targets_beyond")


@pytest.mark.parametrize("end", ENDS)
def test_the_share_of_targets_that_the_end_of_the_network_can_not_give(end):
    activation, low, high = ENDS[end]
    inputs = torch.randn(40, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    outputs = activation(inputs)
    targets = 2 * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
    missed = [max(low - t, t - high, 0.0) ** 2 for t in targets.flatten().tolist()]
    share = sum(missed) / float((targets.double() - targets.double().mean()).square().sum())
    assert _beyond((outputs, targets)) == (pytest.approx(share) if share else None)


def test_of_several_losses_the_one_within_reach_counts_and_few_targets_tell_nothing():
    inputs = torch.randn(40, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.randn(40, 1, generator=torch.Generator().manual_seed(1))
    assert _beyond((torch.relu(inputs), targets)) > 0.3
    assert _beyond((torch.relu(inputs), targets), (inputs, targets)) is None
    assert _beyond((torch.relu(inputs[:7]), targets[:7])) is None
    assert _beyond((torch.relu(inputs), -torch.ones(40, 1))) is None


def _told_of(make):
    probe, transfer = LossProbe(), Transfer()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            probe.see(func, result, args, kwargs or {})
            return result

    outputs, targets = torch.zeros(9, 3, requires_grad=True), torch.ones(9, 3)
    with Watch():
        make(outputs, targets, torch.arange(9) % 2)
    probe.share(transfer)
    return "residual_rms" in told(transfer.fetch())


@pytest.mark.parametrize(
    ("make", "is_told"),
    [
        (lambda p, t, seen: ((p - t) ** 2).mean(), True),
        (lambda p, t, seen: ((p - t) ** 2).sum(-1).mean(), True),
        (lambda p, t, seen: (((p - t) ** 2).sum(-1) * seen).sum(), False),  # of some the targets are no targets
        (lambda p, t, seen: (F.mse_loss(p, t, reduction="none").mean(1) * seen).mean(), False),
        (lambda p, t, seen: F.mse_loss(p, t, reduction="none").mean(1).mean(), True),
    ],
)
def test_errors_that_are_weighted_on_the_way_are_none_of_the_targets(make, is_told):
    assert _told_of(make) is is_told


def test_functions_of_the_users_own_are_not_taken_for_torchs():
    class MseLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.square().mean()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.expand(N, 1)

    assert not mismatches(MseLoss.apply(column()))


def test_a_hundred_thousand_losses_are_no_graph_to_read():
    x = column()
    assert not mismatches(torch.stack([x.mean()] * 100_000).sum())


def test_what_ranks_saw_before_and_no_rank_sees_now_is_not_told():
    assert told({"softmax_twice": (0.0,), "compared": (0.0,) * 40}) == {}
    assert told({"softmax_twice": (2.0,), "compared": (0.0,) * 40}) == {"softmax_twice": 1.0}
