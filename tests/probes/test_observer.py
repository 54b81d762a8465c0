"""Layer outputs and activations as they are executed, and nothing left behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from lightning_gradflow.probes.layers import LayerMap
from lightning_gradflow.probes.observer import ForwardObserver, first_tensor


class Calls(nn.Module):
    """A model whose forward is the function that it is given."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


class PassOn(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _observed(model, run=None):
    """What is reported of a forward pass, in order: layers by name, activations as (module, op)."""
    seen = []
    observer = ForwardObserver(
        LayerMap(model),
        lambda name, output: seen.append(name),
        lambda module, op, output, arguments: seen.append((module, op)),
    )
    observer.open()
    try:
        run() if run else model(torch.randn(4, 6))
    finally:
        observer.close()
    return seen


def _nothing_is_left():
    assert not module_hooks._global_forward_hooks
    assert not module_hooks._global_forward_pre_hooks
    assert not module_hooks._global_forward_hooks_always_called
    assert not _get_current_function_mode_stack()


class Counts(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_what_is_done_with_what_is_reported_is_seen_by_no_mode():
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.ones(3, 2)

    def functions(observed):
        observer = ForwardObserver(
            LayerMap(model), lambda _, out: out.detach().norm(), lambda m, op, out, a: out.detach().norm()
        )
        with Counts() as mode:
            if observed:
                observer.open()
            model(x)
            observer.close()
        return [func for func in mode.seen if func in (torch.tanh, F.linear, Tensor.norm, Tensor.detach)]

    assert functions(True) == functions(False) != []


MODULES = {
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardtanh": nn.Hardtanh(),
    "softsign": nn.Softsign(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(),
    "prelu": nn.PReLU(),
    "rrelu": nn.RReLU(),
    "elu": nn.ELU(),
    "selu": nn.SELU(),
    "celu": nn.CELU(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "softplus": nn.Softplus(),
    "logsigmoid": nn.LogSigmoid(),
    "glu": nn.GLU(),
}


@pytest.mark.parametrize("op", MODULES)
def test_every_activation_module_is_seen_once_and_by_its_name(op):
    seen = _observed(nn.Sequential(MODULES[op]))
    assert [entry for entry in seen if isinstance(entry, tuple)] == [("0", op)]


@pytest.mark.parametrize(
    ("call", "op"),
    [
        (torch.sigmoid, "sigmoid"),
        (torch.Tensor.sigmoid, "sigmoid"),
        (F.sigmoid, "sigmoid"),
        (torch.special.expit, "sigmoid"),
        (lambda x: x.clone().sigmoid_(), "sigmoid"),
        (torch.tanh, "tanh"),
        (lambda x: x.tanh(), "tanh"),
        (F.relu, "relu"),
        (lambda x: F.relu(x.clone(), inplace=True), "relu"),
        (lambda x: x.relu(), "relu"),
        (lambda x: torch.relu_(x.clone()), "relu"),
        (lambda x: F.leaky_relu_(x.clone()), "leaky_relu"),
        (F.silu, "silu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu"),
        (lambda x: F.hardtanh(x, 0.0, 6.0), "relu6"),
        (lambda x: F.hardtanh(x, 0.0, 1.0), "hardtanh"),
    ],
)
def test_every_spelling_of_a_function_is_seen_once(call, op):
    assert _observed(Calls(lambda self, x: call(x))) == [("(root)", op)]


def test_softmax_is_no_activation():
    assert _observed(nn.Softmax(dim=1)) == []


@pytest.mark.parametrize(
    ("module", "expected"),
    [(nn.Hardtanh(-2.0, 3.0), {"min_val": -2.0, "max_val": 3.0}), (nn.ELU(0.5), {"alpha": 0.5})],
)
def test_the_limits_of_an_activation_are_reported(module, expected):
    found = []
    observer = ForwardObserver(LayerMap(module), lambda *_: None, lambda m, o, t, arguments: found.append(arguments))
    observer.open()
    module(torch.zeros(2))
    observer.close()
    assert {name: found[0][name] for name in expected} == expected


def test_the_order_is_that_of_execution():
    model = Calls(
        lambda self, x: torch.sigmoid(self.last(self.act(self.first(x)))),
        last=nn.Linear(6, 6),
        act=nn.Tanh(),
        first=nn.Linear(6, 6),
    )
    assert _observed(model) == ["first", ("act", "tanh"), "last", ("(root)", "sigmoid")]


def test_a_function_is_told_of_the_innermost_module_that_calls_it():
    inner = Calls(lambda self, x: torch.tanh(x))
    model = Calls(lambda self, x: torch.relu(self.inner(x)), inner=inner)
    assert _observed(model) == [("inner", "tanh"), ("(root)", "relu")]


def test_an_error_that_the_user_catches_does_not_mix_up_the_names():
    def fails(self, x):
        raise ValueError("mine")

    def forward(self, x):
        with pytest.raises(ValueError, match="mine"):
            self.inner(x)
        return torch.relu(x)

    assert _observed(Calls(forward, inner=Calls(fails, lin=nn.Linear(1, 1)))) == [("(root)", "relu")]


def test_what_goes_on_in_a_network_outside_the_model_is_not_seen():
    teacher = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid())
    assert _observed(Calls(lambda self, x: self.lin(teacher(x)), lin=nn.Linear(6, 6))) == ["lin"]


def test_a_wrapper_around_the_model_hides_nothing():
    model = nn.Sequential(nn.Linear(6, 6))
    wrapper = Calls(lambda self, x: torch.tanh(self.inner(x)), inner=model)
    assert _observed(model, lambda: wrapper(torch.ones(1, 6))) == ["0", ("(root)", "tanh")]


def test_an_activation_module_that_is_made_on_the_spot_is_seen():
    assert _observed(Calls(lambda self, x: nn.ReLU()(x))) == [("(root)", "relu")]


def test_integer_and_empty_handed_layers_are_passed_over():
    class Index(nn.Linear):
        def forward(self, x):
            return super().forward(x).argmax(1)

    class Nothing(nn.Linear):
        def forward(self, x):
            return None

    assert _observed(Calls(lambda self, x: (self.a(x), self.b(x)), a=Index(6, 6), b=Nothing(6, 6))) == []


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (torch.ones(1), 1.0),
        ((None, torch.ones(1)), 1.0),
        ([torch.tensor([3]), {"x": (torch.full((1,), 2.0),)}], 2.0),
        (nn.utils.rnn.pack_sequence([torch.full((1,), 5.0)]), 5.0),
        ((torch.tensor([1]), "text", None), None),
        (torch.ones(1, dtype=torch.complex64), None),
        (torch.ones(1).to_sparse(), None),
        (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged), None),
        (None, None),
    ],
)
def test_the_first_floating_tensor_of_an_output_is_taken(output, expected):
    found = first_tensor(output)
    assert (found.item() if found is not None else None) == expected


def test_a_device_context_in_forward_hides_nothing():
    def forward(self, x):
        with torch.device("cpu"):
            return torch.sigmoid(self.lin(x)) + torch.zeros(6)

    assert _observed(Calls(forward, lin=nn.Linear(6, 6))) == ["lin", ("(root)", "sigmoid")]


def test_a_mode_of_the_user_stays_where_it_is():
    model = nn.Linear(6, 6)
    observer = ForwardObserver(LayerMap(model), lambda *_: None, lambda *_: None)
    observer.open()
    with PassOn() as mine:
        observer.close()
        assert _get_current_function_mode_stack()[-1] is mine
    observer.close()
    _nothing_is_left()


def test_behind_a_mode_of_the_user_nothing_is_reported_after_close():
    seen = []
    observer = ForwardObserver(LayerMap(nn.ReLU()), lambda *_: None, lambda *args: seen.append(args))
    observer.open()
    with PassOn():
        observer.close()
        torch.relu(torch.ones(1))
    observer.close()
    assert seen == []


def test_open_and_close_may_be_repeated():
    observer = ForwardObserver(LayerMap(nn.ReLU()), lambda *_: None, lambda *_: None)
    for _ in range(2):
        observer.open()
        observer.open()
        assert len(_get_current_function_mode_stack()) == 1
        observer.close()
        observer.close()
        _nothing_is_left()


def test_nothing_is_left_after_an_error_in_forward():
    def forward(self, x):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        _observed(Calls(forward))
    _nothing_is_left()


def test_the_output_is_bit_identical():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 6), nn.RReLU())
    x = torch.randn(4, 6)
    torch.manual_seed(0)
    expected = model(x)
    outputs = []
    torch.manual_seed(0)
    _observed(model, lambda: outputs.append(model(x)))
    assert torch.equal(outputs[0], expected)


def test_what_goes_on_inside_of_vmap_is_passed_over():
    model = Calls(
        lambda self, x: self.b(torch.vmap(lambda v: torch.tanh(self.a(v)))(x)), a=nn.Linear(6, 6), b=nn.Linear(6, 1)
    )
    assert _observed(model) == ["b"]


def test_an_error_in_the_reports_does_not_reach_the_forward_pass():
    errors = []
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    observer = ForwardObserver(LayerMap(model), lambda *_: 1 / 0, lambda *_: 1 / 0, errors.append)
    observer.open()
    model(torch.ones(1, 2))
    observer.close()
    assert [type(error) for error in errors] == [ZeroDivisionError] * 2


def test_a_compiled_model_is_seen_and_not_compiled_again():
    counter = CompileCounter()
    block = nn.Sequential(nn.Linear(6, 6), Calls(lambda self, x: torch.sigmoid(x)))
    model = Calls(lambda self, x: self.block(x), block=torch.compile(block, backend=counter))
    x = torch.ones(4, 6)
    seen = []
    for sampled in (False, True, False, True, False):
        if sampled:
            seen.append(_observed(model, lambda: model(x)))
        else:
            model(x)
    assert seen == [["block._orig_mod.0", ("block._orig_mod.1", "sigmoid")]] * 2
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_the_stance_of_the_compiler_is_put_back():
    import torch._dynamo.eval_frame as eval_frame

    observer = ForwardObserver(LayerMap(nn.ReLU()), lambda *_: None, lambda *_: None)
    observer.open()
    during = eval_frame._stance.stance
    observer.close()
    assert (during, eval_frame._stance.stance) == ("force_eager", "default")


def _checkpointed(follow):
    """What is reported of the backward pass of a checkpointed segment, which repeats it."""
    model = Calls(lambda self, x: torch.tanh(self.lin(x)), lin=nn.Linear(6, 6))
    seen = []
    observer = ForwardObserver(LayerMap(model), lambda name, _: seen.append(name), lambda m, op, t, a: seen.append(op))
    observer.open()
    loss = checkpoint(model, torch.ones(4, 6, requires_grad=True), use_reentrant=True).sum()
    if follow:
        observer.follow_backward()
    seen.clear()
    loss.backward()
    observer.close()
    return seen


def test_what_a_backward_pass_repeats_is_seen_in_order():
    assert _checkpointed(follow=True) == ["lin", "tanh"]


def test_a_backward_pass_that_was_followed_leaves_nothing():
    _checkpointed(follow=True)
    _nothing_is_left()


class OfLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.ParameterList([torch.ones(6, 6), torch.ones(6, 6)])

    def forward(self, x):
        return torch.tanh(x @ self.w[0]) @ self.w[1]


def test_the_end_of_a_module_whose_parameters_are_in_lists_is_that_of_a_layer():
    model = nn.Sequential(OfLists(), nn.Linear(6, 6))
    assert _observed(model) == [("0", "tanh"), "0.w", "1"]
    assert _observed(OfLists()) == [("(root)", "tanh"), "w"]
