"""Cures for recurrences."""

from __future__ import annotations

import math

from lightning_gradflow.advice.site import NN, Site, get, literal, paste, quote
from lightning_gradflow.findings import Suggestion

_MEMORY = (
    "With the logarithm of n a gate remembers about n steps: drawn from a few to all, some units keep what is long "
    "past and others follow what is new."
)


def initialise_recurrence(site: Site) -> list[Suggestion]:
    """Orthogonal recurrent weights, and an open forget gate."""
    if not site.named:
        return []
    code = [*NN, *_initialised(site)]
    return [
        Suggestion(
            "Initialise the recurrent weights orthogonally, and the forget gate of an LSTM (update gate of a GRU) open",
            paste(code),
            "An orthogonal matrix keeps the size of the signal at each time step; an open gate keeps the state. A bias "
            f"of 1 is the usual one. {_MEMORY}",
            "Saxe et al. 2014; Jozefowicz et al. 2015, An empirical exploration of recurrent network architectures; "
            "Tallec and Ollivier 2018, Can recurrent neural networks warp time?",
        )
    ]


def _initialised(site: Site) -> list[str]:
    return [
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
        "            # the forget gate of an LSTM, the update gate of a GRU",
        f"            parameter.data[layer.hidden_size : 2 * layer.hidden_size].{_open(site)}",
        *_of_own_cells(site),
    ]


def _of_own_cells(site: Site) -> list[str]:
    if site.gated.intersection(site.named):
        return []
    return [
        "# in a cell of your own the bias of the gate that keeps the state has to be set as well:",
        f"# bias.data.{_open(site)} where the gate multiplies the old state; minus that where 1 - gate does",
    ]


def gate_recurrence(site: Site) -> list[Suggestion]:
    """A gated recurrence in the place of a plain one; none where it is known to be gated."""
    if not site.named or get(site.named[0]) == "model" or site.gated.intersection(site.named):
        return []
    code = [
        *NN,
        f"old = {get(site.named[0])}",
        "if isinstance(old, nn.RNN):",
        "    new = nn.GRU(",
        "        old.input_size, old.hidden_size, old.num_layers, old.bias,",
        "        batch_first=old.batch_first, dropout=old.dropout, bidirectional=old.bidirectional,",
        "    )",
        "    for key, parameter in new.named_parameters():",
        '        if "bias_ih" in key:  # update gates that are open to the past',
        f"            parameter.data[new.hidden_size : 2 * new.hidden_size].{_open(site)}",
        f"    model.set_submodule({quote(site.named[0])}, new)",
        "# in a loop of your own: keep = torch.sigmoid(self.gate(state)); state = keep * state + (1 - keep) * new",
    ]
    return [
        Suggestion(
            "If the recurrence is a plain one (nn.RNN), use a gated one (GRU, LSTM)",
            paste(code),
            "Gates let the state pass from step to step unchanged, and the gradient with it. nn.GRU takes and returns "
            "what nn.RNN does. As PyTorch initialises it, a gate is half shut and forgets within a few steps. "
            f"{_MEMORY}",
            "Hochreiter and Schmidhuber 1997, Long short-term memory; Cho et al. 2014; Tallec and Ollivier 2018",
        )
    ]


def _open(site: Site) -> str:
    """Code that fills the bias of a gate so that units remember few steps to all, as far as the number is known."""
    steps = site.finding.evidence.get("time_steps", math.nan)
    longest = steps - 1 if math.isfinite(steps) else 0.0
    return f"uniform_(2.7, {longest:.0f}).log_()" if longest > math.e else "fill_(1.0)"


def normalise_recurrence(site: Site) -> list[Suggestion]:
    """LayerNorm in the recurrence."""
    names = tuple(name for name in site.named if get(name) != "model")
    if not names:
        return []
    code = [
        "import torch",
        *NN,
        "def small_norm(size):",
        "    norm = nn.LayerNorm(size)",
        "    nn.init.constant_(norm.weight, 0.1)  # so that units work where they are steep",
        "    return norm",
        "",
        "class Normalised(nn.Module):  # runs a recurrence step by step, with LayerNorm on what it hands on",
        "    def __init__(self, recurrence):",
        "        super().__init__()",
        "        self.recurrence, self.norm = recurrence, small_norm(recurrence.hidden_size)",
        "",
        "    def forward(self, x, state=None):",
        "        axis, outputs = (1 if self.recurrence.batch_first else 0), []",
        "        for now in x.split(1, dim=axis):",
        "            output, state = self.recurrence(now, state)",
        "            if isinstance(state, tuple):  # an LSTM; its cell keeps what it has",
        "                state = (self.norm(state[0]), state[1])",
        "            else:",
        "                state = self.norm(state)",
        "            outputs.append(self.norm(output))",
        "        return torch.cat(outputs, dim=axis), state",
        "",
        *_initialised(site),
        f"for name in {literal(names)}:",
        "    layer = model.get_submodule(name)",
        "    if isinstance(layer, nn.Linear):  # called in a loop",
        "        model.set_submodule(name, nn.Sequential(layer, small_norm(layer.out_features)))",
        "    elif isinstance(layer, nn.RNNBase) and not layer.bidirectional:",
        "        model.set_submodule(name, Normalised(layer))",
    ]
    return [
        Suggestion(
            "Normalise what the recurrence hands on from step to step (LayerNorm), with orthogonal weights",
            paste(code),
            "The state keeps its size however many steps there are; the weights have to keep its direction, for "
            "normalisation alone does not. Python then runs the steps, which is slower than one fused call.",
            "Ba et al. 2016, Layer normalization; Cooijmans et al. 2017, Recurrent batch normalization",
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
