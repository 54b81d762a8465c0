"""Whoever watches changes nothing: weights, random state, buffers and optimizers are the same to the last bit."""

from functools import cache

import lightning as L
import pytest
import torch
import torch._dynamo.eval_frame as eval_frame
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack

from lightning_gradflow import GradFlow
from tests.benchmarks.zoo import quiet_trainer
from tests.benchmarks.zoo.exact import EXACT, EXACT_DATA, STEPS

EVERY = pytest.mark.parametrize("name", EXACT)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@cache
def _fit(name, watched):
    """Trains once; what is left of it is kept for all tests."""
    flow = GradFlow(every_n_steps=1, report=False, console=False)
    L.seed_everything(0, verbose=False)
    module = EXACT[name](0)
    trainer = quiet_trainer(max_steps=STEPS, callbacks=[flow] if watched else [])
    trainer.fit(module, EXACT_DATA[name](0))
    return {
        "flow": flow,
        "module": module,
        "rng": torch.get_rng_state(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "global_hooks": [
            hooks
            for kind in vars(module_hooks)
            if kind.startswith("_global_") and isinstance(hooks := getattr(module_hooks, kind), dict) and hooks
        ],
        "modes": list(_get_current_function_mode_stack()),
        "stance": eval_frame._stance.stance,
    }


def _same(one, other):
    """Whether nested containers of tensors are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


@EVERY
def test_every_step_was_sampled(name):
    rows = 20 if name == "manual_gan" else STEPS  # two optimizer steps a batch
    assert len(_fit(name, True)["flow"].history) == rows


@EVERY
def test_weights_and_buffers_are_bit_identical(name):
    assert _same(_fit(name, True)["module"].state_dict(), _fit(name, False)["module"].state_dict())


@EVERY
def test_the_random_state_is_identical(name):
    assert torch.equal(_fit(name, True)["rng"], _fit(name, False)["rng"])


@EVERY
def test_the_state_of_the_optimizers_is_bit_identical(name):
    assert _same(_fit(name, True)["optimizers"], _fit(name, False)["optimizers"])


@EVERY
def test_no_hook_is_left_on_any_module_or_parameter(name):
    watched, alone = _fit(name, True)["module"], _fit(name, False)["module"]
    for mine, theirs in zip(watched.modules(), alone.modules(), strict=True):
        # a parametrization or a recurrent layer may have hooks of its own
        assert [len(getattr(mine, kind)) for kind in _HOOKS] == [len(getattr(theirs, kind)) for kind in _HOOKS]
    assert not [key for key, parameter in watched.named_parameters() if parameter._backward_hooks]


@EVERY
def test_nothing_is_left_in_the_process(name):
    left = _fit(name, True)
    assert (left["global_hooks"], left["modes"], left["stance"]) == ([], [], "default")


def test_a_difference_in_one_bit_would_be_found():
    weights = _fit("dropout", True)["module"].state_dict()
    changed = {key: value.clone() for key, value in weights.items()}
    changed["net.0.bias"][0] = torch.nextafter(changed["net.0.bias"][0], torch.tensor(torch.inf))
    assert not _same(weights, changed)
