"""Cures for recurrences."""

from __future__ import annotations

from lightning_gradflow.advice.site import PASTE, Site, get, literal, quote
from lightning_gradflow.findings import Suggestion


def initialise_recurrence(site: Site) -> list[Suggestion]:
    """Orthogonal recurrent weights, and an open forget gate."""
    if not site.named:
        return []
    code = [
        PASTE,
        "from torch import nn",
        "",
        f"for name in {literal(site.named)}:",
        "    layer = model.get_submodule(name)",
        "    for key, parameter in layer.named_parameters(recurse=False):",
        "        if parameter.ndim < 2:",
        "            nn.init.zeros_(parameter)",
        '        elif "weight_hh" in key or parameter.shape[0] == parameter.shape[1]:',
        "            for gate in parameter.data.split(parameter.shape[1]):",
        "                nn.init.orthogonal_(gate)",
        "        else:",
        "            nn.init.xavier_uniform_(parameter)",
        '        if "bias_ih" in key and isinstance(layer, (nn.LSTM, nn.LSTMCell, nn.GRU, nn.GRUCell)):',
        "            parameter.data[layer.hidden_size : 2 * layer.hidden_size] = 1.0  # forget or update gate",
    ]
    return [
        Suggestion(
            "Initialise the recurrent weights orthogonally, and the forget gate of an LSTM (update gate of a GRU) open",
            "\n".join(code),
            "An orthogonal matrix keeps the size of the signal at each time step; an open gate keeps the state. A bias "
            "of 1 is the usual one; for much longer sequences take the logarithm of their length.",
            "Saxe et al. 2014; Jozefowicz et al. 2015, An empirical exploration of recurrent network architectures",
        )
    ]


def gate_recurrence(site: Site) -> list[Suggestion]:
    """A gated recurrence in the place of a plain one."""
    if not site.named or get(site.named[0]) == "model":
        return []
    code = [
        PASTE,
        "from torch import nn",
        "",
        f"old = {get(site.named[0])}",
        "if isinstance(old, nn.RNN):",
        "    new = nn.GRU(",
        "        old.input_size, old.hidden_size, old.num_layers, old.bias,",
        "        batch_first=old.batch_first, dropout=old.dropout, bidirectional=old.bidirectional,",
        "    )",
        f"    model.set_submodule({quote(site.named[0])}, new)",
    ]
    return [
        Suggestion(
            "Use a gated recurrence (GRU, LSTM) instead of a plain one",
            "\n".join(code),
            "Gates let the state pass from step to step unchanged, and the gradient with it. nn.GRU takes and returns "
            "what nn.RNN does.",
            "Hochreiter and Schmidhuber 1997, Long short-term memory; Cho et al. 2014",
        )
    ]


def read_all_steps(site: Site) -> list[Suggestion]:
    """A way to the loss from every time step."""
    del site  # how the outputs are read is written in `forward`
    return [
        Suggestion(
            "Give every time step a way of its own to the loss, or make the sequences shorter",
            "# in forward, in the place of output[:, -1]; score = nn.Linear(hidden_size, 1) in __init__\n"
            "def read(output, score):  # (batch, time, hidden) -> (batch, hidden)\n"
            "    return (output * score(output).softmax(dim=1)).sum(dim=1)",
            "With attention, or a mean, over the outputs the gradient reaches each step without going through those "
            "after it. Strides, patches, or backpropagation through fewer steps, shorten its way as well.",
            "Bahdanau et al. 2015, Neural machine translation by jointly learning to align and translate",
        )
    ]
