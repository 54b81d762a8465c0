"""The benchmark of cures: what is trained, and what the tables are made of."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from lightning_gradflow import AutoMitigator
from tests.benchmarks import random_arm
from tests.benchmarks.cure import main, parse
from tests.benchmarks.cure_report import markdown, short
from tests.benchmarks.cure_runs import ARMS, TWIN, Course, Deed, Shelf, budgeted, sources, stretched, train
from tests.benchmarks.cure_score import Trial, Worth, harm, not_ahead, scored
from tests.benchmarks.random_arm import REMEDIES, RandomActor, cool_down
from tests.benchmarks.runs import CASES
from tests.benchmarks.shares import Share
from tests.benchmarks.zoo import HEALTHY, SICK
from tests.benchmarks.zoo.curable import CURABLE, NOT_CURABLE
from tests.benchmarks.zoo.faulty_data import pixels

CASE = SICK["sigmoid_10"]
LATE = SICK["layer_zeroed"]
PLAIN = HEALTHY["relu_mlp"]


def course(arm, end, start=2.0, deeds=(), fingerprint=""):
    return Course("made_up", 0, arm, start, end, tuple(Deed(*deed) for deed in deeds), fingerprint=fingerprint)


def trial(case=CASE, deeds=(), seed=0, twin=0.0, **ends):
    arms = {arm: course(arm, end, deeds=deeds if arm == "auto" else ()) for arm, end in ends.items()}
    return Trial(case, seed, {TWIN: course(TWIN, twin), **arms})


# -- what is trained ------------------------------------------------------------------------------------------------


def test_every_sick_case_is_curable_or_says_why_not():
    assert not CURABLE.keys() & NOT_CURABLE.keys()
    assert CURABLE.keys() | NOT_CURABLE.keys() == SICK.keys()


def test_the_budget_multiplies_steps_and_epochs():
    assert budgeted(CASE, 2.0).max_steps == 2 * CASE.max_steps
    averaged = HEALTHY["averaged_weights"]
    assert budgeted(averaged, 2.0).trainer_kwargs == {"max_epochs": 2 * averaged.trainer_kwargs["max_epochs"]}


def test_a_schedule_that_is_written_for_a_length_becomes_as_long_as_the_run():
    module = stretched(HEALTHY["mixer_one_cycle"].build(0), 2.0)
    schedule = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert isinstance(schedule, OneCycleLR)
    assert schedule.total_steps == 200


def test_no_schedule_ends_before_the_run():
    for name in (*CURABLE, *HEALTHY):
        case = {**SICK, **HEALTHY}[name]
        schedule = getattr(stretched(case.build(0), 2.0), "schedule", None)
        if schedule is not None:
            made = schedule(SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
            assert getattr(made, "total_steps", math.inf) >= 2 * case.max_steps, name


def test_the_missing_pixel_is_not_in_the_steps_that_the_end_is_measured_in():
    """A run that leaves the batch out still shows the loss of it."""
    case = SICK["one_nan_pixel"]
    every = len(case.data(0))
    for budget in (1, 2):
        steps = budget * case.max_steps
        assert not any((step - case.onset) % every == 0 for step in range(steps - 20, steps))


def test_a_training_that_nothing_acts_in_is_the_plain_one():
    plain, *others = (train("relu_mlp", 0, arm, 0.1) for arm in (TWIN, "none", "auto"))
    assert [other.fingerprint for other in others] == [plain.fingerprint] * 2
    assert not any(other.deeds for other in others)


def test_random_actions_wait_for_an_alarm_and_for_each_other():
    assert not train("relu_mlp", 0, "random", 0.1).deeds
    steps = [[deed.step for deed in train("sigmoid_10", seed, "random", 0.7).deeds] for seed in range(2)]
    assert all(len(own) == AutoMitigator().max_actions for own in steps)
    assert all(later - step >= cool_down(84) for own in steps for step, later in pairwise(own))


@pytest.mark.parametrize("name", REMEDIES)
def test_a_random_action_does_what_it_is_called(name, monkeypatch):
    """On a training with dead units and unscaled inputs, so that there is something to do for each."""
    done = {}

    def watched(actor, training, layers):
        before = {key: value.clone() for key, value in training.model.state_dict().items()}
        is_done = REMEDIES[name](actor, training, [name for name, _ in training.model.named_modules()])
        after = training.model.state_dict()
        done["changed"] = any(not torch.equal(before[key], after[key]) for key in before)
        done["held"] = set(actor._held)
        return is_done

    monkeypatch.setattr(random_arm, "REMEDIES", {name: watched})
    monkeypatch.setattr(RandomActor, "_may_act", lambda actor, step, pause: step == 3)
    case = replace(CASES["dead_biases_one_layer"], data=partial(pixels, factor=128.0, offset=128.0))
    monkeypatch.setitem(CASES, "both", case)
    assert train("both", 0, "random", 0.1).deeds == (Deed(3, name, "applied"),)
    assert done["changed"] is (name != "clip")
    assert done["held"] == ({name} if name in ("clip", "rollback", "scale_inputs") else set())


def test_another_seed_leaves_another_fingerprint():
    assert train("relu_mlp", 0, TWIN, 0.1).fingerprint != train("relu_mlp", 1, TWIN, 0.1).fingerprint


def test_the_twin_is_trained_without_the_fault():
    assert train("sgd_lr_30", 0, TWIN, 0.2).end < 2.0 < train("sgd_lr_30", 0, "none", 0.2).end


def test_a_training_that_dies_ends_at_infinity(monkeypatch):
    class Dies(type(PLAIN.build(0))):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    build = PLAIN.build
    monkeypatch.setitem(CASES, "dies", replace(PLAIN, build=lambda seed: Dies(build(seed).net)))
    found = train("dies", 0, "none", 0.1)
    assert (found.end, found.crash) == (math.inf, "RuntimeError: out of luck")


def test_what_was_kept_is_taken_until_the_sources_change(tmp_path):
    shelf = Shelf(tmp_path, {"auto": "first"})
    made = replace(course("auto", math.nan, deeds=[(3, "clip", "kept")]), alarms=("3 x",), faults=("broken",))
    shelf.keep(made, 2.0)
    assert repr(shelf.kept("made_up", 0, "auto", 2.0)) == repr(made)
    assert shelf.kept("made_up", 0, "auto", 1.0) is None
    assert Shelf(tmp_path, {"auto": "second"}).kept("made_up", 0, "auto", 2.0) is None


def test_a_change_of_the_package_leaves_trainings_alone_in_which_it_does_not_act():
    versions = {arm: sources(arm) for arm in (TWIN, *ARMS)}
    assert versions[TWIN] == versions["none"]
    assert versions["none"] not in {versions[arm] for arm in ("random", "clip", "auto")}


# -- the arithmetic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("none", "end", "gap"),
    [
        (1.0, 1.0, 0.0),
        (1.0, 0.2, 0.8),
        (1.0, 0.0, 1.0),
        (1.0, -0.5, 1.5),
        (1.0, 1.5, -0.5),
        # the twin begins at 2: nothing worse than that is a gap to close
        (1e9, 2.0, 0.0),
        (1e9, 1.0, 0.5),
        (math.nan, 1.0, 0.5),
        (math.inf, 0.0, 1.0),
        (1.0, math.nan, -math.inf),
        (math.nan, math.inf, -math.inf),
    ],
)
def test_the_gap_closed_is_a_share_of_the_way_to_the_twin(none, end, gap):
    assert trial(none=none, auto=end).gap_closed("auto") == pytest.approx(gap)


@pytest.mark.parametrize(("end", "is_cured"), [(0.4, True), (0.41, False), (math.nan, False)])
def test_cured_is_what_closes_four_fifths_of_the_gap(end, is_cured):
    assert trial(none=2.0, auto=end).is_cured("auto") is is_cured


def test_what_is_cured_by_the_stricter_start_is_cured_by_the_end_without_a_cure_too():
    for none in (0.5, 1.0, 2.0, 3.0, 1e9):
        for end in (0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 1e6):
            one = trial(none=none, auto=end)
            assert not one.is_cured("auto") or (none - end) >= 0.8 * none


@pytest.mark.parametrize(
    ("plain", "end", "is_harmed"),
    [
        (1.0, 1.1, False),
        (1.0, 1.11, True),
        (1.0, 0.5, False),
        (1.0, math.nan, True),
        (1.0, math.inf, True),
        (-1.0, -0.91, False),
        (-1.0, -0.89, True),
        (0.0, 0.0, False),
    ],
)
def test_harm_is_an_end_that_is_a_tenth_worse(plain, end, is_harmed):
    assert trial(PLAIN, twin=plain, auto=end).is_harmed("auto") is is_harmed


@pytest.mark.parametrize(
    ("none", "twin", "is_sick"),
    [(2.0, 0.5, True), (math.nan, 0.5, True), (0.9, 0.1, False), (2.0, 1.1, False), (3.0, 1.3, False), (2, 1.3, False)],
)
def test_what_has_healed_or_has_no_better_twin_is_not_sick(none, twin, is_sick):
    assert trial(none=none, twin=twin).still_sick is is_sick


def test_the_delay_counts_from_the_onset():
    early, late = (10, "clip", "rolled_back"), (75, "reinit", "kept")
    assert trial(LATE, [early, late], none=2.0, auto=0.0).delay("auto") == 75 - LATE.onset
    assert trial(CASE, [early, late], none=2.0, auto=0.0).delay("auto") == 10
    assert trial(CASE, [early, late], none=2.0, auto=0.0).delay("auto", "kept") == 75
    assert trial(CASE, none=2.0, auto=0.0).delay("auto") is None


def test_the_worth_of_an_arm_counts_runs_and_actions():
    runs = [
        trial(none=2.0, auto=0.2, deeds=[(0, "reinit", "kept"), (40, "clip", "rolled_back")]),
        trial(none=2.0, auto=1.0, deeds=[(20, "clip", "rolled_back"), (60, "reinit", "kept")]),
        trial(none=2.0, auto=math.nan),
    ]
    assert Worth.of(runs, "auto") == Worth(Share(1, 3), gap=0.5, taken=4, kept=2, delay=10, delay_kept=30)
    # the middle of them is minus infinity, which a file can't hold
    assert Worth.of(runs[1:] + runs[2:], "auto").gap is None
    assert Worth.of([], "auto") == Worth(Share(0, 0), None, 0, 0, None, None)


def test_a_family_in_which_another_arm_cures_as_many_is_named():
    other = replace(CASE, family="others")
    runs = [
        trial(none=2.0, clip=0.0, auto=0.0),
        trial(none=2.0, clip=2.0, auto=0.0),
        trial(other, none=2.0, clip=0.0, auto=0.0),
    ]
    assert not_ahead(runs, "auto", ["clip"]) == [{"family": "others", "arm": "clip", "ours": 1, "theirs": 1, "runs": 1}]


def test_harmed_and_touched_runs_are_named():
    same = Trial(PLAIN, 0, {TWIN: course(TWIN, 1.0, fingerprint="a"), "auto": course("auto", 1.0, fingerprint="a")})
    moved = Trial(PLAIN, 1, {TWIN: course(TWIN, 1.0, fingerprint="a"), "auto": course("auto", 1.2, fingerprint="b")})
    found = harm([same, moved], "auto")
    assert (found["harmed"]["hits"], found["untouched"]["hits"]) == (1, 1)
    assert found["runs_harmed"] == found["runs_touched"] == ["relu_mlp-1"]


def test_a_run_that_is_not_sick_any_more_is_listed_and_counts_nowhere():
    found = scored([trial(none=0.1), trial(none=2.0, auto=0.0, seed=1)], ["none", "auto"])
    assert found["not_sick"] == [{"case": "sigmoid_10", "seed": 0, "start": 2.0, "none": 0.1, "twin": 0.0}]
    assert (found["sick_runs"], found["arms"]["auto"]["cured"]["total"]) == (1, 1)
    assert found["families"]["deep_sigmoid"]["runs"] == 1


def test_an_end_that_is_not_a_number_is_null_in_the_results():
    each = scored([trial(none=math.nan, auto=math.inf)], ["none", "auto"])["each"]
    assert json.loads(json.dumps(each, allow_nan=False))[0]["auto"] == {
        "end": None,
        "gap": None,
        "alarms": [],
        "deeds": [],
    }


# -- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of one sick and one healthy training, made once and then taken from the folder."""
    folder = tmp_path_factory.mktemp("cure")
    line = ["--seeds", "1", "--processes", "1", "--cache", str(folder), "--out", str(folder / "new" / "found.json")]
    line += ["--cases", "sigmoid_10", "relu_mlp", "--arms", "clip", "auto", "--budget", "0.8"]
    read = []
    for _ in range(2):
        assert main(line) == 0
        read.append(json.loads((folder / "new" / "found.json").read_text(encoding="utf-8")))
    return read


def test_a_sick_and_a_healthy_training_are_judged(found):
    main_budget = found[0]["budgets"]["0.8"]
    assert (main_budget["sick_runs"], main_budget["healthy_runs"], main_budget["not_sick"]) == (1, 1, [])
    assert list(main_budget["arms"]) == ["none", "clip", "auto"]
    assert main_budget["arms"]["clip"]["cured"]["hits"] == 0
    assert main_budget["arms"]["auto"]["healthy"]["untouched"]["hits"] == 1
    assert main_budget["arms"]["auto"]["taken"] >= 1
    assert main_budget["crashes"] == {}
    assert list(main_budget["faults_of_the_monitor"]) == ["sigmoid_10-0-clip"]  # which may not do what would fit


def test_what_was_kept_gives_the_same_results(found):
    first, again = found
    assert first["budgets"] == again["budgets"]


def test_the_tables_have_a_row_for_each_arm_and_family(found):
    tables = [line for line in markdown(found[0]).splitlines() if line.startswith("| ")]
    first = len(found[0]["budgets"]["0.8"]["arms"])
    assert len(tables) == 2 + first + 2 + 1
    for table in (tables[: 2 + first], tables[2 + first :]):
        assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize(("gap", "said"), [(0.5, "50 %"), (-0.001, "0 %"), (-3e5, "below 0 %"), (None, "-")])
def test_how_far_a_run_diverged_is_not_told(gap, said, found):
    changed = json.loads(json.dumps(found[0]))
    changed["budgets"]["0.8"]["arms"]["clip"]["gap"] = gap
    row = next(line for line in markdown(changed).splitlines() if line.startswith("| clipping only"))
    assert row.split(" | ")[2] == said


def test_another_budget_is_a_sentence_below_the_tables(found):
    one = found[0]["budgets"]["0.8"]
    said = markdown({**found[0], "budgets": {"2": one, "1": one}})
    assert "it gets 2 times the steps" in said
    assert "With the steps of the label alone are cured: clipping only 0/1 (0-79 %), `GradFlow" in said


@pytest.mark.parametrize("line", [["--cases", "shuffled_labels"], ["--cases", "unicorn"], ["--budget", "0"]])
def test_what_can_not_be_cured_or_has_no_steps_is_an_error(line, capsys):
    with pytest.raises(SystemExit):
        parse(line)
    assert "must be" in capsys.readouterr().err


def test_in_short_there_is_a_row_for_each_arm_and_what_was_trained(found):
    table, said = short(found[0]).split("\n\n")
    lines = table.splitlines()
    assert len(lines) == 2 + len(found[0]["budgets"]["0.8"]["arms"])
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| clipping only | 0/1 (0-79 %) |")
    assert said.startswith("Runs of 1 sick and 1 healthy trainings over 1 seeds")


def test_in_short_it_is_said_where_another_arm_is_as_good(found):
    changed = json.loads(json.dumps(found[0]))
    even = {"family": "deep_sigmoid", "arm": "clip", "ours": 1, "theirs": 1, "runs": 1}
    changed["budgets"]["0.8"]["not_ahead"] = [even]
    assert short(changed).endswith("Not ahead of clipping only: deep sigmoid (1 against 1 of 1 by clipping only).")
