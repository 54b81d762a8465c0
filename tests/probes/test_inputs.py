"""The root mean square of each feature of the input, against analytic values and numpy."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradflow import GradFlow
from lightning_gradflow.probes.inputs import MAX_FEATURES, InputScale, shut_gates
from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.signals import SignalProbe
from lightning_gradflow.probes.transfer import Transfer


def _sample(model, *losses):
    """(F,) the input of a step of these losses; a loss of None is a batch that is left out."""
    transfer = Transfer()
    probe = SignalProbe(LayerMap(model), transfer)
    for loss in losses:
        probe.start_batch()
        value = loss()
        if value is None:
            probe.forget_batch()
            continue
        probe.before_backward()
        value.backward()
        probe.after_backward()
    probe.finish()
    return probe.collect(transfer.fetch()).input_rms


def _of(model, *inputs):
    return _sample(model, *(lambda x=x: model(x).sum() for x in inputs))


def _scale(module, *arguments):
    scale, transfer = InputScale(), Transfer()
    scale.take(module, arguments)
    scale.pack(transfer)
    return scale.unpack(transfer.fetch())[0]


def test_each_feature_has_its_own_root_mean_square():
    x = torch.tensor([[3.0, 1000.0, 0.0], [4.0, -1000.0, 0.0]])
    np.testing.assert_allclose(_of(nn.Linear(3, 2), x), [math.sqrt(12.5), 1000.0, 0.0])


def _deviations(*inputs):
    scale, transfer = InputScale(), Transfer()
    for x in inputs:
        scale.take(nn.Linear(x.shape[-1], 1), (x,))
    scale.pack(transfer)
    return scale.unpack(transfer.fetch())[1]


def test_deviations_are_taken_around_the_mean_of_all_batches():
    assert _deviations(torch.tensor([[1.0], [3.0]])) == pytest.approx([1.0])
    assert _deviations(torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [3.0]])) == pytest.approx([1.0])


def test_a_small_deviation_is_not_lost_beside_its_mean():
    torch.manual_seed(0)
    x = 1e-3 * torch.randn(64, 2, dtype=torch.float64) + torch.tensor([2000.0, 0.0])
    np.testing.assert_allclose(_deviations(x), x.numpy().std(0), rtol=1e-3)


def test_a_constant_does_not_deviate():
    assert _deviations(torch.full((7, 1), 0.1)) == pytest.approx([0.0], abs=1e-8)


def test_the_deviation_of_what_is_not_finite_is_neither():
    np.testing.assert_array_equal(_deviations(torch.tensor([[math.inf, 1.0], [1.0, 3.0]])), [math.inf, 1.0])


def test_features_are_the_last_dimension_of_a_sequence():
    torch.manual_seed(0)
    x = torch.randn(4, 7, 5) * torch.tensor([1.0, 10.0, 0.1, 1e3, 1e-3])
    expected = np.sqrt((x.double().numpy() ** 2).mean((0, 1)))
    np.testing.assert_allclose(_scale(nn.GRU(5, 2, batch_first=True), x, None), expected)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(3, 2, 3), (5, 3, 9)),
        (nn.Conv2d(3, 2, 3), (5, 3, 9, 8)),
        (nn.Conv3d(3, 2, 3), (5, 3, 6, 7, 8)),
        (nn.ConvTranspose2d(3, 2, 3), (5, 3, 9, 8)),
        (nn.BatchNorm1d(3), (5, 3)),
        (nn.BatchNorm2d(3), (5, 3, 9, 8)),
        (nn.GroupNorm(1, 3), (5, 3, 9, 8)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_features_of_pictures_are_the_channels(module, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    expected = np.sqrt((np.moveaxis(x.double().numpy(), 1, 0).reshape(3, -1) ** 2).mean(1))
    np.testing.assert_allclose(_scale(module, x), expected)


def test_a_picture_without_a_batch_has_its_channels_in_front():
    x = torch.ones(2, 9, 9) * torch.tensor([1.0, 5.0])[:, None, None]
    np.testing.assert_allclose(_scale(nn.Conv2d(2, 1, 3), x), [1.0, 5.0])


def test_packed_sequences_count_what_is_no_padding():
    sequence = nn.utils.rnn.pack_sequence([torch.full((3, 1), 2.0), torch.full((1, 1), 6.0)])
    assert _scale(nn.LSTM(1, 2), sequence) == pytest.approx([math.sqrt(12)])


def test_only_the_first_layer_of_a_batch_counts():
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3))
    assert _of(model, torch.ones(3, 2)) == pytest.approx([1.0, 1.0])


def test_a_layer_that_holds_the_first_layer_does_not_take_its_place():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(()))
            self.patches = nn.Conv2d(2, 1, 3)

        def forward(self, x):
            return self.patches(x) + self.token

    model = nn.Sequential(Net())
    assert _of(model, torch.ones(1, 2, 5, 6)) == pytest.approx([1.0, 1.0])


def test_batches_of_a_step_are_taken_together():
    assert _of(nn.Linear(1, 1), torch.full((2, 1), 3.0), torch.full((6, 1), 5.0)) == pytest.approx([math.sqrt(21)])


def test_a_batch_that_is_forgotten_has_no_part():
    model = nn.Linear(1, 1)

    def loss(size, is_kept):
        total = model(torch.full((2, 1), size)).sum()
        return total if is_kept else None

    assert _sample(model, lambda: loss(1e9, False), lambda: loss(3.0, True), lambda: loss(1e9, False)) == pytest.approx(
        [3.0]
    )


def test_another_forward_pass_of_the_same_batch_is_not_counted():
    model, transfer = nn.Linear(1, 1), Transfer()
    probe = SignalProbe(LayerMap(model), transfer)
    probe.start_batch()
    for size in (3.0, 100.0):
        loss = model(torch.full((2, 1), size)).sum()
        probe.before_backward()
        loss.backward()
        probe.after_backward()
        probe.next_forward()
    probe.finish()
    assert probe.collect(transfer.fetch()).input_rms == pytest.approx([3.0])


def test_the_next_step_starts_anew():
    model, transfer = nn.Linear(1, 1), Transfer()
    probe = SignalProbe(LayerMap(model), transfer)
    for size in (3.0, 100.0):
        probe.start_batch()
        loss = model(torch.full((2, 1), size)).sum()
        probe.before_backward()
        loss.backward()
        probe.finish()
        assert probe.collect(transfer.fetch()).input_rms == pytest.approx([size])


def test_inputs_of_two_widths_share_their_first_columns():
    class Any(nn.Linear):
        def forward(self, x):
            return super().forward(x[:, :1])

    narrow, wide = torch.full((2, 2), 3.0), torch.full((2, 3), 5.0)
    expected = [math.sqrt(17), math.sqrt(17), 5.0]
    for inputs in ((narrow, wide), (wide, narrow)):
        np.testing.assert_allclose(_of(Any(1, 1), *inputs), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_feature_that_is_not_finite_was_measured_and_leaves_the_others(bad):
    assert _scale(nn.Linear(2, 1), torch.tensor([[bad, 2.0], [1.0, 2.0]])) == pytest.approx([math.inf, 2.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_measured(dtype):
    assert _scale(nn.Linear(1, 1), torch.full((9, 1), 4096.0, dtype=dtype)) == pytest.approx([4096.0])


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.ones(3, 2, dtype=torch.long),),
        (torch.ones(2),),
        (torch.ones(0, 2),),
        (torch.ones(3, MAX_FEATURES + 1),),
        (torch.ones(3, 2, dtype=torch.cfloat),),
        (),
    ],
    ids=["whole numbers", "a vector", "empty", "wide", "complex", "none"],
)
def test_what_has_no_features_is_not_measured(arguments):
    assert _scale(nn.Linear(2, 1), *arguments).size == 0


def test_the_widest_input_is_measured():
    assert _scale(nn.Linear(2, 1), torch.ones(3, MAX_FEATURES)) == pytest.approx([1.0] * MAX_FEATURES)


def test_behind_a_layer_that_takes_whole_numbers_nothing_is_measured():
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 1))
    assert _of(model, torch.ones(3, 4, dtype=torch.long)).size == 0


def test_a_checkpointed_input_is_counted_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    x = torch.full((3, 2), 2.0, requires_grad=True)
    assert _sample(model, lambda: checkpoint(model, x, use_reentrant=True).sum()) == pytest.approx([2.0, 2.0])


def test_a_step_without_a_forward_pass_has_no_input():
    assert _sample(nn.Linear(1, 1)).size == 0


# -- what an input does to a recurrence


def _gates_by_hand(cell, x):
    """Share of the gates of each kind that are within 1 % of a bound, gate by gate."""
    kind = {"RNN": "t", "LSTM": "ssts", "GRU": "sst"}[type(cell).__name__.removesuffix("Cell")]
    named = ("weight_ih", "bias_ih", "bias_hh")
    weight, bias, other = (next(p for n, p in cell.named_parameters() if name in n) for name in named)
    near = []
    for i, gate in enumerate(kind):
        w, b, c = (p.detach().double().chunk(len(kind))[i] for p in (weight, bias, other))
        is_gated = kind == "sst" and i == 2  # the state of a GRU's new content, and its bias with it
        driven = x.double() @ w.T + b + (0 if is_gated else c)
        out = (torch.sigmoid if gate == "s" else torch.tanh)(driven)
        near.append((out > 0.99) | (out < (0.01 if gate == "s" else -0.99)))
    return float(torch.stack(near).double().mean())


@pytest.mark.parametrize("size", [1.0, 10.0, 50.0])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.RNN(3, 5),
        lambda: nn.LSTM(3, 5),
        lambda: nn.GRU(3, 5),
        lambda: nn.RNNCell(3, 5),
        lambda: nn.LSTMCell(3, 5),
        lambda: nn.GRUCell(3, 5),
        lambda: nn.LSTM(3, 5, num_layers=2, bidirectional=True, proj_size=2),
    ],
    ids=["rnn", "lstm", "gru", "rnn cell", "lstm cell", "gru cell", "lstm in two layers"],
)
def test_gates_that_the_input_shuts_are_counted(make, size):
    torch.manual_seed(0)
    cell, x = make(), size * torch.randn(*((7, 9) if "Cell" not in type(make()).__name__ else (63,)), 3)
    shut, count = shut_gates(cell, (x,))
    assert int(shut) / count == pytest.approx(_gates_by_hand(cell, x))


def test_of_many_time_steps_some_tell():
    torch.manual_seed(0)
    cell, x = nn.GRU(3, 50), 20 * torch.randn(900, 9, 3)
    shut, count = shut_gates(cell, (x,))
    assert count <= 1024 * 150
    assert int(shut) / count == pytest.approx(_gates_by_hand(cell, x), abs=0.02)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (nn.Linear(3, 5), (torch.ones(2, 3),)),
        (nn.RNN(3, 5, nonlinearity="relu"), (torch.ones(2, 2, 3),)),
        (nn.RNNCell(3, 5, nonlinearity="relu"), (torch.ones(2, 3),)),
        (nn.GRU(3, 5), ()),
        (nn.GRU(3, 5), (torch.ones(0, 2, 3),)),
        (nn.GRU(3, 5), (torch.ones(2, 2, 4),)),  # a class with a forward of its own
    ],
    ids=["linear", "relu", "relu cell", "by keyword", "empty", "another width"],
)
def test_what_has_no_gates_to_shut_is_not_measured(module, arguments):
    assert shut_gates(module, arguments) is None


def test_packed_sequences_and_half_precision_are_counted():
    x = torch.full((3, 1), 1e4, dtype=torch.float64)
    cell = nn.GRU(1, 2)
    nn.init.ones_(cell.weight_ih_l0)
    shut, count = shut_gates(cell, (nn.utils.rnn.pack_sequence([x, x]),))
    assert int(shut) == count == 36
    shut, count = shut_gates(cell.bfloat16(), (x[None].bfloat16(),))
    assert int(shut) == count == 18


def test_a_recurrence_without_biases_has_gates_too():
    cell = nn.LSTM(1, 2, bias=False)
    nn.init.ones_(cell.weight_ih_l0)
    assert [int(shut_gates(cell, (torch.full((1, 1, 1), x),))[0]) for x in (2.6, 2.7, 4.5, 4.7)] == [0, 2, 2, 8]


class _Reader(nn.Module):
    def __init__(self, before=None):
        super().__init__()
        self.before = before or nn.Identity()
        self.rnn, self.out = nn.GRU(2, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.rnn(self.before(x))[0])


def _saturated(model, x):
    transfer = Transfer()
    probe = SignalProbe(LayerMap(model), transfer)
    probe.start_batch()
    loss = model(x).sum()
    probe.before_backward()
    loss.backward()
    probe.after_backward()
    probe.finish()
    points = probe.collect(transfer.fetch()).points
    return {
        point.name: values["saturated_fraction"] for point, values in points.items() if "saturated_fraction" in values
    }


def test_the_share_stands_at_the_recurrence_that_gets_the_input():
    torch.manual_seed(0)
    model, x = _Reader(), 30 * torch.randn(6, 8, 2)
    assert _saturated(model, x) == {"rnn": pytest.approx(_gates_by_hand(model.rnn, x))}


def test_a_recurrence_behind_another_layer_is_not_asked():
    torch.manual_seed(0)
    assert _saturated(_Reader(nn.Linear(2, 2)), torch.randn(6, 8, 2)) == {}


# -- in a training


class _Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def training_step(self, batch, _):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def test_the_history_holds_the_input_of_each_sampled_step(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 3) * torch.tensor([1.0, 100.0, 1e-3])
    flow = GradFlow(every_n_steps=1, report=False, console=False)
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        accumulate_grad_batches=2,
        accelerator="cpu",
        callbacks=[flow],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(_Net(), DataLoader(TensorDataset(x, torch.zeros(16, 1)), batch_size=4))
    expected = np.sqrt((x.double().numpy().reshape(2, 8, 3) ** 2).mean(1))
    np.testing.assert_allclose(flow.history["input_rms"], expected)
    np.testing.assert_allclose(flow.history["input_deviation"], x.double().numpy().reshape(2, 8, 3).std(1), rtol=1e-6)
    assert flow.history.names("input_rms") == ("0", "1", "2")


class Table(nn.Module):
    """Embeddings beside raw numbers, as nets for tables have them."""

    def __init__(self, apart=False):
        super().__init__()
        self.lookup = nn.Embedding(5, 3)
        self.apart = nn.Linear(2, 3) if apart else None
        self.mixed = nn.Linear(3 if apart else 5, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, keys, numbers):
        found = self.lookup(keys)
        found = torch.cat([found, numbers], 1) if self.apart is None else found + self.apart(numbers)
        return self.head(self.mixed(found))


def _of_table(model, numbers):
    transfer = Transfer()
    probe = SignalProbe(LayerMap(model), transfer)
    probe.start_batch()
    loss = model(torch.arange(len(numbers)) % 5, numbers).sum()
    probe.before_backward()
    loss.backward()
    probe.after_backward()
    probe.finish()
    return probe.collect(transfer.fetch())


@pytest.mark.parametrize(
    ("apart", "layer", "expected"), [(False, "mixed", [math.nan] * 3 + [1.0, 1000.0]), (True, "apart", [1.0, 1000.0])]
)
def test_raw_numbers_behind_an_embedding_are_measured_where_they_go_in(apart, layer, expected):
    found = _of_table(Table(apart), torch.tensor([[1.0, 1000.0]] * 6))
    assert found.input_layer == layer
    np.testing.assert_allclose(found.input_rms, expected)
    np.testing.assert_allclose(found.input_deviation, [0 * x for x in expected], atol=1e-4)


def test_columns_that_are_not_measured_at_the_end_are_left_out():
    class Ahead(Table):
        def forward(self, keys, numbers):
            return self.head(self.mixed(torch.cat([numbers, self.lookup(keys)], 1)))

    np.testing.assert_allclose(_of_table(Ahead(), torch.full((4, 2), 7.0)).input_rms, [7.0, 7.0])


def test_the_rows_of_a_frozen_table_are_data():
    model = Table()
    nn.init.constant_(model.lookup.requires_grad_(requires_grad=False).weight, 300.0)
    found = _of_table(model, torch.full((4, 2), 7.0))
    assert found.input_layer == "mixed"
    np.testing.assert_allclose(found.input_rms, [300.0] * 3 + [7.0] * 2)


def test_what_another_frozen_layer_makes_is_no_input():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.lookup, self.body, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 1)
            self.lookup.requires_grad_(requires_grad=False)
            self.body.requires_grad_(requires_grad=False)

        def forward(self, keys, _):
            return self.head(self.body(self.lookup(keys)))

    assert not _of_table(Frozen(), torch.full((4, 2), 7.0)).input_rms.size


def test_a_nan_in_a_column_of_an_embedding_leaves_the_raw_ones():
    model = Table()
    with torch.no_grad():
        model.lookup.weight.fill_(math.nan)
    np.testing.assert_allclose(_of_table(model, torch.full((4, 2), 7.0)).input_rms, [math.nan] * 3 + [7.0, 7.0])


@pytest.mark.parametrize(
    ("cell", "bias", "shut"),
    [
        (nn.LSTMCell(1, 2), -10.0, 24),
        (nn.LSTMCell(1, 2), 4.0, 6),  # the tanh alone
        (nn.RNNCell(1, 2), -10.0, 6),
        (nn.GRUCell(1, 2), -10.0, 12),  # what a gate lets through of the third is not known
    ],
)
def test_the_bias_of_the_state_shuts_gates_too(cell, bias, shut):
    for name, parameter in cell.named_parameters():
        nn.init.constant_(parameter, bias if name == "bias_hh" else 0.0)
    assert int(shut_gates(cell, (torch.ones(3, 1),))[0]) == shut
