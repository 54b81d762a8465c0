"""Cures that change how weights are held: by number format, and by whom.

Each takes a `Site` and returns its suggestions, none where it does not apply.
"""

from __future__ import annotations

import math

from lightning_gradflow.advice.site import Site, as_function, literal, paste
from lightning_gradflow.findings import Suggestion


def keep_float32(site: Site) -> list[Suggestion]:
    """Mixed precision in the place of weights in 16 bits."""
    del site  # the same for every model
    return [
        Suggestion(
            "Keep the weights in float32, and compute in bf16",
            "# needs: import lightning as L\n"
            'trainer = L.Trainer(precision="bf16-mixed")  # not "bf16-true", and no model.to(torch.bfloat16)\n'
            "model = model.float()",
            "In float32 a weight takes steps of 1e-7 of itself. Under autocast the matrix products are as fast as with "
            "weights in bf16, and only the weights take twice the memory.",
            "Micikevicius et al. 2018, Mixed precision training; Kalamkar et al. 2019, A study of bfloat16",
        )
    ]


def master_weights(site: Site) -> list[Suggestion]:
    """Copies of the weights in float32, for the optimizer alone."""
    rate = 1e-3 if math.isnan(site.lr) else site.lr
    code = [
        "# in the LightningModule; needs: import torch",
        "def configure_optimizers(self):",
        "    self.masters = [(p, p.detach().float().requires_grad_()) for p in self.parameters()]",
        f"    optimizer = torch.optim.AdamW([master for _, master in self.masters], lr={rate:.3g})",
        "    optimizer.register_step_post_hook(lambda *_: [p.data.copy_(master) for p, master in self.masters])",
        "    return optimizer",
        "",
        "def on_before_optimizer_step(self, optimizer):",
        "    for p, master in self.masters:",
        "        master.grad, p.grad = (None if p.grad is None else p.grad.float()), None",
    ]
    return [
        Suggestion(
            "If the model has to be in 16 bits, let the optimizer step on float32 copies of the weights",
            "\n".join(code),
            "Steps that are too small for the weights add up in the copies until they show. Stochastic rounding, or a "
            "compensated sum, does without the copies: so do some optimizers made for weights in bf16.",
            "Micikevicius et al. 2018, Mixed precision training; Zamirai et al. 2020, Revisiting BFloat16 training",
        )
    ]


_TENSORS = [
    "from torch import Tensor, nn",
    "",
    "def tensors(part, own=True):  # of a layer its own, of a list or dict all that are in it",
    "    if isinstance(part, nn.Module):",
    "        return list(part.parameters(recurse=not own))",
    "    if isinstance(part, Tensor):",
    "        return [part]",
    "    items = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ()",
    "    return [p for item in items for p in tensors(item, own=False)]",
]


def hold(site: Site) -> list[Suggestion]:
    """An optimizer that holds all layers."""
    where = "# in configure_optimizers, behind the optimizer; make it there, when all layers are made"
    code = [
        *_TENSORS,
        "",
        "known = {id(p) for group in optimizer.param_groups for p in group['params']}",
        "left_out = {}",
        f"for name in {literal(site.named)}:",
        "    place, _, attribute = name.rpartition('.')",
        "    part = getattr(model.get_submodule(place), attribute) if attribute else model",
        "    if isinstance(part, (list, tuple)) and all(isinstance(item, nn.Module) for item in part):",
        "        setattr(model.get_submodule(place), attribute, nn.ModuleList(part))",
        "    left_out |= {id(p): p for p in tensors(part) if p.requires_grad and id(p) not in known}",
        "optimizer.add_param_group({'params': list(left_out.values())})",
    ]
    return [
        Suggestion(
            "Give these parameters to the optimizer",
            as_function(where, code, "optimizer"),
            "An optimizer changes the parameters that it was given, and no others. One that is made in __init__ misses "
            "the layers that come later; layers belong into an nn.ModuleList or nn.ModuleDict, tensors into an "
            "nn.Parameter.",
            "Paszke et al. 2019, PyTorch: an imperative style, high-performance deep learning library",
        )
    ]


def freeze_left_out(site: Site) -> list[Suggestion]:
    """Layers that are left out on purpose: frozen."""
    code = [
        *_TENSORS,
        "",
        f"for name in {literal(site.named)}:",
        "    place, _, attribute = name.rpartition('.')",
        "    part = getattr(model.get_submodule(place), attribute) if attribute else model",
        "    for p in tensors(part):",
        "        p.requires_grad_(False)",
    ]
    return [
        Suggestion(
            "If they are left out on purpose, freeze them",
            paste(code),
            "Gradients that nobody uses take time and memory, and are summed up from step to step, for no optimizer "
            "sets them to zero.",
            "Paszke et al. 2017, Automatic differentiation in PyTorch",
        )
    ]
