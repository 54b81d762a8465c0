"""What the four callbacks and their composite have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_gradflow.callbacks import trainer_facts
from lightning_gradflow.callbacks.session import Session
from lightning_gradflow.detectors.base import Detector, check_range
from lightning_gradflow.findings import Action, Finding, GradFlowWarning
from lightning_gradflow.history import History
from lightning_gradflow.remedies.trial import Mitigation
from lightning_gradflow.sinks import summary

_NO_FIT = (
    "No fit in this process yet. Under ddp_spawn and ddp_fork the fit runs in processes of its own: "
    "see gradflow_report.html, or load a checkpoint."
)


class Monitor(Callback):
    """Base of the callbacks: any set of them in one Trainer shares one session, which the first of them drives.

    Args:
        every_n_steps: steps between two samples, in [1, inf); None for the Trainer's `log_every_n_steps`. The smallest
            interval of a set counts for all of it.

    Raises:
        ValueError: if `every_n_steps` is out of its range.
    """

    measures_gradients = False
    measures_activations = False
    explains_plateaus = False
    dead_window: int | None = None
    console = False
    report = False
    train_loss: str | None = None
    val_loss: str | None = None
    stands_back = False
    """Whether it leaves a Trainer to the monitors that were put there on purpose, where there are any."""

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None:
            check_range("every_n_steps", every_n_steps, 1, float("inf"), open_low=False, whole=True)
        self.every_n_steps = every_n_steps
        self._session: Session | None = None
        self._leads = False
        self._restored: dict[str, Any] | None = None

    # -- what a callback is made of -----------------------------------------------------------------------------

    def parts(self) -> Sequence[Monitor]:
        """The callbacks that this one stands for: itself, or its children."""
        return (self,)

    def detectors(self, alone: bool) -> list[Detector]:
        """The detectors it brings; `alone` says whether it is the only monitor of the Trainer."""
        return []

    def mitigation(self) -> Mitigation | None:
        """What acts on the run, for the mitigator in `apply` mode."""
        return None

    @property
    def suggests(self) -> bool:
        """Whether findings are to carry suggestions."""
        return False

    @property
    def signal_every_n_steps(self) -> int | None:
        """Steps between two samples of all that is measured; between them it asks for the gradients alone."""
        return self.every_n_steps

    # -- what a person asks of it -------------------------------------------------------------------------------

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings that were ever opened in this Trainer, in order."""
        return self._session.recorder.findings if self._session is not None else ()

    @property
    def history(self) -> History:
        """All rows: `history["grad_norm"]` is (rows, layers), `history.scalar("loss")` is (rows,)."""
        return self._session.recorder.history if self._session is not None else History()

    @property
    def actions(self) -> tuple[Action, ...]:
        """What the mitigator did, in order."""
        return tuple(self._session.recorder.actions) if self._session is not None else ()

    def summary(self) -> str:
        """The verdict, the layers and what to do, as text."""
        return summary(self._session.recorder.view) if self._session is not None else _NO_FIT

    # -- Lightning's hooks --------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Joins the other monitors of the Trainer; the first one drives.

        Raises:
            ValueError: if two callbacks of the Trainer do the same thing.
        """
        present = [callback for callback in trainer_facts.callbacks(trainer) if isinstance(callback, Monitor)]
        if stage != "fit" or self not in present:
            return
        # Lightning extends the very list it was given: a list used twice holds the last Trainer's callback too
        group = [monitor for monitor in present if not monitor.stands_back] or present[-1:]
        if self not in group:
            self._leads = False
            return
        kinds = [type(part).__name__ for monitor in group for part in monitor.parts()]
        doubled = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if doubled:
            raise ValueError(
                "callbacks must hold each monitor once (GradFlow holds all four), "
                f"got {', '.join(doubled)} more than once"
            )
        if self is group[0]:
            session = self._session if self._session is not None and self._session.belongs_to(trainer, group) else None
            session = session or Session(trainer, group)
            for monitor in group:
                monitor._session, monitor._leads = session, monitor is self

    def _restore(self) -> None:
        """Goes on with the state of the checkpoint, whichever callback of the set drove the run that wrote it."""
        if self._leads and self._session is not None:
            states = [monitor._restored for monitor in self._session.monitors if monitor._restored is not None]
            if states:
                self._session.run("load_state_dict", states[0])
            for monitor in self._session.monitors:
                monitor._restored = None

    def _drive(self, hook: str, *args: Any) -> None:
        if self._leads and self._session is not None:
            self._session.run(hook, *args)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at model, optimizers and loggers."""
        if self._leads and self._session is not None:
            self._session.renew(trainer)
        self._restore()
        if self._leads and self._session is not None:
            self._session.begin_together(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Opens a sample where one is due."""
        self._drive("batch_start", trainer, pl_module, batch, batch_idx)

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The forward pass is over: the gradients of thousands of tensors are deleted faster where nobody looks on."""
        self._drive("before_backward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward pass is over."""
        self._drive("before_backward", loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The gradients are fresh."""
        self._drive("after_backward", trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Reads the gradients: accumulated, all-reduced, and not yet clipped."""
        self._drive("before_optimizer_step", trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the loss, and finishes a sample."""
        self._drive("batch_end", trainer, pl_module, outputs)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes the loss that `validation_step` returned."""
        self._drive("validation_batch_end", outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the validation loss that was logged."""
        self._drive("validation_end", trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops to observe where the user's on_train_batch_start has cut the epoch short."""
        self._drive("epoch_end")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows what was found."""
        self._drive("end_together", trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Shows what was found until the run died, and leaves nothing behind."""
        with contextlib.suppress(GradFlowWarning):  # the exception that is on its way must not be replaced
            self._drive("end", trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves nothing behind, whatever happened."""
        if stage == "fit":
            self._restore()  # a run that had nothing left to do never came to on_train_start
            self._drive("end", trainer)
        self._restored = None  # of a checkpoint that was validated, not continued

    def state_dict(self) -> dict[str, Any]:
        """History, findings and actions; only the driving callback of a set has a state."""
        if not self._leads or self._session is None:
            return {}
        return self._session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers the state until the fit starts."""
        if self._session is None or not self._session.is_running:  # else a search in the middle of a fit
            self._restored = state_dict or None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, is a callback as it was configured: it belongs to no Trainer."""
        return {**self.__dict__, "_session": None, "_leads": False, "_restored": None}
