import math
import subprocess
import sys

import matplotlib
import numpy as np
import pytest

from lightning_gradflow.figures import (
    MAX_COLUMNS,
    MAX_ROWS,
    MISSING_COLOUR,
    NONFINITE_COLOUR,
    ZERO_COLOUR,
    colour_map,
    grid,
    heatmap,
    limits,
)
from lightning_gradflow.findings import Action
from tests import made_up

SPECIAL = {"zero": (0.0, ZERO_COLOUR), "nonfinite": (math.inf, NONFINITE_COLOUR), "nan": (math.nan, MISSING_COLOUR)}


def area(pixels, colour):
    """Share of the picture in a colour."""
    return float((pixels == np.array(colour)).all(axis=2).mean())


@pytest.mark.parametrize("name", SPECIAL)
def test_a_special_value_has_a_colour_of_its_own(name):
    value, colour = SPECIAL[name]
    with_it = heatmap(made_up.gradients([1.0, 0.1], [value, 0.1]))
    without = heatmap(made_up.gradients([1.0, 0.1], [0.5, 0.1]))
    assert area(with_it, colour) > 0.1
    assert area(without, colour) < 0.01
    for other in SPECIAL.keys() - {name}:
        assert area(with_it, SPECIAL[other][1]) < 0.01


def test_the_first_layer_is_on_top_and_the_first_step_at_the_left():
    pixels = heatmap(made_up.gradients([0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, math.inf]))
    top, left = (np.argwhere((pixels == ZERO_COLOUR).all(axis=2) & wide(pixels, ZERO_COLOUR)).mean(axis=0)).tolist()
    foot, right = np.argwhere((pixels == NONFINITE_COLOUR).all(axis=2) & wide(pixels, NONFINITE_COLOUR)).mean(axis=0)
    assert top < foot
    assert left < right


def test_a_line_stands_between_the_columns_before_and_after_an_action():
    shown = made_up.gradients([0.0] * 9, [0.0] * 9, [math.inf] * 9, [math.inf] * 9)
    plain = heatmap(shown)
    red = (plain == NONFINITE_COLOUR).all(axis=2) & wide(plain, NONFINITE_COLOUR)
    border, inside = np.argwhere(red)[:, 1].min(), np.argwhere(red)[:, 0].max() - 1
    white = {}
    for outcome in ("kept", "rolled_back"):
        marked = heatmap(shown, actions=[Action(1, "clip", outcome=outcome)])
        assert marked.shape == plain.shape
        changed = np.flatnonzero((marked != plain)[inside].any(axis=1))
        assert abs((changed.min() + changed.max()) / 2 - border) <= 2
        white[outcome] = (marked == 255).all(axis=2).sum()
    assert white["kept"] > white["rolled_back"]


def test_an_action_has_its_name_where_there_is_room():
    shown = made_up.gradients(*[[1.0, 0.1]] * 40)
    left, foot = 40, heatmap(shown).shape[0] // 2
    ink = {}
    for kinds in (["", ""], ["clip", ""], ["clip", "reinit"]):
        steps = (10, 11) if kinds[1] else (10, 30)
        marked = heatmap(shown, actions=[Action(step, kind) for step, kind in zip(steps, kinds, strict=True)])
        ink[kinds[0], kinds[1]] = (marked[:foot, left:] < 100).all(axis=2).sum()
    assert ink["clip", ""] > ink["", ""]
    assert ink["clip", "reinit"] <= ink["clip", ""]  # the second is too near to the first


def wide(pixels, colour):
    """Rows of pixels with much of a colour: cells, not letters or legends."""
    return (pixels == np.array(colour)).all(axis=2).sum(axis=1, keepdims=True) > 200


def test_a_large_and_a_small_norm_look_different_without_pyplot_or_a_changed_setting():
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black", "axes.grid": True}):
        strange = heatmap(made_up.gradients([1.0, 1e-6]))
    assert dict(matplotlib.rcParams) == before
    np.testing.assert_array_equal(strange, heatmap(made_up.gradients([1.0, 1e-6])))
    cells = strange[strange.shape[0] // 2 - 40 : strange.shape[0] // 2 + 40, 600]
    assert len(np.unique(cells, axis=0)) >= 2


def test_drawing_does_without_the_figures_of_matplotlib():
    code = (
        "import sys; from lightning_gradflow.figures import heatmap; from lightning_gradflow.history import History;"
        "sys.modules |= {'matplotlib.pyplot': None, 'matplotlib.figure': None}; heatmap(History())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [[1.0]],
        [[0.0, 0.0]] * 3,
        [[math.nan, math.nan]],
        [[math.inf, math.inf]],
        [[1e-300, 1e300, 0.0, math.inf, math.nan]],
        [[1.0] * 300],
        [[1.0, 2.0]] * 700,
    ],
    ids=["empty", "one", "zero", "nan", "inf", "wild", "many layers", "many steps"],
)
@pytest.mark.parametrize("metric", ["grad_norm", "dead_fraction"])
def test_any_history_gives_pixels(rows, metric):
    pixels = heatmap(made_up.gradients(*rows), metric)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert pixels.shape[1] == 1200
    assert 300 <= pixels.shape[0] <= 900


def test_long_and_foreign_names_leave_room_for_the_picture():
    shown = made_up.History()
    shown.layer_axis.merge(["a.very.long.name." * 12 + str(i) for i in range(3)] + ["$x_1$", "层"])
    shown.append(made_up.Row(0, {"grad_norm": np.array([math.inf] * 5)}))
    assert area(heatmap(shown), NONFINITE_COLOUR) > 0.3


def test_cells_are_equally_large_and_fill_the_frame():
    pixels = heatmap(made_up.gradients([0.0, math.inf] * 4, [math.inf, 0.0] * 4))
    black, red = area(pixels, ZERO_COLOUR), area(pixels, NONFINITE_COLOUR)
    assert black == pytest.approx(red, rel=0.02)
    assert black + red > 0.5


def test_the_colour_bar_goes_from_the_lowest_colour_at_its_foot_to_the_highest():
    pixels = heatmap(made_up.gradients([1.0, 1e-3]))
    bar = pixels[34 : pixels.shape[0] - 48, 1200 - 100 + 18 + 9]
    assert (bar[0].tolist(), bar[-1].tolist()) == (colour_map()[-1].tolist(), colour_map()[0].tolist())
    assert (np.diff(bar.astype(int).sum(axis=1)) <= 0).mean() > 0.9  # viridis gets darker all the way down


def test_values_beyond_the_scale_have_the_colours_of_its_ends_and_the_bar_has_tips():
    wild = [[1e-8] * 100] * 49 + [[1e-8] * 98 + [1e30, 1e-40]]
    assert limits(np.array(wild)) == (-12, -8)
    with_tips, without = (heatmap(made_up.gradients(*rows)) for rows in (wild, [[1e-8] * 99 + [1e-12]] * 50))
    corner = (slice(34, 36), 1200 - 100 + 18 + 1)
    assert (with_tips[corner] == 255).all()
    assert (without[corner] < 255).any()


def test_a_single_infinite_value_survives_the_merging_of_cells():
    rows = [[1.0] * 600 for _ in range(1000)]
    rows[501][301] = math.inf
    cells = grid(made_up.gradients(*rows), "grad_norm")
    assert cells.values.shape == (MAX_ROWS, MAX_COLUMNS)
    assert np.isinf(cells.values).sum() == 1
    assert (cells.steps[-1], len(cells.names)) == (999, MAX_ROWS)


def test_fractions_are_shown_for_the_points_that_have_them():
    cells = grid(made_up.history(), "saturated_fraction")
    assert cells.names == ("net.1.sigmoid", "net.3.sigmoid", "net.5.sigmoid")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2e-7, 0.5], (-7, 0)),
        ([5.0], (-3, 1)),
        ([0.1, 1.0], (-4, 0)),
        ([0.0, math.nan, math.inf], (-4, 0)),
        ([1e-8] * 500 + [1e-1] * 500 + [1e30], (-8, -1)),
    ],
)
def test_limits_are_four_whole_decades_or_more_and_one_wild_value_does_not_drown_the_rest(values, expected):
    assert limits(np.array(values)) == expected
