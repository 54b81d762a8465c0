"""Cures that give the gradient another way: residual and gated connections, normalisation beside the stream.

Each takes a `Site` and returns its suggestions, none where it does not apply.
"""

from __future__ import annotations

from lightning_gradflow.advice.site import NN, WEIGHTED, Site, by_hand, literal, paste
from lightning_gradflow.findings import Suggestion


def residuals(site: Site) -> list[Suggestion]:
    """Residual connections around each layer and its activation."""
    pairs = _plain_pairs(site)
    calls = [place for place in site.hidden if not place.module or place.norm]
    if not pairs and not calls:
        return []
    code = []
    if pairs:
        code = [
            *NN,
            "class Residual(nn.Sequential):",
            "    def forward(self, x):",
            "        y = super().forward(x)",
            "        return x + y if x.shape == y.shape else y",
            "",
            *_around(pairs, "Residual"),
        ]
    told = by_hand("x = x + {op}(layer(x)) where the shape stays, for layer =", calls)
    return [
        Suggestion(
            "Add residual connections around layers whose input and output have the same shape",
            paste(code, told),
            "The gradient then has a way past each layer on which nothing multiplies it.",
            "He et al. 2016, Deep residual learning for image recognition",
        )
    ]


def gates(site: Site) -> list[Suggestion]:
    """Highway connections: residual ones with a gate that is learnt."""
    pairs = _plain_pairs(site)
    if not pairs:
        return []
    code = [
        "import copy",
        "",
        "import torch",
        *NN,
        "class Highway(nn.Module):",
        "    def __init__(self, layer, activation):",
        "        super().__init__()",
        "        self.layer, self.activation, self.gate = layer, activation, copy.deepcopy(layer)",
        "        nn.init.zeros_(self.gate.weight)",
        "        if self.gate.bias is not None:",
        "            nn.init.constant_(self.gate.bias, -2.0)  # almost shut at first",
        "",
        "    def forward(self, x):",
        "        y = self.activation(self.layer(x))",
        "        return torch.lerp(x, y, torch.sigmoid(self.gate(x))) if x.shape == y.shape else y",
        "",
        *_around(pairs, "Highway"),
    ]
    return [
        Suggestion(
            "Let a gate decide how much of each layer is used (highway connections)",
            paste(code),
            "A layer gives t * f(x) + (1 - t) * x with a gate t that is learnt: while it is almost shut, the signal "
            "passes unchanged both ways. It costs a second weight for each layer that keeps the shape.",
            "Srivastava, Greff and Schmidhuber 2015, Training very deep networks",
        )
    ]


def _plain_pairs(site: Site) -> list[tuple[str, str]]:
    """Each layer with the module of its activation, where nothing stands between them."""
    return [(place.layer, place.module) for place in site.hidden if place.module and not place.norm]


def _around(pairs: list[tuple[str, str]], wrapper: str) -> list[str]:
    """Code that puts a wrapper around each layer with its activation."""
    return [
        f"for name, activation in {literal(pairs)}:",
        "    layer = model.get_submodule(name)",
        f"    if isinstance(layer, {WEIGHTED}):",
        f"        model.set_submodule(name, {wrapper}(layer, model.get_submodule(activation)))",
        "        model.set_submodule(activation, nn.Identity())",
    ]


def pre_norm(site: Site) -> list[Suggestion]:
    """Pre-LN for PyTorch's own transformer layers where they run attention first."""
    blocks = [name.removesuffix(".self_attn") for name in site.layers if name.endswith(".self_attn")]
    at = {name: i for i, name in enumerate(site.layers)}
    post = [block for block in blocks if at.get(f"{block}.norm1", -1) > at[f"{block}.self_attn"]]
    if not post:
        return []
    code = [
        *NN,
        f"for name in {literal(post)}:",
        "    block = model.get_submodule(name)",
        "    if isinstance(block, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):",
        "        block.norm_first = True  # to be given to its constructor",
        "for stack in model.modules():  # what comes out of the last block is to be normalised too",
        "    if isinstance(stack, (nn.TransformerEncoder, nn.TransformerDecoder)) and stack.norm is None:",
        "        stack.norm = nn.LayerNorm(stack.layers[0].norm1.normalized_shape)",
    ]
    return [
        Suggestion(
            "Normalise before attention and before the feed-forward part (Pre-LN), not after them",
            paste(code),
            "The residual stream is then a way from the loss to each block on which nothing multiplies the gradient. "
            "Where it is normalised after each block, the gradients near the output are large at first, and it takes "
            "a warm-up of the learning rate to survive them.",
            "Xiong et al. 2020, On layer normalization in the transformer architecture",
        )
    ]
