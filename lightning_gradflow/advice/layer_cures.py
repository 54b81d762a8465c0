"""Cures that change layers: initialisation, activations, normalisation, inputs.

Each takes a `Site` and returns its suggestions, none where it does not apply.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_gradflow.activations import BOUNDED, RECTIFIERS, SIGMOIDS
from lightning_gradflow.advice.site import NN, WEIGHTED, Hidden, Site, by_hand, get, literal, paste, quote
from lightning_gradflow.findings import Suggestion

_BF16_STEPS = 128  # numbers of bf16 between a power of two and the next
_BEFORE_THE_CAST = (
    " Do it there, in float32, where the run is in bf16: inputs so far from zero are rounded to a few numbers, or one, "
    "and no layer brings back what the cast has lost."
)


def initialise(site: Site) -> list[Suggestion]:
    """The initialisation that keeps the signal, for each kind of hidden activation, in one piece of code."""
    found = []
    if layers := site.feeding("sigmoid"):
        found.append(_sigmoid(layers, tuple(place.layer for place in site.hidden if place.before in SIGMOIDS)))
    if layers := site.feeding("tanh", "hardtanh", "softsign"):
        found.append(_tanh(layers))
    if layers := site.feeding(*RECTIFIERS):
        found.append(_he(layers))
    fed = site.feeding(*BOUNDED, *RECTIFIERS)
    others = tuple(name for name in site.feeding_named() if name not in fed)
    # too large or too small, a layer behind the last activation is as much to blame as those before it
    if others and (not found or site.finding.cause == "weight_scale"):
        found.append(_orthogonal(others))
    return _together(found)


def initialise_large(site: Site) -> list[Suggestion]:
    """The same where layers were drawn too large."""
    return initialise(site) if {"weight_size", "layer_gain"} & site.finding.evidence.keys() else []


def initialise_named(site: Site) -> list[Suggestion]:
    """He's initialisation for the layers of the finding."""
    layers = site.feeding_named()
    return _together([_he(layers)] if layers else [])


@dataclass(frozen=True)
class _Drawn:
    """How some layers are drawn: what is done, the code for it, why, and by whom."""

    what: str
    code: list[str]
    reason: str
    reference: str


def _together(parts: list[_Drawn]) -> list[Suggestion]:
    """One suggestion: layers before different activations are to be drawn together, and not one kind or the other."""
    if not parts:
        return []
    return [
        Suggestion(
            "Initialise " + ", and ".join(part.what for part in parts),
            paste([*NN, *(line for part in parts for line in part.code)]),
            " ".join(dict.fromkeys(part.reason for part in parts)),
            "; ".join(dict.fromkeys(part.reference for part in parts)),
        )
    ]


def _loop(layers: tuple[str, ...], *body: str) -> list[str]:
    return [
        f"for name in {literal(layers)}:",
        "    layer = model.get_submodule(name)",
        f"    if not isinstance(layer, {WEIGHTED}):",
        "        continue",
        *(f"    {line}" for line in body),
    ]


def _sigmoid(layers: tuple[str, ...], behind: tuple[str, ...]) -> _Drawn:
    """For the layers that feed a sigmoid, of which those `behind` a sigmoid have an input with a mean of 1/2."""
    fed_by_data = tuple(name for name in layers if name not in behind)
    return _Drawn(
        "the layers before each sigmoid with orthogonal weights of gain 4 and centred biases",
        _loop(
            layers,
            f"is_inner = name not in {literal(fed_by_data)}  # its input comes from a sigmoid",
            "nn.init.orthogonal_(layer.weight, gain=4.0 if is_inner else 2.0)",
            "if layer.bias is not None:",
            "    layer.bias.data = -0.5 * is_inner * layer.weight.data.flatten(1).sum(1)",
        ),
        "Since sigmoid(x) = (1 + tanh(x / 2)) / 2, the network is then exactly an orthogonal tanh network, which keeps "
        "the size of the gradient at first; PyTorch's default loses more than four fifths of it in each sigmoid layer.",
        "Saxe et al. 2014, Exact solutions to the nonlinear dynamics of learning in deep linear neural networks",
    )


def _tanh(layers: tuple[str, ...]) -> _Drawn:
    return _Drawn(
        "the layers before each tanh with orthogonal weights",
        _loop(
            layers,
            "nn.init.orthogonal_(layer.weight)  # or xavier_normal_(layer.weight, gain=5 / 3)",
            "if layer.bias is not None:",
            "    nn.init.zeros_(layer.bias)",
        ),
        "Where tanh is nearly linear, an orthogonal weight keeps the size of the signal both ways.",
        "Glorot and Bengio 2010; Saxe et al. 2014",
    )


def _by_he(layers: tuple[str, ...]) -> list[str]:
    return _loop(
        layers,
        'nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")',
        "if layer.bias is not None:",
        "    nn.init.zeros_(layer.bias)",
    )


def _he(layers: tuple[str, ...]) -> _Drawn:
    return _Drawn(
        "these layers by He's rule, with biases at zero",
        _by_he(layers),
        "Half of the units pass nothing on, and a variance of 2 / fan_in makes up for it; PyTorch's default for "
        "linear layers is a sixth of that.",
        "He et al. 2015, Delving deep into rectifiers",
    )


def _orthogonal(layers: tuple[str, ...]) -> _Drawn:
    code = [
        f"for name in {literal(layers)}:",
        "    layer = model.get_submodule(name)",
        "    for parameter in layer.parameters(recurse=False):",
        "        if parameter.ndim > 1 and not isinstance(layer, nn.Embedding):",
        "            nn.init.orthogonal_(parameter)",
    ]
    return _Drawn(
        "these layers with orthogonal weights",
        code,
        "An orthogonal weight keeps the size of the signal both ways, whatever the depth.",
        "Saxe et al. 2014, Exact solutions to the nonlinear dynamics of learning in deep linear neural networks",
    )


def swap_activations(site: Site) -> list[Suggestion]:
    """Rectifiers in the place of bounded activations."""
    places = [place for place in site.hidden if place.op in BOUNDED]
    if not places:
        return []
    layers = tuple(dict.fromkeys(place.layer for place in places))
    calls = [place for place in places if not (place.module or place.shared)]
    told = by_hand("nn.functional.relu(...) in the place of {op}(...) after", calls)
    return [
        Suggestion(
            f"Use ReLU or GELU instead of {' and '.join(dict.fromkeys(place.op for place in places))}, with He's rule",
            paste([*NN, *_by_he(layers), *_put(places, "nn.ReLU()")], told),
            "A rectifier passes the gradient on unchanged where it is active; a sigmoid at most a quarter of it.",
            "Glorot, Bordes and Bengio 2011, Deep sparse rectifier neural networks; He et al. 2015",
        )
    ]


def _put(places: list[Hidden], activation: str) -> list[str]:
    """Code that puts an activation in the place of the modules of others."""
    own = [place.module for place in places if place.module]
    shared = list(dict.fromkeys(place.shared for place in places if place.shared))
    code = [f"for name in {literal(own)}:", f"    model.set_submodule(name, {activation})"] if own else []
    if shared:  # a module that is called in several places may have several names too, of which one is known
        code += [
            f"for old in [model.get_submodule(name) for name in {literal(shared)}]:",
            "    for name, module in list(model.named_modules(remove_duplicate=False)):",
            "        if module is old:",
            f"            model.set_submodule(name, {activation})",
        ]
    return code


def leak(site: Site) -> list[Suggestion]:
    """Leaky rectifiers in the place of those that can die."""
    places = [place for place in site.hidden if place.op in ("relu", "relu6")]
    named = {*site.named}
    meant = [place for place in places if named & ({place.module, place.shared, place.layer, place.norm} - {""})]
    places = meant or places
    if not places:
        return []
    calls = [place for place in places if not (place.module or place.shared)]
    told = by_hand("nn.functional.leaky_relu(...) in the place of {op}(...) after", calls)
    code = _put(places, "nn.LeakyReLU(0.01)")
    born_dead = site.finding.cause == "initialisation"
    if born_dead:  # a slope of 0.01 at each layer would only make the gradient vanish
        code = [*_by_he(tuple(dict.fromkeys(place.layer for place in places))), *code]
    if code:
        code = [*NN, *code]
    return [
        Suggestion(
            "Use a rectifier with a slope on both sides (LeakyReLU)" + (", with He's rule" if born_dead else ""),
            paste(code, told),
            "A unit with a slope everywhere gets a gradient everywhere and can come back.",
            "Maas et al. 2013, Rectifier nonlinearities improve neural network acoustic models",
        )
    ]


_LAST_AXIS = (
    "class BatchNorm(nn.BatchNorm1d):  # over all axes but the last",
    "    def forward(self, x):",
    "        return super().forward(x.flatten(0, -2)).view_as(x)",
    "",
)
_BATCH_NORMS = "{nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}"


def normalise(site: Site) -> list[Suggestion]:
    """Normalisation of each unit between layers and activations."""
    bare = tuple(dict.fromkeys(place.layer for place in site.hidden if not place.norm))
    layers = bare if site.hidden else site.feeding_named()
    if not layers:
        return []
    code = [
        *NN,
        *_LAST_AXIS,
        f"norms = {_BATCH_NORMS}",
        f"for name in {literal(layers)}:",
        "    layer = model.get_submodule(name)",
        "    if isinstance(layer, nn.Linear):",
        "        model.set_submodule(name, nn.Sequential(layer, BatchNorm(layer.out_features)))",
        "    elif type(layer) in norms:",
        "        model.set_submodule(name, nn.Sequential(layer, norms[type(layer)](layer.out_channels)))",
    ]
    return [
        Suggestion(
            "Normalise before each activation (BatchNorm)",
            paste(code),
            "Each unit is centred where its activation is steep, and the scale of the weights stops mattering. In a "
            "plain stack LayerNorm does not do that: it leaves in what all samples have in common, and with depth that "
            "is most of it.",
            "Ioffe and Szegedy 2015, Batch normalization; Daneshmand et al. 2020, Batch normalization provably avoids "
            "rank collapse for randomly initialised deep networks",
        )
    ]


def _is_far(site: Site) -> bool:
    """Whether the inputs are so far from zero that numbers in bf16, with 8 bits, are the same for all samples."""
    evidence = site.finding.evidence
    return evidence.get("input_mean", 0.0) > _BF16_STEPS * evidence.get("input_deviation", math.inf)


def scale_inputs(site: Site) -> list[Suggestion]:
    """Standardised inputs for the first layer, with the features that are too large by index."""
    layer = site.input_layer or (*site.layers, *site.feeding_named(), "")[0]
    if layer in ("", "(root)"):
        return []
    large = [key.removeprefix("feature_") for key in site.finding.evidence if key.startswith("feature_")]
    code = [
        *NN,
        *(
            [f"# the largest features x[..., i] of the input, channels x[:, i] of images: i = {', '.join(large)}"]
            if large
            else []
        ),
        *_LAST_AXIS,
        "class Scaled(nn.Sequential):",
        "    def forward(self, x, *rest):",
        "        return self[1](self[0](x), *rest)",
        "",
        f"first = {get(layer)}",
        f"norms = {_BATCH_NORMS}",
        "if type(first) in norms:",
        "    scale = norms[type(first)](first.in_channels, affine=False)",
        "else:",
        "    size = first.in_features if isinstance(first, nn.Linear) else first.input_size",
        "    scale = BatchNorm(size, affine=False)",
        f"model.set_submodule({quote(layer)}, Scaled(scale, first))",
    ]
    return [
        Suggestion(
            "Scale the inputs to mean 0 and variance 1" + (f", above all feature {large[0]}" if large else ""),
            paste(code),
            "Initialisations are made for inputs of that size: far larger ones make outputs and steps too large, and "
            "columns far smaller than the rest are not seen. Scaling in the dataset, with the mean and deviation of "
            "the training data, does the same." + (_BEFORE_THE_CAST if _is_far(site) else ""),
            "LeCun et al. 1998, Efficient BackProp",
        )
    ]
