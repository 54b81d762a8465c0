import math

from lightning_gradflow.findings import Action, Severity
from lightning_gradflow.sinks import ConsoleSink, summary
from lightning_gradflow.sinks.console import MAX_ACTIONS, MAX_LAYERS, layer_lines
from tests import made_up


def test_the_verdict_stands_first_and_the_code_to_write_below():
    text = summary(made_up.view(findings=(made_up.finding(),)))
    lines = text.splitlines()
    assert lines[0] == "The signal dies on its way to net.0."
    assert "    model.net[1] = nn.ReLU()" in lines
    assert text.index("net.6") < text.index("Use ReLU")


def test_nothing_found_is_said():
    assert summary(made_up.view()).startswith("No sign of trouble in the gradients.\n")


def test_info_is_no_trouble():
    assert summary(made_up.view(findings=(made_up.finding(Severity.INFO),))).startswith("No sign of trouble")


def test_resolved_findings_are_told_without_what_to_do():
    text = summary(made_up.view(findings=(made_up.finding(resolved_step=30),)))
    assert text.startswith("No sign of trouble in the gradients any more: 1 earlier finding resolved.")
    assert "steps 10 to 30, resolved" in text
    assert "Use ReLU" not in text


def test_of_what_was_cured_in_the_run_the_code_for_the_next_one_is_told():
    finding = made_up.finding(resolved_step=30)
    reason = f"{finding.kind}, {finding.cause}".replace("_", " ")
    for done, is_told in (
        (Action(10, "reinit", (), f"{reason}; and more", outcome="kept"), True),
        (Action(10, "reinit", (), reason, outcome="rolled_back"), False),
        (Action(9, "reinit", (), reason, outcome="kept"), False),  # for something earlier
        (Action(10, "reinit", (), "loss plateau, unknown", outcome="kept"), False),
    ):
        text = summary(made_up.view(findings=(finding,), actions=(done,)))
        assert ("For the next run: Use ReLU" in text) is is_told
        assert ("    model.net[1] = nn.ReLU()\n" in text) is is_told


def test_a_run_that_measured_nothing_is_not_called_healthy():
    assert summary(made_up.view(made_up.History())).startswith("Nothing was measured")


def test_code_is_never_wrapped():
    long = "x = " + " + ".join(["value"] * 60)
    finding = made_up.finding()
    object.__setattr__(finding.suggestions[0], "code", long)
    assert f"    {long}\n" in summary(made_up.view(findings=(finding,)), width=60)


def test_text_that_looks_like_markup_is_kept():
    text = summary(made_up.view(findings=(made_up.finding(message="See net[0] and [red]this[/red]."),)))
    assert "See net[0] and [red]this[/red]." in text


def test_of_many_layers_the_worst_are_shown_and_the_rest_counted():
    findings = (made_up.finding(layers=("net.90",)),)
    lines = summary(made_up.view(made_up.history(layers=50), findings)).splitlines()
    shown = [line.split()[0] for line in lines if line.strip().startswith("net.")]
    assert len(shown) == MAX_LAYERS
    assert {"net.0", "net.90"} <= set(shown)
    assert f"The {MAX_LAYERS} layers that stand out most; {50 - MAX_LAYERS} more are left out." in lines


def test_columns_that_were_not_measured_are_left_out():
    text = summary(made_up.view(made_up.gradients([1.0, math.nan])))
    assert "saturated" not in text
    assert "grad_norm" in text
    assert "nan" not in text


def test_an_activation_counts_for_the_layer_before_it():
    first, *_, last = layer_lines(made_up.history())
    assert (first.relative_delta, first.saturated, first.dead) == (1e-6, 0.5, 0.25)
    assert math.isnan(last.saturated)


def test_actions_are_listed_with_their_outcome_and_how_to_read_it():
    text = summary(made_up.view(actions=made_up.DECIDED), width=160)
    assert (
        "What was changed (2)\n"
        "  step 10: drew net.0 and net.2 anew (vanishing gradient, saturation): span -8.1 -> -0.3 decades; "
        "kept at step 30: loss 2.31 -> 1.02\n"
        "  step 10: began to clip the gradient norm (exploding gradient): grad norm total before it 1e+09; "
        "max norm after it 2.5; taken back at step 30\n"
        "Each action is tried for a while."
    ) in text


def test_of_many_actions_the_last_are_shown_and_the_rest_counted():
    actions = tuple(Action(step, "clip") for step in range(MAX_ACTIONS + 3))
    text = summary(made_up.view(actions=actions))
    assert text.count("began to clip") == MAX_ACTIONS
    assert f"step {MAX_ACTIONS + 2}: " in text
    assert f"The last {MAX_ACTIONS}; 3 earlier ones are left out." in text


def test_a_run_without_actions_says_nothing_of_them():
    assert "What was changed" not in summary(made_up.view())


def test_the_sink_prints_the_summary(capsys):
    shown = made_up.view(findings=(made_up.finding(),))
    ConsoleSink().on_end(shown)
    assert capsys.readouterr().out.startswith("The signal dies on its way to net.0.\n")
