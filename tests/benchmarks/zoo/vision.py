"""Networks on 8x8 images: convolutional, residual, recurrent over rows, autoencoder, GAN."""

from __future__ import annotations

from typing import cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from .data import digit_images


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut."""
        branch = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        output: Tensor = self.relu(branch + self.shortcut(x))
        return output


class ResNet(nn.Module):
    """Six residual blocks of 8 to 32 channels; with ``zero_gamma`` every branch starts as zero (Goyal et al. 2017)."""

    def __init__(self, *, zero_gamma: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        shapes = [(8, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1)]
        self.blocks = nn.Sequential(*(BasicBlock(*shape) for shape in shapes))
        self.head = nn.Linear(32, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_gamma and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images (B, 1, 8, 8)."""
        output: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return output


def pooled_convnet() -> nn.Sequential:
    """Three convolutions with max-pooling, without any normalisation."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


class RowLSTM(nn.Module):
    """Reads an image row by row, eight steps, and classifies from the last state."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU] = nn.LSTM, hidden: int = 48) -> None:
        super().__init__()
        self.rnn = cell(8, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify flattened images (B, 64)."""
        output: Tensor = self.head(self.rnn(x.view(-1, 8, 8))[0][:, -1])
        return output


class RowTransformer(nn.Module):
    """PyTorch's own encoder, normalising first, over the eight rows of an image."""

    def __init__(self, depth: int = 3, width: int = 32, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.randn(8, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout, batch_first=True, norm_first=True)
        # Nested tensors are not supported together with norm_first, and PyTorch warns where they are left on.
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify flattened images (B, 64)."""
        output: Tensor = self.head(self.encoder(self.embed(x.view(-1, 8, 8)) + self.position).mean(1))
        return output


class Autoencoder(nn.Module):
    """64 pixels through a code of 12 numbers and back, with a sigmoid output."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12))
        self.decoder = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct the pixels in [0, 1]."""
        output: Tensor = self.decoder(self.encoder(x))
        return output


class GAN(L.LightningModule):
    """Digits from noise, by manual optimization of two networks with one optimizer each (Goodfellow et al. 2014)."""

    def __init__(self, latent: int = 16, width: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.latent = latent
        self.generator = nn.Sequential(
            nn.Linear(latent, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, 64),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Linear(64, width),
            nn.LeakyReLU(0.2),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )

    def forward(self, noise: Tensor) -> Tensor:
        """Draw images (B, 64) from noise (B, latent)."""
        output: Tensor = self.generator(noise)
        return output

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update the discriminator, then the generator; nothing is returned."""
        real = batch[0]
        first, second = cast("list[LightningOptimizer]", self.optimizers())
        noise = torch.randn(len(real), self.latent, device=real.device)

        self.toggle_optimizer(first)
        judged = self.discriminator(torch.cat([real, self(noise).detach()]))
        truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)]).to(real)
        d_loss = F.binary_cross_entropy_with_logits(judged, truth)
        first.zero_grad()
        self.manual_backward(d_loss)
        first.step()
        self.untoggle_optimizer(first)

        self.toggle_optimizer(second)
        g_loss = F.binary_cross_entropy_with_logits(self.discriminator(self(noise)), torch.ones(len(real), 1).to(real))
        second.zero_grad()
        self.manual_backward(g_loss)
        second.step()
        self.untoggle_optimizer(second)
        self.log_dict({"d_loss": d_loss, "g_loss": g_loss})

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for each of the two networks, the discriminator's first."""
        parts = (self.discriminator, self.generator)
        return [torch.optim.Adam(part.parameters(), lr=1e-3, betas=(0.5, 0.999)) for part in parts]


@torch.no_grad()
def energy_distance(module: L.LightningModule) -> float:
    """Distance between generated and real digits, 0 where the distributions agree (Szekely and Rizzo 2013).

    ``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` over 500 images each: what the losses of a GAN do not tell.
    """
    real = digit_images()[:500]
    latent = module.get_parameter("generator.0.weight").shape[1]
    noise = torch.randn(500, latent, generator=torch.Generator().manual_seed(0))
    module.eval()
    fake = module(noise)
    module.train()
    return float(2 * torch.cdist(real, fake).mean() - torch.cdist(real, real).mean() - torch.cdist(fake, fake).mean())
