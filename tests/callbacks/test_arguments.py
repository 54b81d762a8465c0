"""Arguments out of range are refused at construction, with their name, range and value."""

import pytest

from lightning_gradflow import AutoMitigator, GradFlow, GradNormLogger, PlateauDetector, SaturationMonitor
from lightning_gradflow.remedies.plan import REMEDIES

BAD = [
    (GradFlow, {"every_n_steps": 0}, r"every_n_steps must be a whole number in \[1, inf\), got 0"),
    (GradFlow, {"every_n_steps": -3}, r"every_n_steps must be a whole number in \[1, inf\), got -3"),
    (GradFlow, {"every_n_steps": 2.5}, r"every_n_steps must be a whole number in \[1, inf\), got 2.5"),
    (GradFlow, {"every_n_steps": True}, r"every_n_steps must be a whole number in \[1, inf\), got True"),
    (GradFlow, {"saturation": True}, r"saturation must be a SaturationMonitor or None, got True"),
    (GradFlow, {"plateau": PlateauDetector}, r"plateau must be a PlateauDetector or None, got <class"),
    (GradFlow, {"gradients": PlateauDetector()}, r"gradients must be a GradNormLogger or None, got <"),
    (GradFlow, {"report": "out.html"}, r"report must be True or False, got 'out.html'"),
    (GradFlow, {"mitigate": "always"}, r"mitigate must be one of \('off', 'suggest', 'apply'\), got 'always'"),
    (
        GradFlow,
        {"mitigate": "off", "mitigator": AutoMitigator("apply")},
        r"mitigate must agree with the mode of mitigator \('apply'\), got 'off'",
    ),
    (GradNormLogger, {"max_decay": 0}, r"max_decay must be in \(0, 100\), got 0"),
    (GradNormLogger, {"max_decay": 100}, r"max_decay must be in \(0, 100\), got 100"),
    (GradNormLogger, {"max_growth": float("nan")}, r"max_growth must be in \(0, 100\), got nan"),
    (GradNormLogger, {"max_growth": "4"}, r"max_growth must be in \(0, 100\), got '4'"),
    (SaturationMonitor, {"max_saturated": 1.01}, r"max_saturated must be in \(0, 1\], got 1.01"),
    (SaturationMonitor, {"max_dead": 0}, r"max_dead must be in \(0, 1\], got 0"),
    (SaturationMonitor, {"window": 0}, r"window must be a whole number in \[1, inf\), got 0"),
    (PlateauDetector, {"window": 31}, r"window must be a whole number in \[32, inf\), got 31"),
    (PlateauDetector, {"min_progress": 1}, r"min_progress must be in \(0, 1\), got 1"),
    (AutoMitigator, {"mode": None}, r"mode must be one of \('off', 'suggest', 'apply'\), got None"),
    (AutoMitigator, {"allow": ("clip", "pray")}, r"allow must hold only remedies of \('clip', .*'\), got .*pray"),
    (AutoMitigator, {"allow": "clip"}, r"allow must be a sequence of .*, such as \['clip'\], got 'clip'"),
    (AutoMitigator, {"max_actions": -1}, r"max_actions must be a whole number in \[0, inf\), got -1"),
    (AutoMitigator, {"max_progress": 0}, r"max_progress must be in \(0, 1\], got 0"),
    (AutoMitigator, {"max_progress": 1.1}, r"max_progress must be in \(0, 1\], got 1.1"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), BAD)
def test_a_bad_argument_is_refused_by_name_range_and_value(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (GradFlow, {"every_n_steps": 1}),
        (GradFlow, {"mitigate": "apply", "mitigator": AutoMitigator("apply")}),
        (GradNormLogger, {"max_decay": 99.9, "max_growth": 0.1}),
        (SaturationMonitor, {"max_saturated": 1, "max_dead": 1, "window": 1}),
        (SaturationMonitor, {"max_dead": 0.1}),
        (PlateauDetector, {"window": 32, "min_progress": 0.999}),
        (AutoMitigator, {"allow": (), "max_actions": 0, "max_progress": 1}),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(kind, arguments):
    kind(**arguments)


@pytest.mark.parametrize("remedy", REMEDIES)
def test_each_remedy_can_be_allowed_by_itself(remedy):
    assert AutoMitigator("apply", allow=(remedy,)).allow == (remedy,)


def test_all_remedies_are_allowed_by_default():
    assert AutoMitigator("apply").allow == REMEDIES


def test_before_a_fit_everything_is_empty():
    flow = GradFlow()
    assert (flow.findings, flow.actions, len(flow.history), flow.report_path) == ((), (), 0, None)
    assert flow.summary().startswith("No fit in this process yet.")
