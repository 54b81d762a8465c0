"""What holds for every test."""

import os

# small tensors: threads only get in each other's way, those of programs that the tests start too
os.environ.setdefault("OMP_NUM_THREADS", "1")
# W&B reads this once in a process, and writes its log of the console late, to wherever the process then is
os.environ["WANDB_CONSOLE"] = "off"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def errors_inside_the_monitor_are_raised(monkeypatch):
    monkeypatch.setenv("LIGHTNING_GRADFLOW_RAISE", "1")
