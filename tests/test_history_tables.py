"""What the history keeps from row to row, against a second look at all of its rows."""

import copy
import math

import numpy as np
import pytest

from lightning_gradflow.detectors import known
from lightning_gradflow.detectors.dead_units import DeadUnits
from lightning_gradflow.detectors.exploding import ExplodingGradient
from lightning_gradflow.detectors.no_gradient import NoGradient
from lightning_gradflow.detectors.nonfinite import NonfiniteGradient
from lightning_gradflow.detectors.plateau import LossPlateau
from lightning_gradflow.detectors.profile import depth_profile
from lightning_gradflow.detectors.recurrence import RecurrentGradient
from lightning_gradflow.detectors.saturation import SaturatedActivation
from lightning_gradflow.detectors.update_ratio import UpdateRatio
from lightning_gradflow.detectors.vanishing import VanishingGradient
from lightning_gradflow.history import Axis, History, Point, Row
from lightning_gradflow.history.tables import Grown
from lightning_gradflow.metrics import METRICS

nan, inf = math.nan, math.inf
DETECTORS = (
    VanishingGradient(),
    ExplodingGradient(),
    NonfiniteGradient(),
    NoGradient(),
    UpdateRatio(),
    DeadUnits(),
    SaturatedActivation(),
    LossPlateau(),
    RecurrentGradient(),
)


class Twin:
    """A history that random rows go into, and the same values by name in plain dicts."""

    def __init__(self, seed, max_rows=32):
        self.rng = np.random.default_rng(seed)
        self.history = History(max_rows)
        self.values, self.scalars, self.losses = {}, {}, 0
        self.step = -1
        self.level = {}
        self.grow(6)

    def grow(self, number):
        """New layers, each with an activation behind it, anywhere in the order of execution."""
        for _ in range(number):
            made = len(self.history.layer_axis)
            layers, points = list(self.history.layers), list(self.history.points)
            at = int(self.rng.integers(len(layers) + 1))
            before = next((i for i, p in enumerate(points) if at < len(layers) and p.name == layers[at]), len(points))
            name = f"fc{made}"
            new = [Point(name, name), Point(f"{name}/act", name, str(self.rng.choice(["relu", "tanh"])))]
            self.history.layer_axis.merge([*layers[:at], name, *layers[at:]])
            self.history.add_points([*points[:before], *new, *points[before:]])
        self.history.add_features(int(self.rng.integers(1, 5)))

    def reorder(self):
        self.history.layer_axis.reorder(self.rng.permutation(self.history.layers).tolist())

    def reload(self):
        state, self.history = self.history.state_dict(), History(self.history._max_rows)
        self.history.load_state_dict(state)

    def new_level(self):
        """Another regime, healthy or sick, for the rows to come."""
        levels = {"grad_norm": [0, 0.1, 1e9, inf], "delta_norm": [0, 1.0, inf], "dead_fraction": [0, 0.95, 1]}
        levels |= {"silent_fraction": [0, 0.5, 1], "saturated_fraction": [0, 0.95], "gate_fraction": [0, 0, 1]}
        levels |= {"update_ratio": [1e-9, 1e-3, 2], "weight_norm": [0, 1, 2], "grad_missing_fraction": [0, 1]}
        levels |= {"output_spread": [0, 1], "input_rms": [1, 1e3], "grad_nonfinite_fraction": [0, 0, 1]}
        self.level = {metric: self.rng.choice(of) for metric, of in levels.items()}
        self.decay = self.rng.choice([0, 0, 1, -1])

    def append(self):
        self.step += int(self.rng.integers(1, 20))
        if not self.level or self.rng.random() < 0.1:
            self.new_level()
        values = {}
        for metric in METRICS:
            width = len(self.history.names(metric))
            if self.rng.random() < 0.1:
                continue
            width -= int(self.rng.integers(0, 3)) if self.rng.random() < 0.1 else 0
            found = self.level.get(metric, 1.0) * self.rng.choice([1.0, 1.1], max(0, width))
            if metric == "delta_norm":
                place = {name: i for i, name in enumerate(self.history.point_axis.names)}
                by_identity = sorted(place, key=self.history.point_axis.identity)
                found *= 10.0 ** (self.decay * np.array([place[name] for name in by_identity[: len(found)]]))
            if METRICS[metric].unit == "fraction":
                found = np.minimum(found, 1.0)
            found[self.rng.random(len(found)) < 0.05] = nan
            values[metric] = found
        scalars = {"lr": 0.1, "optimizers": 1.0, "grad_norm_total": float(self.rng.choice([1, 1e5])), "loss": 1.0}
        scalars |= {"step_skipped": 1.0} if self.rng.random() < 0.05 else {}
        scalars |= {"val_loss": float(self.rng.random())} if self.rng.random() < 0.2 else {}
        losses = 2 + 0.01 * self.rng.standard_normal(int(self.rng.integers(0, 20)))
        called = {self.history.points[0].name: 0.1 ** np.arange(9.0)[::-1]} if self.rng.random() < 0.9 else {}
        self.history.append(Row(self.step, values, scalars, losses=losses, calls=called))
        names = {metric: sorted(self.history.names(metric), key=self._axis(metric).identity) for metric in values}
        self.values[self.step] = {m: dict(zip(names[m], v.tolist(), strict=False)) for m, v in values.items()}
        self.scalars[self.step] = scalars

    def close(self):
        self.history.close(self.step, np.array([1.5]), 0.25)
        self.scalars[self.step] = {**self.scalars[self.step], "val_loss": 0.25}

    def _axis(self, metric):
        history = self.history
        axes = {"layers": history.layer_axis, "points": history.point_axis, "features": history.feature_axis}
        return axes[METRICS[metric].axis]

    def table(self, metric):
        """The values of a metric, looked up one by one."""
        rows = [self.values[step].get(metric, {}) for step in self.history.steps.tolist()]
        names = self.history.names(metric)
        return np.array([[row.get(name, nan) for name in names] for row in rows]).reshape(len(rows), len(names))

    def steps(self, number):
        """Random changes, each of which may come at any time."""
        for _ in range(number):
            self.append()
            change = self.rng.random()
            if change < 0.03:
                self.grow(1)
            elif change < 0.06:
                self.reorder()
            elif change < 0.08:
                self.reload()
            elif change < 0.1:
                self.close()
            yield


@pytest.mark.parametrize("seed", range(4))
def test_tables_and_scalars_are_those_that_a_look_at_every_row_gives(seed):
    twin = Twin(seed)
    for _ in twin.steps(150):
        for metric in twin.rng.choice(list(METRICS), 4):  # what was not asked for a while has to catch up
            np.testing.assert_array_equal(twin.history[metric], twin.table(metric))
        for name in twin.rng.choice(["lr", "val_loss", "step_skipped", "clip_factor"], 2):
            expected = [twin.scalars[step].get(name, nan) for step in twin.history.steps.tolist()]
            np.testing.assert_array_equal(twin.history.scalar(name), expected)
        row = twin.history.rows[int(twin.rng.integers(len(twin.history)))]
        for metric, found in twin.values[row.step].items():
            np.testing.assert_array_equal(row.values[metric], list(found.values()))
        assert set(row.values) == set(twin.values[row.step])
    assert len(twin.history) <= 32 < len(twin.values)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_remembered_of_the_rows_is_what_a_look_at_all_of_them_gives(seed):
    twin = Twin(seed)
    for _ in twin.steps(150):
        for metric in twin.rng.choice(list(METRICS), 3):
            table = twin.table(metric)
            is_known = ~np.isnan(table)
            columns = [column[~np.isnan(column)] for column in table.T]
            np.testing.assert_array_equal(known.known_rows(twin.history, metric), is_known.any(axis=1))
            np.testing.assert_array_equal(known.how_often_known(twin.history, metric), is_known.sum(axis=0))
            always = [bool((column == 1).all()) for column in columns]
            np.testing.assert_array_equal(known.is_always(twin.history, metric, 1), always)
            ends = [[c[i] if c.size else nan for c in columns] for i in (0, -1)]
            np.testing.assert_array_equal(known.first_values(twin.history, metric), ends[0])
            np.testing.assert_array_equal(known.newest_values(twin.history, metric), ends[1])


@pytest.mark.parametrize("seed", range(3))
def test_a_history_that_was_judged_at_each_row_is_judged_as_one_that_comes_fresh(seed):
    twin, found = Twin(seed), 0
    for _ in twin.steps(120):
        fresh = History(32)
        fresh.load_state_dict(twin.history.state_dict())
        for detector in DETECTORS:
            told = detector.judge(twin.history)
            assert repr(told) == repr(detector.judge(fresh))
            found += len(told)
    assert found > 100


def _long(rows=100, width=5, max_rows=64):
    history = History(max_rows)
    history.layer_axis.merge([f"fc{i}" for i in range(width)])
    history.add_points([Point(f"fc{i}", f"fc{i}") for i in range(width)])
    for step in range(rows):
        values = {"grad_norm": np.full(width, float(step)), "delta_norm": 10.0 ** np.arange(width)}
        history.append(Row(step, values, {"loss": 1.0}, losses=np.ones(2)))
    return history


def test_a_table_that_is_asked_for_twice_is_made_once():
    history = _long()
    assert history["grad_norm"] is history["grad_norm"]
    assert history["update_norm"] is history["update_norm"]
    assert history.rows is history.rows
    assert history.points is history.points
    for read in ("steps", "losses", "loss_steps"):
        assert getattr(history, read) is getattr(history, read)


@pytest.mark.parametrize("is_turned", [False, True])
def test_a_new_row_leaves_the_others_where_they_are(is_turned):
    history = _long(1, max_rows=2048)
    if is_turned:
        history.layer_axis.reorder(history.layers[::-1])
    moves, before = 0, history["grad_norm"]
    for step in range(1, 1000):
        history.append(Row(step, {"grad_norm": np.ones(5)}))
        after = history["grad_norm"]
        moves += not np.shares_memory(before, after)
        before = after
    assert moves <= math.log2(1000 / 16) + 1


def test_rows_and_tables_hold_the_same_memory():
    history = _long()
    assert all(np.shares_memory(row.values["grad_norm"], history["grad_norm"]) for row in history.rows)


def test_a_row_holds_no_memory_for_what_it_does_not_have():
    """Rows of gradients alone have four metrics of a score, and are many."""

    def held(tables):
        return sum(table.rows.size for table in tables._values.values())

    history = _long(1)
    before = held(history._tables)
    for step in range(1, 50):
        history.append(Row(step, {"grad_norm": np.ones(5)}))
    assert held(history._tables) == before + 49 * 5
    for step in range(50, 100):  # some of which are thinned out
        history.append(Row(step, {"grad_norm": np.ones(5)}))
    assert held(history._tables) == len(history) * 5 + 5


def test_a_state_keeps_every_number_and_writes_small_ones_small():
    numbers = {"grad_norm": 1e-55, "grad_rms": 0.5, "dead_fraction": 0.1, "grad_missing_fraction": 1.0}
    numbers |= {
        "output_rms": inf,
        "grad_max_abs": float(np.float32(0.1)),
        "update_norm": 1e300,
        "weight_norm": 1 + 2**-52,
        "delta_norm": -1.0,
    }
    history = _long(0)
    for step in range(3):
        history.append(Row(step, {metric: np.array([number, nan, 0]) for metric, number in numbers.items()}))
    history.append(Row(3, {"grad_nonfinite_fraction": np.array([0.0, 1.0, 1.0])}))
    state = history.state_dict()
    types = {metric: found["values"].dtype.name for metric, found in state["values"].items()}
    in_full = {"grad_norm", "dead_fraction", "update_norm", "weight_norm"}
    assert {metric for metric, dtype in types.items() if dtype == "float64"} == in_full
    assert types["grad_max_abs"] == "float32"
    assert types["grad_nonfinite_fraction"] == "uint8"
    loaded = History()
    loaded.load_state_dict(state)
    for metric in types:
        np.testing.assert_array_equal(loaded[metric], history[metric])
        assert loaded[metric].dtype == np.float64


def test_one_number_that_needs_all_its_digits_is_found_far_back():
    history = History()
    history.layer_axis.merge([f"fc{i}" for i in range(9000)])
    history.append(Row(0, {"grad_norm": np.append(np.zeros(8999), 0.1)}))
    assert history.state_dict()["values"]["grad_norm"]["values"][-1] == 0.1


def test_what_was_read_cannot_be_written_to():
    history = _long()
    history.layer_axis.merge(["late"])
    row = history.rows[-1].values["grad_norm"]
    arrays = [history["grad_norm"], history["update_norm"], history.scalar("loss"), history.steps, history.losses, row]
    for array in [*arrays, history.loss_steps, history.layer_axis.order]:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_what_was_read_stays_as_it_was():
    history = _long(60)
    read = [
        history["grad_norm"],
        history.scalar("loss"),
        history.steps,
        history.losses,
        history.rows[1].values["grad_norm"],
    ]
    kept = copy.deepcopy(read)
    for step in range(100, 400):
        history.append(Row(step, {"grad_norm": np.zeros(5)}, {"loss": 0.0}, losses=np.zeros(2)))
    history.layer_axis.reorder(history.layers[::-1])
    for now, before in zip(read, kept, strict=True):
        np.testing.assert_array_equal(now, before)


def test_a_profile_is_made_once_however_often_it_is_asked_for():
    history = _long(60)
    profile = depth_profile(history, -1)
    for step in range(100, 110):  # some of which are thinned out
        history.append(Row(step, {"delta_norm": np.ones(5)}))
        at = history.steps.tolist().index(59)
        assert depth_profile(history, at) is profile
    history.point_axis.reorder(history.point_axis.names[::-1])
    assert depth_profile(history, at).span == -profile.span


def test_a_state_has_as_many_arrays_however_many_rows_there_are():
    def arrays(state):
        nested = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
        return sum(arrays(part) for part in nested) + isinstance(state, np.ndarray)

    assert arrays(_long(3).state_dict()) == arrays(_long(60).state_dict())


def test_an_order_that_stays_makes_no_new_version():
    axis = Axis("abc")
    version = axis.version
    axis.merge("abc")
    axis.reorder("abc")
    assert axis.version == version
    axis.reorder("cab")
    assert axis.version > version


def test_rows_that_come_together_stand_one_after_the_other():
    grown = Grown(np.empty((0, 2)))
    for start in range(0, 60, 20):
        grown.extend(np.arange(start, start + 20.0).reshape(10, 2))
    np.testing.assert_array_equal(grown.rows, np.arange(60.0).reshape(30, 2))
    assert len(grown) == 30 <= grown.room < 60
