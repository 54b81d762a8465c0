"""The vocabulary of causes, and a model with its history."""

from torch import nn

from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History, Point, Row

VOCABULARY = {
    "vanishing_gradient": (
        "saturation weight_scale depth recurrence underflow dead_units learning_rate_too_large unknown"
    ),
    "exploding_gradient": "weight_scale depth recurrence learning_rate_too_large unscaled_inputs unknown",
    "nonfinite_gradient": "initialisation forward loss backward optimizer_step learning_rate_too_large unscaled_inputs",
    "dead_units": "initialisation symmetry learning_rate_too_large unscaled_inputs unknown",
    "saturated_activation": "unscaled_inputs weight_scale score_scale drift unknown",
    "loss_plateau": (
        "vanishing_gradient dead_units saturation weight_scale symmetry recurrence unscaled_inputs "
        "learning_rate_too_small learning_rate_too_large no_signal_in_data unknown"
    ),
    "loss_mismatch": (
        "unscaled_targets unreachable_targets softmax_twice bounded_scores sigmoid_twice no_log_softmax broadcast "
        "unknown"
    ),
    "mixed_samples": "batch_first unknown",
    "no_gradient": "detached initialisation unused not_optimized",
    "update_ratio": (
        "rounding learning_rate_too_small learning_rate_too_large unscaled_inputs weight_scale overwritten weight_decay"
    ),
}
PAIRS = [(FindingKind(kind), cause) for kind, causes in VOCABULARY.items() for cause in causes.split()]
EVIDENCE = {
    "span": -6.25,
    "slope": -0.3125,
    "points": 21.0,
    "weight_gain": 0.58,
    "activation_gain": 0.24,
    "underflowed_points": 3.0,
    "lost_share": 0.44,
    "headroom": 0.7,
    "growth": 4321.0,
    "grad_norm_total": 9.5e7,
    "nonfinite_layers": 4.0,
    "softmax_gap": 25.8,
    "unit_spread": 0.61,
    "targets_beyond": 0.5,
    "dead_fraction": 0.97,
    "activations": 2.0,
    "saturated_fraction": 0.93,
    "features": 2.0,
    "feature_12": 746.9,
    "feature_4": 99.7,
    "progress": 0.0012,
    "steps": 400.0,
    "loss": 2.3026,
    "update_ratio": 2e-7,
}


class Net(nn.Module):
    def __init__(self, depth=10, act=nn.Sigmoid, output=None):
        super().__init__()
        blocks = [module for _ in range(depth) for module in (nn.Linear(32, 32), act())]
        self.net = nn.Sequential(*blocks, nn.Linear(32, 4), *([output] if output else []))

    def forward(self, x):
        return self.net(x)


def history_of(model, lr=0.01):
    """The points as probes would give them, for a model that is one `nn.Sequential` called net."""
    points = [
        Point(f"net.{i}", f"net.{i}", "" if isinstance(module, nn.Linear) else type(module).__name__.lower())
        for i, module in enumerate(model.net)
    ]
    history = History()
    history.layer_axis.merge([point.name for point in points if point.is_layer])
    history.add_points(points)
    history.append(Row(0, scalars={"lr": lr}))
    return history


def finding(kind, cause, layers=("net.0", "net.2", "net.4", "net.6"), evidence=None):
    evidence = EVIDENCE if evidence is None else evidence
    return Finding(FindingKind(kind), Severity.WARNING, 0, layers, cause, "", evidence)
