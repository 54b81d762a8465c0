"""Runs that stand still with weights that were unusual from the start: each condition from both sides."""

import math

import numpy as np
import pytest

from lightning_gradflow.callbacks.plateau_detector import PlateauDetector
from lightning_gradflow.detectors.chaotic_state import ChaoticState
from lightning_gradflow.detectors.large_tables import LargeTables
from lightning_gradflow.detectors.standstill import stands_still, starts_with_embedding
from lightning_gradflow.findings import Ledger
from lightning_gradflow.history import History, Point, Row
from tests.detectors.runs import stack, verdict

nan = math.nan
STILL = np.full(101, 2.3)
EMBEDDED = [Point("emb", "emb"), Point("fc", "fc"), Point("out", "out")]


def run(points=None, losses=STILL, values=None, interval=10, lr=None, later=None, features=0, **scalars):
    """A run that stands still, of which `values` were measured at first, and `later` from then on."""
    history = History()
    points = points or stack(4)
    history.layer_axis.merge([point.module for point in points if point.is_layer])
    history.add_points(points)
    history.add_features(features)
    last = -1
    for step in range(0, len(losses), interval):
        seen = (values if step == 0 or later is None else later) or {}
        rates = {} if lr is None else {"lr": lr(step)}
        measured = {name: np.array(column, dtype=float) for name, column in seen.items()}
        history.append(Row(step, measured, {**scalars, **rates}, losses=np.array(losses[last + 1 : step + 1])))
        last = step
    return history


def judge(history):
    """What both say: they share nothing but the kind of the finding."""
    return [*ChaoticState().judge(history), *LargeTables().judge(history)]


def judged(**changes):
    return verdict(judge(run(**changes)))


def radii(*values):
    return {"recurrent_radius": values}


def deltas(*values):
    return {"delta_norm": values}


def embedding(table=15.0, behind=(6.0, 1.0), spread=0.9, norms=(nan, 1.0, 1.0), tables=(nan, nan)):
    return {
        "embedding_rms": (table, *tables),
        "output_rms": (table, *behind),
        "output_spread": (1.0, spread, spread),
        "spectral_norm": norms,
    }


CHAOS = radii(nan, 8.0, nan, nan)
SICK = [("warning", "recurrence", ("fc1",))]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (radii(nan, 4.01, nan, nan), SICK),
        (radii(nan, 3.99, nan, nan), []),
        (radii(nan, nan, nan, nan), []),
        (radii(5.0, 0.6, 9.0, nan), [("warning", "recurrence", ("fc2", "fc0"))]),
        # what an overwriting first step made of it is not what it started with
        ({**CHAOS, "update_ratio": (0.01, 0.31, 0.01, 0.01)}, []),
        ({**CHAOS, "update_ratio": (0.31, 0.29, 0.31, 0.31)}, SICK),
    ],
)
def test_a_recurrence_is_judged_by_its_spectral_radius(values, expected):
    assert judged(values=values) == expected


@pytest.mark.parametrize(
    ("shares", "steps", "expected"),
    [
        ((1.0, 0.9e-4, 0.1, 0.1), 21, SICK),
        ((1.0, 1.1e-4, 0.1, 0.1), 21, []),
        ((1.0, 0.0, 0.1, 0.1), 11, []),  # two samples
        ((0.9e-4, 1.0, 0.1, 0.1), 21, []),  # another layer
        ((nan, nan, nan, nan), 21, []),
        ((1.0, 0.0, 0.1, 0.1), 51, SICK),
    ],
)
def test_one_that_no_gradient_gets_into_is_told_at_once(shares, steps, expected):
    assert judged(values=CHAOS, later={"grad_norm": shares}, losses=np.full(steps, 2.3)) == expected
    assert judged(values=radii(nan, 1.0, nan, nan), later={"grad_norm": shares}, losses=np.full(steps, 2.3)) == []


def test_a_run_that_has_made_more_steps_is_judged_by_what_it_has_learnt():
    history = run(values=CHAOS, later={"grad_norm": (1.0, 0.0, 0.1, 0.1)}, losses=np.linspace(2.3, 0.1, 101))
    assert verdict(ChaoticState().judge(history)) == []


def loops(*values, calls):
    return {"loop_radius": values, "calls": calls}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (loops(nan, 4.01, nan, nan, calls=[nan, 20, nan, nan]), ("fc1",)),
        (loops(nan, 3.99, nan, nan, calls=[nan, 20, nan, nan]), ()),
        # what is called as often goes into it, or is a gate of it
        (loops(nan, 9.0, nan, 0.9, calls=[20, 20, 19, 20]), ("fc1", "fc0", "fc3")),
        (loops(nan, 9.0, nan, nan, calls=[nan, nan, nan, nan]), ("fc1",)),
    ],
)
def test_a_loop_by_hand_is_judged_in_the_same_way(values, expected):
    assert judged(values=values) == ([("warning", "recurrence", expected)] if expected else [])


def test_the_numbers_behind_it_are_told():
    (finding,) = ChaoticState().judge(run(values=CHAOS, losses=STILL[:61]))
    assert (finding.kind, finding.step) == ("loss_plateau", 60)
    assert finding.evidence == {"steps": 60.0, "loss": 2.3, "recurrent_radius": 8.0}


def test_weights_that_became_so_in_training_are_another_matter():
    assert judged(values=radii(nan, 1.0, nan, nan), later=CHAOS) == []
    assert judged(values=CHAOS, later=radii(nan, 1.0, nan, nan)) == SICK


def test_the_gain_of_the_gradient_does_not_count_for_it_may_have_been_learnt():
    assert judged(values=deltas(65.0, 16.2, 4.02, 1.0)) == []


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_unit_of_the_loss_does_not_matter(factor):
    for gain, losses in ((4.1, STILL), (3.9, STILL), (4.1, np.linspace(2.3, 1.3, 101))):
        norms = [gain**3, gain**2, gain, 1.0]
        expected = judged(values=deltas(*norms), losses=losses)
        assert judged(values=deltas(*(factor * norm for norm in norms)), losses=losses * factor) == expected


@pytest.mark.parametrize(
    ("values", "is_found"),
    [
        (embedding(), True),
        (embedding(table=10.1), True),
        (embedding(table=9.9), False),
        (embedding(behind=(3.4, 1.0)), True),
        (embedding(behind=(3.3, 1.0)), False),  # 2.97 differ between samples
        (embedding(behind=(1.0, 9.0)), False),  # a normalisation takes it up
        (embedding(behind=(9.0, 1.0), norms=(nan, nan, 1.0)), False),  # what follows multiplies nothing
        (embedding(behind=(nan, 6.0)), True),  # what was not measured hides nothing
        (embedding(behind=(1.0, 1.0), tables=(0.29, nan)), True),  # the other drowns, whatever is behind
        (embedding(behind=(1.0, 1.0), tables=(0.31, nan)), False),
        (embedding(table=nan), False),
        (embedding(behind=(nan, nan)), False),  # nobody looked
    ],
)
def test_an_embedding_is_judged_by_its_table(values, is_found):
    assert judged(points=EMBEDDED, values=values) == ([("warning", "weight_scale", ("emb",))] if is_found else [])


@pytest.mark.parametrize(
    ("spreads", "is_found"),
    [
        ((0.9, 0.019, 0.019), True),
        ((0.9, 0.021, 0.021), False),
        ((0.9, 0.5, 0.019), True),
        ((0.19, 0.01, 0.01), False),  # the samples are alike when they come in
        ((0.01, 0.01, 0.9), False),
        ((nan, nan, nan), False),
    ],
)
def test_rows_that_are_added_at_their_places_hide_what_differs_between_samples(spreads, is_found):
    values = {**embedding(behind=(1.0, 1.0)), "output_spread": spreads}
    assert bool(judged(points=EMBEDDED, values=values)) is is_found
    small = {**embedding(table=9.9, behind=(1.0, 1.0)), "output_spread": spreads}
    assert not judged(points=EMBEDDED, values=small)


def test_an_embedding_that_was_drawn_anew_is_well():
    values = {**embedding(), "weight_norm": (150.0, 1.0, 1.0)}
    assert judged(points=EMBEDDED, values=values, later={"weight_norm": (101.0, 1.0, 1.0)})
    assert not judged(points=EMBEDDED, values=values, later={"weight_norm": (99.0, 1.0, 1.0)})


@pytest.mark.parametrize(
    ("losses", "is_found"),
    [
        (np.concatenate([np.linspace(200.0, 1.0, 40), np.ones(61)]), True),  # the best constant is found soon
        (np.linspace(200.0, 1.0, 101), False),
        (np.concatenate([np.linspace(200.0, 1.0, 40), np.linspace(1.0, 0.9, 61)]), False),
    ],
)
def test_beside_a_large_embedding_a_loss_that_falls_no_more_is_enough(losses, is_found):
    assert bool(judged(points=EMBEDDED, values=embedding(), losses=losses)) is is_found
    assert judged(values=CHAOS, losses=losses) == []


def tables(*shares, loss=2.3, **more):
    """Cosines with which the loss falls by these shares of itself, for each share that the tables are smaller by."""
    sizes = {"grad_norm": [0.5] * len(shares), "weight_norm": [8.0] * len(shares)}
    return {"table_cosine": [share * loss / 4.0 for share in shares], **sizes, **more}


TABLES = [Point("u", "u"), Point("v", "v")]
SLOW = np.linspace(2.3, 1.3, 101)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((0.51, 0.01), ("u",)),
        ((0.48, 0.01), ()),
        ((0.2, 0.31), ("v", "u")),  # several make it up together
        ((0.2, 0.29), ()),
        ((nan, 0.6), ("v",)),
        ((nan, nan), ()),
    ],
)
def test_tables_that_make_up_the_loss_are_found(shares, expected):
    found = LargeTables().judge(run(points=TABLES, values=tables(*shares)))
    assert verdict(found) == ([("warning", "weight_scale", expected)] if expected else [])
    if expected:
        named = [share for share, point in zip(shares, TABLES, strict=True) if point.name in expected]
        assert found[0].evidence["loss_by_size"] == pytest.approx(sum(named))


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_unit_of_a_loss_that_tables_make_up_does_not_matter(factor):
    for share in (0.51, 0.49):
        values = tables(share, 0.0)
        values["grad_norm"] = [factor * norm for norm in values["grad_norm"]]
        assert bool(judged(points=TABLES, values=values, losses=STILL * factor)) == (share > 0.5)


def test_it_is_enough_that_a_loss_made_by_tables_does_not_halve():
    # the gradient falls with the loss, which is made up by the tables all along
    values = tables(1.0, 0.1, loss=2.3)
    assert judged(points=TABLES, values=values, losses=SLOW)
    assert not judged(points=TABLES, values=values, losses=np.geomspace(2.3, 0.1, 101))


def test_a_loss_that_tables_made_up_at_first_only_is_another_matter():
    sick = tables(1.0, 0.1)
    for later in (tables(0.4, 0.1), {name: column for name, column in sick.items() if name != "table_cosine"}):
        assert not judged(points=TABLES, values=sick, later=later)
        assert not judged(points=TABLES, values=later, later=sick) or "table_cosine" not in later
    assert judged(points=TABLES, values=sick, later=tables(0.8, 0.1))


def test_tables_that_are_left_when_others_were_drawn_anew_are_no_new_finding():
    assert judged(points=TABLES, values=tables(1.5, 0.6), later=tables(0.01, 0.6))
    assert not judged(points=TABLES, values=tables(1.5, 0.05), later=tables(0.01, 0.6))


@pytest.mark.parametrize(("later", "is_found"), [(1.14, True), (1.12, False)])
def test_a_share_that_comes_down_tells_that_something_is_learnt(later, is_found):
    found = judged(points=TABLES, values=tables(1.0, 0.5), later=tables(later / 2, later / 2))
    assert bool(found) is is_found


def test_a_loss_that_may_be_negative_has_no_share():
    assert not judged(points=TABLES, values=tables(1.0, 1.0), losses=-STILL)
    assert not judged(points=TABLES, values=tables(1.0, 1.0), losses=0 * STILL)


def test_what_takes_numbers_is_no_embedding():
    values = embedding()
    assert starts_with_embedding(run(points=EMBEDDED, values=values))
    with_inputs = run(points=EMBEDDED, values={**values, "input_rms": (1.0,)}, features=1)
    assert not starts_with_embedding(with_inputs)
    assert not starts_with_embedding(History())


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (np.linspace(2.3, 2.2, 101), SICK),
        (np.linspace(2.3, 1.3, 101), []),  # many a network learns with such weights
        (np.concatenate([[9.0], np.full(100, 2.3)]), []),
        (np.linspace(2.3, 9.0, 101), SICK),
        (np.full(101, nan), []),
    ],
)
def test_a_run_that_learns_is_left_alone(losses, expected):
    assert judged(values=CHAOS, losses=losses) == expected


@pytest.mark.parametrize(
    ("length", "planned", "expected"),
    [
        (41, nan, []),
        (51, nan, SICK),
        (101, nan, SICK),
        (111, nan, []),  # what has stopped it by now is none of its birth
        (51, 300.0, []),
        (61, 300.0, SICK),
        (121, 300.0, SICK),
        (131, 300.0, []),
        (291, 1e6, []),
        (301, 1e6, SICK),
    ],
)
def test_it_is_asked_of_a_young_run_that_had_time_to_learn(length, planned, expected):
    assert judged(values=CHAOS, losses=np.full(length, 2.3), planned_steps=planned) == expected


def test_a_warm_up_does_not_count():
    assert judged(values=CHAOS, lr=lambda step: 1e-3 * min(step, 60)) == []
    assert judged(values=CHAOS, lr=lambda step: 1e-3 * min(step, 40)) == SICK


def test_several_optimizers_are_not_judged():
    assert judged(values=CHAOS, optimizers=1.0) == SICK
    assert judged(values=CHAOS, optimizers=2.0) == []


def test_nothing_is_said_of_nothing():
    assert judge(History()) == []
    assert not stands_still(History())
    assert judged() == []


def test_trained_weights_with_little_left_to_learn_are_left_alone():
    """Their outputs and singular values are large, and the loss stands where it stood."""
    trained = {
        "output_rms": (8.0, 8.0, 8.0, 8.0),
        "output_spread": (1.0, 1.0, 1.0, 1.0),
        "spectral_norm": (40.0, 60.0, 30.0, 25.0),
        "delta_norm": (6.0, 4.0, 2.0, 1.0),
        "recurrent_radius": (nan, 1.6, nan, nan),
    }
    assert judged(values=trained, losses=np.full(101, 0.1)) == []


def test_the_plateau_detector_tells_it():
    history = run(values=CHAOS)
    said = [finding for detector in PlateauDetector().detectors(alone=True) for finding in detector.judge(history)]
    assert verdict(said[:1]) == SICK
    opened = Ledger().update(100, said)
    assert [finding.cause for finding in opened] == ["recurrence"]  # of two of a kind the first counts


def test_more_layers_that_are_well_change_nothing():
    assert judged(points=stack(6), values=radii(nan, 8.0, nan, nan, 1.0, nan)) == SICK


@pytest.mark.parametrize(("kind", "argument"), [(ChaoticState, "max_radius"), (LargeTables, "max_embedding")])
@pytest.mark.parametrize("value", [0.0, -1.0, nan, math.inf])
def test_limits_out_of_range_are_refused(kind, argument, value):
    with pytest.raises(ValueError, match=rf"{argument} must be .*, got"):
        kind(**{argument: value})


def test_limits_are_the_callers():
    assert verdict(ChaoticState(max_radius=9.0).judge(run(values=CHAOS))) == []
    assert verdict(LargeTables(max_embedding=20.0).judge(run(points=EMBEDDED, values=embedding()))) == []
