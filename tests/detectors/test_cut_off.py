import math

import numpy as np
import pytest

from lightning_gradflow.detectors.no_gradient import NoGradient
from lightning_gradflow.history import History, Row
from tests.detectors.runs import stack, verdict

nan = math.nan
ZERO = {"grad_missing_fraction": [0, 0], "grad_norm": [0, 0], "delta_norm": [0, nan, 0]}
PENALTY = {"grad_missing_fraction": [0, 0], "grad_norm": [0.1, 0.2], "in_graph": [1, nan, 1]}


def judge(values, steps=(0, 1, 2), loss=2.3, floor=-149.0, passes=1.0, **changes):
    history = History()
    history.layer_axis.merge(["fc0", "fc1"])
    history.add_points(stack(2, "relu"))
    last = -1
    for step in steps:
        row = {name: np.array(of, dtype=float) for name, of in {**values, **changes}.items()}
        scalars = {"delta_floor": floor, "backward_passes": passes, "optimizers": 1.0, "lr": 1e-3}
        losses = np.broadcast_to(loss, (step - last,)) if np.ndim(loss) == 0 else loss[last + 1 : step + 1]
        history.append(Row(step, row, scalars, losses=np.array(losses, dtype=float)))
        last = step
    return verdict(NoGradient().judge(history))


DETACHED = [("warning", "detached", ("fc0", "fc1"))]


def test_zeros_everywhere_in_three_samples_come_from_an_operation_without_a_slope():
    assert judge(ZERO) == DETACHED
    assert judge(ZERO, steps=(0, 1)) == []


@pytest.mark.parametrize(
    "other",
    [
        {"loss": 0.0},  # a hinge that is content with all samples
        {"loss": nan},
        {"floor": -24.0},  # fp16 may have lost it
        {"floor": nan},
        {"zero_weights": [1, 0]},
        {"dead_fraction": [nan, 1.0, nan]},
        {"silent_fraction": [nan, 0.95, nan]},
        {"saturated_fraction": [nan, 1.0, nan]},
        {"grad_norm": [0, 1e-30], "delta_norm": [0, nan, 0]},
    ],
)
def test_zeros_with_another_reason_are_left_to_others(other):
    assert judge(ZERO, **other) == []


LATE = (0, 1, 2, 30, 60)


def test_a_gradient_that_no_output_gets_is_that_of_a_penalty():
    assert judge(PENALTY, LATE) == DETACHED


@pytest.mark.parametrize(
    "other",
    [
        {"delta_norm": [nan, nan, 0.1]},
        {"passes": 0.0},  # loss.backward() by hand: the backward pass was not seen
        {"in_graph": [1, nan, 0]},
        {"in_graph": [nan, nan, nan]},
        {"loss": np.linspace(2.3, 1.5, 61)},
    ],
)
def test_a_gradient_of_something_else_is_none(other):
    assert judge(PENALTY, LATE, **other) == []


def test_a_young_run_may_have_no_gradient_at_its_outputs():
    assert judge(PENALTY, (0, 1, 2, 30, 49)) == []


def test_an_optimizer_that_holds_nothing_but_what_gets_no_gradient_is_cut_off():
    cut = {
        "grad_missing_fraction": [1, nan],
        "in_graph": [1, nan, 1],
        "input_detached": [0, nan, 0],
        "delta_norm": [nan, nan, 0.1],
    }
    assert judge(cut, LATE) == [("warning", "detached", ("fc0",))]
    assert judge(cut, (0, 1, 2)) == [("info", "unused", ("fc0",))]
    assert judge({**cut, "grad_missing_fraction": [1, 0]}, LATE) == [("info", "unused", ("fc0",))]
