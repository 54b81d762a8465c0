"""What is trained: small networks, each with something about it, and LightningModules that train them in their ways."""

from functools import partial

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)


# -- networks ---------------------------------------------------------------------------------------------------------


class Middle(nn.Module):
    """An activation as a module and one as a function."""

    def __init__(self):
        super().__init__()
        self.act, self.b = nn.Tanh(), nn.Linear(9, 9)

    def forward(self, x):
        return F.relu(self.b(self.act(x)) - 0.6)


class MLP(nn.Module):
    """Three layers and two activations."""

    def __init__(self):
        super().__init__()
        self.a, self.middle, self.c = nn.Linear(6, 9), Middle(), nn.Linear(9, 4)

    def forward(self, x):
        return self.c(self.middle(self.a(x)))


class WithSpare(MLP):
    """One layer is never called, and the bias of another one does not train."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 3)
        self.c.bias.requires_grad_(False)


class Checkpointed(MLP):
    """The middle of the network runs a second time in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        return self.c(checkpoint(self.middle, self.a(x), use_reentrant=self.reentrant))


class Large(nn.Module):
    """More entries in a parameter than one would like to keep a copy of."""

    def __init__(self):
        super().__init__()
        self.words, self.wide, self.head = nn.Embedding(20_000, 8), nn.Linear(8, 10_000), nn.Linear(10_000, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.wide(self.words(x).mean(1))))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.down.weight = self.up.weight

    def forward(self, x):
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.down = self.up

    def forward(self, x):
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


class Twice(nn.Module):
    """Two views of the input through one encoder."""

    def __init__(self):
        super().__init__()
        self.encode, self.head = nn.Sequential(nn.Linear(6, 9), nn.Tanh()), nn.Linear(9, 4)

    def forward(self, x):
        return self.head(self.encode(x) * self.encode(x.flip(1)))


class Loop(nn.Module):
    """A cell in a loop, two or three times as the data will have it."""

    def __init__(self):
        super().__init__()
        self.cell, self.act, self.head = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)

    def turn(self, x):
        return self.act(self.cell(x) * 2)

    def turns(self, x):
        for _ in range(2 if x[0, 0] > 0 else 3):
            x = self.turn(x)
        return x

    def forward(self, x):
        return self.head(self.turns(x))


class LoopOfCheckpoints(Loop):
    """Every turn is repeated by itself."""

    def turn(self, x):
        return checkpoint(super().turn, x, use_reentrant=True)

    def forward(self, x):
        return super().forward(x.clone().requires_grad_())


class LoopInCheckpoint(Loop):
    """All turns are repeated at once."""

    def turns(self, x):
        return checkpoint(super().turns, x.clone().requires_grad_(), use_reentrant=True)


class Convolutions(nn.Module):
    """Convolutions with the channels last in memory."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.head, self.relu = nn.Conv2d(1, 5, 3), nn.Conv2d(5, 7, 2), nn.Linear(7, 4), nn.ReLU()
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = x[:, :, None].repeat(1, 1, 6).unsqueeze(1).contiguous(memory_format=torch.channels_last)
        return self.head(self.relu(self.c2(F.relu(self.c1(x) - 0.5))).mean((2, 3)))


class Complex(nn.Module):
    """A layer with complex weights."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(6, 8, dtype=torch.complex64), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.mix(x.cfloat()).abs())


class Words(nn.Module):
    """An embedding whose gradient is stored sparsely, before a layer whose gradient is not."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(12, 6, sparse=True), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.words(x).mean(1))


class Factors(nn.Module):
    """Embeddings with sparse gradients and nothing else."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Embedding(12, 4, sparse=True), nn.Embedding(12, 4, sparse=True)

    def forward(self, x):
        return self.left(x[:, 0]) * self.right(x[:, 1])


# -- modules ----------------------------------------------------------------------------------------------------------


class Task(L.LightningModule):
    """Cross entropy, one optimizer."""

    def __init__(self, net=MLP, optimize=ADAMW):
        super().__init__()
        self.net, self.optimize = net(), optimize

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimize(self.parameters())


class ClipsByItself(Task):
    """Halves every gradient."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0.5)


class SkipsBatches(Task):
    """Finds some batches to be no good."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in (1, 2, 5) else loss


class Thaws(Task):
    """The first layer trains from the third step on."""

    def on_train_batch_start(self, batch, batch_idx):
        self.net.a.requires_grad_(batch_idx >= 2)


class Manual(Task):
    """One optimizer by hand, which steps after every few batches."""

    def __init__(self, every=1):
        super().__init__()
        self.automatic_optimization = False
        self.every = every

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if (batch_idx + 1) % self.every == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss


class Rates(Task):
    """Two optimizers; the second one steps after every other batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer, every in zip(self.optimizers(), (1, 2), strict=True):
            if (batch_idx + 1) % every == 0:
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def configure_optimizers(self):
        first = [*self.net.a.parameters()]
        return [ADAMW(first), ADAMW([*self.net.middle.parameters(), *self.net.c.parameters()])]


class GAN(L.LightningModule):
    """Two networks, trained in turn with toggled optimizers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 1))

    def training_step(self, batch, batch_idx):
        x, (first, second) = batch[0], self.optimizers()
        self.toggle_optimizer(first)
        loss = self._judged(self.generator(x.flip(0)).detach(), False) + self._judged(x, True)
        self._update(first, loss)
        self.toggle_optimizer(second)
        self._update(second, self._judged(self.generator(x.flip(0)), True))
        return loss

    def _judged(self, x, as_real):
        judged = self.discriminator(x)
        return F.binary_cross_entropy_with_logits(judged, torch.full_like(judged, as_real))

    def _update(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [ADAM(part.parameters()) for part in (self.discriminator, self.generator)]


class CompilesItself(Task):
    """Has its network compiled in place."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def configure_model(self):
        self.net.compile(backend=self.backend)


class CompilesIntoWrapper(CompilesItself):
    """Puts a compiled module in the place of its network."""

    def configure_model(self):
        self.net = torch.compile(self.net, backend=self.backend)
