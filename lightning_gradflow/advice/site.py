"""What the cures know of a model, and how to write its layers in code."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from textwrap import indent, wrap

import numpy as np

from lightning_gradflow.findings import Finding
from lightning_gradflow.history import History

PASTE = "# at the end of __init__"
"""Where code that changes layers belongs: before the optimizer is made."""

BY_HAND = "# in forward(): "
"""How a line begins that tells what to write by hand, for no code can be pasted in its place."""

NN = ("from torch import nn", "")
"""The import that most code needs; its own, for nobody knows what the user's file has."""

CONVOLUTIONS = "nn.Conv1d, nn.Conv2d, nn.Conv3d"
WEIGHTED = f"(nn.Linear, {CONVOLUTIONS})"
"""Code for the layers with a weight that a cure knows how to treat."""

ROOT = "(root)"
"""How a model is named that owns parameters itself."""

_LINE = 100
_NEAR = 0.5  # of the newest learning rate: before, it was warming up


@dataclass(frozen=True)
class Hidden:
    """An activation with layers behind it, and the layer that feeds it.

    Args:
        layer: the layer's module name.
        op: the activation, such as `sigmoid`.
        module: the activation's module name; empty where it is a call in `forward`, or one module called in
            several places, so that it cannot be joined to this layer.
        before: the activation that the layer's input comes from; empty where another layer or the data comes first.
        shared: the name of one module called in several places, where all of them are between layers; else empty.
        norm: the normalisation between the layer and the activation, or empty.
    """

    layer: str
    op: str
    module: str
    before: str = ""
    shared: str = ""
    norm: str = ""


@dataclass(frozen=True)
class Site:
    """A finding and the model it was made in.

    Args:
        finding: what was found.
        layers: module names that own parameters, in order of execution.
        hidden: the activations between the layers, in order of execution; the model's output activation is not
            among them, for it is bounded by design.
        lr: the newest learning rate, or NaN.
        grad_norm: the median of the total gradient norms that were finite, or NaN without any.
        norms: how many those are.
        clipped: share of the recent steps in which the Trainer clipped the gradients, or NaN.
        input_layer: the layer that the measured inputs go into; empty where that is not known.
        first_ratio: size of a step against that of the weights, a median over the layers, in the first sample with a
            learning rate near the newest; NaN where that is not known.
        gated: the layers that are known to be gated recurrences, or to feed a gate.
        normed: normalisation -> the layer before it.
        planned: steps of the whole run, or NaN.
        end: the module of the activation that gives the output; empty where there is none, or it is a call.
        peak_lr: the largest learning rate so far, or NaN.
    """

    finding: Finding
    layers: tuple[str, ...]
    hidden: tuple[Hidden, ...]
    lr: float
    grad_norm: float = math.nan
    norms: int = 0
    clipped: float = math.nan
    input_layer: str = ""
    first_ratio: float = math.nan
    gated: frozenset[str] = frozenset()
    normed: Mapping[str, str] = field(default_factory=dict)
    planned: float = math.nan
    end: str = ""
    peak_lr: float = math.nan

    @property
    def named(self) -> tuple[str, ...]:
        """The layers of the finding, worst first; all of the model's if it names none."""
        return self.finding.layers or self.layers

    def feeding(self, *ops: str) -> tuple[str, ...]:
        """The layers right before the hidden activations of these kinds, in order of execution."""
        return tuple(dict.fromkeys(place.layer for place in self.hidden if place.op in ops))

    def feeding_named(self) -> tuple[str, ...]:
        """The layers of the finding, with the layers before it in the place of an activation or a normalisation."""
        before = {norm: [layer] for norm, layer in self.normed.items()}
        for place in self.hidden:
            before.setdefault(place.module or place.shared, []).append(place.layer)
        return tuple(dict.fromkeys(layer for name in self.named for layer in before.get(name, [name])))

    @property
    def ops(self) -> tuple[str, ...]:
        """The kinds of hidden activations, each once."""
        return tuple(dict.fromkeys(place.op for place in self.hidden))


def survey(finding: Finding, history: History) -> Site:
    """What the history tells of the model.

    Example:
        >>> from lightning_gradflow.findings import FindingKind, Severity
        >>> from lightning_gradflow.history import Point
        >>> history = History()
        >>> points = [("fc1", ""), ("act", "tanh"), ("fc2", ""), ("out", "sigmoid")]
        >>> history.add_points([Point(name, name, op) for name, op in points])
        >>> survey(Finding(FindingKind.LOSS_PLATEAU, Severity.WARNING, 0), history).hidden
        (Hidden(layer='fc1', op='tanh', module='act', before='', shared='', norm=''),)
    """
    points = history.points
    last = max((i for i, point in enumerate(points) if point.is_layer), default=-1)
    modules = Counter(point.module for point in points)
    inner = Counter(point.module for point in points[: last + 1])
    hidden: list[Hidden] = []
    normalising = _norms(history)
    normed: dict[str, str] = {}
    layer = before = op = norm = ""
    for point in points[: last + 1]:
        if point.is_layer and point.module in normalising and layer and not op:
            norm = point.module
            normed[norm] = layer
        elif point.is_layer:
            layer, before, op, norm = point.module, op, "", ""
        elif layer:
            is_module = point.module not in history.layers and point.module != layer
            is_own, is_inner = modules[point.module] == 1, inner[point.module] == modules[point.module]
            own = point.module if is_module and is_own else ""
            shared = point.module if is_module and is_inner and not is_own else ""
            op = point.op
            hidden.append(Hidden(layer, op, own, before, shared, norm))
    rates = history.scalar("lr")
    rates = rates[rates > 0]
    layers = history.layers or tuple(point.module for point in points if point.is_layer)
    norms = history.scalar("grad_norm_total")
    norms = norms[np.isfinite(norms) & (norms > 0)]
    clipped = history.scalar("clipped_fraction")
    planned = history.scalar("planned_steps")
    return Site(
        finding,
        layers,
        tuple(hidden),
        lr=float(rates[-1]) if rates.size else math.nan,
        grad_norm=float(np.median(norms)) if norms.size else math.nan,
        norms=norms.size,
        clipped=float(clipped[-1]) if clipped.size else math.nan,
        input_layer=history.input_layer or "",
        first_ratio=_first_ratio(history),
        gated=_gated(history),
        normed=normed,
        planned=float(planned[-1]) if planned.size else math.nan,
        end=next((p.module for p in points[last + 1 :][-1:] if p.module not in history.layers), ""),
        peak_lr=float(rates.max()) if rates.size else math.nan,
    )


def _norms(history: History) -> frozenset[str]:
    """The layers of which gains are known."""
    known = np.any(~np.isnan(history["gain_rms"]), axis=0)
    return frozenset(name for name, is_norm in zip(history.layers, known, strict=True) if is_norm)


def _gated(history: History) -> frozenset[str]:
    found = {history.layers[i] for i in np.flatnonzero(np.any(history["recurrent_gates"] > 0, axis=0))}
    gates = set(np.flatnonzero(np.any(history["gate_fraction"] > 0, axis=0)).tolist())
    layer = ""
    for i, point in enumerate(history.points):
        layer = point.module if point.is_layer else layer
        if i in gates:
            found.add(layer)
    return frozenset(found)


def _first_ratio(history: History) -> float:
    rates, ratios = history.scalar("lr"), history["update_ratio"]
    if not rates.size:
        return math.nan
    near = np.flatnonzero((rates >= _NEAR * rates[-1]) & (np.isfinite(ratios) & (ratios > 0)).any(axis=1))
    if not near.size:
        return math.nan
    first = ratios[near[0]]
    return float(np.median(first[np.isfinite(first) & (first > 0)]))


def paste(lines: Iterable[str], by_hand: Iterable[str] = ()) -> str:
    """Code to paste at the end of `__init__`, behind lines that tell what to change by hand.

    It is a function of its own: an import, a class or a variable in `__init__` itself would hide the user's own of
    that name from the lines above.

    Args:
        lines: the code, in which `model` is the module; may be empty where there is something to do by hand.
        by_hand: comments.

    Example:
        >>> print(paste(["model.act = None"]))
        # at the end of __init__
        def follow_advice(model):
            model.act = None
        <BLANKLINE>
        follow_advice(self)
    """
    body = list(lines)
    parts = ["\n".join(by_hand), as_function(PASTE, body) if body else ""]
    return "\n\n".join(part for part in parts if part)


def as_function(where: str, lines: Iterable[str], *rest: str) -> str:
    """Code in a function of `model`, and of `rest`, and the call of it.

    Args:
        where: a comment that says where it belongs.
        lines: the code.
        rest: names that are known there.
    """
    body = indent("\n".join(lines), "    ")
    takes, given = ", ".join(("model", *rest)), ", ".join(("self", *rest))
    return f"{where}\ndef follow_advice({takes}):\n{body}\n\nfollow_advice({given})"


def by_hand(text: str, places: Iterable[Hidden]) -> list[str]:
    """Comments that tell what to write in `forward`, one for each kind of activation.

    Args:
        text: in which `{op}` stands for the activation; the names of the layers are put behind it.
        places: the activations.

    Example:
        >>> by_hand("relu(...) in the place of {op}(...) after", [Hidden("fc1", "tanh", ""), Hidden("fc2", "tanh", "")])
        ['# in forward(): relu(...) in the place of tanh(...) after fc1, fc2']
    """
    layers: dict[str, list[str]] = {}
    for place in places:
        layers.setdefault(place.op, []).append(place.layer)
    told = [f"{BY_HAND}{text.format(op=op)} {', '.join(dict.fromkeys(names))}" for op, names in layers.items()]
    return [line for one in told for line in wrap(one, _LINE, subsequent_indent="#   ", break_long_words=False)]


_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")  # torch's own, within names


def get(name: str) -> str:
    """Code for a module of the user's.

    Example:
        >>> get("net.3"), get("(root)")
        ('model.get_submodule("net.3")', 'model')
    """
    return "model" if name in ("", ROOT) else f"model.get_submodule({quote(name)})"


def quote(name: str) -> str:
    """Code for a module name; the root cannot be looked up by the name it is shown with.

    Wrappers that come after `__init__`, where the code is to stand, are left out.

    Example:
        >>> quote("net._orig_mod.0")
        '"net.0"'
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return json.dumps("" if name == ROOT else name)


def literal(names: Iterable[object]) -> str:
    """Code for a tuple of names, or of tuples of names, over as many lines as it needs.

    Example:
        >>> literal(["a", "b"]), literal([("a", "b")])
        ('("a", "b")', '(("a", "b"),)')
    """
    items = [_item(name) for name in names]
    inline = f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    if len(inline) <= _LINE:
        return inline
    lines = [""]
    for item in items:
        if len(lines[-1]) + len(item) + 6 > _LINE:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{item},"
    return "(\n" + "\n".join(f"    {line}" for line in lines) + "\n)"


def _item(name: object) -> str:
    if isinstance(name, tuple):
        return f"({', '.join(_item(part) for part in name)})"
    return quote(str(name))
