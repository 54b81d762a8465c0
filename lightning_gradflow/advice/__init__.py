"""All prose about findings: what one means, and what to do about it.

To change a wording, change a row in `explanations`; to change which cures are proposed and in which order, a row in
`suggestions`; to change a cure itself, its function in one of the modules `*_cures`.
"""

from lightning_gradflow.advice.explanations import explain
from lightning_gradflow.advice.rate_cures import too_often_clipped, with_rate_of
from lightning_gradflow.advice.suggestions import suggest

__all__ = ["explain", "suggest", "too_often_clipped", "with_rate_of"]
