"""Cures for scores that are too large for the softmax that chooses by them."""

from __future__ import annotations

from lightning_gradflow.advice.site import Site
from lightning_gradflow.findings import Suggestion


def divide_scores(site: Site) -> list[Suggestion]:
    """Products of queries and keys that are divided by the root of their length."""
    where = f" of {', '.join(site.finding.layers)}" if site.finding.layers else ""
    return [
        Suggestion(
            "Divide the scores by the square root of the number of features that they are a sum over",
            f"# in forward{where}, in the place of the softmax of query @ key.transpose(-2, -1)\n"
            "def attend(query, key, value):  # (..., positions, features) -> (..., positions, features)\n"
            "    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5\n"
            "    return scores.softmax(dim=-1) @ value",
            "A sum of d products of numbers of size 1 has the size sqrt(d). A softmax of such scores takes one "
            "position, chosen by chance, and passes next to no gradient on to what would choose another.",
            "Vaswani et al. 2017, Attention is all you need, section 3.2.1",
        )
    ]


def initialise_scores(site: Site) -> list[Suggestion]:
    """Usual weights for what queries and keys are made by, or their normalisation."""
    del site  # which weights make them is written in `forward`
    return [
        Suggestion(
            "Draw the weights that make queries and keys with a deviation of 1 / sqrt(inputs), or normalise both",
            "# where they are made; inputs is the number of features that they are multiplied with\n"
            "def projection(inputs, outputs):\n"
            "    return torch.nn.Parameter(torch.randn(inputs, outputs) * inputs**-0.5)\n"
            "\n"
            "# or, in forward, before the product:\n"
            "def normalised(query, key):\n"
            "    features = query.shape[-1:]\n"
            "    return torch.nn.functional.layer_norm(query, features), torch.nn.functional.layer_norm(key, features)",
            "torch.randn alone makes each query and key sqrt(inputs) times as large as what goes in, and the scores "
            "that many times larger once for each side of the product.",
            "Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks; Henry "
            "et al. 2020, Query-key normalization for Transformers",
        )
    ]
