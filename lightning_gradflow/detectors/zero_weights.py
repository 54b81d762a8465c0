"""Are there weights that are zero, and that no step can change?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_gradflow.detectors.known import ROOT, first_values, how_often_known, skipped_rows
from lightning_gradflow.detectors.standstill import stands_still
from lightning_gradflow.detectors.underflow import recent_underflow
from lightning_gradflow.history import Bools, History

_SAMPLES = 3  # what starts at zero on purpose lets gradients through from the second on
_FACTORS = 2  # of a product that must be zero for both to get nothing
_EXACT = ("relu", "relu6")  # flat at zero itself


@dataclass(frozen=True)
class ZeroWeights:
    """The layers whose weights are zero, and stay so.

    Args:
        layers: all of them, in order of execution.
        outer: those of them that a gradient comes to, and that get none only because their input is zero: they move as
            soon as the others do not give zeros any more.
    """

    layers: tuple[str, ...] = ()
    outer: frozenset[str] = frozenset()


def zero_weights(history: History) -> ZeroWeights:
    r"""The layers that are zero because they are zero.

    The gradient of a factor is a multiple of the other ones: of :math:`x = W_2 W_1 u` it is
    :math:`\partial L / \partial W_1 = W_2^T \delta u^T` and :math:`\partial L / \partial W_2 = \delta (W_1 u)^T`. With
    one of the two at zero that one moves with the first step, and the other with the second: so do heads, the second
    factors of adapters and the ends of residual branches that start from zero. With both at zero none ever moves.

    Looked at are layers with weights that were zero, and had a gradient of exactly zero, in each of three samples with
    a learning rate above 0, in which no other one came free: of a chain of which one end moves one does with each step.
    That another loss may start later, or a branch be used later, is no fault. So they are told of only where

    - a gradient comes to one, and another one before it gives zeros and gets none;
    - two are embeddings that give zeros and get none, as those of users and items whose rows are multiplied, and the
      run stands still;
    - it is an `nn.MultiheadAttention` to which a gradient comes, and so is its output projection;
    - a gradient comes to one that has two such weights, or holds another such layer, and the run stands still;
    - one gives zeros to a ReLU of which all units are dead, behind which there is a gradient: the slope at 0 is 0.
      Where a gradient gets past it to other layers, as in a residual branch, the run must stand still; where none
      does, all before it that give zeros are as much to blame;
    - no layer gets anything but zeros, and there are two such weights, or one in a run that stands still, and a loss;
    - or they are most of the layers, and the run stands still (see `stands_still`).

    Example:
        >>> from lightning_gradflow.history import Point, Row
        >>> history = History()
        >>> history.layer_axis.merge(["fc1", "fc2"])
        >>> history.add_points([Point("fc1", "fc1"), Point("fc2", "fc2")])
        >>> pair = {"zero_weights": np.ones(2), "output_rms": np.zeros(2), "delta_norm": np.array([0.0, 0.3])}
        >>> for step in range(3):
        ...     history.append(Row(step, pair, {"lr": 0.1}))
        >>> zero_weights(history)
        ZeroWeights(layers=('fc1', 'fc2'), outer=frozenset({'fc2'}))
    """
    if not history.rows or "zero_weights" not in history.rows[-1].values:
        return ZeroWeights()
    held = _held(history)
    if not held or len(history["delta_norm"]) < _SAMPLES:
        return ZeroWeights()
    points = _Points(history)
    blocked = [name for name in held if name in points.last and points.is_blocked(points.last[name])]
    outer = {name for name in held if name in points.last and points.gets(points.last[name])}
    pairs = _pairs(points, blocked, outer)
    # two weights of a layer, or two tables, may belong to what comes later, and no product
    is_still = stands_still(history)
    products, tables = (_products(held, points), _tables(history, blocked)) if is_still else (set(), set())
    products |= _attention(held, points)
    found = pairs | products | tables | _before_dead(history, blocked, points)
    # one weight may be a head whose loss starts later
    is_blocked = _nothing_moves(history) and (is_still or sum(held.values()) >= _FACTORS)
    if not found and (is_blocked or (is_still and _are_most(history, held))):
        found = set(held)
    return ZeroWeights(tuple(name for name in held if name in found), frozenset((pairs & outer) - products))


def may_be_blocked(history: History) -> bool:
    """Whether the first samples have such layers, and it is not known yet whether they come free by themselves.

    A norm layer behind zeros divides by its eps alone, so that no gain there tells of the weights.
    """
    return len(history) < _SAMPLES and bool((history["zero_weights"][-1:] > 0).any())


def _held(history: History) -> dict[str, int]:
    """How many weights are zero, and get nothing, in each layer that has such in every sample so far."""
    has_stepped = ~(history.scalar("lr") == 0) & ~skipped_rows(history)
    counts = history["zero_weights"]
    # of a layer that has none any more it is said once, and not measured again
    if has_stepped.sum() < _SAMPLES or (counts[1 - _SAMPLES :] == 0).any():
        return {}
    newest, seen = counts[-1], how_often_known(history, "zero_weights")
    always: Bools = np.asarray((newest > 0) & (seen >= _SAMPLES) & ~_was_none(history))
    return {name: int(newest[i]) for i, name in enumerate(history.layers) if always[i]}


def _was_none(history: History) -> Bools:
    """(L,) the layers of which a sample said that they have no such weights."""
    counts = history["zero_weights"]
    return history.facts.so_far(
        "no zero weights", len(counts), lambda start: np.asarray((counts[start:] == 0).any(axis=0)), np.logical_or
    )


class _Points:
    """What came to the outputs of the layers in the newest samples, and what they gave."""

    def __init__(self, history: History) -> None:
        deltas, outputs = history["delta_norm"][-_SAMPLES:], history["output_rms"][-_SAMPLES:]
        self._some: Bools = np.asarray((deltas > 0).all(axis=0))
        # of a recurrence of which only the last state is used nothing is known at the output
        self._never: Bools = np.asarray(~(deltas > 0).any(axis=0))
        self._silent: Bools = np.zeros(len(history.points), dtype=bool)
        if outputs.size:
            self._silent |= (outputs == 0).all(axis=0)
        self.last = {point.module: i for i, point in enumerate(history.points) if point.is_layer}

    def is_blocked(self, at: int) -> bool:
        """Whether nothing comes out, and no gradient comes back."""
        return bool(self._never[at] and self._silent[at])

    def gets(self, at: int) -> bool:
        """Whether a gradient comes back to it."""
        return bool(self._some[at])


def _pairs(points: _Points, blocked: list[str], outer: set[str]) -> set[str]:
    """Layers that give zeros to others that a gradient comes to, and those."""
    ends = [points.last[name] for name in outer]
    before = {name for name in blocked if any(points.last[name] < end for end in ends)}
    after = {name for name in outer if any(points.last[first] < points.last[name] for first in before)}
    return before | after


def _tables(history: History, blocked: list[str]) -> set[str]:
    """The embeddings among these, if there are two: their rows are factors of each other."""
    sizes, norms = first_values(history, "embedding_rms"), first_values(history, "spectral_norm")
    looked_up = {name for i, name in enumerate(history.layers) if sizes[i] == 0 and np.isnan(norms[i])}
    found = looked_up & {*blocked}
    return found if len(found) >= _FACTORS else set()


def _products(held: dict[str, int], points: _Points) -> set[str]:
    """Layers with several such weights, of their own or of layers in them that are not called, and a gradient."""
    by_call: dict[str, list[str]] = {}
    for name in held:
        by_call.setdefault(_called(name, points), []).append(name)
    return {
        name
        for call, names in by_call.items()
        if call in points.last and points.gets(points.last[call]) and sum(held[n] for n in names) >= _FACTORS
        for name in names
    }


def _attention(held: dict[str, int], points: _Points) -> set[str]:
    """Attention of torch's whose inputs and output are zero: it calls its output projection by the weight alone."""
    found: set[str] = set()
    for name in held:
        end = f"{name}.out_proj".removeprefix(f"{ROOT}.")
        if name in points.last and points.gets(points.last[name]) and end in held and end not in points.last:
            found |= {name, end}
    return found


def _called(name: str, points: _Points) -> str:
    """The layer itself, or the one around it that is called."""
    while name not in points.last and name != ROOT:
        name = name.rpartition(".")[0] or ROOT
    return name


def _before_dead(history: History, blocked: list[str], points: _Points) -> set[str]:
    dead = history["dead_fraction"]
    if not dead.size:
        return set()
    behind = {name: points.last[name] + 1 for name in blocked if points.last[name] + 1 < len(history.points)}
    found = {
        name for name, at in behind.items() if history.points[at].op in _EXACT and dead[-1, at] == 1 and points.gets(at)
    }
    first = min((points.last[name] for name in found), default=0)
    # a branch that gives nothing is no fault of a network that learns without it
    if any(points.gets(at) for at in range(first)):
        return found if stands_still(history) else set()
    # freed alone it would be given zeros by those before it
    return found | {name for name in blocked if points.last[name] < first}


def _are_most(history: History, held: dict[str, int]) -> bool:
    """Whether most layers that get a gradient at all are among them."""
    return bool(2 * len(held) > (how_often_known(history, "grad_norm") > 0).sum())


def _nothing_moves(history: History) -> bool:
    """Whether all gradients there are were zero in each of the newest samples, and the loss was not."""
    norms, losses = history["grad_norm"][-_SAMPLES:], history.losses[-_SAMPLES:]
    if len(norms) < _SAMPLES or not losses.size:
        return False
    known = ~np.isnan(norms)
    some = bool(known.any(axis=1).all() and (norms[known] == 0).all())
    return some and bool((np.isfinite(losses) & (losses != 0)).all()) and recent_underflow(history) is None
