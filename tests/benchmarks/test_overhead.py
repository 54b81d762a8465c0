"""The benchmark of the cost: its arithmetic, tiny fits of each kind, and its tables."""

import json
import math
import sys

import pytest

from tests.benchmarks import overhead, overhead_fits
from tests.benchmarks.cost_models import MODELS, SMALL, LoggingNorms
from tests.benchmarks.overhead import RESULTS, bars, main, measure, parse, quartiles, times_cheaper, turned
from tests.benchmarks.overhead_fits import ARMS, LONG, SHORT, STEADY, WANDB, Fit, fit, floor
from tests.benchmarks.overhead_report import NAMES, markdown, short

WARM_UP = overhead_fits.WARM_UP["long"]
STEPS = WARM_UP + 4


def made_up(step, sampled=(), wall=None, slow=0.0, steps=STEPS):
    """A fit with steps of `step` seconds, and `slow` more in those that are sampled."""
    taken = tuple(step + slow * (i in sampled) for i in range(steps))
    return Fit(sum(taken) if wall is None else wall, taken, tuple(sampled))


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_quartiles_of_five_numbers_are_the_second_third_and_fourth():
    assert quartiles([5, 1, 4, 2, 3]) == {"median": 3, "low": 2, "high": 4}


def test_fits_are_compared_within_a_round():
    """One round is ten times as slow as the other; a ratio of medians would not be 2."""
    rounds = [{STEADY: made_up(1.0), "gradients": made_up(2.0)}, {STEADY: made_up(10.0), "gradients": made_up(20.0)}]
    ratio = overhead.paired(rounds, ARMS["gradients"], lambda one: one.wall)
    assert ratio == {"median": 2, "low": 2, "high": 2}


def test_a_sample_costs_what_the_steps_take_more_over_the_number_of_samples():
    every = tuple(range(STEPS))
    rounds = [{STEADY: made_up(1.0), "gradients": made_up(1.0, every, slow=0.5)}]
    assert overhead.sample_costs(rounds, ARMS["gradients"]) == pytest.approx([0.5])


def test_the_warm_up_is_no_step():
    one = Fit(1.0, (100.0,) * WARM_UP + (1.0, 3.0))
    assert one.mean_step == 2.0


def test_a_fit_knows_what_its_own_samples_cost():
    one = made_up(1.0, sampled=(0, 1, 2, 4, 9), slow=0.5, steps=WARM_UP + 10)
    assert one.counted == 2
    assert one.own_sample == pytest.approx(0.5)
    assert one.own_overhead == pytest.approx(2 * 0.5 / 10)


def test_a_fit_without_an_unsampled_step_does_not():
    one = made_up(1.0, sampled=range(STEPS), slow=0.5)
    assert math.isnan(one.own_sample)
    assert math.isnan(one.own_overhead)


def test_how_much_cheaper_is_a_ratio_of_costs_and_not_of_steps():
    every = tuple(range(STEPS))
    rounds = [
        {
            WANDB: made_up(1.0),
            "every step, to W&B": made_up(1.0, every, slow=0.1),
            "watch all": made_up(1.0, every, slow=3.0),
        }
    ]
    assert times_cheaper(rounds, "every step, to W&B")["median"] == pytest.approx(30)
    assert times_cheaper(rounds, "gradients, to W&B") is None


def test_what_seems_to_cost_nothing_is_far_cheaper():
    every = tuple(range(STEPS))
    fits = {WANDB: made_up(1.0), "every step, to W&B": made_up(0.9, every), "watch all": made_up(2.0, every)}
    assert times_cheaper([fits], "every step, to W&B")["median"] == overhead.FREE


def test_each_arm_begins_a_round_as_often_as_its_twins():
    arms = [ARMS[name] for name in (SHORT, "every step", "grad_norm", WANDB, "watch all")]
    orders = [[arm.name for arm in turned(arms, i)] for i in range(3)]
    assert [order[0] for order in orders] == [SHORT, "every step", "grad_norm"]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert all({WANDB, "watch all"} == set(order[3:]) for order in orders)


def test_every_arm_stands_in_the_tables_and_has_a_plain_twin_of_its_length_and_logger():
    assert set(NAMES) == {arm.name for arm in ARMS.values() if not arm.is_plain}
    for arm in ARMS.values():
        twin = ARMS[arm.twin]
        assert twin.is_plain
        assert (twin.length, twin.to_wandb) == (arm.length, arm.to_wandb)


# -- real fits --------------------------------------------------------------------------------------------------------


def test_the_networks_are_as_large_as_they_are_said_to_be():
    sizes = {name: [p.numel() for p in model.net().parameters()] for name, model in MODELS.items()}
    assert {name: len(of_it) for name, of_it in sizes.items()} == {"transformer": 148, "resnet": 62, "lstm": 11}
    assert {name: round(sum(of_it) / 1e6, 1) for name, of_it in sizes.items()} == {
        "transformer": 9.5,
        "resnet": 2.8,
        "lstm": 1.1,
    }


def test_a_fit_at_the_default_cadence_samples_densely_first_and_then_every_fifty_steps():
    one = fit(SMALL, ARMS["default"], 52)
    assert one.sampled == (0, 1, 2, 4, 8, 16, 32, 50)
    assert len(one.steps) == 52
    assert 0 < sum(one.steps) < one.wall
    plain = fit(SMALL, ARMS[LONG], 52)
    assert (len(plain.steps), plain.sampled) == (52, ())


def test_a_flush_of_ours_is_smaller_than_one_of_wandb_watch():
    ours, theirs = fit(SMALL, ARMS["every step, to W&B"], STEPS), fit(SMALL, ARMS["watch all"], STEPS)
    assert ours.sampled == theirs.sampled == tuple(range(STEPS))
    assert 500 < ours.flush < 3000
    assert theirs.flush > 10 * ours.flush


def test_wandb_watch_logs_parameters_only_where_it_is_asked_for_them():
    gradients, both = fit(SMALL, ARMS["watch gradients"], STEPS), fit(SMALL, ARMS["watch all"], STEPS)
    assert both.flush == pytest.approx(2 * gradients.flush, rel=0.2)


def test_a_plain_fit_has_nothing_to_flush():
    assert math.isnan(fit(SMALL, ARMS[WANDB], STEPS).flush)


def test_lightnings_grad_norm_is_logged_for_each_parameter():
    seen = {}

    class Looking(LoggingNorms):
        def log_dict(self, dictionary, **kwargs):
            seen.update(dictionary)
            super().log_dict(dictionary, **kwargs)

    arm = ARMS["grad_norm"]
    fit(SMALL, overhead.Arm(arm.name, arm.twin, kind=Looking), STEPS)
    assert len(seen) == sum(1 for _ in SMALL.net().parameters()) + 1


def test_the_floor_is_a_time():
    assert 0 < floor(SMALL, repeats=3) < 1


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The whole benchmark, on a network that is trained in no time."""
    out = tmp_path_factory.mktemp("overhead") / "overhead.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "lstm", SMALL)
        arms = ["default", "gradients", "every step, to W&B", "watch all"]
        lengths = ["--long", "12", "--steady", "40", "--short", "21"]
        assert main(["--models", "lstm", "--rounds", "1", *lengths, "--arms", *arms, "--out", str(out)]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_the_results_hold_each_arm_with_its_twin(found):
    arms = found["models"]["lstm"]["arms"]
    assert list(arms) == [LONG, "default", STEADY, "gradients", WANDB, "every step, to W&B", "watch all"]
    assert arms["gradients"]["samples"] == arms["gradients"]["steps"] == 40
    assert arms["default"]["own"]["median"] > 1
    assert "wall" not in arms[LONG]


def test_what_it_takes_to_show_a_fit_is_told(found):
    shown = found["models"]["lstm"]["shown_ms"]
    assert set(shown) == {"report", "summary", "wandb_row_with_picture", "wandb_row", "wandb_end"}
    assert shown["wandb_row_with_picture"] > shown["wandb_row"] > 0


def test_the_tables_have_a_row_for_each_arm(found):
    text = markdown(found)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert sum(line.startswith("| `GradFlow()`") for line in lines) == 2
    assert sum(NAMES["watch all"] in line for line in lines) == 2
    assert not any(NAMES["grad_norm"] in line for line in lines)
    assert len({line.count("|") for line in lines}) == 1


def test_what_is_not_met_is_said(found):
    one = {"model": "lstm", "what": "default: wall", "value": 1.02, "bar": 1.01, "most": True, "is_met": False}
    text = markdown({**found, "bars": [one]})
    assert "not met: `GradFlow()`, with its page and its summary, time of a fit 1.02 (transformer, 2 layers" in text
    assert "where it is to be at most 1.01." in text
    assert "All that was aimed at is met." in markdown({**found, "bars": [one | {"is_met": True}]})


def test_in_short_there_is_a_row_for_each_arm_to_choose_from(found):
    lines = [line for line in short(found).splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        f"| {NAMES[arm]}" for arm in ("default", "gradients", "watch all")
    ]


def test_in_short_what_is_not_met_is_said_too(found):
    about = {"model": "lstm", "is_met": False}
    large = about | {"what": "default: wall", "value": 1.0204, "bar": 1.01, "most": True}
    few = about | {"what": "watch all / every step, to W&B: sample", "value": 3.3, "bar": 20, "most": False}
    text = short({**found, "bars": [large, few]})
    assert "missed: `GradFlow()`, time of a fit at most 1.01 (transformer 1.02); a sample of `wandb.watch" in text
    assert text.endswith("/ one of `GradFlow` to W&B at least 20 (transformer 3.3).")
    assert short({**found, "bars": [large | {"is_met": True}]}).endswith("All that was aimed at is met.")


def test_a_bar_is_met_at_its_value():
    arms = {"default": {"wall": {"median": 1.01}}, "gradients": {"step": {"median": 1.04}}}
    model = {"arms": arms, "times_cheaper": {"every step, to W&B": {"median": 20.0}, "gradients, to W&B": None}}
    asked = bars({"models": {"lstm": model}})
    assert [(one["bar"], one["is_met"]) for one in asked] == [(1.01, True), (1.03, False), (20, True)]


def test_long_fits_are_made_in_every_second_round(capsys):
    measure(SMALL, [ARMS[LONG], ARMS[SHORT]], 3, {"long": 6, "short": 20})
    made = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "plain:" in line]
    assert made == ["1/3", "3/3"]


@pytest.mark.parametrize("argument", ["--rounds", "--long", "--steady", "--short"])
def test_too_few_of_something_is_an_error(argument, capsys):
    with pytest.raises(SystemExit):
        parse([argument, "0"])
    assert f"{argument} must be in" in capsys.readouterr().err


def test_the_committed_results_are_of_all_networks_and_arms():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert set(results["models"]) == set(MODELS)
    assert results["rounds"] > 0
    assert sys.float_info.max not in [one["value"] for one in results["bars"]]
