"""The benchmark on a GPU, as far as it can be tried without one."""

import math
import warnings

import pytest
import torch

from tests.benchmarks.cost_models import SMALL
from tests.benchmarks.gpu import GPT2, NO_GPU, SYNC, count, main, measure, per_step


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.strip() == NO_GPU


def test_the_network_is_as_large_as_gpt2_small():
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT2.net().parameters()) == pytest.approx(124e6, rel=0.01)


def test_warnings_of_waiting_are_counted_and_others_are_not():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in (SYNC, "something else", f"{SYNC} (Triggered internally at x.cpp:1)"):
            warnings.warn(text, stacklevel=1)
    assert count(caught) == 2


def test_waits_of_the_plain_training_are_taken_off():
    assert per_step([1, 2, 1, 3], [1, 1, 1, 1], sampled=(1,)) == {"sampled": 1, "between": 2}
    assert per_step([1, 2, 1, 1], [1, 1, 1, 1], sampled=(1,)) == {"sampled": 1, "between": 0}


def test_on_the_cpu_every_arm_is_timed_and_none_waits():
    found = measure(SMALL, rounds=1, steps=9, device="cpu")
    assert found["plain"]["step"] == {"low": 1.0, "median": 1.0, "high": 1.0}
    assert found["every step"]["samples"] == 6
    for arm in ("default", "every step"):
        assert found[arm]["waits"] == {"sampled": 0, "between": 0}
        assert math.isfinite(found[arm]["step"]["median"])
