"""Cures for recurrences."""

from __future__ import annotations

from lightning_gradflow.advice.site import PASTE, Site, get, quote
from lightning_gradflow.findings import Suggestion


def initialise_recurrence(site: Site) -> list[Suggestion]:
    """Orthogonal recurrent weights, and an open forget gate."""
    if not site.named:
        return []
    code = [
        PASTE,
        "from torch import nn",
        "",
        f"recurrence = {get(site.named[0])}",
        "for name, parameter in recurrence.named_parameters():",
        '    if "weight_hh" in name:',
        "        for gate in parameter.data.split(recurrence.hidden_size):",
        "            nn.init.orthogonal_(gate)",
        '    elif "weight_ih" in name:',
        "        nn.init.xavier_uniform_(parameter)",
        '    elif "bias" in name:',
        "        nn.init.zeros_(parameter)",
        '    if "bias_ih" in name and isinstance(recurrence, (nn.LSTM, nn.LSTMCell)):',
        "        parameter.data[recurrence.hidden_size : 2 * recurrence.hidden_size] = 1.0  # the forget gate",
    ]
    return [
        Suggestion(
            "Initialise the recurrent weights orthogonally, and the forget gate of an LSTM open",
            "\n".join(code),
            "An orthogonal matrix keeps the size of the signal at each time step; an open forget gate keeps the cell.",
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
