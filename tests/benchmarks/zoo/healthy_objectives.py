"""Trainings that learn something else than one label per sample: densities, embeddings, several targets, a policy."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import pretrained
from .case import Case, seeded
from .data import diabetes, digit_pairs, digits, wine
from .stacks import mlp
from .task import ADAM, Task, error_rate, reconstruction_loss

FASTER = partial(ADAM, lr=3e-3)


class VAE(Task):
    """Reconstruction and divergence from the prior, with the draw inside (Kingma and Welling 2014)."""

    def __init__(self, code: int = 8) -> None:
        super().__init__(mlp(1, nn.ReLU, outputs=2 * code), partial(ADAM, lr=1e-2))
        self.decoder = mlp(1, nn.ReLU, inputs=code, outputs=64)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        mean, log_variance = self(batch[0]).chunk(2, 1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        pixels = (batch[0] + 1) / 2
        fit = F.binary_cross_entropy_with_logits(self.decoder(code), pixels, reduction="sum")
        # Scaled so that the entropy of grey pixels, which nothing can remove, is not most of the loss.
        floor = F.binary_cross_entropy(pixels, pixels, reduction="sum")
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum() / 2
        return (fit - floor + divergence) / len(mean)


class Contrastive(Task):
    """Two noisy views of an image find each other among all others of the batch (Chen et al. 2020)."""

    def __init__(self) -> None:
        super().__init__(mlp(2, nn.ReLU, norm=True, outputs=32))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        views = [F.normalize(self(batch[0] + 0.3 * torch.randn_like(batch[0]))) for _ in range(2)]
        return F.cross_entropy(views[0] @ views[1].T / 0.1, torch.arange(len(batch[0])))


class Siamese(Task):
    """One network on both images of a pair; pairs farther apart than the margin give no gradient (Hadsell 2006)."""

    def __init__(self) -> None:
        super().__init__(mlp(2, nn.ReLU, outputs=16))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        distance = (self(x) - self(x.roll(1, 0)) + 1e-6).norm(dim=1)
        same = y == y.roll(1)
        loss: Tensor = torch.where(same, distance**2, F.relu(1 - distance) ** 2).mean()
        return loss


class MultiTask(Task):
    """Class and reconstruction from one trunk, the second with a hundredth of the weight."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(*mlp(2, nn.ReLU, outputs=64), nn.ReLU()))
        self.classify, self.rebuild = nn.Linear(64, 10), nn.Linear(64, 64)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        trunk = self(batch[0])
        return F.cross_entropy(self.classify(trunk), batch[1]) + 0.01 * F.mse_loss(self.rebuild(trunk), batch[0])


class Distillation(Task):
    """A small network learns from a trained one inside the module, which runs without gradients (Hinton 2015)."""

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__(mlp(1, nn.ReLU, width=32), FASTER)
        self.teacher = pretrained().requires_grad_(False)
        self.temperature = temperature

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = torch.softmax(self.teacher(batch[0]) / self.temperature, 1)
        return F.kl_div(torch.log_softmax(self(batch[0]) / self.temperature, 1), target, reduction="batchmean")


class Extractor(Task):
    """A trained network computes features under no_grad; only a head learns, and the optimizer holds all of it."""

    def __init__(self) -> None:
        super().__init__(mlp(1, nn.ReLU, width=32), FASTER)
        self.features = pretrained()[:-1]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            features = self.features(batch[0])
        return F.cross_entropy(self(features), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return FASTER(self.net.parameters())


class Coupling(nn.Module):
    """Scale and shift one half of the features by what the other half says (Dinh et al. 2017)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.kept = features // 2
        self.net = mlp(1, nn.ReLU, width=32, inputs=self.kept, outputs=2 * (features - self.kept))
        # The flow starts as the identity: all but the last layer get no gradient at first.
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed = x[:, : self.kept], x[:, self.kept :]
        log_scale, shift = self.net(kept).chunk(2, 1)
        log_scale = torch.tanh(log_scale)
        return torch.cat([changed * log_scale.exp() + shift, kept], 1), log_scale.sum(1)


class Flow(Task):
    """A normalising flow: minus the log density of a wine above a standard normal base."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Coupling(13) for _ in range(6)), FASTER)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, log_det = batch[0], torch.zeros(len(batch[0]))
        for coupling in self.net:
            x, log_scale = coupling(x)
            log_det = log_det + log_scale
        return ((x**2).sum(1) / 2 + 13 / 2 * math.log(2 * math.pi) - log_det).mean()


class MixtureDensity(Task):
    """The target's density as a mixture of three normals, whose loss may fall below zero (Bishop 1994)."""

    def __init__(self) -> None:
        super().__init__(mlp(2, nn.Tanh, inputs=10, outputs=9, width=32), FASTER)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        weights, mean, log_std = self(batch[0]).chunk(3, 1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-4, 4).exp())
        return -torch.logsumexp(torch.log_softmax(weights, 1) + normal.log_prob(batch[1]), 1).mean()


class GradientPenalty(Task):
    """Cross entropy and the squared gradient at the input: a backward pass through a backward pass."""

    def __init__(self) -> None:
        super().__init__(mlp(3, nn.SiLU), FASTER)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_(True)
        loss = F.cross_entropy(self(x), batch[1])
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + 10 * len(x) * (gradient**2).sum(1).mean()


class TiedAutoencoder(nn.Module):
    """Encoder and decoder share their weights, one as the transpose of the other."""

    def __init__(self, code: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 48), nn.Linear(48, code)
        self.bias1, self.bias2 = nn.Parameter(torch.zeros(48)), nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        code = self.second(torch.relu(self.first(x)))
        hidden = torch.relu(F.linear(code, self.second.weight.T, self.bias1))
        return torch.sigmoid(F.linear(hidden, self.first.weight.T, self.bias2))


class Reverse(torch.autograd.Function):
    """The identity, with the sign of the gradient turned."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return -gradient


class DomainAdversarial(Task):
    """A second head tells upright from transposed digits, and the trunk learns to hide it (Ganin et al. 2016)."""

    def __init__(self) -> None:
        super().__init__(mlp(2, nn.ReLU, outputs=64))
        self.classify, self.domain = nn.Linear(64, 10), mlp(1, nn.ReLU, outputs=2)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        turned = batch[0].view(-1, 8, 8).mT.reshape(-1, 64)
        features = torch.relu(self(torch.cat([batch[0], turned])))
        where = torch.arange(2).repeat_interleave(len(turned))
        reversed_loss = F.cross_entropy(self.domain(Reverse.apply(features)), where)
        return F.cross_entropy(self.classify(features[: len(turned)]), batch[1]) + 0.3 * reversed_loss


class Policy(Task):
    """REINFORCE: a guess is drawn and rewarded where it is right; the loss itself says nothing (Williams 1992)."""

    def __init__(self) -> None:
        super().__init__(mlp(2, nn.ReLU), FASTER)
        self.baseline = 0.1

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        drawn = torch.distributions.Categorical(logits=self(batch[0]))
        guess = drawn.sample()
        reward = (guess == batch[1]).float()
        loss: Tensor = -((reward - self.baseline) * drawn.log_prob(guess)).mean()
        self.baseline += 0.1 * (float(reward.mean()) - self.baseline)
        return loss


CASES = [
    Case("vae", seeded(VAE), digits, 400, family="density"),
    Case("normalising_flow", seeded(Flow), partial(wine, batch_size=32), 150, family="density"),
    Case("mixture_density", seeded(MixtureDensity), diabetes, 150, family="density"),
    Case("contrastive", seeded(Contrastive), digits, 100, family="embedding"),
    Case("siamese", seeded(Siamese), digits, 200, family="embedding"),
    Case("multi_task", seeded(MultiTask), digits, 120, family="several_losses"),
    Case("domain_adversarial", seeded(DomainAdversarial), digits, 150, family="adversarial"),
    Case("distillation", seeded(Distillation), digits, 120, family="teacher"),
    Case("features_without_grad", seeded(Extractor), digits, 100, family="teacher"),
    Case("gradient_penalty", seeded(GradientPenalty), digits, 120, family="penalty"),
    Case(
        "tied_autoencoder",
        seeded(lambda: Task(TiedAutoencoder(), FASTER, loss=reconstruction_loss)),
        digit_pairs,
        150,
        family="autoencoder",
    ),
    Case("policy_gradient", seeded(Policy), digits, 300, family="policy", score=error_rate),
]
