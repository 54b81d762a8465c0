"""Running statistics that a batch with NaN or infinity in it does not spoil."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_gradflow.remedies.joint_norm import alike

_NAMES = ("running_mean", "running_var")


class StatisticsGuard:
    """Puts running statistics that became NaN or infinite in a batch back to what they were before it.

    A running mean is an average with all that came before: m = (1 - a) m + a x. One x that is NaN makes it NaN for
    good. In training mode nothing shows it, for there a layer uses the batch's own statistics; in evaluation mode it
    gives nothing but NaN. No gradient flows into it, so to leave out the optimizer's step is no help.

    All statistics of a batch are put back together, as if it had not been; what was not finite before is left alone.
    Each rank looks at its own buffers: they are not sharded, and what DDP or SyncBatchNorm makes of them is the same
    as without a guard. Nothing is copied to the host. It takes about six kernels a batch, however many layers there
    are, and is blind to statistics that are far off but finite.

    Args:
        model: all buffers called `running_mean` and `running_var` are guarded, which are those of torch's BatchNorm,
            SyncBatchNorm and InstanceNorm and of most others.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> guard = StatisticsGuard(norm)
        >>> _ = norm(torch.tensor([[1.0], [3.0]]))
        >>> guard.batch_end()
        >>> _ = norm(torch.tensor([[1.0], [float("nan")]]))
        >>> guard.batch_end()
        >>> norm.running_mean, norm.running_var
        (tensor([0.2000]), tensor([1.1000]))
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [m for m in model.modules() if any(name in m._buffers for name in _NAMES)]
        self._kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.batch_end()

    @torch.no_grad()
    def batch_end(self) -> None:
        """A batch is over: its statistics are kept, or put back."""
        found = (layer._buffers.get(name) for layer in self._layers for name in _NAMES)
        buffers = [buffer for buffer in found if buffer is not None and buffer.is_floating_point()]
        for kind, where in alike(buffers).items():
            its = [buffers[i] for i in where]
            now = torch.cat([buffer.flatten() for buffer in its])
            before = self._kept.get(kind, now)
            if before.shape == now.shape:  # else layers have come or gone
                is_spoilt = (before.isfinite() & now.isfinite().logical_not_()).any()
                now = torch.where(is_spoilt, before, now)
                parts = now.split([buffer.numel() for buffer in its])
                torch._foreach_copy_(its, [part.view(b.shape) for part, b in zip(parts, its, strict=True)])
            self._kept[kind] = now
