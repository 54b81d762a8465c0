"""The weights that map a state to the next one, and their spectral radius."""

import pytest
import torch
from torch import nn

from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.signals import SignalProbe
from lightning_gradflow.probes.spectra import SpectralProbe
from lightning_gradflow.probes.state_weights import stack_gain, state_weights
from lightning_gradflow.probes.transfer import Transfer

SIZE, STEPS = 12, 10


class Own(nn.Module):
    """Bare matrices."""

    def __init__(self, *sizes):
        super().__init__()
        self.matrices = [nn.Parameter(torch.randn(size)) for size in sizes]
        for i, matrix in enumerate(self.matrices):
            self.register_parameter(f"w{i}", matrix)


def _shapes(module, turns=STEPS):
    return {key: tuple(weight.shape) for key, weight in state_weights(module, turns)}


def _with_codes():
    """A linear layer of the user's own, with a parameter that is no matrix."""
    layer = nn.Linear(SIZE, SIZE)
    layer.register_parameter("codes", nn.Parameter(torch.zeros(2, 3, 4)))
    return layer


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (_with_codes(), {"weight": (SIZE, SIZE)}),
        (nn.Linear(SIZE, SIZE), {"weight": (SIZE, SIZE)}),
        (nn.Linear(SIZE, 4 * SIZE), {}),
        (
            nn.Linear(SIZE + 5, 3 * SIZE),
            {"weight": (SIZE - 3, SIZE - 3)} | {f"weight[{i}]": (SIZE - 3,) * 2 for i in (1, 2, 3)},
        ),
        (nn.Linear(SIZE + 5, SIZE), {"weight": (SIZE, SIZE)}),
        (nn.Linear(SIZE + 5, 4 * SIZE), {f"weight{i}": (SIZE, SIZE) for i in ("", "[1]", "[2]", "[3]")}),
        (nn.Linear(SIZE, 2 * SIZE + 2), {}),
        (nn.Linear(SIZE, 5 * SIZE), {}),
        (nn.Conv2d(SIZE, SIZE, 3), {"weight": (SIZE, SIZE)}),
        (nn.Conv1d(SIZE, SIZE, 3, groups=SIZE), {}),
        (nn.ConvTranspose1d(SIZE, SIZE, 3), {}),
        (nn.LSTMCell(SIZE, SIZE), {"weight_hh": (SIZE, SIZE)}),
        (nn.LSTM(SIZE, SIZE, proj_size=4), {}),
        (nn.Bilinear(SIZE, SIZE, SIZE), {}),
        (Own((3, SIZE), (SIZE, SIZE)), {"w1": (SIZE, SIZE)}),
        (Own((SIZE, SIZE), (SIZE, SIZE)), {}),  # ten turns for two: it may be a chain of them
        (Own((SIZE, SIZE, SIZE)), {}),
        (Own((SIZE, 3 * SIZE)), {"w0": (SIZE, SIZE), "w0[1]": (SIZE, SIZE), "w0[2]": (SIZE, SIZE)}),
        (Own((SIZE, 2 * SIZE)), {}),
        (Own((SIZE, 4 * SIZE), (SIZE, SIZE)), {"w1": (SIZE, SIZE)}),
        (Own((SIZE, 4 * SIZE), (SIZE, 4 * SIZE)), {}),  # as above
        (nn.Linear(1, 1), {}),
    ],
)
def test_what_a_state_is_multiplied_with(module, expected):
    assert _shapes(module) == expected


def test_of_inputs_and_a_state_together_the_last_columns_are_the_state_s():
    layer = nn.Linear(SIZE + 5, SIZE)
    ((_, weight),) = state_weights(layer, STEPS)
    assert torch.equal(weight, layer.weight[:, 5:])


def test_what_is_called_seven_times_is_no_loop_but_torch_s_own_always_are():
    assert _shapes(nn.Linear(SIZE, SIZE), 7) == _shapes(Own((SIZE, SIZE)), 7) == {}
    assert _shapes(nn.GRU(SIZE, SIZE), 1) == {"weight_hh_l0": (SIZE, SIZE)}


def test_of_a_convolution_it_is_what_happens_to_a_state_that_is_the_same_everywhere():
    conv = nn.Conv1d(SIZE, SIZE, 3, padding=1, bias=False)
    ((_, weight),) = state_weights(conv, STEPS)
    state = torch.randn(SIZE)
    inside = conv(state[None, :, None].expand(1, SIZE, 9))[0, :, 4]
    torch.testing.assert_close(weight @ state, inside.detach())


class Net(nn.Module):
    """A loop by hand, in one of several ways."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.enter = nn.Linear(3, SIZE)
        self.act = nn.Tanh()
        if kind == "linear":
            self.again = nn.Linear(SIZE, SIZE)
        else:
            self.w = nn.Parameter(torch.randn(SIZE, SIZE))
        if kind == "bare":
            self.v = nn.Parameter(torch.randn(3, SIZE))

    def forward(self, x):
        state = x.new_zeros(len(x), SIZE)
        for now in x.unbind(1):
            if self.kind == "bare":
                state = torch.tanh(now @ self.v + state @ self.w)
            elif self.kind == "beside":
                state = self.act(self.enter(now) + state @ self.w)
            else:
                state = torch.tanh(self.enter(now) + self.again(state))
        return state


def _measured(model):
    x = torch.randn(16, STEPS, 3)
    layers, transfer = LayerMap(model), Transfer()
    signals = SignalProbe(layers, transfer)
    signals.start_batch()
    loss = model(x).square().mean()
    signals.before_backward()
    loss.backward()
    signals.after_backward()
    spectra = SpectralProbe(layers, transfer)
    spectra.measure(signals.turns)
    found = spectra.collect(transfer.fetch())
    return {name: values["loop_radius"] for name, values in found.items() if "loop_radius" in values}


@pytest.mark.parametrize(("kind", "layer"), [("linear", "again"), ("bare", "(root)"), ("beside", "(root)")])
def test_the_radius_of_a_loop_by_hand_is_that_of_its_eigenvalues(kind, layer):
    torch.manual_seed(0)
    net = Net(kind)
    weight = net.again.weight if kind == "linear" else net.w
    weight.data += 0.5  # one eigenvalue stands out, and the first sample has it
    assert _measured(net) == {layer: pytest.approx(float(torch.linalg.eigvals(weight.detach()).abs().max()), rel=0.05)}


def test_activations_behind_many_layers_are_no_loop():
    class Deep(Own):
        def __init__(self):
            super().__init__((SIZE, SIZE))
            self.enter = nn.Linear(3, SIZE)
            self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(STEPS))

        def forward(self, x):
            x = self.enter(x) @ self.w0
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    assert _measured(Deep()) == {}


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("both", [True, False])
def test_the_gain_of_a_stack_is_that_of_what_comes_to_its_layers(kind, both):
    torch.manual_seed(0)
    stack, x = kind(3, SIZE, 4, bidirectional=both), torch.randn(STEPS, 8, 3)
    stack(x)[0].square().mean().backward()
    ends = ("", "_reverse") if both else ("",)
    first, last = (
        torch.cat([getattr(stack, f"bias_ih_l{layer}{end}").grad for end in ends]).norm().item() for layer in (0, 3)
    )
    assert stack_gain(stack).item() == pytest.approx(first / last, rel=1e-6)
    layers, transfer = LayerMap(stack), Transfer()
    spectra = SpectralProbe(layers, transfer)
    spectra.measure()
    assert spectra.collect(transfer.fetch())["(root)"]["stack_gain"] == pytest.approx(first / last, rel=1e-6)


@pytest.mark.parametrize("stack", [nn.RNN(3, SIZE), nn.RNN(3, SIZE, 4, bias=False)])
def test_a_single_layer_and_one_without_biases_have_none(stack):
    stack(torch.randn(STEPS, 8, 3))[0].sum().backward()
    assert stack_gain(stack) is None


def test_nor_has_a_stack_without_gradients():
    assert stack_gain(nn.RNN(3, SIZE, 4)) is None


@pytest.mark.parametrize("shape", [(SIZE, 4 * SIZE), (4 * SIZE, SIZE)])
def test_of_gates_that_are_stacked_each_is_a_matrix_of_its_own(shape):
    own = Own(shape)
    found = dict(state_weights(own, STEPS))
    dim = shape.index(4 * SIZE)
    assert list(found) == ["w0", "w0[1]", "w0[2]", "w0[3]"]
    assert torch.equal(torch.cat([*found.values()], dim), own.w0)
