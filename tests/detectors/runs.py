"""Made-up histories, for the tables of the detectors."""

from dataclasses import replace

import numpy as np

from lightning_gradflow.history import History, Point, Row


def stack(layers, op=None):
    """The points of a stack of layers `fc0`, `fc1`, ..., with an activation `act0`, ... between any two."""
    points = []
    for i in range(layers):
        points.append(Point(f"fc{i}", f"fc{i}"))
        if op is not None and i < layers - 1:
            points.append(Point(f"act{i}", f"act{i}", op))
    return points


def measured(points, metric, *rows, start=0, **others):
    """A history of one metric of points, a list of values for each step; `others` are further metrics, in each row."""
    history = History()
    history.add_points(points)
    fixed = {name: np.array(values, dtype=float) for name, values in others.items()}
    for step, values in enumerate(rows, start):
        history.append(Row(step, {metric: np.array(values, dtype=float), **fixed}))
    return history


def measured_too(history, *values, **scalars):
    """The same history, in which more was measured: `values` for each row, or one for all; and scalars in all rows.

    What is None was not measured.
    """
    made = History()
    axes = ("layers", "points", "point_order", "features")
    made.load_state_dict({**made.state_dict(), **{part: history.state_dict()[part] for part in axes}})
    for i, row in enumerate(history.rows):
        every = {**row.values, **values[i if len(values) > 1 else 0]}
        known = {name: np.array(found, dtype=float) for name, found in every.items() if found is not None}
        made.append(replace(row, values=known, scalars={**row.scalars, **scalars}))
    return made


def verdict(findings):
    """(severity, cause, layers) of each finding."""
    return [(finding.severity.value, finding.cause, finding.layers) for finding in findings]


def is_due(step, interval):
    """Whether a step is sampled: 0, 1, 2, 4, 8, ..., then every `interval` steps."""
    return step & (step - 1) == 0 if step < interval else step % interval == 0


def rows_of(losses, interval=50, lr=None, sampled_only=False, val=None, **scalars):
    """The rows that a run with these losses has; `sampled_only` where the loss is known at the samples alone."""
    last = -1
    for step in range(len(losses)):
        if not is_due(step, interval):
            continue
        found = {"optimizers": 1.0, "lr": 1e-3 if lr is None else float(lr[step]), **scalars}
        if val is not None:
            found["val_loss"] = float(val[step])
        known = losses[step : step + 1] if sampled_only else losses[last + 1 : step + 1]
        last = step
        yield Row(step, scalars=found, losses=np.array(known, dtype=float))


def alarms(detector, losses, **how):
    """The steps at which a detector finds something in a run with these losses."""
    history = History()
    steps = []
    for row in rows_of(losses, **how):
        history.append(row)
        if detector.judge(history):
            steps.append(row.step)
    return steps
