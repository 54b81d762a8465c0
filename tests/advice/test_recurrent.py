"""Cures of recurrences and transformers, on real modules."""

from math import log

import pytest
import torch
from torch import nn

from lightning_gradflow.advice import suggest
from lightning_gradflow.history import History
from tests.advice.cases import finding

KINDS = [nn.RNN, nn.LSTM, nn.GRU]


def cures_of(cause="recurrence", steps=40.0):
    evidence = {"time_steps": steps} if steps else {}
    return suggest(finding("vanishing_gradient", cause, layers=("rnn",), evidence=evidence), History())


def model_of(kind, **kwargs):
    model = nn.Module()
    model.rnn = kind(8, 16, **kwargs)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_twofold", [False, True])
def test_cures_of_a_recurrence_run_on_every_kind(kind, is_twofold):
    for suggestion in cures_of():
        model = model_of(kind, num_layers=2, batch_first=True, bidirectional=is_twofold)
        if "model" in suggestion.code:
            exec(suggestion.code, {"self": model})
            output, state = model.rnn(torch.rand(4, 5, 8))
            assert output.shape == (4, 5, 32 if is_twofold else 16)
            assert (state[0] if isinstance(state, tuple) else state).shape == (4 if is_twofold else 2, 4, 16)


@pytest.mark.parametrize(
    ("steps", "least", "most"), [(40.0, log(2.7), log(39)), (3.0, 1.0, 1.0), (2.0, 1.0, 1.0), (None, 1.0, 1.0)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_weights_become_orthogonal_and_gates_open_for_few_to_all_steps(kind, steps, least, most):
    torch.manual_seed(0)
    model = model_of(kind)
    exec(cures_of(steps=steps)[0].code, {"self": model})
    for block in model.rnn.weight_hh_l0.split(16):
        torch.testing.assert_close(block @ block.T, torch.eye(16), rtol=0, atol=1e-5)
    if kind is not nn.RNN:
        both = model.rnn.bias_ih_l0 + model.rnn.bias_hh_l0
        gates = both[16:32]
        assert gates.min() >= least
        assert gates.max() <= most
        assert gates.max() - gates.min() >= 0.7 * (most - least)  # of units that remember all and such as forget
        assert not both[:16].any()
        assert not both[32:].any()


def test_the_gated_recurrence_in_the_place_of_a_plain_one_keeps_its_state_for_as_many_steps():
    model = model_of(nn.RNN, num_layers=2)
    exec(cures_of(steps=100.0)[1].code, {"self": model})
    assert isinstance(model.rnn, nn.GRU)
    for layer in ("l0", "l1"):
        bias = getattr(model.rnn, f"bias_ih_{layer}")[16:32]
        assert bias.min() >= log(2.7)
        assert log(50) < bias.max() <= log(99)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_normalised_recurrence_is_a_step_and_a_layer_norm_in_turn(kind, batch_first):
    torch.manual_seed(0)
    model = model_of(kind, batch_first=batch_first)
    plain = model.rnn
    (cure,) = [cure for cure in cures_of() if "LayerNorm" in cure.title]
    exec(cure.code, {"self": model})
    x = torch.randn(4, 6, 8)
    output, _ = model.rnn(x if batch_first else x.transpose(0, 1))
    output = output if batch_first else output.transpose(0, 1)
    state, wanted = None, []
    for t in range(6):
        now = x[:, t : t + 1] if batch_first else x[:, t : t + 1].transpose(0, 1)
        _, state = plain(now, state)
        hidden = state[0] if kind is nn.LSTM else state
        hidden = 0.1 * nn.functional.layer_norm(hidden, (16,))
        state = (hidden, state[1]) if kind is nn.LSTM else hidden
        wanted.append(hidden[0])
    torch.testing.assert_close(output, torch.stack(wanted, dim=1))


def test_a_layer_called_in_a_loop_gets_a_layer_norm_behind_it():
    model = nn.Module()
    model.rnn = nn.Linear(16, 16)
    (cure,) = [cure for cure in cures_of() if "LayerNorm" in cure.title]
    exec(cure.code, {"self": model})
    assert model.rnn(torch.randn(3, 16)).std(dim=1, unbiased=False).tolist() == pytest.approx([0.1] * 3, abs=1e-4)
    torch.testing.assert_close(model.rnn[0].weight @ model.rnn[0].weight.T, torch.eye(16), rtol=0, atol=1e-5)


def transformer(norm_first, norm=None):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3, norm=norm, enable_nested_tensor=False)


def history_of_blocks(order):
    history = History()
    history.layer_axis.merge([f"layers.{i}.{name}" for i in range(3) for name in order.split()])
    return history


POST = "self_attn norm1 linear1 linear2 norm2"
PRE = "norm1 self_attn norm2 linear1 linear2"


def pre_norm_of(order):
    found = finding("exploding_gradient", "learning_rate_too_large", layers=("layers.0.linear1",))
    return [cure for cure in suggest(found, history_of_blocks(order)) if "Pre-LN" in cure.title]


def test_post_ln_blocks_become_what_pre_ln_ones_are():
    model, wanted = transformer(norm_first=False), transformer(norm_first=True, norm=nn.LayerNorm(16))
    x = torch.randn(4, 5, 16)
    assert not torch.allclose(model(x), wanted(x))
    (cure,) = pre_norm_of(POST)
    assert '"layers.0", "layers.1", "layers.2"' in cure.code
    exec(cure.code, {"self": model})
    torch.testing.assert_close(model(x), wanted(x))


@pytest.mark.parametrize("order", [PRE, "linear1 linear2", "self_attn"])
def test_pre_ln_is_offered_where_attention_comes_before_its_norm_only(order):
    assert pre_norm_of(order) == []
