import math
from dataclasses import replace

from lightning_gradflow.findings import Action, FindingKind, Severity, Suggestion
from lightning_gradflow.sinks import ConsoleSink, summary
from lightning_gradflow.sinks.console import MAX_ACTIONS, MAX_LAYERS, layer_lines
from tests import made_up


def test_the_verdict_stands_first_and_the_code_to_write_below():
    text = summary(made_up.view(findings=(made_up.finding(),)))
    lines = text.splitlines()
    assert lines[0] == "The signal dies on its way to net.0. Cause: saturation."
    assert "    model.net[1] = nn.ReLU()" in lines
    assert text.index("net.6") < text.index("Use ReLU")


def test_nothing_found_is_said():
    assert summary(made_up.view()).startswith("No sign of trouble in the gradients.\n")


def test_info_is_no_trouble():
    assert summary(made_up.view(findings=(made_up.finding(Severity.INFO),))).startswith("No alarm, and 1 note.")


def test_an_alarm_that_is_over_is_told_with_what_to_do_in_the_next_run():
    text = summary(made_up.view(findings=(made_up.finding(resolved_step=30),)), width=200)
    assert text.startswith(
        "No sign of trouble in the gradients any more: 1 earlier finding resolved. "
        "Nothing was changed because of it, so its cause may still be there: see below.\n"
    )
    assert "steps 10 to 30, resolved" in text
    assert "For the next run: Use ReLU" in text
    assert "    model.net[1] = nn.ReLU()\n" in text


def test_an_info_that_is_over_is_told_without_what_to_do():
    text = summary(made_up.view(findings=(made_up.finding(Severity.INFO, resolved_step=30),)))
    assert text.startswith("No sign of trouble in the gradients.\n")
    assert "Use ReLU" not in text


def test_an_alarm_that_went_over_into_an_info_is_an_alarm_in_the_next_run():
    alarm = made_up.finding(resolved_step=30)
    left = replace(made_up.finding(Severity.INFO, resolved_step=50), step=30)
    assert "For the next run: Use ReLU" in summary(made_up.view(findings=(alarm, left)))


def test_what_was_cured_in_the_run_is_told_for_the_next_one_too():
    finding = made_up.finding(resolved_step=30)
    done = Action(10, "reinit", (), "vanishing gradient, saturation", outcome="kept")
    text = summary(made_up.view(findings=(finding,), actions=(done,)))
    assert text.startswith("No sign of trouble in the gradients any more: 1 earlier finding resolved.\n")
    assert "For the next run: Use ReLU" in text


def test_what_follows_from_an_alarm_names_it_and_has_no_advice_of_its_own():
    root = replace(made_up.finding(), suggestions=(Suggestion("Use GELU", "gelu()", "", ""),))
    plateau = replace(made_up.finding(Severity.INFO, FindingKind.LOSS_PLATEAU), cause="vanishing_gradient")
    text = summary(made_up.view(findings=(plateau, root)))
    assert "Comes of: Vanishing gradient" in text
    assert "gelu()" in text
    assert "ReLU" not in text
    other = replace(plateau, cause="no_signal_in_data")  # a fault of its own
    text = summary(made_up.view(findings=(other, root)))
    assert "Comes of" not in text
    assert "What to do: Use ReLU" in text


def test_where_the_code_of_alternatives_is_stands_once_at_the_end():
    finding = made_up.finding()
    alone = summary(made_up.view(findings=(finding,)))
    others = (*finding.suggestions, Suggestion("Use GELU", "", "", ""), Suggestion("Use ELU", "", "", ""))
    last = summary(made_up.view(findings=(replace(finding, suggestions=others),))).splitlines()[-1]
    assert ("Or:" in alone) == ("The code of each" in alone)
    assert last == 'The code of each "Or:" is in `suggestions` of the finding.'


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
    text = summary(made_up.view(actions=made_up.DECIDED), width=200)
    assert (
        "What was changed (2)\n"
        "  step 10: drew net.0 and net.2 anew (vanishing gradient, saturation): "
        "gradient from the last layer to the first x7.9e-09 -> x0.5; kept at step 30: loss 2.31 -> 1.02\n"
        "  step 10: began to clip the gradient norm (exploding gradient): grad norm total before it 1e+09; "
        "max norm after it 2.5; taken back at step 30\n"
        "Each is tried for a while"
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
    assert capsys.readouterr().out.startswith("The signal dies on its way to net.0. Cause: saturation.\n")
