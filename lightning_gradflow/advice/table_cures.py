"""Cures for tables that are looked up in."""

from __future__ import annotations

from lightning_gradflow.advice.site import NN, Site, literal, paste
from lightning_gradflow.findings import Suggestion


def shorten_rows(site: Site) -> list[Suggestion]:
    """Tables with rows of length 1; none where it is the weights of layers that are too large."""
    if {"weight_size", "layer_gain"} & site.finding.evidence.keys():
        return []
    code = [
        *NN,
        f"for name in {literal(site.finding.layers)}:",
        "    part = model.get_submodule(name)",
        "    for table in part.parameters(recurse=False):",
        "        if table.ndim > 1 and table.any():  # zeros are there on purpose",
        "            nn.init.normal_(table, std=table.shape[-1] ** -0.5)",
        "    if getattr(part, 'padding_idx', None) is not None:",
        "        nn.init.zeros_(part.weight.data[part.padding_idx])",
    ]
    return [
        Suggestion(
            "Draw these tables with a standard deviation of 1 / sqrt(width), so that their rows have length 1",
            paste(code),
            "PyTorch draws an embedding with a deviation of 1: the product of two rows of 64 entries then has 8, "
            "and so have the outputs of a layer that shares its weight with the embedding.",
            "LeCun et al. 1998, Efficient BackProp; Rendle 2010, Factorization machines",
        )
    ]
