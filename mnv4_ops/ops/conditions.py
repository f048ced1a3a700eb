"""What about a call, rather than a module, makes it run the original forward. Asked on every call, so in few steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as _module

from .backends import BY_DEVICE
from .layout import DTYPES, name_of

# not public, but nothing public tells: without them the answer is that nothing is active
_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_function_modes: Any = getattr(torch._C, "_len_torch_function_stack", lambda: 0)
_transforms: Any = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)
HOOKS = [
    hooks
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks")
    if (hooks := getattr(_module, name, None)) is not None
]
_tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]
_autocast = torch.is_autocast_enabled

NOT_PLAIN = "not a plain torch.Tensor"


def _observing_function_modes() -> str | None:
    from torch.overrides import _get_current_function_mode_stack

    for mode in _get_current_function_mode_stack():
        # `with torch.device(...)` and torch.set_default_device only concern factory functions
        if type(mode).__name__ != "DeviceContext":
            return f"the torch function mode {type(mode).__name__} is active"
    return None


def reason(x: Any, grad: bool) -> str | None:
    """Why this input, here and now, is not for a kernel; None if it is."""
    if type(x) is not Tensor:
        return f"the input is a {type(x).__name__}, {NOT_PLAIN}"
    if x.is_cpu:
        device = "cpu"
    elif x.is_cuda:
        device = "cuda"
    else:
        return f"the input is on {x.device}: no kernels for this device"
    if x.dtype not in DTYPES[device]:
        return f"the input is {name_of(x.dtype)}, kernels take {', '.join(map(name_of, DTYPES[device]))} on this device"
    if x.layout is not torch.strided or x.dim() != 4:
        return f"the input is not a dense tensor [N, C, H, W] ({x.layout}, {x.dim()} dimensions)"
    if grad and x.requires_grad:
        return "the input requires grad and grad mode is on"
    if _dispatch_modes():
        return "a torch dispatch mode is active"
    if _function_modes() and (found := _observing_function_modes()) is not None:
        return found
    if _transforms() is not None:
        return "a functorch transform is active"
    if _tracing():
        return "torch.jit is tracing"
    if _autocast(device):
        return "autocast is enabled"
    for hooks in HOOKS:
        if hooks:
            return "global module hooks are registered"
    if x.is_neg():
        return "the input is lazily negated"
    return BY_DEVICE[device].unavailable()
