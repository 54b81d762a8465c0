"""Cures that change layers: initialisation, activations, normalisation, residual connections, recurrences.

Each takes a `Site` and returns its suggestions, none where it does not apply.
"""

from __future__ import annotations

from lightning_gradflow.activations import BOUNDED, RECTIFIERS
from lightning_gradflow.advice.site import PASTE, Site, get, literal, quote
from lightning_gradflow.findings import Suggestion

_CONVOLUTIONS = "nn.Conv1d, nn.Conv2d, nn.Conv3d"
_WEIGHTED = f"(nn.Linear, {_CONVOLUTIONS})"


def initialise(site: Site) -> list[Suggestion]:
    """The initialisation that keeps the signal, for each kind of hidden activation."""
    found = []
    if layers := site.feeding("sigmoid"):
        found.append(_sigmoid(layers))
    if layers := site.feeding("tanh", "hardtanh", "softsign"):
        found.append(_tanh(layers))
    if layers := site.feeding(*RECTIFIERS):
        found.append(_he(layers))
    layers = site.feeding_named()
    return found or ([_orthogonal(layers)] if layers else [])


def initialise_named(site: Site) -> list[Suggestion]:
    """He's initialisation for the layers of the finding."""
    layers = site.feeding_named()
    return [_he(layers)] if layers else []


def _loop(layers: tuple[str, ...], *body: str) -> str:
    lines = [
        PASTE,
        "from torch import nn",
        "",
        f"for name in {literal(layers)}:",
        "    layer = model.get_submodule(name)",
        f"    if not isinstance(layer, {_WEIGHTED}):",
        "        continue",
        *(f"    {line}" for line in body),
    ]
    return "\n".join(lines)


def _sigmoid(layers: tuple[str, ...]) -> Suggestion:
    return Suggestion(
        "Initialise the layers before each sigmoid with orthogonal weights of gain 4 and centred biases",
        _loop(
            layers,
            "nn.init.orthogonal_(layer.weight, gain=4.0)",
            "if layer.bias is not None:",
            "    layer.bias.data = -0.5 * layer.weight.data.flatten(1).sum(1)",
        ),
        "Since sigmoid(x) = (1 + tanh(x / 2)) / 2, the network is then exactly an orthogonal tanh network, which keeps "
        "the size of the gradient at first; PyTorch's default loses more than four fifths of it in each sigmoid layer. "
        "The first layer expects inputs in [0, 1].",
        "Saxe et al. 2014, Exact solutions to the nonlinear dynamics of learning in deep linear neural networks",
    )


def _tanh(layers: tuple[str, ...]) -> Suggestion:
    return Suggestion(
        "Initialise the layers before each tanh with orthogonal weights",
        _loop(
            layers,
            "nn.init.orthogonal_(layer.weight)  # or xavier_normal_(layer.weight, gain=5 / 3)",
            "if layer.bias is not None:",
            "    nn.init.zeros_(layer.bias)",
        ),
        "Where tanh is nearly linear, an orthogonal weight keeps the size of the signal both ways.",
        "Glorot and Bengio 2010; Saxe et al. 2014",
    )


def _he(layers: tuple[str, ...]) -> Suggestion:
    return Suggestion(
        "Initialise these layers by He's rule, with biases at zero",
        _loop(
            layers,
            'nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")',
            "if layer.bias is not None:",
            "    nn.init.zeros_(layer.bias)",
        ),
        "Half of the units pass nothing on, and a variance of 2 / fan_in makes up for it; PyTorch's default for "
        "linear layers is a sixth of that.",
        "He et al. 2015, Delving deep into rectifiers",
    )


def _orthogonal(layers: tuple[str, ...]) -> Suggestion:
    code = [
        PASTE,
        "from torch import nn",
        "",
        f"for name in {literal(layers)}:",
        "    for parameter in model.get_submodule(name).parameters(recurse=False):",
        "        if parameter.ndim > 1:",
        "            nn.init.orthogonal_(parameter)",
    ]
    return Suggestion(
        "Initialise these layers with orthogonal weights",
        "\n".join(code),
        "An orthogonal weight keeps the size of the signal both ways, whatever the depth.",
        "Saxe et al. 2014, Exact solutions to the nonlinear dynamics of learning in deep linear neural networks",
    )


def swap_activations(site: Site) -> list[Suggestion]:
    """Rectifiers in the place of bounded activations."""
    places = [place for place in site.hidden if place.op in BOUNDED]
    if not places:
        return []
    modules = [place.module for place in places if place.module]
    code = [PASTE, "from torch import nn", ""]
    if modules:
        code += [f"for name in {literal(modules)}:", "    model.set_submodule(name, nn.ReLU())"]
    calls = [place for place in places if not place.module]
    if calls:
        code += [f"# in forward(): F.relu(...) in the place of {place.op}(...) after {place.layer}" for place in calls]
    layers = tuple(dict.fromkeys(place.layer for place in places))
    return [
        Suggestion(
            f"Use ReLU or GELU instead of {' and '.join(dict.fromkeys(place.op for place in places))}, with He's rule",
            "\n".join(code) + "\n" + _he(layers).code.split("\n\n", 1)[1],
            "A rectifier passes the gradient on unchanged where it is active; a sigmoid at most a quarter of it.",
            "Glorot, Bordes and Bengio 2011, Deep sparse rectifier neural networks; He et al. 2015",
        )
    ]


def leak(site: Site) -> list[Suggestion]:
    """Leaky rectifiers in the place of those that can die."""
    places = [place for place in site.hidden if place.op in ("relu", "relu6")]
    named = set(site.named)
    places = [place for place in places if named & {place.module, place.layer}] or places
    if not places:
        return []
    modules = [place.module for place in places if place.module]
    code = [PASTE, "from torch import nn", ""]
    if modules:
        code += [f"for name in {literal(modules)}:", "    model.set_submodule(name, nn.LeakyReLU(0.01))"]
    code += [f"# in forward(): F.leaky_relu(...) after {place.layer}" for place in places if not place.module]
    return [
        Suggestion(
            "Use a rectifier with a slope on both sides (LeakyReLU, GELU)",
            "\n".join(code),
            "A unit with a slope everywhere gets a gradient everywhere and can come back.",
            "Maas et al. 2013, Rectifier nonlinearities improve neural network acoustic models",
        )
    ]


def normalise(site: Site) -> list[Suggestion]:
    """Normalisation between layers and activations."""
    layers = tuple(dict.fromkeys(place.layer for place in site.hidden)) or site.feeding_named()
    if not layers:
        return []
    code = [
        PASTE,
        "from torch import nn",
        "",
        f"for name in {literal(layers)}:",
        "    layer = model.get_submodule(name)",
        "    if isinstance(layer, nn.Linear):",
        "        model.set_submodule(name, nn.Sequential(layer, nn.LayerNorm(layer.out_features)))",
        f"    elif isinstance(layer, ({_CONVOLUTIONS})):",
        "        model.set_submodule(name, nn.Sequential(layer, nn.GroupNorm(1, layer.out_channels)))",
    ]
    return [
        Suggestion(
            "Normalise before each activation (LayerNorm; BatchNorm for large batches)",
            "\n".join(code),
            "Normalised inputs keep an activation off its flat part, and the scale of the weights stops mattering.",
            "Ioffe and Szegedy 2015, Batch normalization; Ba et al. 2016, Layer normalization",
        )
    ]


def residuals(site: Site) -> list[Suggestion]:
    """Residual connections around each layer and its activation."""
    pairs = [(place.layer, place.module) for place in site.hidden if place.module]
    calls = [place for place in site.hidden if not place.module]
    if not pairs and not calls:
        return []
    code = [PASTE, "from torch import nn", ""]
    if pairs:
        code += [
            "class Residual(nn.Sequential):",
            "    def forward(self, x):",
            "        return x + super().forward(x)",
            "",
            f"for name, activation in {literal(pairs)}:",
            "    layer = model.get_submodule(name)",
            f"    if isinstance(layer, {_WEIGHTED}) and layer.weight.shape[0] == layer.weight.shape[1]:",
            "        model.set_submodule(name, Residual(layer, model.get_submodule(activation)))",
            "        model.set_submodule(activation, nn.Identity())",
        ]
    code += [
        f"# in forward(), if {place.layer} keeps the shape: x = x + {place.op}(self.{place.layer}(x))"
        for place in calls
    ]
    return [
        Suggestion(
            "Add residual connections around layers whose input and output have the same shape",
            "\n".join(code),
            "The gradient then has a way past each layer on which nothing multiplies it.",
            "He et al. 2016, Deep residual learning for image recognition",
        )
    ]


def scale_inputs(site: Site) -> list[Suggestion]:
    """Standardised inputs for the first layer, with the features that are too large by index."""
    layer = (*site.layers, *site.feeding_named(), "")[0]
    if layer in ("", "(root)"):
        return []
    large = [key.removeprefix("feature_") for key in site.finding.evidence if key.startswith("feature_")]
    code = [
        PASTE,
        "from torch import nn",
        "",
        *(
            [f"# the largest features x[..., i] of the input, channels x[:, i] of images: i = {', '.join(large)}"]
            if large
            else []
        ),
        f"first = {get(layer)}",
        "if isinstance(first, nn.Linear):",
        "    scale = nn.BatchNorm1d(first.in_features, affine=False)",
        "else:  # a convolution over images",
        "    scale = nn.BatchNorm2d(first.in_channels, affine=False)",
        f"model.set_submodule({quote(layer)}, nn.Sequential(scale, first))",
    ]
    return [
        Suggestion(
            "Scale the inputs to mean 0 and variance 1" + (f", above all feature {large[0]}" if large else ""),
            "\n".join(code),
            "Initialisations are made for inputs of that size; pixels in [0, 255] drive an activation to its bounds. "
            "Scaling in the dataset, with the mean and deviation of the training data, does the same.",
            "LeCun et al. 1998, Efficient BackProp",
        )
    ]
