"""Has a network come to give the same output, but for a trace, whatever comes in?"""

from __future__ import annotations

import numpy as np

from lightning_gradflow.detectors.known import layer_mask
from lightning_gradflow.detectors.overwritten import start_of_steps
from lightning_gradflow.detectors.standstill import is_judged, keeps_residual, still_falls
from lightning_gradflow.history import History

_TRACE = 0.1  # of what the outputs of samples differed by at first


def collapsed_since(history: History) -> int | None:
    """The row from which steps have made the network a constant; None where they have not.

    A loss that started far above what a constant gives has fallen far when it gets there, and nothing was learnt. It is
    so if all of these hold:

    - there was time to learn, the run is young, and the loss does not fall (see `standstill`);
    - the gradient at the output is half of the first one or more, as a constant leaves it;
    - the outputs differ between samples by less than a tenth of what they did at first.

    A network that finds the best constant before it learns may look the same for a while: what made it a constant has
    to be known.

    Args:
        history: where to read.
    """
    if not is_judged(history) or still_falls(history):
        return None
    start = start_of_steps(history)
    if not keeps_residual(history, start):
        return None
    rms, share = (history[name][[start, -1]] for name in ("output_rms", "output_spread"))
    first, now = rms * share
    known = np.flatnonzero(layer_mask(history) & np.isfinite(first) & np.isfinite(now))
    return start if known.size and now[known[-1]] < _TRACE * first[known[-1]] else None
