"""Does the loss function get what it is made for?"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History
from lightning_gradflow.metrics import MISMATCHES


@dataclass(frozen=True)
class LossMismatch:
    """Finds loss functions that are applied to the wrong thing.

    PyTorch's losses of classes hold a softmax, a sigmoid or a logarithm, or hold none, and many a network has one too
    many or one too few at its end. It may learn all the same, but less, and later. It is read off the autograd graph,
    so it is a fact and needs no limit: the finding is open while the newest sample has it, from the first one on.
    Losses that are compiled, or written in other operations, are not looked through.

    References:
        Paszke et al. 2019, PyTorch: an imperative style, high-performance deep learning library.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.append(Row(0, scalars={"loss": 2.3, "softmax_twice": 1.0}))
        >>> [(str(f.kind), f.cause) for f in LossMismatch().judge(history)]
        [('loss_mismatch', 'softmax_twice')]
    """

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row, if there is one."""
        rows = history.rows
        cause = next((name for name in MISMATCHES if rows and name in rows[-1].scalars), None)
        if cause is None:
            return []
        return [Finding(FindingKind.LOSS_MISMATCH, Severity.WARNING, rows[-1].step, cause=cause)]
