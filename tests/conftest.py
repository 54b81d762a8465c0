"""What holds for every test."""

import pytest
import torch

torch.set_num_threads(1)  # small tensors: threads only get in each other's way


@pytest.fixture(autouse=True)
def errors_inside_the_monitor_are_raised(monkeypatch):
    monkeypatch.setenv("LIGHTNING_GRADFLOW_RAISE", "1")
