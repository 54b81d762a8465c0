"""A fit in processes that Lightning starts itself: callbacks are pickled or forked, and what they saw stays there."""

import re

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.multiprocessing import ProcessRaisedException

from tests.integration.traces import Tiny, fit, flow, process_traces

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*forked processes:UserWarning"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log.*sync_dist=True`:UserWarning"),
]

WAYS = [("ddp_spawn", 1), ("ddp_fork", 1), ("ddp_fork", 2)]


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: f"{way[0]}-{way[1]}")
def fitted(request, tmp_path_factory):
    """The monitor of the main process, the trained model, the folder that the run wrote to, the number of devices."""
    strategy, devices = request.param
    folder = tmp_path_factory.mktemp(strategy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_GRADFLOW_RAISE", "1")
        monitor, model = flow(report=True), Tiny()
        keeps = ModelCheckpoint(folder, filename="end")
        fit(
            [monitor, keeps],
            model,
            strategy=strategy,
            devices=devices,
            default_root_dir=folder,
            enable_checkpointing=True,
        )
    return monitor, model, folder, devices


def test_rank_zero_writes_the_report_of_the_whole_fit(fitted):
    _, _, folder, devices = fitted
    pages = list(folder.rglob("gradflow_report.html"))
    assert len(pages) == 1
    steps = 12 // devices
    assert f"{steps} sampled steps, 0 to {steps - 1}" in pages[0].read_text(encoding="utf-8")


def test_the_checkpoint_holds_the_history(fitted):
    _, _, folder, devices = fitted
    state = torch.load(folder / "end.ckpt", weights_only=True)["callbacks"]["GradFlow"]
    assert [row["step"] for row in state["recorder"]["history"]["rows"]] == list(range(12 // devices))


def test_the_model_comes_back_as_it_does_without_the_monitor(fitted):
    _, watched, _, devices = fitted
    alone = Tiny()
    fit([], alone, strategy="ddp_fork", devices=devices)  # it starts in no time, and trains as ddp_spawn does
    for one, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_monitor_of_the_main_process_has_no_verdict(fitted):
    monitor, *_ = fitted
    assert (monitor.findings, monitor.actions, len(monitor.history)) == ((), (), 0)
    assert re.match(r"No fit", monitor.summary())
    assert process_traces() == []


def test_the_monitor_of_the_main_process_can_be_used_again(fitted, tmp_path):
    monitor, *_ = fitted
    fit([monitor], default_root_dir=tmp_path)
    assert len(monitor.history) == 12


def test_an_error_in_a_process_arrives_with_its_text():
    class Dies(Tiny):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    monitor = flow()
    with pytest.raises(ProcessRaisedException, match="RuntimeError: out of luck"):
        fit([monitor], Dies(), strategy="ddp_fork")
    assert len(monitor.history) == 0
    assert process_traces() == []
