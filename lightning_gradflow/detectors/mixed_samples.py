"""Does a layer run over the samples of a batch in the place of time?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_gradflow.findings import Finding, FindingKind, Severity
from lightning_gradflow.history import History


@dataclass(frozen=True)
class MixedSamples:
    """Finds recurrences and attentions that take the samples of a batch for the time steps of a sequence.

    Torch's own take (time, batch, features) unless they are made with `batch_first=True`. Fed with (batch, time,
    features) they raise no error: what comes out for a sample hangs on those that stand before it in the batch by
    chance, or on all of them, and on nothing that came before in time. It is read off shapes, so it is a fact and needs
    no limit: the finding is open while the newest sample of everything has it, from the first one on.

    References:
        Paszke et al. 2019, PyTorch: an imperative style, high-performance deep learning library.

    Example:
        >>> from lightning_gradflow.history import Row
        >>> history = History()
        >>> history.layer_axis.merge(["rnn", "head"])
        >>> history.append(Row(0, {"steps_as_samples": np.array([50, np.nan])}, {"samples_as_steps": 64.0}))
        >>> [(str(f.kind), f.cause, f.layers, f.evidence["time_steps"]) for f in MixedSamples().judge(history)]
        [('mixed_samples', 'batch_first', ('rnn',), 50.0)]
    """

    def judge(self, history: History) -> list[Finding]:
        """The finding of the newest row that is no row of gradients alone, if there is one."""
        rows = history.rows
        at = next((i for i in reversed(range(len(rows))) if not rows[i].gradients_only), None)
        if at is None or "samples_as_steps" not in rows[at].scalars:
            return []
        steps = history["steps_as_samples"][at]
        mixed = np.flatnonzero(steps > 0)
        return [
            Finding(
                kind=FindingKind.MIXED_SAMPLES,
                severity=Severity.WARNING,
                step=rows[-1].step,
                layers=tuple(history.layers[i] for i in mixed),
                cause="batch_first",
                evidence={"batch_size": rows[at].scalars["samples_as_steps"], "time_steps": float(steps[mixed[0]])},
            )
        ]
