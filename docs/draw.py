"""`python docs/draw.py` draws docs/heatmap.png, the picture in the README.

It trains the example twice, as it is and with `mitigate="apply"`, and puts the pictures that GradFlow makes of the two
runs below each other, each with a caption.
"""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from lightning_gradflow import GradFlow, GradFlowWarning
from lightning_gradflow.figures import heatmap

HERE = Path(__file__).resolve().parent
PICTURE = HERE / "heatmap.png"
EPOCHS = 20
_EXAMPLE = HERE.parent / "examples" / "vanishing_digits.py"
_CAPTION, _MARGIN = 76, 12
_INK = (34, 34, 34)


def run(mitigate: Literal["suggest", "apply"], epochs: int) -> tuple[GradFlow, float]:
    """Trains the example and returns what watched it, with the accuracy on held-out digits."""
    example = runpy.run_path(str(_EXAMPLE))
    L.seed_everything(0, verbose=False)
    flow = GradFlow(mitigate=mitigate, report=False, console=False)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[flow],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    with warnings.catch_warnings():
        # the network vanishes on purpose
        warnings.simplefilter("ignore", GradFlowWarning)
        trainer.fit(example["Digits"](), *example["digits"]())
    return flow, float(trainer.callback_metrics["val/accuracy"])


def drawn(epochs: int = EPOCHS) -> Image.Image:
    """Both runs below each other, the sick one on top."""
    sick, of_sick = run("suggest", epochs)
    cured, of_cured = run("apply", epochs)
    parts = [
        captioned(
            sick,
            f"This network does not learn: accuracy {of_sick:.0%}",
            f"10 sigmoid layers on handwritten digits. Dark is small: the first layer (top) gets {_times(sick)} times "
            "less gradient than the last (bottom).",
        ),
        captioned(
            cured,
            f'The same run with GradFlow(mitigate="apply"): accuracy {of_cured:.0%}',
            f"At the white line, after step {cured.actions[0].step}, GradFlow draws the weights anew. From then on "
            "every layer gets a gradient of similar size.",
        ),
    ]
    return Image.fromarray(np.concatenate([np.asarray(part) for part in parts]))


def captioned(flow: GradFlow, title: str, text: str) -> Image.Image:
    """The picture of a run, with a title and a line of text above it."""
    pixels = heatmap(flow.history, actions=flow.actions)
    height, width, _ = pixels.shape
    image = Image.new("RGB", (width, _CAPTION + height + _MARGIN), "white")
    image.paste(Image.fromarray(pixels), (0, _CAPTION))
    draw = ImageDraw.Draw(image)
    draw.text((12, 14), title, fill=_INK, font=_font("DejaVuSans-Bold", 24))
    draw.text((12, 49), text, fill=_INK, font=_font("DejaVuSans", 15))
    return image


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{name}.ttf", size)


def _times(flow: GradFlow) -> str:
    """How many times smaller the gradient of the first layer is than that of the last, to the nearest power of ten."""
    norms = flow.history["grad_norm"]
    return f"{10 ** round(float(np.nanmedian(np.log10(norms[:, -1] / norms[:, 0])))):,}"


def main() -> int:
    """Writes the picture."""
    drawn().quantize(256, dither=Image.Dither.NONE).save(PICTURE, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
