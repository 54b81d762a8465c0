"""The code in the suggestions does what is said of it, on real models."""

from math import inf

import pytest
import torch
from torch import nn

from lightning_gradflow.advice import suggest
from lightning_gradflow.advice.site import PASTE
from lightning_gradflow.history import History
from tests.advice.cases import PAIRS, Net, finding, history_of


def span(model):
    """Decades between the loss gradient at the first and at the last layer's output, by plain autograd."""
    torch.manual_seed(1)
    outputs = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: outputs.append(output))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    loss = nn.functional.cross_entropy(model(torch.rand(64, 32)), torch.randint(4, (64,)))
    for hook in hooks:
        hook.remove()
    first, last = torch.autograd.grad(loss, [outputs[0], outputs[-1]])
    return float(torch.log10(first.norm() / last.norm()))


def test_sigmoid_layers_of_gain_4_with_centred_biases_are_exactly_an_orthogonal_tanh_net():
    torch.manual_seed(0)
    x = torch.rand(16, 32, dtype=torch.float64)
    sigmoid, tanh = x, 2 * x - 1
    for _ in range(50):
        weight = nn.init.orthogonal_(torch.empty(32, 32, dtype=torch.float64), gain=4.0)
        sigmoid = torch.sigmoid(nn.functional.linear(sigmoid, weight, -0.5 * weight.sum(1)))
        tanh = torch.tanh(nn.functional.linear(tanh, weight / 4))
        torch.testing.assert_close(sigmoid, (1 + tanh) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("act", "depth", "shrink"), [(nn.Sigmoid, 10, 1.0), (nn.Sigmoid, 30, 1.0), (nn.Tanh, 20, 0.01), (nn.ReLU, 24, 1.0)]
)
def test_the_first_suggestion_for_a_vanishing_gradient_cures_the_span(act, depth, shrink):
    torch.manual_seed(0)
    model = Net(depth, act)
    if shrink != 1:
        for layer in model.net[::2]:
            nn.init.normal_(layer.weight, std=shrink)
    assert span(model) < -4
    cure = suggest(finding("vanishing_gradient", "weight_scale"), history_of(model))[0]
    exec(cure.code, {"self": model})
    assert abs(span(model)) < 2


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh, nn.ReLU])
def test_each_change_of_layers_runs_on_a_real_model_and_keeps_its_shapes(act):
    ran = set()
    for kind, cause in PAIRS:
        for suggestion in suggest(finding(kind, cause), history_of(Net(act=act))):
            if (
                suggestion.code.startswith(PASTE)
                and "Look at" not in suggestion.title  # its hook stops at the first value that is not finite
                and "recurrent weights" not in suggestion.title
                and "recurrence" not in suggestion.title
            ):
                model = Net(act=act)
                exec(suggestion.code, {"self": model})
                assert model(torch.rand(8, 32)).shape == (8, 4)
                ran.add(suggestion.title)
    assert len(ran) >= 5


def test_the_cure_of_a_sigmoid_net_makes_it_exactly_an_orthogonal_tanh_net():
    torch.manual_seed(0)
    model = Net(depth=6).double()
    cure = suggest(finding("vanishing_gradient", "weight_scale"), history_of(model))[0]
    exec(cure.code, {"self": model})
    x = torch.randn(16, 32, dtype=torch.float64)
    sigmoid, tanh = x, x
    for i in range(0, 12, 2):
        sigmoid = torch.sigmoid(model.net[i](sigmoid))
        gain = 2 if i == 0 else 4  # data comes as it is; what comes from a sigmoid is half of what a tanh gives
        tanh = torch.tanh(nn.functional.linear(tanh, model.net[i].weight / gain))
        torch.testing.assert_close(model.net[i].weight @ model.net[i].weight.T, gain**2 * torch.eye(32).double())
        torch.testing.assert_close(sigmoid, (1 + tanh) / 2, rtol=0, atol=1e-12)


def test_swapping_activations_leaves_the_output_sigmoid_alone():
    model = Net(depth=3, output=nn.Sigmoid())
    (swap,) = [s for s in suggest(finding("vanishing_gradient", "saturation"), history_of(model)) if "ReLU" in s.title]
    exec(swap.code, {"self": model})
    assert [type(module).__name__ for module in model.net if not isinstance(module, nn.Linear)] == [
        "ReLU",
        "ReLU",
        "ReLU",
        "Sigmoid",
    ]


def test_residual_connections_let_the_gradient_through():
    torch.manual_seed(0)
    model = Net()
    before = span(model)
    (cure,) = [
        s for s in suggest(finding("vanishing_gradient", "saturation"), history_of(model)) if "residual" in s.title
    ]
    exec(cure.code, {"self": model})
    assert before < -6
    assert span(model) > -2


def test_a_model_that_owns_its_parameters_itself_is_called_model_in_code():
    history = History()
    history.layer_axis.merge(["(root)"])
    cures = suggest(finding("nonfinite_gradient", "forward", layers=("(root)",)), history)
    assert "model.register_forward_hook" in cures[0].code
    frozen = suggest(finding("no_gradient", "unused", layers=("(root)",)), history)[0]
    model = nn.Linear(2, 2)
    exec(frozen.code, {"self": model})
    assert not model.weight.requires_grad


def test_a_unit_that_went_out_of_range_is_stopped_with_the_range_of_its_input():
    model = Net(depth=1)
    code = suggest(finding("nonfinite_gradient", "forward", layers=("net.0",)), history_of(model))[0].code
    exec(code, {"self": model})
    with pytest.raises(FloatingPointError, match="not finite"):
        model(torch.full((1, 32), inf))
