import io
import math

import numpy as np
import pytest
import torch

from lightning_gradflow.callbacks.state import from_checkpoint, to_checkpoint
from lightning_gradflow.history import Axis, History, Point, Row
from lightning_gradflow.metrics import HISTOGRAM_BINS, METRICS
from tests import made_up

nan, inf = math.nan, math.inf


def through_a_checkpoint(state):
    """What comes back of a state that was saved, and loaded as untrusted."""
    file = io.BytesIO()
    torch.save(to_checkpoint(state), file)
    file.seek(0)
    return from_checkpoint(torch.load(file, weights_only=True))


WAYS = {"as it is": lambda state: state, "through a checkpoint": through_a_checkpoint}


def long_history(rows, max_rows=64, losses=lambda step: [float(step)]):
    history = History(max_rows)
    for step in range(rows):
        history.append(Row(step, scalars={"loss": float(step)}, losses=np.array(losses(step))))
    return history


def grown_late():
    """A history in which a layer and its activation ran for the first time in the second row."""
    history = History()
    history.layer_axis.merge(["a", "c"])
    history.add_points([Point("a", "a"), Point("c", "c")])
    counts = np.arange(HISTOGRAM_BINS + 2)
    history.append(Row(0, {"grad_norm": np.array([1.0, inf])}, {"loss": 2.0}, {"grad_hist_early": counts}))
    history.layer_axis.merge(["a", "b", "c"])
    history.add_points([Point("a", "a"), Point("b", "b"), Point("b/relu", "b", "relu"), Point("c", "c")])
    values = {"grad_norm": np.array([4.0, 6.0, 5.0]), "delta_norm": np.array([1.0, 4.0, nan, 3.0])}
    history.append(Row(7, values, {"lr": 0.1}, losses=np.array([1.5, nan])))
    return history


# -- axes


@pytest.mark.parametrize(
    ("sequences", "names"),
    [
        ([["a", "c"], ["a", "b", "c"]], "abc"),
        ([["b"], ["a", "b"]], "ab"),
        ([["a", "b"], ["b", "a"]], "ab"),
        ([["a", "d"], ["a", "b", "c", "d"]], "abcd"),
        ([["a", "b"], ["b", "c"], ["a", "x"]], "axbc"),
        ([["a", "a"], []], "a"),
    ],
)
def test_a_new_name_stands_after_the_one_executed_before_it(sequences, names):
    axis = Axis()
    for sequence in sequences:
        axis.merge(sequence)
    assert "".join(axis.names) == names


def test_a_name_keeps_its_identity_when_others_come_in_before_it():
    axis = Axis(["a", "c"])
    axis.merge(["x", "a", "b", "c"])
    assert [axis.identity(name) for name in "acxb"] == [0, 1, 2, 3]


def test_the_order_holds_the_identity_of_each_name():
    axis = Axis(["a", "c"])
    axis.merge(["a", "b", "c"])
    assert axis.order.tolist() == [axis.identity(name) for name in axis.names] == [0, 2, 1]


def test_a_new_order_leaves_the_identities():
    axis = Axis(["a", "b", "c"])
    axis.reorder(["c", "a", "b"])
    assert axis.names == ("c", "a", "b")
    assert axis.identity("c") == 2


@pytest.mark.parametrize("sequence", [["a"], ["a", "b", "b"], ["a", "x"], []])
def test_an_order_must_hold_each_name_once(sequence):
    with pytest.raises(ValueError, match="each name of the axis once"):
        Axis(["a", "b"]).reorder(sequence)


def test_names_of_an_axis_may_be_of_any_kind_that_can_be_looked_up():
    axis = Axis([("delta", 0), ("delta", 2)])
    axis.merge([("delta", 0), ("delta", 1)])
    assert axis.names == (("delta", 0), ("delta", 1), ("delta", 2))


# -- tables


def test_columns_stand_in_order_of_execution():
    assert grown_late()["grad_norm"][1].tolist() == [4.0, 5.0, 6.0]


def test_a_column_that_came_late_is_nan_before():
    np.testing.assert_array_equal(grown_late()["grad_norm"][0], [1.0, nan, inf])


def test_a_row_without_the_metric_is_nan_throughout():
    table = grown_late()["delta_norm"]
    assert np.isnan(table[0]).all()
    np.testing.assert_array_equal(table[1], [1.0, nan, 3.0, 4.0])


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_has_a_column_for_each_name(metric):
    history = grown_late()
    assert history[metric].shape == (2, len(history.names(metric)))


def test_a_scalar_is_nan_where_a_row_has_none():
    np.testing.assert_array_equal(grown_late().scalar("lr"), [nan, 0.1])


def test_a_histogram_is_zero_where_a_row_has_none():
    counts = grown_late().histogram("grad_hist_early")
    np.testing.assert_array_equal(counts, [np.arange(HISTOGRAM_BINS + 2), np.zeros(HISTOGRAM_BINS + 2)])


def test_an_empty_history_has_empty_tables():
    history = History()
    assert history["grad_norm"].shape == (0, 0)
    assert history.scalar("loss").shape == history.steps.shape == history.losses.shape == (0,)
    assert history.histogram("grad_hist_late").shape == (0, HISTOGRAM_BINS + 2)


def test_a_point_is_a_layer_unless_it_has_an_operation():
    assert [point.is_layer for point in grown_late().points] == [True, True, False, True]


def _called():
    """A history of a loop of two turns, of none, and of three."""
    history = History()
    history.append(Row(0, calls={"cell": np.array([1.0, 2.0])}))
    history.append(Row(1))
    history.append(Row(2, calls={"cell": np.array([nan, inf, 3.0])}))
    return history


def test_calls_are_nan_where_there_was_no_such_call():
    np.testing.assert_array_equal(_called().calls("cell"), [[1.0, 2.0, nan], [nan] * 3, [nan, inf, 3.0]])


def test_a_point_that_ran_once_has_no_calls():
    assert _called().calls("head").shape == (3, 0)


def test_an_empty_history_has_no_calls():
    assert History().calls("cell").shape == (0, 0)


def test_a_row_has_no_calls_unless_it_is_given_some():
    assert Row(0).calls == {}


# -- bounds


@pytest.mark.parametrize("max_rows", [8, 9, 64, 1024])
def test_ten_thousand_rows_stay_within_the_bound(max_rows):
    history = History(max_rows)
    for step in range(10_000):
        history.append(Row(step))
        assert len(history) <= max_rows


@pytest.mark.parametrize("max_rows", [8, 9, 64, 1024])
def test_the_last_half_of_the_rows_has_no_gap(max_rows):
    history = long_history(10_000, max_rows)
    recent = max_rows // 2
    assert history.steps[-recent:].tolist() == list(range(10_000 - recent, 10_000))


def test_the_first_row_is_kept():
    assert long_history(10_000).steps[0] == 0


@pytest.mark.parametrize("rows", [1100, 2000, 10_000, 30_000])
def test_the_old_rows_are_spread_evenly_over_the_run(rows):
    assert np.diff(long_history(rows, 1024).steps).max() <= 3 * rows / 256


@pytest.mark.parametrize("rows", [600, 2000, 10_000])
def test_the_old_losses_are_spread_evenly_over_the_run(rows):
    assert np.diff(long_history(rows, 64).loss_steps).max() <= 3 * rows / 128


def test_the_loss_trace_is_bounded():
    history = History(8)
    for step in range(10_000):
        history.append(Row(step, losses=np.ones(1)))
        assert len(history.losses) <= 64


def test_a_row_with_more_losses_than_the_bound_is_taken():
    history = History(8)
    history.append(Row(999, losses=np.arange(1000.0)))
    assert len(history.losses) <= 64


def test_thinning_keeps_the_mean_of_the_loss():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(5000)
    history = long_history(5000, 8, losses=lambda step: [values[step]])
    steps = np.array([count for _, _, count in history.state_dict()["losses"]])
    assert steps.sum() == 5000
    assert float(history.losses @ steps) / 5000 == pytest.approx(values.mean(), abs=1e-12)


def test_a_thinned_loss_stands_at_the_mean_of_its_steps():
    history = long_history(5000, 8)  # the loss is the step
    np.testing.assert_allclose(history.losses, history.loss_steps)


def test_the_recent_and_the_first_losses_are_kept_step_by_step():
    history = long_history(10_000, 64)
    assert history.losses[:16].tolist() == list(range(16))
    assert history.losses[-256:].tolist() == list(range(9744, 10_000))


def test_a_lost_step_does_not_spread_over_its_neighbours():
    history = long_history(10_000, 8, losses=lambda step: [nan if step % 5 == 3 else 1.0])
    assert history.losses[2:10].tolist() == [1.0] * 8


def test_each_loss_has_its_step():
    history = History()
    history.append(Row(0, losses=np.array([3.0])))
    history.append(Row(4, losses=np.array([2.0, 1.9, 1.8, 1.7])))
    history.append(Row(8, losses=np.array([1.0])))
    assert history.loss_steps.tolist() == [0, 1, 2, 3, 4, 8]


# -- errors


@pytest.mark.parametrize("max_rows", [7, 0, -1])
def test_too_small_a_bound_is_refused(max_rows):
    with pytest.raises(ValueError, match=rf"max_rows must be in \[8, inf\), got {max_rows}"):
        History(max_rows)


def test_an_unknown_metric_is_refused_in_a_row():
    with pytest.raises(ValueError, match=r"values must be keyed by metrics in .*, got \['grad_nrom'\]"):
        History().append(Row(0, {"grad_nrom": np.zeros(0)}))


def test_an_unknown_metric_is_refused_in_a_question():
    with pytest.raises(KeyError, match=r"metric must be one of .*, got 'grad_nrom'"):
        History()["grad_nrom"]


@pytest.mark.parametrize("step", [3, 2])
def test_a_step_that_is_not_above_the_last_is_refused(step):
    history = History()
    history.append(Row(3))
    with pytest.raises(ValueError, match=f"step must be above 3, got {step}"):
        history.append(Row(step))


def test_more_values_than_layers_are_refused():
    with pytest.raises(ValueError, match="grad_norm must have at most 0 values, got 1"):
        History().append(Row(0, {"grad_norm": np.ones(1)}))


@pytest.mark.parametrize("bad", [Row(0, {"x": np.zeros(1)}), Row(0, {"grad_norm": np.ones(1)})])
def test_a_refused_row_leaves_nothing_behind(bad):
    history = History()
    with pytest.raises(ValueError, match="must"):
        history.append(bad)
    assert len(history) == 0


# -- features


def _widened():
    """A history of an input of two features, of none that could be measured, and of three."""
    history = History()
    for step, values in enumerate(([1.0, 2.0], [], [4.0, inf, 6.0])):
        history.add_features(len(values))
        history.append(Row(step, {"input_rms": np.array(values)} if values else {}))
    return history


def test_features_have_their_numbers_as_names():
    assert _widened().names("input_rms") == ("0", "1", "2")


def test_an_axis_of_features_only_grows():
    expected = [[1.0, 2.0, nan], [nan, nan, nan], [4.0, inf, 6.0]]
    np.testing.assert_array_equal(_widened()["input_rms"], expected)


def test_features_come_in_their_own_order_beyond_nine():
    history = History()
    history.add_features(12)
    assert history.names("input_rms") == tuple(map(str, range(12)))


def test_more_values_than_features_are_refused():
    with pytest.raises(ValueError, match="input_rms must have at most 0 values, got 1"):
        History().append(Row(0, {"input_rms": np.array([1.0])}))


# -- state


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "make", [History, grown_late, _called, _widened, made_up.history, lambda: long_history(200, 8)]
)
def test_a_loaded_history_is_the_one_that_was_saved(make, way):
    saved, loaded = make(), History(8)
    loaded.load_state_dict(WAYS[way](saved.state_dict()))
    assert loaded.layers == saved.layers
    assert loaded.points == saved.points
    for read in ("steps", "losses", "loss_steps"):
        np.testing.assert_array_equal(getattr(loaded, read), getattr(saved, read))
    for metric in METRICS:
        np.testing.assert_array_equal(loaded[metric], saved[metric])
    np.testing.assert_array_equal(loaded.histogram("grad_hist_early"), saved.histogram("grad_hist_early"))
    np.testing.assert_array_equal(loaded.calls("cell"), saved.calls("cell"))
    for a, b in zip(loaded.rows, saved.rows, strict=True):
        assert a.scalars == b.scalars
        np.testing.assert_array_equal(a.losses, b.losses)


@pytest.mark.parametrize("way", WAYS)
def test_a_loaded_history_goes_on_as_the_one_that_was_saved(way):
    saved, loaded = grown_late(), History()
    loaded.load_state_dict(WAYS[way](saved.state_dict()))
    for history in (saved, loaded):
        history.layer_axis.merge(["b", "late"])
        history.append(Row(9, {"grad_norm": np.array([1.0, 2.0, 3.0, 4.0])}, losses=np.array([1.0])))
    np.testing.assert_array_equal(loaded["grad_norm"], saved["grad_norm"])
    assert loaded.layers == saved.layers == ("a", "b", "late", "c")


def test_a_saved_state_does_not_change_with_the_history():
    history = grown_late()
    state = history.state_dict()
    history.append(Row(8, losses=np.array([9.0])))
    loaded = History()
    loaded.load_state_dict(state)
    assert loaded.steps.tolist() == [0, 7]
    assert loaded.losses.size == 2


def test_a_scalar_that_nobody_knows_is_refused_and_one_of_a_row_is_not():
    history = History()
    assert history.scalar("loss").shape == (0,)
    with pytest.raises(KeyError, match=r"scalar must be one of .*, got 'los'"):
        history.scalar("los")
    with pytest.raises(KeyError, match=r"got 'grad_norm' \(a metric: history\[name\]\)"):
        history.scalar("grad_norm")
    history.append(Row(0, scalars={"of_my_own": 3.0}))
    assert history.scalar("of_my_own").tolist() == [3.0]
