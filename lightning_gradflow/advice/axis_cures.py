"""Cures for layers that are fed with axes in the wrong order."""

from __future__ import annotations

from lightning_gradflow.advice.explanations import names
from lightning_gradflow.advice.site import BY_HAND, NN, Site, get, literal, paste
from lightning_gradflow.findings import Suggestion

_REFERENCE = "Paszke et al. 2019, PyTorch: an imperative style, high-performance deep learning library"


def put_batch_first(site: Site) -> list[Suggestion]:
    """Layers that take (batch, time, features)."""
    layers = _named(site)
    if not layers:
        return []
    code = [
        *NN,
        "# or where they are made: nn.LSTM(..., batch_first=True), and the same of nn.GRU, nn.RNN,",
        "# nn.MultiheadAttention, nn.TransformerEncoderLayer and nn.TransformerDecoderLayer",
        f"for name in {literal(layers)}:",
        "    layer = model.get_submodule(name)",
        "    if isinstance(layer, (nn.RNNBase, nn.MultiheadAttention)):",
        "        layer.batch_first = True",
    ]
    return [
        Suggestion(
            f"Make {names(layers)} with batch_first=True",
            paste(code),
            "Torch's recurrences and attentions take (time, batch, features) unless they are told otherwise. What "
            "comes out then has the order of what goes in, so the last time step is output[:, -1]; the state of a "
            "recurrence stays (layers, batch, features).",
            _REFERENCE,
        )
    ]


def put_time_first(site: Site) -> list[Suggestion]:
    """Sequences as (time, batch, features), where the layers are to stay as they are."""
    layers = _named(site)
    if not layers:
        return []
    several = len(layers) > 1
    before, behind = ("the first of ", "the last of them") if several else ("", "it")
    code = [
        f"{BY_HAND}x = x.transpose(0, 1) before {before}{names(layers)},",
        f"# and output = output.transpose(0, 1) behind {behind}",
    ]
    return [
        Suggestion(
            "Or give them (time, batch, features)" if several else "Or give it (time, batch, features)",
            "\n".join(code),
            "The second transpose brings back the order that the rest of the network is written for.",
            _REFERENCE,
        )
    ]


def _named(site: Site) -> tuple[str, ...]:
    return tuple(name for name in site.named if get(name) != "model")
