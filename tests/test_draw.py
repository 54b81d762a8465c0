"""The picture in the README is made by docs/draw.py."""

import runpy
from pathlib import Path

import numpy as np
from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"


def test_a_short_run_gives_a_picture_as_wide_as_the_committed_one():
    drawn = runpy.run_path(str(DOCS / "draw.py"))["drawn"](epochs=2)
    with Image.open(DOCS / "heatmap.png") as committed:
        assert drawn.size == committed.size
    upper, lower = np.split(np.asarray(drawn), 2)
    assert (upper != lower).any()


def test_the_committed_picture_is_small():
    assert (DOCS / "heatmap.png").stat().st_size <= 150_000
