"""Units that died in a run are brought back to life, without a change of what the network computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradflow.findings import Finding
from lightning_gradflow.history import History
from lightning_gradflow.probes.shards import is_sharded
from lightning_gradflow.remedies.forward_pass import Pass, Units
from lightning_gradflow.remedies.training import Training
from lightning_gradflow.remedies.unit_weights import NORMS, Edit, Side
from lightning_gradflow.remedies.way_out import SAME, Stage

_DEVIATIONS = 3.0  # a unit as far below zero fires for one input in 700, if they are normally distributed
_SICK = 0.5  # of the units: from this share on an activation is worth a treatment that no finding asks for
_VARIES = 1e-4  # of its mean: a unit whose inputs vary by less can't be brought to life by weights
_FACTORS = (1.0, 0.3, 0.1)  # of the usual size of incoming weights, where what follows can't be kept as it is
_MAX_RISE = 0.1  # of the loss: units that come back so loud undo what the rest has learnt
_MAX_SCALE = 3.0  # living units of another size than He's rule gives are followed so far; they may be sick as well


@dataclass(frozen=True)
class Recycling:
    """What was done to dead units.

    Args:
        layers: whose units got new weights, in order of execution.
        units: how many live now.
        before: `dead_fraction` of the activations that were treated.
        after: `dead_fraction` of them, on the same batch; `output_change`, the largest change of what any layer behind
            gives, in units of its rms (NaN where nothing passed any treated layer); `loss_change`, relative (NaN where
            no loss was seen).
    """

    layers: tuple[str, ...]
    units: int
    before: Mapping[str, float]
    after: Mapping[str, float]


def recycle(training: Training, finding: Finding) -> Recycling | None:
    """Gives the dead units that a finding is about new weights, so that they live and nothing else changes.

    A unit is dead where it is on the flat side of its activation for every sample of a batch of the run (of every
    rank), with mean + 3 deviations of what goes into the activation below zero; or where the run's own history has at
    least so many units dead over several batches. In order of execution:

    - The incoming weights are drawn anew (He normal), and scaled so that what goes into the activation varies as it
      does for the median of the living units. Behind a norm layer it is the norm's weight that is set, and not the
      layer before it.
    - The bias is set so that the unit's mean on the batch is 0: it fires for about half of the samples.
    - The outgoing weights become 0, and what a dead unit had given throughout (an ELU's -1) goes to the bias. So the
      network computes what it computed before, and the units get a gradient from the second step on.
    - The optimizer's moments for these weights are cleared.

    Which weights are the outgoing ones is not taken from the order of the layers: numbers are put into the dead units,
    and all layers are looked at for what changes. If the way out is not that simple (residual streams, depthwise
    convolutions, attention, a penalty on activations), the outgoing weights stay and the incoming ones are a tenth as
    large; this is taken back where the loss rises by more than 10 %. Where every unit of a layer is dead nothing passed
    it, and there is nothing to preserve. There the outgoing weights stay as well, and the incoming ones are the largest
    of 1, 0.3 and 0.1 times He's with which the loss rises by at most 10 %, or the smallest.

    Layers that are frozen, tied, parametrized or spread over ranks (FSDP2) are left as they are; so are units to whose
    activation something else is added before it.

    Args:
        training: the run; without a rehearsal nothing can be done.
        finding: names the activations, or the layers before them. If none of them is met, every activation of which
            half of the units are dead is treated.

    Returns:
        What was done; None if nothing was, and then the weights are as they were.

    References:
        Sokar et al. 2023, The dormant neuron phenomenon in deep reinforcement learning (recycling with outgoing weights
        of zero); Lu et al. 2019, Dying ReLU and initialization: theory and numerical examples.

    Example:
        >>> import contextlib
        >>> from lightning_gradflow.findings import FindingKind, Severity
        >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(64, 4)
        >>> _ = nn.init.constant_(net[0].bias[:6].detach(), -20.0)
        >>> @contextlib.contextmanager
        ... def rehearse():
        ...     yield net, lambda: net(x).sum()
        >>> before = net(x)
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> finding = Finding(FindingKind.DEAD_UNITS, Severity.WARNING, step=60, layers=("1",))
        >>> done = recycle(Training(net, [optimizer], History(), rehearse), finding)
        >>> done.units, done.before["dead_fraction"], done.after["dead_fraction"], torch.allclose(net(x), before)
        (6, 0.75, 0.0, True)
    """
    if training.rehearse is None or any(is_sharded(parameter) for parameter in training.model.parameters()):
        return None
    with training.rehearse() as (module, run), torch.no_grad():
        recycler = _Recycler(training, module, run)
        try:
            return recycler.treat(finding)
        except BaseException:
            recycler.undo()  # the module may be the model itself
            raise


@dataclass(frozen=True)
class _Revived:
    """An activation that was treated: what is seen of the network since then, and whether nothing had passed it."""

    units: Units
    chosen: Tensor
    edit: Edit
    seen: Pass
    change: float
    was_blocked: bool


class _Recycler:
    """One treatment."""

    def __init__(self, training: Training, module: nn.Module, run: Callable[[], None]) -> None:
        self._training = training
        self._module = module
        self._stage = Stage(training, module, run)
        self._generator = torch.Generator().manual_seed(training.seed)
        self._edits: list[Edit] = []

    def _new_edit(self) -> Edit:
        self._edits.append(Edit(self._module))
        return self._edits[-1]

    def undo(self) -> None:
        """Puts everything back, the last change first."""
        for edit in reversed(self._edits):
            edit.undo()

    def treat(self, finding: Finding) -> Recycling | None:
        first = now = self._stage.look()
        named = {u.point for u in now.units.values() if {u.module, u.feeder} & set(finding.layers)}
        done: list[_Revived] = []
        for point in list(now.units):
            chosen = self._dead(now.units[point])
            if chosen is None or not chosen.any():
                continue
            # behind a layer that nothing passed, units had been silent for want of an input
            others = not named or any(revived.was_blocked for revived in done)
            if point in named or (others and chosen.float().mean() >= _SICK):
                revived = self._revive(now, now.units[point], chosen)
                if revived is not None:
                    done.append(revived)
                    now = revived.seen
        if not done:
            return None
        for revived in done:
            revived.edit.carry_over(self._training)
        units = sum(len(r.chosen) for r in done)
        dead = sum(int(r.chosen.sum()) for r in done)
        still = sum(int((r.chosen & self._silent(r.seen.units[r.units.point])).sum()) for r in done)
        return Recycling(
            layers=tuple(dict.fromkeys(r.units.feeder for r in done)),
            units=dead - still,
            before={"dead_fraction": dead / units},
            after={
                "dead_fraction": still / units,
                "output_change": max((r.change for r in done if not r.was_blocked), default=math.nan),
                "loss_change": self._stage.loss_change(first, now),
            },
        )

    # -- which units ------------------------------------------------------------------------------------------------

    def _silent(self, units: Units) -> Tensor:
        return units.statistics(self._stage.averaged)[0] == 0

    def _dead(self, units: Units) -> Tensor | None:
        """(U,) which units are dead; None where the activation has no flat side."""
        if not units.has_flat_side:
            return None
        active, mean, deviation = units.statistics(self._stage.averaged)
        silent = (active == 0) & (mean < 0)
        if float(silent.float().mean()) <= _dead_share(self._training.history, units.point):
            return silent
        return silent & (mean + _DEVIATIONS * deviation < 0)

    # -- the way in -------------------------------------------------------------------------------------------------

    def _revive(self, now: Pass, units: Units, chosen: Tensor) -> _Revived | None:
        """Treats one activation; None where it can't be, and then nothing was changed."""
        side = self._stage.sides.incoming(units.feeder)
        if side is None or not self._is_fed(units, side, chosen):
            return None
        was_blocked = bool(chosen.all())
        if not was_blocked:
            edit = self._new_edit()
            seen = self._renew(edit, units, side, chosen, 1.0) if self._stage.cut(edit, now, units, chosen) else None
            if seen is not None and self._stage.changes(now, seen, units.feeder).amax() <= SAME:
                return self._revived(now, seen, edit, units, chosen, was_blocked)
            edit.undo()
        for factor in _FACTORS if was_blocked else _FACTORS[-1:]:
            edit = self._new_edit()
            seen = self._renew(edit, units, side, chosen, factor)
            rise = self._stage.loss_change(now, seen) if seen is not None else math.nan
            # behind a layer that nothing passes nothing is learnt any more: then the smallest has to do
            if seen is not None and (rise <= _MAX_RISE or (was_blocked and factor == _FACTORS[-1] and rise < math.inf)):
                return self._revived(now, seen, edit, units, chosen, was_blocked)
            edit.undo()
        return None

    def _revived(self, now: Pass, seen: Pass, edit: Edit, units: Units, chosen: Tensor, was_blocked: bool) -> _Revived:
        change = math.nan if was_blocked else float(self._stage.changes(now, seen, units.feeder).amax())
        return _Revived(units, chosen, edit, seen, change, was_blocked)

    def _is_fed(self, units: Units, side: Side, chosen: Tensor) -> bool:
        """Whether nothing but this layer goes into the units: without its weights they are the same for all samples."""
        edit = self._new_edit()
        self._set(edit, side, chosen, 0.0)
        seen = self._stage.look().units.get(units.point)
        edit.undo()
        if seen is None or seen.sums.shape != units.sums.shape:
            return False
        _, usual, _ = units.statistics(self._stage.averaged)
        _, _, deviation = seen.statistics(self._stage.averaged)
        return bool((deviation <= _VARIES * usual.abs())[chosen].all())

    def _set(self, edit: Edit, side: Side, chosen: Tensor, weight: float | Tensor) -> None:
        """Sets the incoming weights, and the bias to 0."""
        own = edit.units(side.weight, side.axis, chosen)
        own[chosen] = weight.to(own) if isinstance(weight, Tensor) else weight
        if side.bias:
            edit.units(side.bias, 0, chosen)[chosen] = 0.0

    def _renew(self, edit: Edit, units: Units, side: Side, chosen: Tensor, factor: float) -> Pass | None:
        """Draws incoming weights and centres the units; None where none of them could live."""
        self._set(edit, side, chosen, self._drawn(units.feeder, side, chosen))
        _, mean, deviation = self._stage.look().units[units.point].statistics(self._stage.averaged)
        varies = deviation > _VARIES * mean.abs()
        lives, usual = chosen & varies, varies & ~chosen
        if not lives.any():
            return None
        scale = torch.full_like(deviation, factor)
        if usual.any():
            drawn = deviation[lives].median()
            target = deviation[usual].median().clamp(drawn / _MAX_SCALE, drawn * _MAX_SCALE)
            scale *= target / deviation.where(varies, 1.0)
        if not side.bias:  # the mean stays: let it be above zero
            scale *= torch.where(mean < 0, -1.0, 1.0)
        weight = edit.units(side.weight, side.axis, chosen)
        weight[lives] *= scale[lives].to(weight).view(-1, *[1] * (weight.dim() - 1))
        if side.bias:
            bias = edit.units(side.bias, 0, chosen)
            bias[lives] = -(mean * scale)[lives].to(bias)
        return self._stage.look()

    def _drawn(self, layer: str, side: Side, chosen: Tensor) -> Tensor:
        shape = self._module.get_parameter(side.weight).movedim(side.axis, 0)[chosen].shape
        if isinstance(self._stage.layers.module(layer), NORMS):
            return torch.ones(shape)
        # on the CPU: the same on every rank and device
        return torch.randn(shape, generator=self._generator) * math.sqrt(2 / math.prod(shape[1:]))


def _dead_share(history: History, point: str) -> float:
    """The share of dead units of an activation when it was last seen over several batches; 0 if it never was."""
    names, table = history.names("dead_fraction"), history["dead_fraction"]
    if point not in names or not table.size:
        return 0.0
    known = table[:, names.index(point)]
    known = known[~np.isnan(known)]
    return float(known[-1]) if known.size else 0.0
