"""What is said of layers that run over the samples of a batch, and what the cure makes of them."""

import pytest
import torch
from torch import nn

from lightning_gradflow.advice import explain, suggest
from lightning_gradflow.history import History
from tests.advice.cases import finding

EVIDENCE = {"batch_size": 64.0, "time_steps": 50.0}
ENCODER = ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn")


def found(*layers):
    return finding("mixed_samples", "batch_first", layers=layers, evidence=EVIDENCE)


def cured(model, *layers):
    exec(suggest(found(*layers), History())[0].code, {"self": model})
    return model


def test_the_text_names_both_axes():
    assert explain(found("rnn")) == (
        "The samples of a batch are mixed in rnn: its 64 samples are taken for time steps, "
        "and the 50 time steps for samples. "
        "batch_first is False there, and the input is (batch, time, features)."
    )


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_recurrence_then_runs_over_time_with_the_weights_it_has(kind):
    model, x = nn.Module(), torch.randn(6, 5, 4)
    model.rnn, model.other = kind(4, 3), kind(4, 3)
    wanted = model.rnn(x.transpose(0, 1))[0].transpose(0, 1)
    torch.testing.assert_close(cured(model, "rnn").rnn(x)[0], wanted)
    assert not model.other.batch_first


def test_a_transformer_then_looks_at_time_in_training_and_evaluation():
    torch.manual_seed(0)
    model, x = nn.Module(), torch.randn(6, 5, 4)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
    model.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    wanted = model.encoder(x.transpose(0, 1)).transpose(0, 1)
    cured(model, *ENCODER)
    torch.testing.assert_close(model.encoder(x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().encoder(x), wanted)


def test_the_other_way_is_told_in_words_and_comes_last():
    (first, second) = suggest(found("rnn"), History())
    assert first.title == "Make rnn with batch_first=True"
    assert second.code.startswith("# in forward(): x = x.transpose(0, 1) before rnn,\n")
    (_, of_several) = suggest(found(*ENCODER), History())
    assert f"before the first of {ENCODER[0]} and {ENCODER[1]},\n" in of_several.code
    assert of_several.code.endswith("behind the last of them")


def test_nothing_is_done_in_the_run():
    assert not any("mitigate" in cure.reason for cure in suggest(found("rnn"), History()))
