"""Cures that change the run: precision, data, and how to look closer.

Each takes a `Site` and returns its suggestions, none where it does not apply.
"""

from __future__ import annotations

import math

from lightning_gradflow.advice.site import NN, Site, get, literal, paste
from lightning_gradflow.findings import Suggestion


def wider_format(site: Site) -> list[Suggestion]:
    """A number format with a wider range."""
    del site  # the same for every model
    return [
        Suggestion(
            "Train in bf16-mixed, or in 32-true, instead of fp16",
            '# needs: import lightning as L\ntrainer = L.Trainer(precision="bf16-mixed")',
            "bfloat16 has the range of float32: a gradient of 1e-8 stays what it is, in float16 it becomes zero.",
            "Micikevicius et al. 2018, Mixed precision training; Kalamkar et al. 2019, A study of bfloat16",
        )
    ]


def scale_gradients(site: Site) -> list[Suggestion]:
    """Mixed precision with a gradient scaler."""
    del site  # the same for every model
    return [
        Suggestion(
            "Train in 16-mixed, where Lightning scales the gradients",
            '# needs: import lightning as L\ntrainer = L.Trainer(precision="16-mixed")',
            "A gradient scaler multiplies the loss, so that small gradients stay above the smallest number of fp16, "
            "and divides them again before the step; the weights stay in float32. With 16-true nothing does that.",
            "Micikevicius et al. 2018, Mixed precision training",
        )
    ]


def scale_loss(site: Site) -> list[Suggestion]:
    """A constant factor for the loss."""
    rate = "" if math.isnan(site.lr) else f"  # it was {site.lr:.3g}"
    return [
        Suggestion(
            "If it has to be fp16 without a scaler, multiply the loss by a constant",
            f"# in training_step; Adam does not mind, with SGD set lr = lr / 1024{rate}\nloss = 1024 * loss",
            "It lifts all gradients by the same factor. A sum over pixels or tokens in the place of a mean does the "
            "same. Take a power of two, which costs no precision, and stay a factor of 100 below an overflow.",
            "Micikevicius et al. 2018, Mixed precision training",
        )
    ]


def watch_layer(site: Site) -> list[Suggestion]:
    """A hook that stops at the first value that is not finite."""
    layer = (*site.named, "")[0]
    code = [
        "import torch",
        "",
        "def stop(module, inputs, output):",
        "    for x in inputs:",
        "        if torch.is_tensor(x):",
        '            print("input from", x.min().item(), "to", x.max().item())',
        "    if torch.is_tensor(output) and not output.isfinite().all():",
        '        raise FloatingPointError("output is not finite")',
        "",
        f"{get(layer)}.register_forward_hook(stop)",
    ]
    return [
        Suggestion(
            "Look at what goes into the layer where it began",
            paste(code),
            "Infinity comes from an overflow, a division by zero or the logarithm of zero; the range of the input "
            "tells which. A small constant under a square root, in a divisor or a logarithm prevents it.",
            "Goldberg 1991, What every computer scientist should know about floating-point arithmetic",
        )
    ]


def watch_weights(site: Site) -> list[Suggestion]:
    """A look at the weights around each step."""
    layer = (*site.named, "")[0]
    code = [
        "# needs: import lightning as L",
        "class Watch(L.Callback):",
        "    before = None",
        "",
        "    def weights(self, module):",
        f"        layer = module.get_submodule({layer!r})",
        "        return [p.detach().clone() for p in layer.parameters()]",
        "",
        "    def on_train_batch_end(self, trainer, module, *args):",
        "        self.before = self.weights(module)",
        "",
        "    def on_before_optimizer_step(self, trainer, module, optimizer):",
        "        if self.before and any((a != b).any() for a, b in zip(self.before, self.weights(module))):",
        '            print("weights were written to before step", trainer.global_step)',
        "",
        "trainer = L.Trainer(callbacks=[Watch()])",
    ]
    return [
        Suggestion(
            "Find out what writes to the weights between two steps",
            "\n".join(code),
            "Only the optimizer should. Look for load_state_dict, for copies of weights that are swapped in and not "
            "back, and for hooks and callbacks that assign to `.data`; compare a checkpoint with the model first.",
            "Paszke et al. 2019, PyTorch: an imperative style, high-performance deep learning library",
        )
    ]


def fill_missing(site: Site) -> list[Suggestion]:
    """Values for the parameters that have none."""
    return [
        Suggestion(
            "Initialise the parameters that are NaN",
            paste(
                [
                    "import torch",
                    "",
                    f"for layer in {literal(site.named)}:",
                    "    for name, parameter in model.get_submodule(layer).named_parameters():",
                    "        if not torch.isfinite(parameter).all():",
                    "            print(layer, name)",
                    "            if parameter.dim() > 1:",
                    "                torch.nn.init.kaiming_normal_(parameter)",
                    "            else:",
                    "                bad = ~torch.isfinite(parameter)",
                    '                parameter.data[bad] = 0.0 if "bias" in name else 1.0',
                ]
            ),
            "`torch.empty` takes memory as it is: what stands in it by chance is often zero, and sometimes NaN. A "
            "parameter made of it needs an initialisation; one that was loaded needs another checkpoint.",
            "He et al. 2015, Delving deep into rectifiers",
        )
    ]


def draw_zeros(site: Site) -> list[Suggestion]:
    """Values other than zero for weights that are factors of each other."""
    return [
        Suggestion(
            "Start no more than one factor of a product from zero",
            paste(
                [
                    *NN,
                    f"for name in {literal(site.named)}:",
                    "    for key, parameter in model.get_submodule(name).named_parameters(recurse=False):",
                    '        if not parameter.requires_grad or parameter.any() or "bias" in key:',
                    "            continue",
                    "        if parameter.dim() > 1:",
                    "            nn.init.normal_(parameter, std=(len(parameter) / parameter.numel()) ** 0.5)",
                    "        else:",
                    "            nn.init.ones_(parameter)  # the scale of a norm layer",
                ]
            ),
            "The gradient of a factor is the others times what comes back. With one of them at zero, as in an adapter "
            "or at the end of a residual branch, that one moves with the first step; with two at zero none ever does.",
            "Hu et al. 2021, LoRA: low-rank adaptation of large language models",
        )
    ]


def gains_of_one(site: Site) -> list[Suggestion]:
    """The usual gains for norm layers whose gains were drawn around 0."""
    if "gain_rms" not in site.finding.evidence:
        return []
    return [
        Suggestion(
            "Start the gains of norm layers from 1",
            paste(
                [
                    *NN,
                    f"for name in {literal(site.named)}:",
                    "    nn.init.ones_(model.get_submodule(name).weight)",
                ]
            ),
            "A norm layer gives what its gains are. An initialisation of all parameters, as in `for p in "
            "model.parameters()`, is made for matrices: leave out those with one dimension, `if p.dim() > 1`.",
            "Ba et al. 2016, Layer normalization",
        )
    ]


def detect_anomaly(site: Site) -> list[Suggestion]:
    """Autograd's own search for the operation."""
    layer = (*site.named, "")[0]
    return [
        Suggestion(
            "Let autograd name the operation",
            "# needs: import lightning as L\n"
            f"# slow, so for a few steps; look at what comes after {layer or 'the last layer'}\n"
            "trainer = L.Trainer(detect_anomaly=True)",
            "It stops at the operation whose backward made the NaN. Usual ones: sqrt or norm at zero, log of zero, and "
            "torch.where with an invalid value on the side that is not chosen.",
            "Paszke et al. 2019, PyTorch: an imperative style, high-performance deep learning library",
        )
    ]


def overfit_batch(site: Site) -> list[Suggestion]:
    """A check of model and data on a single batch."""
    del site  # the same for every model
    return [
        Suggestion(
            "Check that the model can learn one batch by heart, and look at inputs and targets side by side",
            "# needs: import lightning as L\nL.Trainer(overfit_batches=1, max_epochs=200).fit(model, data)",
            "A model that learns one batch and not the data is healthy: look for shuffled targets, a wrong join or a "
            "preprocessing that removes the signal.",
            "Zhang et al. 2017, Understanding deep learning requires rethinking generalization",
        )
    ]


def larger_eps(site: Site) -> list[Suggestion]:
    """An eps that the number format of the weights can hold."""
    rate = 1e-3 if math.isnan(site.lr) else site.lr
    return [
        Suggestion(
            "Give the optimizer an eps that the weights' number format can hold",
            "# in configure_optimizers; needs: import torch\n"
            f"optimizer = torch.optim.AdamW(self.parameters(), lr={rate:.3g}, eps=1e-4)",
            "Adam divides by the root of its second moment plus eps. In fp16 the usual eps of 1e-8 is zero, and so is "
            "the square of a gradient below 1e-4: zero divided by zero is NaN.",
            "Kingma and Ba 2015, Adam: a method for stochastic optimization",
        )
    ]


def reconnect(site: Site) -> list[Suggestion]:
    """The place where the graph is cut."""
    code = [
        f"# behind {(*site.named, 'them')[-1]}, on the way to the loss: no .detach(), .data, .numpy(), round(), argmax",
        f"for name in {literal(site.named)}:  # in on_after_backward",
        "    assert all(p.grad is not None for p in self.get_submodule(name).parameters()), name",
    ]
    return [
        Suggestion(
            "Let the gradient through where the graph is cut",
            "\n".join(code),
            "What is computed from a detached tensor gives the layers before it no gradient, and what is rounded or "
            "compared gives them zeros: leave that to the metrics. If it is meant, run them under torch.no_grad() and "
            "leave their parameters out of the optimizer.",
            "Paszke et al. 2017, Automatic differentiation in PyTorch",
        )
    ]


def use_or_freeze(site: Site) -> list[Suggestion]:
    """Layers that take no part: use or freeze them."""
    code = [f"for name in {literal(site.named)}:", "    model.get_submodule(name).requires_grad_(False)"]
    return [
        Suggestion(
            "Call these layers in forward, or freeze them",
            paste(code),
            "A layer without a gradient stays as it was initialised. Look for a branch that is never taken, a detach, "
            "an output that the loss does not use, or torch.no_grad().",
            "Paszke et al. 2017, Automatic differentiation in PyTorch",
        )
    ]
