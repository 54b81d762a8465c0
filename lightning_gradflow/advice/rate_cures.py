"""Cures that change the length of the steps: learning rate and clipping.

Each takes a `Site` and returns its suggestions, none where it does not apply.
"""

from __future__ import annotations

import math
from dataclasses import replace

from lightning_gradflow.advice.site import Site
from lightning_gradflow.findings import Action, Suggestion

_USUAL_RATIO = 1e-3  # of a step to the weights
_RUN_OUT = 1e-4  # of the largest learning rate: where schedules end on purpose is above
_END = 0.01  # of it
_FIRST_RATIO = 1e-2  # the same at the start of a run
_LOWER = "Lower the learning rate"
_MAX_CLIPPED = 0.5  # of the recent steps
_MAX_RATIO = "max_update_ratio"  # of an action that clips instead of a smaller rate
_HALF = 0.5
_MIN_LEFT = 0.1  # of the gradient, by clipping
_MIN_NORMS = 5  # before so many samples the run has no usual norm to speak of
_LATE = ("learning_rate_too_large", "unscaled_inputs", "unknown")  # causes of what was not there from the start


def clip(site: Site) -> list[Suggestion]:
    """Clipping of the gradient norm, near the run's own norms where there was a time before."""
    has_past = site.finding.cause in _LATE and site.norms >= _MIN_NORMS
    limit = f"{site.grad_norm:.2g}  # the median norm of this run" if has_past else "1.0"
    return [_clip_at(limit)]


def _clip_at(limit: str) -> Suggestion:
    return Suggestion(
        "Clip the gradient norm",
        f"# needs: import lightning as L\ntrainer = L.Trainer(\n    gradient_clip_val={limit}\n)",
        "It bounds the step that one steep place of the loss can cause. Choose the bound near the norms of healthy "
        "steps; if most steps are clipped, lower the learning rate instead.",
        "Pascanu et al. 2013, On the difficulty of training recurrent neural networks",
    )


def lower_rate(site: Site) -> list[Suggestion]:
    """A smaller learning rate: with it the first steps would have been of the usual size."""
    # the steps of a run that breaks are far larger than those that broke it
    factor = _FIRST_RATIO / site.first_ratio if site.first_ratio > 0 else _towards_usual(site)
    return [
        Suggestion(
            _LOWER,
            _rate(site, min(0.1, max(1e-6, factor))),
            "Steps larger than the loss surface is smooth raise the loss, and can push units where no gradient reaches "
            "them.",
            "Bengio 2012, Practical recommendations for gradient-based training of deep architectures",
        )
    ]


def with_rate_of(suggestion: Suggestion, action: Action) -> Suggestion:
    """The advice to lower the learning rate with the one that an action has found; to clip, where that has helped.

    Args:
        suggestion: any one.
        action: one that was kept.

    Example:
        >>> advice = Suggestion("Lower the learning rate", "lr = 0.8", "", "")
        >>> kept = Action(8, "rollback", before={"lr": 8.0, "lr_factor": 1.0}, after={"lr": 0.25, "lr_factor": 1 / 32})
        >>> with_rate_of(advice, kept).code.splitlines()[-1].strip()
        'group["lr"] = 0.25  # it was 8'
    """
    limit = action.after.get("clip_limit", math.inf)
    if suggestion.title == _LOWER and _MAX_RATIO in action.after and limit < math.inf:
        return _clip_at(f"{limit:.2g}  # what helped in this run, at the rate as it is")
    rate, before = action.after.get("lr", math.nan), action.before.get("lr", math.nan)
    if suggestion.title != _LOWER or not rate < before:
        return suggestion
    was = before / action.before.get("lr_factor", 1.0)  # of the scheduler, whatever was done before
    code = _rate_code(was, rate / was, digits=2)
    if limit < math.inf:
        trainer = f"trainer = L.Trainer(gradient_clip_val={limit:.2g})"
        why = "# the run was clipped with it, and may need to be"
        code = f"# needs: import lightning as L\n{code}\n\n{why}\n{trainer}"
    return replace(suggestion, code=code)


def lower_rate_where_clipped(site: Site) -> list[Suggestion]:
    """A smaller learning rate where more than half of the recent steps were clipped."""
    return [too_often_clipped(site.clipped, site.lr)] if site.clipped > _MAX_CLIPPED else []


def too_often_clipped(share: float, lr: float = math.nan) -> Suggestion:
    """What to do where most steps are clipped.

    Args:
        share: of the recent steps that were clipped, in [0, 1].
        lr: the learning rate, or NaN.

    Example:
        >>> too_often_clipped(0.8, lr=0.1).title
        'Lower the learning rate, for 80% of the recent steps were clipped'
    """
    return Suggestion(
        f"Lower the learning rate, for {share:.0%} of the recent steps were clipped",
        _rate_code(lr, _HALF),
        "Clipping is made for the odd step. Where it cuts more than half of them, it sets the length of the step and "
        "the learning rate does not: halve the rate until fewer are cut, or raise the limit.",
        "Godbole et al. 2023, Deep learning tuning playbook",
    )


def loosen_clipping(site: Site) -> list[Suggestion]:
    """A larger limit for clipping where it is that what makes the steps small."""
    if not _is_clipped_away(site) or math.isnan(site.grad_norm):
        return []
    return [
        Suggestion(
            "Clip at a larger norm",
            "# needs: import lightning as L\n"
            f"trainer = L.Trainer(gradient_clip_val={site.grad_norm:.2g})  # the median norm so far",
            "The limit cuts away nearly all of each gradient, so that it sets the length of the step. A limit near the "
            "usual norm bounds the odd step and leaves the others as they are.",
            "Pascanu et al. 2013, On the difficulty of training recurrent neural networks",
        )
    ]


def _is_clipped_away(site: Site) -> bool:
    return site.finding.evidence.get("clip_factor", math.nan) < _MIN_LEFT


def raise_rate(site: Site) -> list[Suggestion]:
    """A larger learning rate, or one that a schedule leaves as large as it was."""
    if site.lr < _RUN_OUT * site.peak_lr:
        return [
            Suggestion(
                "Let the schedule lower the learning rate less",
                f"# in configure_optimizers: the schedule took the rate from {site.peak_lr:.3g} to {site.lr:.2g}.\n"
                "# It may be called once a step where an epoch is meant (interval), or be made for a shorter run\n"
                "# (T_max, total_steps, gamma). What it may come down to:\n"
                f"eta_min = {_END * site.peak_lr:.1g}",
                "Below a hundredth of the rate that a run is made for next to nothing is learnt, in whatever time.",
                "Loshchilov and Hutter 2017, SGDR: stochastic gradient descent with warm restarts",
            )
        ]
    factor = max(10.0, min(1e7, _towards_usual(site)))
    if _is_clipped_away(site) and site.lr * factor > 1:
        return []  # such a rate would only make up for the clipping
    return [
        Suggestion(
            "Raise the learning rate",
            _rate(site, factor),
            "If longer steps in the same direction lower the loss further, the present ones waste the budget.",
            "Smith 2017, Cyclical learning rates for training neural networks",
        )
    ]


def _towards_usual(site: Site) -> float:
    """The factor on the rate that brings a step to a thousandth of the weights, or near where the loss is lowest."""
    ratio = site.finding.evidence.get("update_ratio", math.nan)
    if ratio > 0 and math.isfinite(ratio):
        return _USUAL_RATIO / ratio
    best = site.finding.evidence.get("line_best_factor", math.nan)
    return best / 100 if best > 0 else 1.0  # so far in one step is further than it goes in many


def _rate(site: Site, factor: float) -> str:
    return _rate_code(site.lr, factor)


def _rate_code(lr: float, factor: float, digits: int = 1) -> str:
    known = not math.isnan(lr)
    value = f"{lr * factor:.{digits}g}" if known else f"{factor:.{digits}g} * lr"
    was = f"  # it was {lr:.3g}" if known else ""
    before = "# in configure_optimizers, before the optimizer is returned"
    return f'{before}\nfor group in optimizer.param_groups:\n    group["lr"] = {value}{was}'


def lower_decay(site: Site) -> list[Suggestion]:
    """A weight decay that leaves the weights to the gradient."""
    del site  # the same for every model
    return [
        Suggestion(
            "Lower the weight decay",
            "# in configure_optimizers, before the optimizer is returned\n"
            "for group in optimizer.param_groups:\n"
            '    group["weight_decay"] = min(group.get("weight_decay", 0.0), 0.01)',
            "In each step AdamW takes the share lr * weight_decay of every weight, whatever the gradient says; SGD and "
            "Adam add weight_decay times the weight to the gradient. A tenth of a percent in a step is much.",
            "Loshchilov and Hutter 2019, Decoupled weight decay regularization",
        )
    ]


def warm_up(site: Site) -> list[Suggestion]:
    """A warm-up of the learning rate, over a tenth of the run."""
    steps = max(10, min(500, int(site.planned) // 10)) if site.planned > 0 else 500
    return [
        Suggestion(
            "Warm the learning rate up over the first steps",
            "# in configure_optimizers; needs: import torch\n"
            f"warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters={steps})\n"
            "# to be returned:\n"
            'plan = {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}',
            "The first gradients are the least reliable; small steps keep them from driving units into dead regions.",
            "Goyal et al. 2017, Accurate, large minibatch SGD",
        )
    ]


def find_rate(site: Site) -> list[Suggestion]:
    """Lightning's learning rate finder."""
    del site  # the same for every model
    return [
        Suggestion(
            "Look for a learning rate with the finder",
            "from lightning.pytorch.tuner import Tuner\n\n"
            "# the module must read its rate from self.lr, or self.hparams.lr\n"
            "found = Tuner(trainer).lr_find(model, train_dataloaders=data)\n"
            "print(found.suggestion())",
            "It tries many rates in one short run and shows where the loss falls fastest.",
            "Smith 2017, Cyclical learning rates for training neural networks",
        )
    ]
