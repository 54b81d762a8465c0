"""What was read of gradients, for tests to compare."""

from __future__ import annotations

from lightning_gradflow.probes.gradient_columns import GradientColumns


def by_layer(columns: GradientColumns, *, scaled: bool = False) -> dict[str, dict[str, float]]:
    """Layer -> metric -> value, of the metrics that the layer has."""
    layers, values = columns.layers(scaled=scaled)
    return {
        layer: {metric: float(column[i]) for metric, column in values.items() if column[i] == column[i]}
        for i, layer in enumerate(layers)
    }
