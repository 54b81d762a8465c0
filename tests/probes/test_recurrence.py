"""The gradient by time step against autograd's own, and the spectra against those of torch.linalg."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.recurrence import by_distance_to_the_end
from lightning_gradflow.probes.spectra import SpectralProbe
from lightning_gradflow.probes.transfer import Transfer
from tests.probes.test_signals import Sampled

KINDS = (nn.RNN, nn.LSTM, nn.GRU)
STEPS, BATCH, INPUTS, HIDDEN = 9, 4, 5, 7


class Net(nn.Module):
    """A recurrence with a name."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn


def _norms_by_time(gradient, time):
    return gradient.transpose(0, time).double().flatten(1).norm(dim=1).numpy()


def _last_state(state):
    return (state[0] if isinstance(state, tuple) else state)[-1]


def _sampled(rnn, forward):
    """Calls of the recurrence in a sampled step with the loss that `forward` gives."""
    sampled = Sampled(Net(rnn))
    found = sampled.step(lambda: forward(rnn))
    return sampled.calls.get("rnn"), found["rnn"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"batch_first": True}, {"num_layers": 2, "bias": False}])
@pytest.mark.parametrize("is_raw", [True, False])
def test_the_norms_are_those_of_the_gradient_at_the_input(kind, options, is_raw):
    torch.manual_seed(0)
    rnn, x = kind(INPUTS, HIDDEN, **options), torch.randn(STEPS, STEPS, INPUTS, requires_grad=not is_raw)
    time = 1 if options.get("batch_first") else 0

    def loss(rnn, x):
        output, state = rnn(x)
        return output.select(time, -1).square().sum() + _last_state(state).sum() + output.mean()

    found, values = _sampled(rnn, lambda rnn: loss(rnn, x))
    tracked = x.detach().clone().requires_grad_()
    loss(rnn, tracked).backward()
    np.testing.assert_allclose(found, _norms_by_time(tracked.grad, time), rtol=1e-6)
    assert values["calls"] == STEPS


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's own
def test_a_projected_state_and_an_initial_one():
    torch.manual_seed(0)
    rnn, x = nn.LSTM(INPUTS, HIDDEN, proj_size=3), torch.randn(STEPS, BATCH, INPUTS)
    first = (torch.randn(1, BATCH, 3, requires_grad=True), torch.randn(1, BATCH, HIDDEN))
    found, _ = _sampled(rnn, lambda rnn: rnn(x, first)[0][-1].sum())
    tracked = x.clone().requires_grad_()
    rnn(tracked, first)[0][-1].sum().backward()
    np.testing.assert_allclose(found, _norms_by_time(tracked.grad, 0), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_without_a_batch(kind):
    torch.manual_seed(0)
    rnn, x = kind(INPUTS, HIDDEN, batch_first=True), torch.randn(STEPS, INPUTS)
    found, _ = _sampled(rnn, lambda rnn: rnn(x)[0][-1].sum())
    tracked = x.clone().requires_grad_()
    rnn(tracked)[0][-1].sum().backward()
    np.testing.assert_allclose(found, tracked.grad.double().norm(dim=1).numpy(), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_raw", [True, False])
def test_packed_sequences_are_counted_from_their_own_ends(kind, is_raw):
    torch.manual_seed(0)
    rnn, lengths = kind(INPUTS, HIDDEN), torch.tensor([3, 9, 6, 9])
    x = torch.randn(STEPS, BATCH, INPUTS, requires_grad=not is_raw)

    def loss(rnn, x):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return _last_state(rnn(packed)[1]).square().sum()

    found, _ = _sampled(rnn, lambda rnn: loss(rnn, x))
    tracked = x.detach().clone().requires_grad_()
    loss(rnn, tracked).backward()
    squares = tracked.grad.double().square().sum(dim=2)
    by_distance = [[float(squares[n - 1 - d, b]) for b, n in enumerate(lengths) if n > d] for d in range(STEPS)]
    expected = [np.sqrt(np.mean(here) * BATCH) for here in by_distance[::-1]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_padding_behind_the_last_step_that_counts_is_no_time():
    torch.manual_seed(0)
    rnn, x = nn.GRU(INPUTS, HIDDEN), torch.randn(STEPS, BATCH, INPUTS)
    found, _ = _sampled(rnn, lambda rnn: rnn(x)[0][5].sum())
    whole, _ = _sampled(rnn, lambda rnn: rnn(x[:6])[0][5].sum())
    np.testing.assert_allclose(found, whole, rtol=1e-6)


def test_both_ends_of_a_bidirectional_recurrence_are_ends():
    torch.manual_seed(0)
    rnn, x = nn.RNN(INPUTS, HIDDEN, bidirectional=True), torch.randn(STEPS, BATCH, INPUTS)
    found, values = _sampled(rnn, lambda rnn: rnn(x)[1].sum())
    tracked = x.clone().requires_grad_()
    rnn(tracked)[1].sum().backward()
    r = _norms_by_time(tracked.grad, 0) ** 2
    folded = [np.sqrt(r[k] + r[-1 - k]) for k in range(4)]
    np.testing.assert_allclose(found[1:], folded[::-1], rtol=1e-6)
    np.testing.assert_allclose(found[0], np.sqrt(2 * r[4]), rtol=1e-6)  # alone in the middle, the others are two
    assert values["calls"] == 5


@pytest.mark.parametrize("both_ends", [True, False])
def test_squares_by_distance_against_a_loop(both_ends):
    generator = torch.Generator().manual_seed(0)
    squares = torch.rand(12, 6, generator=generator) * (torch.rand(12, 6, generator=generator) > 0.4)
    squares[:, 2] = 0
    sums, counts = by_distance_to_the_end(squares, both_ends)
    length = 6 if both_ends else 12
    expected, number = np.zeros(length), np.zeros(length)
    for b in range(6):
        there = np.flatnonzero(squares[:, b])
        for t in range(12) if there.size else ():
            distance = there[-1] - t
            if both_ends:
                distance = min(distance, t - there[0])
            if distance >= 0:
                expected[length - 1 - distance] += float(squares[t, b])
                number[length - 1 - distance] += 1
    np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(counts.numpy(), number)


def test_a_gradient_that_is_not_finite_is_infinite_at_its_step_and_those_before():
    torch.manual_seed(0)
    rnn, x = nn.RNN(INPUTS, HIDDEN), torch.randn(STEPS, BATCH, INPUTS, requires_grad=True)

    def loss(rnn):
        output = rnn(x)[0]
        return output[4].sum() * torch.inf + output[-1].sum()

    found, _ = _sampled(rnn, loss)
    assert np.isinf(found).tolist() == [True] * 5 + [False] * 4


def test_several_batches_of_a_step_add_up():
    torch.manual_seed(0)
    rnn, x, y = nn.GRU(INPUTS, HIDDEN), torch.randn(STEPS, BATCH, INPUTS), torch.randn(5, BATCH, INPUTS)
    sampled = Sampled(Net(rnn))
    sampled.step(lambda: rnn(x)[0][-1].sum(), lambda: rnn(y)[0][-1].sum())
    tracked = [x.clone().requires_grad_(), y.clone().requires_grad_()]
    for one in tracked:
        rnn(one)[0][-1].sum().backward()
    late = np.sqrt(_norms_by_time(tracked[0].grad, 0)[-5:] ** 2 + _norms_by_time(tracked[1].grad, 0) ** 2)
    np.testing.assert_allclose(sampled.calls["rnn"][-5:], late, rtol=1e-6)
    # as if the shorter ones were as long
    early = _norms_by_time(tracked[0].grad, 0)[:-5] * np.sqrt(2)
    np.testing.assert_allclose(sampled.calls["rnn"][:-5], early, rtol=1e-6)


def test_under_checkpointing_the_repeated_pass_is_read():
    torch.manual_seed(0)
    rnn, x = nn.GRU(INPUTS, HIDDEN), torch.randn(STEPS, BATCH, INPUTS, requires_grad=True)
    for reentrant in (True, False):
        found, _ = _sampled(rnn, lambda rnn, r=reentrant: checkpoint(rnn, x, use_reentrant=r)[0][-1].sum())
        plain, _ = _sampled(rnn, lambda rnn: rnn(x)[0][-1].sum())
        np.testing.assert_allclose(found, plain, rtol=1e-6)


def test_nothing_is_measured_where_nothing_can_be():
    rnn, x = nn.RNN(INPUTS, HIDDEN), torch.randn(STEPS, BATCH, INPUTS)
    assert _sampled(rnn, lambda rnn: rnn(input=x)[0][-1].sum())[0] is None  # by keyword
    assert _sampled(rnn, lambda rnn: rnn(x[:1])[0].sum())[0] is None  # one step
    rnn.requires_grad_(False)
    scale = torch.ones((), requires_grad=True)
    assert _sampled(rnn, lambda rnn: rnn(x)[0][-1].sum() * scale)[0] is None


@pytest.mark.parametrize("is_raw", [True, False])
def test_a_recurrence_called_step_by_step_has_its_calls_for_time(is_raw):
    torch.manual_seed(0)
    rnn, x = nn.GRU(INPUTS, HIDDEN), torch.randn(STEPS, BATCH, INPUTS, requires_grad=not is_raw)

    def loss(rnn):
        state = None
        for now in x:
            output, state = rnn(now[None], state)
        return output.sum()

    found, _ = _sampled(rnn, loss)
    whole, _ = _sampled(rnn, lambda rnn: rnn(x)[0][-1].sum())
    np.testing.assert_allclose(found, whole, rtol=1e-5)


def test_the_second_run_leaves_the_run_as_it_is():
    torch.manual_seed(0)
    rnn, x = nn.LSTM(INPUTS, HIDDEN, num_layers=2, dropout=0.5), torch.randn(STEPS, BATCH, INPUTS)
    state = torch.get_rng_state()
    rnn(x)[0][-1].sum().backward()
    gradients, after = [p.grad.clone() for p in rnn.parameters()], torch.get_rng_state()
    rnn.zero_grad()
    torch.set_rng_state(state)
    found, _ = _sampled(rnn, lambda rnn: rnn(x)[0][-1].sum())
    assert found is not None
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(p.grad, g) for p, g in zip(rnn.parameters(), gradients, strict=True))
    assert rnn.dropout == 0.5
    assert not x.requires_grad


# -- spectra --------------------------------------------------------------------------------------------------------


def _spectra(model, samples):
    transfer = Transfer()
    probe = SpectralProbe(LayerMap(model), transfer)
    for _ in range(samples):
        probe.measure()
        found = probe.collect(transfer.fetch())
    return found


def _trained(model, loss, steps=60):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_the_spectra_of_trained_weights(kind):
    torch.manual_seed(0)
    model, x, y = (
        nn.ModuleDict({"rnn": kind(5, 24), "out": nn.Linear(24, 3)}),
        torch.randn(12, 16, 5),
        torch.rand(16, 3),
    )
    _trained(model, lambda: (model["out"](model["rnn"](x)[0][-1]) - y).square().mean())
    found = _spectra(model, samples=20)
    weight = model["rnn"].weight_hh_l0.detach()
    block = {nn.RNN: weight, nn.LSTM: weight[48:72], nn.GRU: weight[48:72]}[kind]
    assert found["rnn"]["spectral_norm"] == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=0.02)
    assert found["rnn"]["recurrent_radius"] == pytest.approx(float(torch.linalg.eigvals(block).abs().max()), rel=0.1)
    out = float(torch.linalg.matrix_norm(model["out"].weight.detach(), 2))
    assert found["out"] == {"spectral_norm": pytest.approx(out, rel=0.02)}


def test_the_first_sample_is_near_already():
    torch.manual_seed(0)
    rnn = nn.RNN(5, 40)
    found = _spectra(rnn, samples=1)["(root)"]
    assert found["spectral_norm"] == pytest.approx(
        float(torch.linalg.matrix_norm(rnn.weight_hh_l0.detach(), 2)), rel=0.1
    )
    radius = float(torch.linalg.eigvals(rnn.weight_hh_l0.detach()).abs().max())
    assert found["recurrent_radius"] == pytest.approx(radius, rel=0.15)


def test_a_rotation_keeps_every_length():
    rnn = nn.RNN(1, 2)
    rnn.weight_hh_l0.data = torch.tensor([[0.0, -0.5], [0.5, 0.0]])
    assert _spectra(rnn, samples=3)["(root)"] == {
        "spectral_norm": pytest.approx(0.5),
        "recurrent_radius": pytest.approx(0.5),
    }


def test_the_largest_of_several_recurrent_weights_counts():
    rnn = nn.RNN(2, 2, num_layers=2, bidirectional=True)
    for i, name in enumerate(["weight_hh_l0", "weight_hh_l0_reverse", "weight_hh_l1", "weight_hh_l1_reverse"]):
        getattr(rnn, name).data = torch.eye(2) * (i + 1)
    found = _spectra(rnn, samples=2)["(root)"]
    assert (found["spectral_norm"], found["recurrent_radius"]) == (pytest.approx(4), pytest.approx(4))


def test_the_ratio_of_gradients_is_that_of_the_state_to_the_input():
    rnn = nn.RNN(2, 2, bias=False)
    rnn.weight_hh_l0.grad, rnn.weight_ih_l0.grad = torch.tensor([[3.0, 4.0], [0, 0]]), torch.tensor([[2.0, 0], [0, 0]])
    assert _spectra(rnn, samples=1)["(root)"]["hh_to_ih"] == 2.5
    rnn.zero_grad(set_to_none=False)
    assert "hh_to_ih" not in _spectra(rnn, samples=1)["(root)"]


def test_zeros_and_values_that_are_not_finite():
    net = nn.RNN(2, 3)
    transfer = Transfer()
    probe = SpectralProbe(LayerMap(net), transfer)
    healthy = net.weight_hh_l0.detach().clone()
    for weight, expected in [(torch.zeros(3, 3), 0.0), (torch.full((3, 3), torch.nan), np.inf)]:
        net.weight_hh_l0.data = weight
        probe.measure()
        found = probe.collect(transfer.fetch())["(root)"]
        assert (found["spectral_norm"], found["recurrent_radius"]) == (expected, pytest.approx(expected, abs=1e-6))
    net.weight_hh_l0.data = healthy
    for _ in range(60):
        probe.measure()
        found = probe.collect(transfer.fetch())["(root)"]
    assert found["spectral_norm"] == pytest.approx(float(torch.linalg.matrix_norm(healthy, 2)), rel=1e-3)


def test_a_probe_goes_on_where_its_state_was_taken():
    torch.manual_seed(0)
    net = nn.GRU(3, 16)
    transfer = Transfer()
    first, second = (SpectralProbe(LayerMap(net), transfer) for _ in range(2))
    for _ in range(3):
        first.measure()
        transfer.fetch()
    second.load_state_dict(first.state_dict())
    found = []
    for probe in (first, second):
        probe.measure()
        found.append(probe.collect(transfer.fetch()))
    assert found[0] == found[1]


def test_the_size_of_weights_is_read_once_and_before_the_first_step():
    net = nn.Sequential(
        nn.Embedding(10, 4), nn.Linear(4, 8), nn.LSTM(8, 6), nn.Bilinear(6, 6, 6), nn.ConvTranspose1d(6, 4, 2)
    )
    usual = {name: p.detach().clone() for name, p in net.named_parameters()}
    transfer = Transfer()
    probe = SpectralProbe(LayerMap(net), transfer)
    for samples in range(2):
        probe.before_step()
        for parameter in net.parameters():
            parameter.data += 1
        probe.before_step()  # of another optimizer
        probe.measure()
        found = probe.collect(transfer.fetch())
        sizes = {name: values["initial_size"] for name, values in found.items() if "initial_size" in values}
        assert sizes.keys() == (set() if samples else {"1", "2", "4"})
        if not samples:
            naive = {"1": ("1.weight", 4), "2": ("2.weight_ih_l0", 8), "4": ("4.weight", 6 * 2)}
            for name, (weight, inputs) in naive.items():
                rms = float(usual[weight].double().square().mean().sqrt())
                assert sizes[name] == pytest.approx(rms * inputs**0.5, rel=1e-6)
                assert found[name]["initial_norm"] == pytest.approx(float(usual[weight].norm()), rel=1e-6)


def test_a_run_that_goes_on_has_no_initial_size():
    transfer = Transfer()
    first, second = (SpectralProbe(LayerMap(nn.Linear(4, 4)), transfer) for _ in range(2))
    first.measure()
    transfer.fetch()
    second.load_state_dict(first.state_dict())
    second.before_step()
    second.measure()
    assert "initial_size" not in second.collect(transfer.fetch())["(root)"]


def test_embeddings_and_vectors_have_no_spectrum():
    assert _spectra(nn.ModuleList([nn.LayerNorm(4)]), samples=1) == {"0": {"gain_mean": 1.0, "gain_rms": 1.0}}
    table = nn.Embedding(10, 4)
    size = pytest.approx(float(table.weight.detach().double().square().mean().sqrt()), rel=1e-6)
    assert _spectra(nn.ModuleList([table]), samples=1) == {"0": {"embedding_rms": size}}


def test_the_table_of_an_embedding_is_measured_once():
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    transfer = Transfer()
    probe = SpectralProbe(LayerMap(net), transfer)
    for expected in ({"0", "1"}, {"1"}):
        probe.measure()
        assert probe.collect(transfer.fetch()).keys() == expected


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 0), (nn.RNNCell, 0), (nn.GRU, 2), (nn.LSTMCell, 3), (nn.LSTM, 3)])
def test_the_gates_of_a_recurrence_are_told_in_the_first_sample(kind, gates):
    rnn = kind(3, 4)
    assert _spectra(rnn, samples=1)["(root)"]["recurrent_gates"] == gates
    assert "recurrent_gates" not in _spectra(rnn, samples=2)["(root)"]
