"""How far the largest score that a softmax gets is above the next one."""

import math

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow import GradFlow
from lightning_gradflow.probes.softmax_scores import LARGE, SoftmaxScores, choices
from lightning_gradflow.probes.transfer import Transfer


def gap(func, *args, **kwargs):
    seen, transfer = SoftmaxScores(), Transfer()
    seen.start(is_first=True)
    seen.see("a", func, args, kwargs, False)
    seen.share(transfer, "a")
    return seen.collect(transfer.fetch()).get("a", {}).get("softmax_gap", math.nan)


def scores(*shape, size=1.0):
    return (size * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).requires_grad_()


def naive(rows):
    """Row by row, with sorting."""
    gaps = [sorted(row, reverse=True) for row in rows.detach().double().tolist()]
    return float(np.median([first - second for first, second, *_ in gaps]))


@pytest.mark.parametrize("func", [torch.softmax, torch.Tensor.softmax, F.softmax])
def test_the_gap_is_that_of_the_middle_row(func):
    x = scores(7, 5, size=3.0)
    assert gap(func, x, -1) == pytest.approx(naive(x))
    assert gap(func, x, dim=0) == pytest.approx(naive(x.T))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_it_is_taken_along_what_the_softmax_chooses_from(dim):
    x = scores(3, 5, 9)
    rows = x.movedim(dim, -1).reshape(-1, x.shape[dim])
    assert len(rows) % 2  # of an even number the lower of the two in the middle is taken
    assert gap(torch.softmax, x, dim) == pytest.approx(naive(rows))


@pytest.mark.parametrize("mask", [-math.inf, -1e9, -1e4, -100.0])
def test_what_is_masked_is_no_choice(mask):
    x = scores(1, 9, 9)
    causal = torch.ones(9, 9).tril().bool()
    assert gap(torch.softmax, x.masked_fill(~causal, mask), -1) < 3


@pytest.mark.parametrize("mask", [-math.inf, -9e15, -1e9, -1e4])
@pytest.mark.parametrize("lost", [0, 6, 11])
def test_a_row_in_which_a_mask_leaves_one_counts_for_nothing(mask, lost):
    x = scores(11, 5)
    lonely = torch.zeros(11, 5, dtype=torch.bool)
    lonely[:lost, 1:] = True
    found = gap(torch.softmax, x.masked_fill(lonely, mask), -1)
    assert math.isnan(found) if lost == 11 else found == pytest.approx(naive(x[lost:]))


def test_products_are_made_of_queries_and_keys():
    q, k = scores(2, 3, 7, 16), scores(2, 3, 9, 16)
    rows = (q @ k.mT / 4).reshape(-1, 9)
    assert gap(F.scaled_dot_product_attention, q, k, k) == pytest.approx(naive(rows), rel=0.2)
    assert torch.equal(choices(F.scaled_dot_product_attention, (q, k, k), {}).reshape(-1, 9), rows)
    loud = gap(F.scaled_dot_product_attention, query=q, key=k, value=k, scale=40.0)
    assert loud == pytest.approx(160 * gap(F.scaled_dot_product_attention, q, k, k), rel=1e-4)


class Called(TorchFunctionMode):
    """Takes down the calls of what torch's attention does all in one."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.multi_head_attention_forward:
            self.calls.append((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 6}, {"bias": False}, {"batch_first": True}])
def test_those_of_torchs_own_attention_are_made_of_its_weights(options, batched):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, **options)
    if attention.in_proj_bias is not None:
        nn.init.normal_(attention.in_proj_bias)
    shape = (3,) if batched else ()
    query, key, value = (
        torch.randn(*shape, n, d) for n, d in ((4, 8), (7, options.get("kdim", 8)), (7, options.get("vdim", 8)))
    )
    given = [x if options.get("batch_first") or not batched else x.transpose(0, 1) for x in (query, key, value)]
    with Called() as called:
        _, weights = attention(*given, average_attn_weights=False)
    (call,) = called.calls
    made = choices(F.multi_head_attention_forward, *call)
    torch.testing.assert_close(made.softmax(-1).reshape(weights.shape), weights)
    few = choices(F.multi_head_attention_forward, *call, 7)
    torch.testing.assert_close(few, made[:1, 0, :1])


def test_of_many_scores_few_are_made():
    q = torch.ones(64, 8, 256, 16)
    made = choices(F.scaled_dot_product_attention, (q, q, q), {}, 16384)
    assert made.numel() <= 16384
    long = torch.ones(1, 1, 40000, 4)
    assert choices(F.scaled_dot_product_attention, (long, long, long), {}, 16384).shape == (1, 1, 40000)


@pytest.mark.parametrize(
    "args",
    [
        (scores(4, 1), -1),  # nothing to choose from
        (scores(4), -1),
        (scores(0, 4), -1),
        (scores(4, 4).detach(), -1),  # data, or a teacher
        (),
    ],
)
def test_of_anything_else_nothing_is_told(args):
    assert math.isnan(gap(torch.softmax, *args))


def test_queries_that_are_grouped_are_left_out():
    q, k = scores(2, 8, 5, 16), scores(2, 2, 5, 16)
    assert math.isnan(gap(F.scaled_dot_product_attention, q, k, k, enable_gqa=True))


@pytest.mark.parametrize(
    ("is_behind", "last", "metric"),
    [(True, "a", "output_gap"), (True, "b", "softmax_gap"), (False, "a", "softmax_gap"), (False, "b", "softmax_gap")],
)
def test_what_is_behind_the_last_layer_is_an_output(is_behind, last, metric):
    seen, transfer = SoftmaxScores(), Transfer()
    seen.start(is_first=True)
    seen.see("a", torch.softmax, (scores(5, 3), -1), {}, is_behind)
    seen.share(transfer, last)
    assert [*seen.collect(transfer.fetch())["a"]] == [metric]


def _gap_of(seen, size):
    """What a sample shows of a softmax that gets scores of this size."""
    transfer = Transfer()
    seen.see("a", torch.softmax, (scores(5, 3, size=size), -1), {}, False)
    seen.share(transfer, "a")
    return seen.collect(transfer.fetch()).get("a", {}).get("softmax_gap")


@pytest.mark.parametrize(
    ("newest", "asks"), [((), False), ((np.array([math.nan, 2.9]),), False), ((np.array([math.nan, 3.1]),), True)]
)
def test_a_run_that_goes_on_asks_where_it_was_large(newest, asks):
    seen = SoftmaxScores()
    seen.start(is_first=False, newest=newest)
    assert (_gap_of(seen, 1.0) is not None) is asks


def test_a_sample_that_holds_none_tells_nothing_of_the_others():
    seen = SoftmaxScores()
    seen.start(is_first=True)
    assert _gap_of(seen, 100.0) > LARGE
    seen.start(is_first=False)
    assert seen.collect({}) == {}
    seen.start(is_first=False)
    assert _gap_of(seen, 1.0) < LARGE
    seen.start(is_first=False)
    assert _gap_of(seen, 100.0) is None


def test_a_first_sample_without_any_ends_it():
    seen = SoftmaxScores()
    seen.start(is_first=True)
    assert seen.collect({}) == {}
    seen.start(is_first=False)
    assert _gap_of(seen, 100.0) is None


class Attention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.qkv = nn.Linear(16, 48, bias=False)
        nn.init.normal_(self.qkv.weight, std=size / 4)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT / 4).softmax(-1) @ v


class Net(L.LightningModule):
    def __init__(self, size, calms_down):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.attention, self.head = nn.Linear(16, 16), Attention(size), nn.Linear(16, 2)
        self.calms_down = calms_down

    def training_step(self, batch, i):
        if i == self.calms_down:
            self.attention.qkv.weight.data /= 100
        x, y = batch
        return F.cross_entropy(self.head(self.attention(self.first(x)).mean(1)), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def history(size, calms_down=-1, flow=None, **kwargs):
    flow = flow or GradFlow(every_n_steps=1, report=False, console=False)
    x = torch.randn(96, 7, 16, generator=torch.Generator().manual_seed(0))
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[flow],
        **kwargs,
    )
    trainer.fit(Net(size, calms_down), DataLoader(TensorDataset(x, (x[:, 0, 0] > 0).long()), 16))
    return flow


def test_it_is_read_in_the_first_sample_and_while_it_is_large():
    quiet = history(1.0).history
    known = quiet["softmax_gap"][:, quiet.layers.index("attention.qkv")]
    assert 0 < known[0] < LARGE
    assert np.isnan(known[1:]).all()
    others = [i for i, name in enumerate(quiet.layers) if name != "attention.qkv"]
    assert np.isnan(quiet["softmax_gap"][:, others]).all()


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_scores_that_are_too_large_are_told_from_the_first_step_until_they_are_not():
    flow = history(20.0, calms_down=3)
    (finding,) = [f for f in flow.findings if f.cause == "score_scale"]
    known = flow.history["softmax_gap"][:, flow.history.layers.index("attention.qkv")]
    assert (known[:3] > 10).all()
    assert known[3] < LARGE
    assert np.isnan(known[4:]).all()
    assert (finding.kind, finding.step, finding.layers) == ("saturated_activation", 0, ("attention.qkv",))
    assert finding.resolved_step == 5


@pytest.mark.filterwarnings("ignore::lightning_gradflow.GradFlowWarning")
def test_the_cure_makes_them_usual():
    flow = history(20.0, flow=GradFlow(every_n_steps=1, report=False, console=False, mitigate="apply"))
    known = flow.history["softmax_gap"][:, flow.history.layers.index("attention.qkv")]
    assert flow.actions[0].kind == "reinit"
    assert known[0] > 10
    assert known[1] < 2
