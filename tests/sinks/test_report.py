import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest

from lightning_gradflow.findings import Action, FindingKind, Severity, Suggestion
from lightning_gradflow.sinks import words
from lightning_gradflow.sinks.charts import charts
from lightning_gradflow.sinks.report import FILE_NAME, ReportSink, page
from tests import made_up


class Page(HTMLParser):
    """The tags and the visible text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self._in = [], "", ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = tag

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in not in ("script", "style"):
            self.text += data


def full_view(name="net.{}"):
    findings = (
        made_up.finding(layers=(name.format(0),)),
        made_up.finding(Severity.WARNING, FindingKind.LOSS_PLATEAU, resolved_step=30, message="Flat."),
    )
    action = Action(20, "clip", (name.format(0),), "norm above 10", {"norm": 12.0}, {"norm": 1.0}, "kept", 40)
    return made_up.view(made_up.history(name=name), findings, (action,))


def drawn(chart):
    """The figure as plotly's own object, which refuses what plotly does not know."""
    return go.Figure({"data": chart.figure.traces, "layout": chart.figure.layout})


def plain(part):
    """Lists and dicts, whether they were tuples or not."""
    return json.loads(json.dumps(part))


@pytest.fixture(scope="module")
def html():
    return page(full_view())


def test_the_page_needs_no_network(html):
    for tag, attributes in Page(html).tags:
        assert tag not in ("link", "iframe", "base")
        assert "src" not in attributes
    assert html.count("plotly.js v") == 1


def test_verdict_picture_findings_actions_and_figures_stand_in_order(html):
    text = Page(html).text
    parts = ["The signal dies on its way to net.0. Cause: saturation.", "Gradient norm by layer and step"]
    parts += ["Vanishing gradient", "since step 10", "span -6"]
    parts += ["Use ReLU", "model.net[1] = nn.ReLU()", "steps 10 to 30, resolved", "norm above 10"]
    parts += ["Signal against depth", "Size of the gradient entries"]
    parts += ["Saturated and dead activations", "Training loss"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert [tag for tag, _ in Page(html).tags].count("pre") == 1  # the second finding has the same cure


def test_every_name_and_text_is_escaped():
    attack = "<b><script>alert(1)</script>"
    shown = full_view(attack + "{}")
    html = page(shown)
    calm = page(full_view())
    assert attack not in html
    assert "<b>" not in html.split("<script>")[0]
    assert Page(html).tags.count(("script", {})) == Page(calm).tags.count(("script", {}))


def test_actions_are_a_table_with_their_outcome_and_how_to_read_it():
    html = page(made_up.view(actions=made_up.DECIDED), figures=False)
    text = Page(html).text
    cells = ["Step", "What", "Layers", "Why", "Before -> after", "Outcome"]
    cells += ["10", "drew net.0 and net.2 anew", "net.0, net.2", "vanishing gradient, saturation"]
    cells += ["gradient from the last layer to the first x7.9e-09 -> x0.5; loss 2.31 -> 1.02", "kept, step 30"]
    cells += ["10", "began to clip the gradient norm", "all", "exploding gradient"]
    cells += ["grad norm total before it 1e+09; max norm after it 2.5", "taken back, step 30"]
    assert "".join(cells) in text
    assert words.outcome_legend(made_up.DECIDED) in text


@pytest.mark.parametrize("name", ["Gradient norm by layer and step", "Loss"])
def test_a_line_stands_where_the_run_was_changed(name):
    shown = [chart for chart in charts(made_up.view(actions=made_up.DECIDED)) if chart.title == name]
    calm = [chart for chart in charts(made_up.view()) if chart.title == name]
    place = 1.5 if "layer" in name else 10  # of the columns 0, 10, 20, ... two were sampled by step 10
    layout = drawn(shown[0]).layout
    assert [(line.x0, line.line.dash) for line in layout.shapes] == [(place, "solid"), (place, "dot")]
    assert [label.text for label in layout.annotations] == ["reinit, kept", "clip, taken back"]
    assert len({label.y for label in layout.annotations}) == 2
    assert "outcome" in shown[0].caption
    assert not drawn(calm[0]).layout.shapes
    assert "outcome" not in calm[0].caption


def test_an_alarm_that_is_over_has_its_advice_for_the_next_run():
    html = page(made_up.view(findings=(made_up.finding(resolved_step=30),)), figures=False)
    assert "Nothing was changed because of it" in html
    assert '<header class="warning">' in html
    text = Page(html).text
    assert text.index("For the next run:") < text.index("model.net[1] = nn.ReLU()")
    done = Action(10, "reinit", (), "vanishing gradient, saturation", outcome="kept")
    html = page(made_up.view(findings=(made_up.finding(resolved_step=30),), actions=(done,)), figures=False)
    assert "Nothing was changed" not in html
    assert '<header class="calm">' in html
    assert "For the next run:" in html


def test_what_follows_from_an_alarm_names_it_and_has_no_advice_of_its_own():
    plateau = replace(made_up.finding(Severity.INFO, FindingKind.LOSS_PLATEAU), cause="vanishing_gradient")
    plateau = replace(plateau, suggestions=(Suggestion("Use GELU", "gelu()", "", ""),))
    html = page(made_up.view(findings=(plateau, made_up.finding())), figures=False)
    assert "Comes of: Vanishing gradient." in html
    assert "gelu()" not in html
    assert "gelu()" in page(made_up.view(findings=(plateau,)), figures=False)


def test_without_figures_the_page_is_small(html):
    assert len(page(full_view(), figures=False)) < 20_000 < len(html)


def test_a_healthy_run_says_so():
    assert "No sign of trouble in the gradients." in Page(page(made_up.view(), figures=False)).text


def test_an_empty_run_has_a_page():
    assert "Nothing was measured" in Page(page(made_up.view(made_up.History()))).text


def test_figures_hold_plain_lists_only(html):
    assert '"bdata"' not in html.split("plotly.js v")[1].rsplit("Plotly.newPlot", 1)[1]
    for chart in charts(full_view()):
        read = json.loads(json.dumps([chart.figure.traces, chart.figure.layout], allow_nan=False))
        assert read == [chart.figure.traces, chart.figure.layout]


def test_plotly_takes_every_figure_as_it_is():
    shown = charts(made_up.view(actions=made_up.DECIDED))
    assert len(shown) == 5
    for chart in shown:
        taken = drawn(chart).to_plotly_json()
        # plotly.js alone would not read what plotly's own objects put right, such as a colour scale without places
        assert plain(taken["data"]) == plain(chart.figure.traces) != []
        layout = {name: part for name, part in chart.figure.layout.items() if part != []}
        assert plain({name: taken["layout"][name] for name in layout}) == plain(layout)


def test_each_figure_has_a_place_of_its_own_on_the_page(html):
    places = [attributes["id"] for tag, attributes in Page(html).tags if "id" in attributes]
    assert len(places) == len(set(places)) == len(charts(full_view()))
    assert all(html.count(f'Plotly.newPlot("{place}", ') == 1 for place in places)


@pytest.mark.parametrize("values", [[], [[0.0]], [[float("nan")] * 3], [[float("inf"), 0.0]] * 2, [[1.0, 1.0]]])
def test_charts_take_any_history(values):
    for chart in charts(made_up.view(made_up.gradients(*values), findings=(made_up.finding(),))):
        drawn(chart)
        assert "NaN" not in chart.figure.html("figure")


def test_many_losses_are_drawn_as_means():
    shown = made_up.History()
    shown.append(made_up.Row(4999, losses=np.arange(5000.0)))
    (chart,) = charts(made_up.view(shown))
    x, y = chart.figure.traces[0]["x"], chart.figure.traces[0]["y"]
    assert len(x) == 2000
    assert x == y


def test_the_file_is_whole_and_its_folder_made(tmp_path):
    sink = ReportSink(lambda: tmp_path / "a" / "b")
    sink.on_end(full_view())
    assert sink.written == tmp_path / "a" / "b" / FILE_NAME
    assert sink.written.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [path.name for path in sink.written.parent.iterdir()] == [FILE_NAME]


def test_a_page_that_fails_leaves_the_old_one_and_no_part(tmp_path, monkeypatch):
    (tmp_path / FILE_NAME).write_text("old")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        ReportSink(tmp_path).on_end(made_up.view())
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert (tmp_path / FILE_NAME).read_text() == "old"


def test_no_folder_means_no_page():
    sink = ReportSink(lambda: None)
    sink.on_end(made_up.view())
    assert sink.written is None


def test_a_remote_folder_is_refused():
    with pytest.raises(OSError, match="local folder"):
        ReportSink("s3://bucket/logs").on_end(made_up.view())
