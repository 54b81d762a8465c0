"""The families of activations: what advice, causes and remedies go by."""

from __future__ import annotations

SIGMOIDS = frozenset({"sigmoid", "hardsigmoid"})
"""Between 0 and 1, with a mean output of 1/2."""

BOUNDED = SIGMOIDS | {"tanh", "hardtanh", "softsign"}
"""Flat on both sides: their slope is at most what it is in the middle, and no weight makes it larger."""

RECTIFIERS = frozenset(
    {"relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "gelu", "silu", "mish", "hardswish", "softplus"}
)
"""Near zero on one side and near the identity on the other: He's rule holds for them."""
