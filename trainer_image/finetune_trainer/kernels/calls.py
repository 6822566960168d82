"""Says when a kernel may take the place of the code of a module, and when a module need not be called.

`install.py` and `shared_projections.py` ask this each time a module is called, because a model changes: it is
evaluated, hooks are registered, and adapters are merged or switched off."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""The attributes in which torch keeps what else a call of a module runs."""


def computes_gradients(module: nn.Module) -> bool:
    """Return whether ``module`` is called in a training step that computes with kernels: in training mode, with
    gradients, and without autocast, which chooses the types of each operator of torch. A compiler of torch sees the
    module's own code."""
    return (
        module.training
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def are_plain(*tensors: torch.Tensor | None) -> bool:
    """Return whether ``tensors`` are tensors of torch itself. A tensor of another class, such as a quantized or a
    distributed one, has operators of its own."""
    return all(tensor is None or type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)


def runs_only_its_code(module: nn.Module) -> bool:
    """Return whether a call of ``module`` runs the code of its class and nothing else, so that a kernel may compute the
    same without a call. Hooks and another forward function would not be run then. ZeRO-3 gathers weights in hooks."""
    own = vars(module)
    return "forward" not in own and has_no_hooks(module)


def has_no_hooks(module: nn.Module) -> bool:
    """Return whether neither ``module`` nor all modules of the process have hooks."""
    own = vars(module)
    return not any(own[name] for name in HOOKS) and not torch_modules._has_any_global_hook()
