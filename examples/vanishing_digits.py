"""A 10-layer sigmoid network on scikit-learn's digits: it does not learn, and GradFlow says why.

    python examples/vanishing_digits.py                    # the gradient vanishes
    python examples/vanishing_digits.py --healthy          # the same depth with ReLU and He's initialisation
    python examples/vanishing_digits.py --mitigate apply   # GradFlow repairs the run while it goes on

Weights & Biases runs offline unless you are logged in; `--logger none` does without it.
"""

from __future__ import annotations

import argparse
import netrc
import os
from pathlib import Path
from urllib.parse import urlparse

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, WandbLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_gradflow import GradFlow

DEPTH, WIDTH = 10, 64


class Digits(L.LightningModule):
    """A stack of equal layers on 8 x 8 pixels.

    Args:
        healthy: ReLU with He's initialisation, instead of sigmoid with PyTorch's default.
        learning_rate: of Adam.
    """

    def __init__(self, healthy: bool = False, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential()
        for _ in range(DEPTH):
            layer = nn.Linear(WIDTH, WIDTH)
            if healthy:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
            self.net.extend([layer, nn.ReLU() if healthy else nn.Sigmoid()])
        self.net.append(nn.Linear(WIDTH, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss, _ = self._evaluate(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on held-out digits."""
        loss, accuracy = self._evaluate(batch)
        self.log("val/loss", loss)
        self.log("val/accuracy", accuracy)

    def _evaluate(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, digits = batch
        scores = self.net(images)
        return nn.functional.cross_entropy(scores, digits), (scores.argmax(dim=1) == digits).float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as most people would start with."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["learning_rate"])


def digits() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """1,797 real handwritten digits, four fifths of them to train on."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    train, held_out = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=360)


def logged_in() -> bool:
    """Whether Weights & Biases knows who you are; nothing is asked of the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def make_logger(name: str, directory: Path) -> Logger | bool:
    """The logger that was asked for."""
    if name == "none":
        return False
    mode = "online" if logged_in() else "offline"
    return WandbLogger(project="vanishing-digits", save_dir=directory, mode=os.environ.get("WANDB_MODE", mode))


def main() -> None:
    """Trains, and says where the pages lie."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healthy", action="store_true", help="a network of the same depth that does learn")
    parser.add_argument("--mitigate", choices=("off", "suggest", "apply"), default="suggest")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logger", choices=("wandb", "none"), default="wandb")
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="where everything is written")
    args = parser.parse_args()

    L.seed_everything(args.seed)
    args.dir.mkdir(parents=True, exist_ok=True)
    flow = GradFlow(mitigate=args.mitigate)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=make_logger(args.logger, args.dir),
        callbacks=[flow],
        default_root_dir=args.dir,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(Digits(healthy=args.healthy), *digits())

    print(f"\nValidation accuracy: {float(trainer.callback_metrics['val/accuracy']):.3f}")
    for finding in flow.findings:
        print(f"Finding: {finding.kind} ({finding.severity}) at step {finding.step}, cause: {finding.cause}")
    if not flow.findings:
        print("Finding: none")
    if isinstance(trainer.logger, WandbLogger):
        run = trainer.logger.experiment
        print(f"Weights & Biases: {Path(run.dir).parent if run.offline else run.url}")


if __name__ == "__main__":
    main()
