"""Strategies under which something cannot be measured say so by name, and the rest goes on."""

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_gradflow import GradFlow, GradFlowWarning
from tests.benchmarks.zoo import HEALTHY

# neither runs on a CPU: what is tested is what their names lead to
FSDPStrategy = type("FSDPStrategy", (SingleDeviceStrategy,), {})
DeepSpeedStrategy = type("DeepSpeedStrategy", (SingleDeviceStrategy,), {})
XLAStrategy = type("XLAStrategy", (SingleDeviceStrategy,), {})
CASE = HEALTHY["tanh_4_default_init"]


def _fit(strategy, **kwargs):
    L.seed_everything(0, verbose=False)
    flow = GradFlow(every_n_steps=1, report=False, console=False, **kwargs)
    trainer = L.Trainer(
        max_steps=4,
        strategy=strategy(device=torch.device("cpu")),
        accelerator="cpu",
        callbacks=[flow],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(CASE.build(0), CASE.data(0))
    return flow


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_where_gradients_have_no_layer_the_rest_is_measured(strategy):
    with pytest.warns(GradFlowWarning) as told:
        flow = _fit(strategy)
    (ours,) = [str(one.message) for one in told if issubclass(one.category, GradFlowWarning)]
    assert strategy.__name__ in ours
    assert np.isnan(flow.history["grad_norm"]).all()
    assert np.isfinite(flow.history["delta_norm"]).all()
    assert np.isfinite(flow.history.losses).all()


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_where_gradients_have_no_layer_nothing_is_mitigated(strategy):
    with pytest.warns(GradFlowWarning) as told:
        _fit(strategy, mitigate="apply")
    assert sum("the mitigator is switched off" in str(one.message) for one in told) == 1


def test_where_tensors_are_lazy_nothing_is_measured():
    with pytest.warns(GradFlowWarning, match="XLAStrategy"):
        flow = _fit(XLAStrategy)
    assert len(flow.history) == 0
