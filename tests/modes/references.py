"""What the numbers of a training should be: the same training by hand, in plain PyTorch.

Nothing here knows Lightning, `nn.Module` or the package under test. A network is a function of its weights, written out
call by call; its gradients are those of `torch.autograd.grad`; a training is a loop over micro-batches.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .steps import Pass, Step, Weights, entries, norm

# -- networks ---------------------------------------------------------------------------------------------------------


def mlp(net: Pass, x):
    x = net.tanh("net.middle.act", net.linear("net.a", x))
    x = net.relu("net.middle.b/relu", net.linear("net.middle.b", x) - 0.6)
    return net.linear("net.c", x)


def tied(net: Pass, x):
    up = net.w["net.up.weight"]
    x = net.tanh("net.up/tanh", net.see("net.up", F.linear(net.begin(x), up, net.w["net.up.bias"])))
    x = net.tanh("net.down/tanh", net.see("net.down", F.linear(x, up, net.w["net.down.bias"])))
    return net.linear("net.head", x)


def shared(net: Pass, x):
    x = net.tanh("net.up/tanh", net.linear("net.up", x))
    x = net.tanh("net.up/tanh", net.linear("net.up", x))
    return net.linear("net.head", x)


def twice(net: Pass, x):
    one, two = (net.tanh("net.encode.1", net.linear("net.encode.0", part)) for part in (x, x.flip(1)))
    return net.linear("net.head", one * two)


def loop(net: Pass, x):
    for _ in range(2 if x[0, 0] > 0 else 3):
        x = net.tanh("net.act", net.linear("net.cell", x) * 2)
    return net.linear("net.head", x)


def convolutions(net: Pass, x):
    x = net.relu("net.c1/relu", net.conv("net.c1", x[:, :, None].repeat(1, 1, 6).unsqueeze(1)) - 0.5)
    x = net.relu("net.relu", net.conv("net.c2", x))
    return net.linear("net.head", x.mean((2, 3)))


def complex_numbers(net: Pass, x):
    # complex outputs are no points
    x = F.linear(net.begin(x.cfloat()), net.w["net.mix.weight"], net.w["net.mix.bias"])
    return net.linear("net.head", x.abs())


def words(net: Pass, x):
    x = net.rows("net.words", x, sparse=True).mean(1)
    return net.linear("net.head", x)


def large(net: Pass, x):
    x = net.rows("net.words", x, sparse=False).mean(1)
    return net.linear("net.head", net.tanh("net.wide/tanh", net.linear("net.wide", x)))


def factors(net: Pass, x):
    return net.rows("net.left", x[:, 0], sparse=True) * net.rows("net.right", x[:, 1], sparse=True)


# -- trainings --------------------------------------------------------------------------------------------------------


def norm_above(limit):
    """Clipping as `torch.nn.utils.clip_grad_norm_` has it."""
    return lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, limit)


def values_above(limit):
    return lambda parameters: torch.nn.utils.clip_grad_value_(parameters, limit)


def halves(parameters):
    for parameter in parameters:
        parameter.grad.mul_(0.5)


def to(dtype):
    """The autocast context of Lightning's mixed precision."""
    return partial(torch.autocast, "cpu", dtype=dtype, cache_enabled=False)


def automatic(
    weights: Weights,
    epochs: Sequence[Sequence[tuple[Tensor, Tensor]]],
    network,
    optimize,
    *,
    planned=1,
    context=nullcontext,
    dtype=None,
    scale=None,
    backoff=0.5,
    clip=None,
    without=(),
    thaw=None,
) -> list[Step]:
    """One optimizer, and what Lightning's automatic optimization does with it.

    Args:
        weights: the initial weights by parameter name.
        epochs: the batches of each epoch.
        network: what computes the logits.
        optimize: makes the optimizer.
        planned: micro-batches of a step; the last window of an epoch may have fewer.
        context: what the forward pass runs in.
        dtype: what weights and inputs are converted to.
        scale: the initial loss scale of a gradient scaler.
        backoff: what the scale is multiplied by when a gradient overflowed.
        clip: what clips the gradients of a list of parameters.
        without: numbers of the batches for which there is no loss.
        thaw: (prefix of names, step from which on they are trained).
    """
    weights = {name: w.to(dtype or w.dtype).requires_grad_() for name, w in weights.items()}
    optimizer = optimize(list(weights.values()))
    scaled, steps, seen = scale is not None, [], 0
    windows = [batches[i : i + planned] for batches in epochs for i in range(0, len(batches), planned)]
    for at, window in enumerate(windows):
        if thaw is not None:
            for name, w in weights.items():
                w.requires_grad_(not name.startswith(thaw[0]) or at >= thaw[1])
        step, factor = Step(at), scale or 1.0
        step.weights_before(weights)
        optimizer.zero_grad()
        with_loss = [batch for i, batch in enumerate(window, seen) if i not in without]
        seen += len(window)
        # a short window is divided by the number that was planned: what is wanted is the gradient of its mean loss
        whole = planned / max(1, len(with_loss))
        for x, y in with_loss:
            net = step.new_pass(weights)
            with context():
                loss = F.cross_entropy(network(net, x.to(dtype) if dtype and x.is_floating_point() else x), y)
            net.backward(loss / planned * factor, unscale=whole / factor)
            step.losses.append(loss.item())
        steps.append(step)
        # under a gradient scaler Lightning makes no step where the last batch has no loss
        if not with_loss or (scaled and seen - 1 in without):
            continue
        step.take_gradients(weights, whole / factor)
        parameters = [w for w in weights.values() if w.grad is not None]
        skipped = scaled and not all(np.isfinite(g).all() for g in step.gradients.values())
        if skipped:
            scale *= backoff
        else:
            for parameter in parameters:
                parameter.grad = parameter.grad / factor
            before = norm(entries(p.grad) for p in parameters)
            if clip is not None:
                clip(parameters)
            step.scalars["clip_factor"] = norm(entries(p.grad) for p in parameters) / before
            optimizer.step()
            step.weights_after(weights)
        if scaled:
            step.scalars |= {"loss_scale": factor, "step_skipped": float(skipped)}
    return steps


def lbfgs(weights: Weights, epochs, network, optimize) -> list[Step]:
    """An optimizer that calls its closure several times a step: the numbers are those of the first call."""
    weights = {name: w.requires_grad_() for name, w in weights.items()}
    optimizer, steps = optimize(list(weights.values())), []
    for at, (x, y) in enumerate(batch for batches in epochs for batch in batches):
        step = Step(at)
        step.weights_before(weights)

        def closure(step=step, x=x, y=y):
            is_first = not step.losses
            optimizer.zero_grad()
            net = step.new_pass(weights) if is_first else Pass(weights)
            loss = F.cross_entropy(network(net, x), y)
            net.backward(loss)
            if is_first:
                step.take_gradients(weights)
            step.losses = [loss.item()]  # of all calls of a training step Lightning hands out the last loss
            return loss.detach()

        optimizer.step(closure)
        step.weights_after(weights)
        steps.append(step)
    return steps


def gan(weights: Weights, epochs, optimize, *, context=nullcontext, scale=None, backoff=0.5) -> list[Step]:
    """Two networks that are trained in turn, each with its own optimizer."""

    def generate(net, x):
        x = net.tanh("generator.1", net.linear("generator.0", x.flip(0)))
        return net.linear("generator.2", x)

    def judge(net, x, as_real):
        x = net.sigmoid("discriminator.1", net.linear("discriminator.0", x))
        probability = torch.sigmoid(net.linear("discriminator.2", x).float())
        return -torch.log(probability if as_real else 1 - probability).mean()

    weights = {name: w.requires_grad_() for name, w in weights.items()}
    parts = [
        {name: w for name, w in weights.items() if name.startswith(part)} for part in ("discriminator", "generator")
    ]
    optimizers = [optimize(list(part.values())) for part in parts]
    scaled, steps = scale is not None, []
    for at, (x, _) in enumerate(batch for batches in epochs for batch in batches):
        step, is_skipped = Step(at), []
        for turn, (part, optimizer) in enumerate(zip(parts, optimizers, strict=True)):
            for name, w in weights.items():
                w.requires_grad_(name in part)
            optimizer.zero_grad()
            net, factor = step.new_pass(weights, turn), scale or 1.0
            with context():
                fake = generate(net, x)
                if turn == 0:
                    loss = judge(net, fake.detach(), False) + judge(net, x, True)
                    step.losses.append(loss.item())
                else:
                    loss = judge(net, fake, True)
            net.backward(loss * factor, part, unscale=1 / factor)
            step.weights_before(part)
            is_skipped.append(step.step_unless_overflown(part, optimizer, factor))
            if is_skipped[-1]:
                scale *= backoff
        if scaled:
            step.scalars |= {"loss_scale": factor, "step_skipped": float(any(is_skipped))}
        steps.append(step)
    return steps


def manual(weights: Weights, epochs, network, optimize, *, every=(1,), parts=("",), context=nullcontext, scale=None):
    """Optimizers that step by hand, each after so many batches, on the sum of the gradients since its last step.

    Args:
        weights: the initial weights by parameter name.
        epochs: the batches of each epoch.
        network: what computes the logits.
        optimize: makes an optimizer.
        every: for each optimizer the number of batches between two steps of it.
        parts: for each optimizer the prefixes of its parameters.
        context: what the forward pass runs in.
        scale: the loss scale of a gradient scaler.
    """
    weights = {name: w.requires_grad_() for name, w in weights.items()}
    mine = [{name: w for name, w in weights.items() if name.startswith(part)} for part in parts]
    optimizers = [optimize(list(part.values())) for part in mine]
    steps, step = [], None
    for at, (x, y) in enumerate(batch for batches in epochs for batch in batches):
        # a sample is open until an optimizer steps
        step = step or Step(at)
        net = step.new_pass(weights)
        with context():
            loss = F.cross_entropy(network(net, x), y)
        net.backward(loss * (scale or 1.0), unscale=1 / (scale or 1.0))
        step.losses.append(loss.item())
        for part, optimizer, n in zip(mine, optimizers, every, strict=True):
            if (at + 1) % n == 0:
                step.weights_before(part)
                for w in part.values():
                    w.grad = w.grad / (scale or 1.0)
                step.take_gradients(part)
                optimizer.step()
                step.weights_after(part)
                optimizer.zero_grad()
        if step.gradients:
            step.scalars = {}
            if scale is not None:
                step.scalars |= {"loss_scale": scale, "step_skipped": 0.0}
            steps.append(step)
            step = None
    return steps
