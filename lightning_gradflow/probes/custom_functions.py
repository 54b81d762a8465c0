"""Whether Python is inside the forward pass of a custom autograd function."""

from __future__ import annotations

import sys
from types import FrameType

from torch.autograd.function import FunctionCtx


def in_custom_function() -> bool:
    """Whether a custom autograd function is in its forward pass, in which nothing makes a graph.

    Activation checkpointing of the reentrant kind, of torch and of others, runs its segments there and repeats them in
    the backward pass: what has no graph there may have one later. A function whose forward pass takes no context is
    not known from any other function.

    Example:
        >>> in_custom_function()
        False
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        takes_context = code.co_name == "forward" and code.co_argcount > 0
        if takes_context and isinstance(frame.f_locals.get(code.co_varnames[0]), FunctionCtx):
            return True
        frame = frame.f_back
    return False
