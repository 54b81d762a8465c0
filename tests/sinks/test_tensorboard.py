import io

import numpy as np
import pytest
from PIL import Image

from lightning_gradflow.sinks.tensorboard import TensorBoardSink, markdown
from tests import made_up

COUNTS = ("actions", "actions_kept", "actions_rolled_back")


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """What the real reader finds in what the real logger wrote."""
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path_factory.mktemp("tensorboard"))
    clock = made_up.Hours()
    sink = TensorBoardSink(logger, now=clock)
    made_up.replay(sink, progress=clock.row, rows=20, findings=(made_up.finding(),), actions=made_up.ACTIONS)
    logger.finalize("success")
    sizes = {"images": 0, "histograms": 0, "tensors": 0, "scalars": 0}
    found = EventAccumulator(logger.log_dir, size_guidance=sizes)
    found.Reload()
    return found


def test_scalars_stand_at_their_steps(events):
    points = events.Scalars("gradflow/grad_norm_max")
    assert [point.step for point in points] == list(range(0, 200, 10))
    assert {point.value for point in points} == {1.0}


def test_the_heatmap_is_an_image_at_every_tenth_of_the_run(events):
    images = events.Images("gradflow/heatmap")
    assert [image.step for image in images] == list(range(10, 200, 20))
    pixels = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)))
    assert pixels.shape[:2] == (images[-1].height, images[-1].width)
    assert pixels.std() > 0.1


def test_histograms_hold_exponents(events):
    first = events.Histograms("gradflow/grad_hist_early")[0].histogram_value
    assert first.num == 500
    assert (first.min, first.max) == (-64 + 20, -64 + 25)
    assert first.sum / first.num == pytest.approx(-64 + 22.5)


def test_findings_and_verdict_are_text(events):
    tags = events.Tags()["tensors"]
    assert {"gradflow/findings/text_summary", "gradflow/verdict/text_summary"} <= set(tags)
    text = events.Tensors("gradflow/findings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "```python\nmodel.net[1] = nn.ReLU()\n```" in text


def test_actions_are_text_and_their_number_a_scalar(events):
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("gradflow/actions/text_summary")]
    assert len(texts) == 4  # two when they are taken, two when they are decided
    assert texts[0].startswith("step 10: drew net.0 and net.2 anew (vanishing gradient, saturation)")
    assert texts[0].endswith("on trial")
    assert texts[2].endswith("kept at step 30: loss 2.31 -\\> 1.02")
    counts = {name: [(event.step, event.value) for event in events.Scalars(f"gradflow/{name}")] for name in COUNTS}
    assert counts == {
        "actions": [(10, 1), (10, 2), (30, 2), (30, 2)],
        "actions_kept": [(30, 1), (30, 1)],
        "actions_rolled_back": [(30, 1)],
    }


def test_markdown_leaves_names_with_underscores_as_they_are():
    assert r"\_\_init\_\_" in markdown(made_up.finding(message="at __init__"))
