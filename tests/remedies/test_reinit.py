"""Layers drawn anew: from data where that can be had, else by the book; and what stays as it was."""

import contextlib
import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Point, Row
from lightning_gradflow.remedies.around import activations_around
from lightning_gradflow.remedies.critical import make_critical
from lightning_gradflow.remedies.recurrent_treatment import treat
from lightning_gradflow.remedies.reinit import reinitialise
from lightning_gradflow.remedies.sick_layers import FAR
from lightning_gradflow.remedies.textbook import initialise
from lightning_gradflow.remedies.training import RehearsalError, Training

WIDTH, DEPTH, SEED = 16, 8, 3
LAYERS = tuple(str(2 * i) for i in range(DEPTH + 1))


def _net(activation=nn.Sigmoid):
    torch.manual_seed(0)
    layers = [module for _ in range(DEPTH) for module in (nn.Linear(WIDTH, WIDTH), activation())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 2))


def _batch():
    return torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(0))


def _history(op="sigmoid"):
    history = History()
    points = []
    for i in range(DEPTH + 1):
        points += [Point(str(2 * i), str(2 * i)), Point(f"{2 * i + 1}", f"{2 * i + 1}", op)]
    history.add_points(points[:-1])
    return history


def _copying(net, x=None):
    """A rehearsal on a copy, as a fit gives it."""

    @contextlib.contextmanager
    def rehearse():
        twin = copy.deepcopy(net)
        yield twin, lambda: twin(_batch() if x is None else x)

    return rehearse


def _training(net, rehearse=None, optimizer=None, history=None):
    optimizers = [] if optimizer is None else [optimizer]
    return Training(net, optimizers, _history() if history is None else history, rehearse, seed=SEED)


def _finding(*layers, cause="saturation"):
    return Finding(FindingKind.VANISHING_GRADIENT, Severity.WARNING, 0, layers or LAYERS, cause)


def _stepped(net, make=torch.optim.Adam):
    """An optimizer that knows all parameters, and gradients that wait for its next step."""
    optimizer = make(net.parameters(), 1e-9)
    for _ in range(2):
        net(_batch()).square().sum().backward()
        optimizer.step()
    return optimizer


def test_activations_are_those_next_to_a_layer_in_order_of_execution():
    points = [
        Point("s0", "s0", "sigmoid"),
        Point("a", "a"),
        Point("a/relu", "a", "relu"),
        Point("a/tanh", "a", "tanh"),
        Point("b", "b"),
        Point("c", "c"),
    ]
    assert activations_around(points) == {"a": ("sigmoid", "relu"), "b": ("tanh", ""), "c": ("", "")}


# From data


def test_the_model_gets_what_was_found_on_the_copy_to_the_bit():
    net = _net()
    twin = copy.deepcopy(net)
    treated = make_critical(twin, lambda: twin(_batch()), SEED)
    done = reinitialise(_training(net, _copying(net)), _finding())
    assert done.layers == tuple(treated.changed)
    assert done.before == {"span": treated.spans[0]}
    assert done.after == {"span": treated.spans[1]}
    assert list(done.centres) == list(treated.centres)
    assert done.before["span"] < -4
    assert abs(done.after["span"]) < 0.3
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


def test_a_model_that_is_rehearsed_itself_gets_the_same():
    net, same = _net(), _net()

    @contextlib.contextmanager
    def on_itself():
        yield same, lambda: same(_batch())

    reinitialise(_training(net, _copying(net)), _finding())
    reinitialise(_training(same, on_itself), _finding())
    assert all(map(torch.equal, net.parameters(), same.parameters()))


def test_all_layers_that_are_sick_are_drawn_not_only_those_that_the_finding_names():
    net = _net()
    done = reinitialise(_training(net, _copying(net)), _finding("2"))
    assert {"2", "4", "14"} <= set(done.layers)


def test_parameters_stay_the_same_objects_and_those_of_other_layers_their_values():
    net = _net()
    net[4].requires_grad_(False)
    parameters, before = list(net.parameters()), copy.deepcopy(net)
    done = reinitialise(_training(net, _copying(net)), _finding())
    assert all(mine is its for mine, its in zip(net.parameters(), parameters, strict=True))
    assert "4" not in done.layers
    for name, parameter in net.named_parameters():
        if name.rpartition(".")[0] not in done.layers:
            assert torch.equal(parameter, before.get_parameter(name))


@pytest.mark.parametrize(
    "make", [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)], ids=["Adam", "SGD"]
)
def test_the_optimizer_forgets_the_layers_that_were_drawn_and_no_other(make):
    net = _net()
    net[4].weight.data[:] = 10 * torch.outer(net[4].weight.data[0], net[4].weight.data[1])  # learnt
    optimizer = _stepped(net, make)
    known = {p: copy.deepcopy(optimizer.state[p]) for p in net[4].parameters()}
    done = reinitialise(_training(net, _copying(net), optimizer), _finding())
    assert "4" not in done.layers
    assert "2" in done.layers
    for name, parameter in net.named_parameters():
        was_drawn = name.rpartition(".")[0] in done.layers
        assert (parameter in optimizer.state) != was_drawn
        assert (parameter.grad is None) == was_drawn
    for parameter, state in known.items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(optimizer.state[parameter][k])) for k, v in state.items()
        )


def test_a_frozen_bias_keeps_its_value():
    net = _net()
    net[4].bias.requires_grad_(False).fill_(0.5)
    done = reinitialise(_training(net, _copying(net)), _finding())
    assert "4" in done.layers
    assert net[4].bias.tolist() == [0.5] * WIDTH


def test_tied_weights_are_left_from_data_and_by_the_book():
    for rehearse in (_copying, lambda net: None):
        net = _net()
        net[4].weight = net[8].weight
        before = net[4].weight.clone()
        done = reinitialise(_training(net, rehearse(net)), _finding())
        assert torch.equal(net[4].weight, before)
        assert not {"4", "8"} & set(done.layers)
        assert "6" in done.layers


def test_a_healthy_model_is_left_and_keeps_its_optimizer_state():
    net = _net(nn.ReLU)
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    net = net[:6].append(nn.Linear(WIDTH, 2))
    optimizer, before = _stepped(net), copy.deepcopy(net)
    assert reinitialise(_training(net, _copying(net), optimizer), _finding()) is None
    assert all(map(torch.equal, net.parameters(), before.parameters()))
    assert all(p in optimizer.state and p.grad is not None for p in net.parameters())


def test_the_same_seed_gives_the_same_weights_and_touches_no_random_state():
    one, other = _net(), _net()
    before = torch.get_rng_state()
    reinitialise(_training(one, _copying(one)), _finding())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    reinitialise(_training(other, _copying(other)), _finding())
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_only_far_leaves_what_a_usual_initialisation_gives():
    ordinary = _net(nn.ReLU)
    assert reinitialise(_training(ordinary, _copying(ordinary)), _finding(), only_far=True) is None
    large = _net(nn.ReLU)
    for layer in large[::2]:
        nn.init.normal_(layer.weight, std=3.0)
    twin = copy.deepcopy(large)
    treated = make_critical(twin, lambda: twin(_batch()), SEED, FAR)
    done = reinitialise(_training(large, _copying(large)), _finding(), only_far=True)
    assert done.layers == tuple(treated.changed)
    assert len(done.layers) >= DEPTH
    assert all(map(torch.equal, large.parameters(), twin.parameters()))


# By the book


def _failing(when):
    def start(net):
        @contextlib.contextmanager
        def rehearse():
            if when == "copy":
                raise RehearsalError("the model can't be copied")

            def run():
                raise RehearsalError("the training step failed")

            yield copy.deepcopy(net), run

        return rehearse

    return start


REHEARSALS = {"none": lambda net: None, "no copy": _failing("copy"), "no step": _failing("step")}


@pytest.mark.parametrize("name", REHEARSALS)
def test_without_a_rehearsal_the_layers_that_are_named_are_drawn_by_the_book(name):
    """Where it is not about depth, as with dead units."""
    net, by_book = _net(), _net()
    generator = torch.Generator().manual_seed(SEED)
    for layer in ("2", "6"):
        initialise(by_book.get_submodule(layer), "orthogonal", generator, before="sigmoid", after="sigmoid")
    optimizer = _stepped(net)
    dead = replace(_finding("6", "2"), kind=FindingKind.DEAD_UNITS)
    done = reinitialise(_training(net, REHEARSALS[name](net), optimizer), dead)
    assert done.layers == ("2", "6")
    assert (done.before, done.after, done.centres) == ({}, {}, {})
    for layer in ("2", "6"):
        assert torch.equal(net.get_submodule(layer).weight, by_book.get_submodule(layer).weight)
        assert torch.equal(net.get_submodule(layer).bias, by_book.get_submodule(layer).bias)
    known = {key for key, parameter in net.named_parameters() if parameter in optimizer.state}
    assert known == {key for key, _ in net.named_parameters()} - {"2.weight", "2.bias", "6.weight", "6.bias"}


@pytest.mark.parametrize(("op", "std"), [("relu", math.sqrt(2 / WIDTH)), ("", math.sqrt(1 / WIDTH))])
def test_by_the_book_the_activations_around_choose(op, std):
    net = _net()
    reinitialise(_training(net, history=_history(op) if op else _bare()), _finding())
    weights = torch.cat([net.get_submodule(layer).weight.detach().flatten() for layer in LAYERS[1:-1]])
    assert weights.std().item() == pytest.approx(std, rel=0.05)


def _bare():
    history = History()
    history.add_points([Point(layer, layer) for layer in LAYERS])
    return history


def test_frozen_layers_are_left_by_the_book():
    net = _net()
    net[4].requires_grad_(False)
    before = net[4].weight.clone()
    done = reinitialise(_training(net), _finding("2", "4"))
    assert "2" in done.layers
    assert "4" not in done.layers
    assert torch.equal(net[4].weight, before)


@pytest.mark.parametrize("name", REHEARSALS)
def test_nothing_is_done_by_the_book_where_only_far_ones_are_sick(name):
    net, before = _net(), _net()
    assert reinitialise(_training(net, REHEARSALS[name](net)), _finding(), only_far=True) is None
    assert all(map(torch.equal, net.parameters(), before.parameters()))


@pytest.mark.parametrize("layers", [("no such layer",), ("1",)])
def test_there_is_nothing_to_do_where_no_named_layer_can_be_drawn(layers):
    net = _net()
    optimizer = _stepped(net)
    dead = replace(_finding(*layers), kind=FindingKind.DEAD_UNITS)
    assert reinitialise(_training(net, optimizer=optimizer), dead) is None
    assert all(p in optimizer.state for p in net.parameters())


def test_all_layers_before_an_activation_are_drawn_where_it_is_about_depth():
    net, before = _net(), _net()
    with torch.no_grad():  # one that has been trained
        net[4].weight.add_(torch.outer(torch.ones(WIDTH), torch.randn(WIDTH)))
    trained = net[4].weight.clone()
    done = reinitialise(_training(net), _finding("2"))
    assert done.layers == tuple(layer for layer in LAYERS[:-1] if layer != "4")
    assert torch.equal(net[4].weight, trained)
    last = net.get_submodule(LAYERS[-1]).weight
    assert torch.equal(last, before.get_submodule(LAYERS[-1]).weight)


def test_an_error_that_is_not_of_the_rehearsal_comes_through():
    net = _net()

    @contextlib.contextmanager
    def rehearse():
        yield copy.deepcopy(net), lambda: 1 / 0

    with pytest.raises(ZeroDivisionError):
        reinitialise(_training(net, rehearse), _finding())


# Recurrences


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.read = nn.RNN(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.read(self.rnn(x)[0][-1])


def test_a_recurrence_is_treated_as_one():
    def made():
        torch.manual_seed(0)
        model, history, x = Recurrent(), History(), torch.randn(30, 4, 8)
        history.add_points([Point("rnn", "rnn"), Point("read", "read")])
        history.append(Row(0, calls={"rnn": np.ones(30)}))
        return model, _training(model, _copying(model, x), history=history)

    (model, training), (expected, its) = made(), made()
    finding = _finding("rnn", cause="recurrence")
    treatment = treat(its, finding)
    done = reinitialise(training, finding)
    assert done.layers == treatment.layers == ("rnn",)
    assert (done.before, done.after) == (treatment.before, treatment.after)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    assert reinitialise(training, _finding("read", cause="recurrence")) is None


class Read(nn.Module):
    """A recurrence between two layers that are well as they are."""

    def __init__(self, kind=nn.LSTM, inputs=1, hidden=128, std=None):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.read = kind(inputs, hidden), nn.Linear(hidden, 2)
        for weight in self.rnn.parameters() if std else ():
            nn.init.normal_(weight, std=std)

    def forward(self, x):
        return self.read(self.rnn(x)[0][-1])


def _sequence(inputs=1):
    return torch.randn(10, 4, inputs, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("std", [1e-4, 20.0])
def test_recurrences_of_a_size_that_nobody_draws_are_drawn_by_the_book(kind, std):
    net = Read(kind, std=std)
    optimizer = torch.optim.SGD(net.parameters(), 0.0, momentum=0.9)
    net(_sequence()).sum().backward()
    optimizer.step()
    done = reinitialise(_training(net, _copying(net, _sequence()), optimizer, _bare()), _finding())
    assert "rnn" in done.layers
    square = net.rnn.weight_hh_l0[:128]
    torch.testing.assert_close(square @ square.T, torch.eye(128), atol=1e-4, rtol=0)
    assert not any(p in optimizer.state or p.grad is not None for p in net.rnn.parameters())


@pytest.mark.parametrize(("noise", "is_drawn"), [(0.0, True), (0.1, True), (0.8, True), (1.2, False)])
def test_recurrences_all_of_whose_units_look_at_one_sum_are_drawn_by_the_book(noise, is_drawn):
    net = Read(nn.GRU)
    for name, p in net.rnn.named_parameters():
        if name.startswith("weight"):
            p.data.copy_(0.05 * (1 + noise * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))))
    done = reinitialise(_training(net, _copying(net, _sequence()), history=_bare()), _finding())
    assert (done is not None and "rnn" in done.layers) == is_drawn


def test_a_table_of_gains_that_are_all_one_stays():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.rnn = nn.Embedding(8, 16), nn.GRU(16, 16)
            nn.init.ones_(self.gain.weight)
            self.rnn.weight_hh_l0.data.mul_(20)

        def forward(self, x):
            return self.rnn(torch.ones(5, 4, 16))[0][-1] * self.gain(x)

    torch.manual_seed(0)
    net = Conditional()
    done = reinitialise(_training(net, _copying(net, torch.arange(4)), history=_bare()), _finding())
    assert done.layers == ("rnn",)
    assert bool((net.gain.weight == 1).all())


@pytest.mark.parametrize(("ends", "bias"), [(True, 300.0), (False, 0.0)])
def test_a_norm_that_gives_the_output_keeps_its_bias(ends, bias):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), *([] if ends else [nn.Sigmoid()]))
    nn.init.constant_(net[1].bias, 300.0)
    nn.init.constant_(net[0].weight, 1e-4)
    history = History()
    history.add_points([Point("0", "0"), Point("1", "1"), *([] if ends else [Point("2", "2", "sigmoid")])])
    reinitialise(_training(net, _copying(net, torch.randn(16, 8)), history=history), _finding("0"))
    assert net[1].bias.tolist() == [bias] * 8


@pytest.mark.parametrize(("radius", "is_drawn"), [(1.0, False), (1.3, False), (2.0, True), (3.0, True)])
def test_weights_of_a_usual_size_are_drawn_anew_where_they_blow_a_gradient_up_through_time(radius, is_drawn):
    """1.3 ** 23 are 2.6 decades, 2 ** 23 are 6.9."""
    net = Read(lambda i, h: nn.RNN(i, h, nonlinearity="relu"), 2, 16)
    with torch.no_grad():
        net.rnn.weight_hh_l0.copy_(radius * torch.eye(16))
        net.rnn.weight_ih_l0.abs_()  # every unit is open
        for bias in (net.rnn.bias_ih_l0, net.rnn.bias_hh_l0):
            bias.zero_()
    x = torch.rand(24, 4, 2, generator=torch.Generator().manual_seed(0))
    done = reinitialise(_training(net, _copying(net, x), history=_bare()), _finding(cause="weight_scale"))
    assert (done is not None and "rnn" in done.layers) == is_drawn
    if is_drawn:
        torch.testing.assert_close(net.rnn.weight_hh_l0.sum(0), torch.ones(16))  # a permutation


@pytest.mark.parametrize("inputs", [1, 128, 2000])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrences_as_torch_draws_them_are_left(kind, inputs):
    net = Read(kind, inputs, 16)
    assert reinitialise(_training(net, _copying(net, _sequence(inputs)), history=_bare()), _finding()) is None


@pytest.mark.parametrize(
    ("kind", "blocks", "is_drawn"),
    [
        (nn.LSTM, (-10.0, -10.0, -10.0, -10.0), True),
        (nn.LSTM, (-6.9, 6.9, 0.0, 0.0), False),  # made for a memory of a thousand steps
        (nn.LSTM, (0.0, 5.0, 0.0, 0.0), False),
        (nn.LSTM, (-3.9, -3.9, -3.9, -3.9), False),
        (nn.GRU, (10.0, 10.0, 10.0), True),
        (nn.RNN, (10.0,), True),
    ],
)
def test_recurrences_whose_biases_shut_most_gates_are_drawn_by_the_book(kind, blocks, is_drawn):
    net = Read(kind, hidden=16)
    with torch.no_grad():
        net.rnn.bias_ih_l0.zero_()
        net.rnn.bias_hh_l0.copy_(torch.tensor(blocks).repeat_interleave(16))
    done = reinitialise(_training(net, _copying(net, _sequence()), history=_bare()), _finding())
    assert (done is not None and "rnn" in done.layers) == is_drawn
    assert bool((net.rnn.bias_hh_l0.abs() > 3).any()) != is_drawn or not any(blocks)


def test_recurrences_are_left_where_the_rehearsal_fails_or_only_far_layers_are_asked_for():
    for start, only_far in ((_failing("step"), False), (lambda net: _copying(net, _sequence()), True)):
        net, before = Read(std=1e-4), Read(std=1e-4)
        reinitialise(_training(net, start(net), history=_bare()), _finding("no such layer"), only_far=only_far)
        assert all(map(torch.equal, net.rnn.parameters(), before.rnn.parameters()))


class Tokens(nn.Module):
    def __init__(self, std, frozen=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.read = nn.Embedding(50, 64, padding_idx=0), nn.Linear(64, 2)
        nn.init.normal_(self.embed.weight, std=std).data[0] = 0
        self.embed.requires_grad_(not frozen)

    def forward(self, x):
        return self.read(self.embed(x).mean(1))


@pytest.mark.parametrize(("std", "expected"), [(1.0, ("embed",)), (0.1, None)])
def test_beside_weights_that_are_too_large_tied_tables_are_drawn_that_make_large_outputs(std, expected):
    class Tied(Tokens):
        def __init__(self):
            super().__init__(std)
            self.read = nn.Linear(64, 50, bias=False)
            self.read.weight = self.embed.weight

    net, x = Tied(), torch.randint(1, 50, (16, 5), generator=torch.Generator().manual_seed(0))
    finding = Finding(FindingKind.LOSS_PLATEAU, Severity.WARNING, 100, ("read",), "weight_scale")
    done = reinitialise(_training(net, _copying(net, x), history=_bare()), finding)
    assert (done and done.layers) == expected
    assert net.read.weight is net.embed.weight
    assert bool(net.embed.weight.std() < 0.2)


@pytest.mark.parametrize(
    ("kind", "cause", "expected"),
    [
        (FindingKind.LOSS_PLATEAU, "weight_scale", {"rnn"}),
        (FindingKind.VANISHING_GRADIENT, "saturation", {"rnn", "embed"}),
    ],
)
def test_beside_weights_that_are_too_large_a_table_of_zeros_stays(kind, cause, expected):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn = nn.Embedding(50, 16), nn.GRU(16, 16)
            nn.init.zeros_(self.embed.weight)
            self.rnn.weight_hh_l0.data.mul_(20)

        def forward(self, x):
            return self.rnn(self.embed(x))[0][-1]

    torch.manual_seed(0)
    net, x = Reads(), torch.randint(50, (5, 16), generator=torch.Generator().manual_seed(0))
    finding = Finding(kind, Severity.WARNING, 100, ("rnn",), cause)
    done = reinitialise(_training(net, _copying(net, x), history=_bare()), finding)
    assert {*done.layers} == expected


@pytest.mark.parametrize(
    ("std", "frozen", "expected"),
    [
        (1e-4, False, ("embed",)),
        (50.0, False, ("embed",)),
        (1e-4, True, None),
        (0.02, False, None),
        (0.125, False, None),
        (1.0, False, None),
    ],
)
def test_so_are_embeddings_and_those_that_are_usual_are_left(std, frozen, expected):
    net, before = Tokens(std, frozen), Tokens(std, frozen)
    done = reinitialise(_training(net, _copying(net, torch.arange(40).view(8, 5)), history=_bare()), _finding())
    assert (done and tuple(name for name in done.layers if name == "embed")) == expected
    assert torch.equal(net.embed.weight, before.embed.weight) == (expected is None)
    if expected:
        assert net.embed.weight[1:].std().item() == pytest.approx(1, rel=0.05)
    assert not net.embed.weight[0].any()


@pytest.mark.parametrize(("std", "is_drawn"), [(50.0, True), (1e-4, False), (1.0, False)])
def test_beside_weights_that_are_too_large_so_is_an_embedding_and_small_ones_are_meant(std, is_drawn):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(50, 16), nn.Linear(16, 32)
            nn.init.normal_(self.embed.weight, std=std)
            nn.init.normal_(self.fc.weight, std=10.0)

        def forward(self, x):
            return self.fc(self.embed(x))

    torch.manual_seed(0)
    net, x = Reads(), torch.arange(40).view(8, 5)
    evidence = {"weight_size": 40.0}
    finding = Finding(FindingKind.LOSS_PLATEAU, Severity.WARNING, 8, ("fc",), "weight_scale", evidence=evidence)
    done = reinitialise(_training(net, _copying(net, x), history=_bare()), finding)
    assert ("embed" in done.layers) is is_drawn
    assert "fc" in done.layers


def _of_tables(*layers):
    return Finding(FindingKind.LOSS_PLATEAU, Severity.WARNING, step=60, layers=layers, cause="weight_scale")


class Pairs(nn.Module):
    """Two tables whose rows are multiplied with each other, and one of zeros on purpose."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.wide = nn.Embedding(50, 64), nn.Embedding(50, 64), nn.Embedding(50, 1)
        nn.init.zeros_(self.wide.weight)

    def forward(self, x):
        return (self.left(x) * self.right(x)).sum(-1) + self.wide(x)[..., 0]


def test_tables_that_a_finding_names_get_rows_of_length_one_and_the_optimizer_starts_anew():
    net, x = Pairs(), torch.arange(40).view(8, 5)
    optimizer = torch.optim.Adam(net.parameters())
    net(x).square().sum().backward()
    optimizer.step()
    wide = net.wide.weight.clone()
    done = reinitialise(_training(net, _copying(net, x), optimizer, _bare()), _of_tables("left"))
    assert done.layers == ("left", "right")  # rows of as many entries, that would drown these
    assert net.left.weight.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert net.right.weight.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert torch.equal(net.wide.weight, wide)
    assert not optimizer.state  # of the other tables it knows gradients that were as much too large


def test_without_a_finding_about_them_tables_are_left():
    net, x = Pairs(), torch.arange(40).view(8, 5)
    left = net.left.weight.clone()
    reinitialise(_training(net, _copying(net, x), history=_bare()), _finding("left"))
    assert torch.equal(net.left.weight, left)


def _saturated(share, gates=math.nan):
    history = History()
    history.add_points([Point("0", "0"), Point("1", "1", "tanh"), Point("2", "2")])
    values = {"saturated_fraction": np.array([math.nan, share, math.nan])}
    history.append(Row(0, {**values, "gate_fraction": np.array([math.nan, gates, math.nan])}))
    return history


def _held_back():
    """A tanh holds back what the weights before it blow up, so that the gain of both shows little of it."""
    torch.manual_seed(0)
    net = nn.Sequential(*[m for _ in range(2) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())], nn.Linear(WIDTH, 4))
    nn.init.orthogonal_(net[0].weight)
    nn.init.orthogonal_(net[2].weight, gain=12.0)
    return net


@pytest.mark.parametrize(
    ("share", "gates", "is_drawn"), [(0.9, math.nan, True), (0.2, math.nan, False), (0.9, 0.9, False)]
)
def test_what_an_activation_at_its_bounds_holds_back_is_drawn_whatever_the_alarm(share, gates, is_drawn):
    net = _held_back()
    done = reinitialise(_training(net, _copying(net), history=_saturated(share, gates)), _finding(cause="weight_scale"))
    assert (done is not None and "2" in done.layers) == is_drawn


class _Beside(nn.Module):
    """A stack that blows the signal up, and beside it, added to its output, a layer that is far too large as well."""

    def __init__(self, *, frozen):
        super().__init__()
        self.stack = _net(nn.ReLU)
        self.beside = nn.Linear(WIDTH, 2)
        for layer in (*self.stack[::2], self.beside):
            nn.init.normal_(layer.weight, std=1000.0 if layer is self.beside else 1.0)
        self.beside.requires_grad_(requires_grad=not frozen)
        nn.init.normal_(self.stack[-1].weight, std=1e-4)

    def forward(self, x):
        return self.stack(x) + self.beside(x)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("evidence", [{}, {"output_growth": 100.0}])
def test_weights_that_leave_outputs_as_large_as_they_were_are_no_cure_of_them(frozen, evidence):
    net = _Beside(frozen=frozen)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = replace(_finding(cause="weight_scale"), kind=FindingKind.EXPLODING_GRADIENT, evidence=evidence)
    done = reinitialise(_training(net, _copying(net)), found)
    assert (done is None) == (frozen and bool(evidence))
    assert (done is None) == all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_attention_that_is_hidden_from_what_measures_gains_is_drawn_with_the_others():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.0, batch_first=True)
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=2.0)
    x = torch.randn(8, 5, WIDTH)
    done = reinitialise(_training(net, _copying(net, x)), _finding("linear1", cause="weight_scale"))
    assert done is not None
    assert {"self_attn", "self_attn.out_proj"} <= {*done.layers}
    assert net.self_attn.in_proj_weight.std() < 0.5


class _Euler(nn.Module):
    """Steps of one network, each of which adds to the state far more than its share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.read = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        state = self.enter(x)
        for _ in range(30):
            state = state + self.narrow(nn.functional.softplus(self.wide(state)))
        return self.read(state)


@pytest.mark.parametrize(("grown", "only_far"), [(True, False), (True, True), (False, False)])
def test_outputs_that_the_same_layers_made_large_step_by_step_get_smaller_steps(grown, only_far):
    net, names = _Euler(), ["enter", "wide", "narrow", "read"]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    spread = float(net(_batch()).detach().std(0).mean())
    history = History()
    history.add_points([Point(name, name, "") for name in names])
    evidence = {"output_growth": 60.0} if grown else {}
    found = replace(_finding(*names, cause="weight_scale"), kind=FindingKind.EXPLODING_GRADIENT, evidence=evidence)
    done = reinitialise(_training(net, _copying(net), history=history), found, only_far=only_far)
    is_shrunk = grown and not only_far
    assert (done is not None and done.layers == ("wide", "narrow")) == is_shrunk
    if grown:
        assert all(torch.equal(net.get_parameter(name), before[name]) for name in ("enter.weight", "read.weight"))
    if is_shrunk:
        assert net.wide.weight.detach().norm() < 0.6 * before["wide.weight"].norm()
        assert float(net(_batch()).detach().std(0).mean()) < 0.5 * spread


class _Multiplied(nn.Module):
    """A recurrence that is well, and a factor behind it that is no weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.read = nn.LSTM(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.read(30 * self.rnn(x[:, None].expand(-1, 20, -1).transpose(0, 1))[0][-1])


def test_outputs_that_are_too_large_are_no_reason_to_draw_a_recurrence_that_is_well():
    net = _Multiplied()
    before = net.rnn.weight_hh_l0.detach().clone()
    history = History()
    history.add_points([Point(name, name, "") for name in ("rnn", "read")])
    evidence = {"output_growth": 60.0}
    found = _finding("rnn", "read", cause="weight_scale")
    found = replace(found, kind=FindingKind.EXPLODING_GRADIENT, evidence=evidence)
    assert reinitialise(_training(net, _copying(net), history=history), found) is None
    assert torch.equal(net.rnn.weight_hh_l0, before)


class Branches(nn.Module):
    """Two branches side by side, of which one may be dead."""

    def __init__(self, bias):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.two = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.out = nn.Linear(2 * WIDTH, 2)
        for layer in (self.one[0], self.one[2]):
            nn.init.constant_(layer.bias, bias)

    def forward(self, x):
        return self.out(torch.cat([self.one(x), self.two(x)], 1))


@pytest.mark.parametrize("cause", ["initialisation", "unknown"])
def test_the_end_of_a_branch_that_was_dead_from_the_start_is_drawn_with_it(cause):
    net, history = Branches(-10.0), History()
    names = ["one.0", "one.1", "one.2", "one.3", "two.0", "two.1", "out"]
    history.add_points([Point(name, name, "relu" if name[-1] in "13" else "") for name in names])
    dead = Finding(FindingKind.DEAD_UNITS, Severity.WARNING, 2, ("one.1", "one.3"), cause)
    done = reinitialise(_training(net, _copying(net), history=history), dead)
    assert ("one.2" in done.layers) is (cause == "initialisation")
    alive = (net.one(_batch()) > 0).any(0)
    assert bool(alive.all()) is (cause == "initialisation")


class Chain(nn.Module):
    """Branches that add to a sum; their biases add up, and nothing gets through the ReLU behind it."""

    def __init__(self, bias):
        super().__init__()
        torch.manual_seed(0)
        self.ends = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.act, self.prior, self.out = nn.ReLU(), nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)
        for layer in (*self.ends, self.prior, self.out):
            nn.init.constant_(layer.bias, bias)

    def forward(self, x):
        for end in self.ends:
            x = x + end(torch.tanh(x))
        x = self.act(x)
        return self.prior(x).sigmoid() * self.out(x)


@pytest.mark.parametrize(("bias", "comes_through"), [(-4.0, True), (-1.5, False)])
def test_biases_that_add_up_to_dead_units_are_taken_away(bias, comes_through):
    net, history = Chain(bias), History()
    ends = [f"ends.{i}" for i in range(6)]
    heads = [Point("prior", "prior"), Point("out", "out")]
    history.add_points([*(Point(name, name) for name in ends), Point("act", "act", "relu"), *heads])
    dead = Finding(FindingKind.DEAD_UNITS, Severity.WARNING, 2, ("act",), "initialisation")
    done = reinitialise(_training(net, _copying(net), history=history), dead)
    assert ({*ends[:-1]} <= {*done.layers}) is comes_through
    assert ends[-1] in done.layers  # right before it
    assert not {"prior", "out"} & {*done.layers}  # how rare a class is, or where targets lie, may be known


def test_units_that_are_alike_and_look_trained_are_no_reason_to_draw_anything_else():
    net = _net(nn.ReLU)
    found = replace(_finding("0", "2", cause="symmetry"), kind=FindingKind.LOSS_PLATEAU, evidence={"unit_spread": 0.6})
    with torch.no_grad():
        for layer in (net[0], net[2]):  # rows that differ in length, and columns
            layer.weight.copy_(torch.outer(torch.linspace(0.1, 2, WIDTH), torch.linspace(0.1, 2, WIDTH)))
        net[-1].weight.mul_(20)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert reinitialise(_training(net, _copying(net)), found) is None
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_outputs_that_are_the_same_for_all_samples_are_too_large_all_the_same():
    """A state at its bounds gives all of them the same sum, and a spread of next to nothing."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.wide, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
            for layer in (self.wide, self.out):
                nn.init.uniform_(layer.weight)

        def forward(self, x):
            return self.out(self.wide((x + 100).sigmoid()))

    net, history = Reads(), History()
    history.add_points([Point(name, name) for name in ("wide", "out")])
    evidence = {"output_rms": 1e3, "output_growth": 1e3}
    found = Finding(FindingKind.EXPLODING_GRADIENT, Severity.WARNING, 0, ("wide",), "weight_scale", evidence=evidence)
    done = reinitialise(_training(net, _copying(net), history=history), found)
    assert {*done.layers} == {"wide", "out"}
    assert net(_batch()).detach().abs().max() < 10


def test_outputs_that_are_far_off_by_a_bias_before_an_exponential_come_near_without_it():
    class Exponential(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.log, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
            nn.init.constant_(self.log.bias, 12.0)

        def forward(self, x):
            return self.out(self.log(torch.tanh(self.inner(x))).exp())

    net, history = Exponential(), History()
    history.add_points([Point(name, name) for name in ("inner", "log", "out")])
    evidence = {"output_rms": 1e5, "output_growth": 1e5}
    found = Finding(FindingKind.EXPLODING_GRADIENT, Severity.WARNING, 0, ("log",), "weight_scale", evidence=evidence)
    done = reinitialise(_training(net, _copying(net), history=history), found)
    assert "log" in done.layers
    assert net.log.bias.abs().max() < 1
    assert net(_batch()).detach().abs().max() < 100
