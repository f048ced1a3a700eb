"""The ops `torch.ops.mnv4.*`: one fused block per call, from raw parameters.

Opaque to compilers, inference only. `layout` says what `params` and `eps` hold; packed weights are looked up in
`mnv4_ops.cache`, so nothing that depends on the machine enters a graph or an exported file. Inputs may have any
strides; outputs are canonical channels_last (`[N, features]` for the head). Input, weights and output have one dtype:
float32 on the CPU, on ARM also float16 and bfloat16; any of them on a GPU. `mqa_attention` is of another kind: see
`attention`.

On a GPU the ops see running statistics change by their versions. A training-mode forward moves them without one: that
is noticed for modules that are enabled, otherwise `mnv4_ops.repack()` is needed after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mnv4_ops import cache

from . import attention, flops, program
from .backends import BY_DEVICE
from .layout import LAYOUTS, Layout, check_input, check_size, empty_output, name_of

__all__ = ["BACKENDS", "SCHEMAS"]

SCHEMAS = {
    "uib": "(Tensor x, Tensor?[] params, float[] eps, int stride, str padding, str act, bool residual) -> Tensor",
    "fused_ib": "(Tensor x, Tensor?[] params, float[] eps, int stride, str padding, str act, bool residual) -> Tensor",
    "conv_bn_act": "(Tensor x, Tensor?[] params, float[] eps, int stride, str padding, str act) -> Tensor",
    "pointwise": "(Tensor x, Tensor?[] params, float[] eps, str act, bool residual) -> Tensor",
    "depthwise": "(Tensor x, Tensor?[] params, float[] eps, int stride, str padding, str act) -> Tensor",
    "depthwise_pointwise": "(Tensor x, Tensor?[] params, float[] eps, int stride, str padding, str depthwise_act, "
    "str act, bool residual) -> Tensor",
    "head": "(Tensor x, Tensor?[] params, float[] eps, str act) -> Tensor",
    "mobile_mqa": "(Tensor x, Tensor?[] params, float[] eps, int heads, int kv_stride, int query_stride, str padding, "
    "bool residual) -> Tensor",
}
# torch's dispatch keys, and the device whose backend serves them
BACKENDS = {"CPU": "cpu", "CUDA": "cuda"}

_library = torch.library.Library("mnv4", "DEF")


def _layout(op: str, x: Tensor, params: Any, eps: Any, args: tuple[Any, ...]) -> Layout:
    """Checks everything, in the order input, parameters, both together."""
    check_input(op, x, None)
    channels = (x.shape[1],) if op == "head" else ()
    layout = LAYOUTS[op](params, eps, *args, *channels)
    check_input(op, x, layout.c_in)
    check_size(layout, x)
    for t in params:
        if t is not None and t.device != x.device:
            raise ValueError(f"mnv4::{op}: expected params on {x.device} like x, got {t.device}")
    if layout.dtype is None:
        return replace(layout, dtype=x.dtype, device=x.device)
    if layout.dtype is not x.dtype:
        raise ValueError(
            f"mnv4::{op}: expected x of dtype {name_of(layout.dtype)} like the weights, got {name_of(x.dtype)}"
        )
    return layout


def _kernel(op: str, device: str) -> Callable[..., Tensor]:
    def run(x: Tensor, params: list[Tensor | None], eps: list[float], *args: Any) -> Tensor:
        backend = BY_DEVICE[device]
        layout = _layout(op, x, params, eps, args)
        native = cache.packed_for_tensors(layout, params, eps, backend)
        return backend.run(native, layout, x.resolve_neg())

    return run


def _fake(op: str) -> Callable[..., Tensor]:
    def run(x: Tensor, params: list[Tensor | None], eps: list[float], *args: Any) -> Tensor:
        return empty_output(_layout(op, x, params, eps, args), x)

    return run


def _no_backward(op: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"mnv4::{op}: expected no call of backward, the fused ops are for inference only; "
            "run the original modules (mnv4_ops.disable()) to train"
        )

    return backward


for _op, _schema in SCHEMAS.items():
    # any strides of the input will do: a compiler need not copy
    _library.define(_op + _schema, tags=(torch.Tag.flexible_layout,))
    for _key, _device in BACKENDS.items():
        _library.impl(_op, _kernel(_op, _device), _key)
    torch.library.register_fake(f"mnv4::{_op}", _fake(_op), lib=_library)
    torch.library.register_autograd(f"mnv4::{_op}", _no_backward(_op), lib=_library)

_library.define(attention.OP + attention.SCHEMA)
for _key, _device in BACKENDS.items():
    _library.impl(attention.OP, attention.kernel(_device), _key)
torch.library.register_fake(f"mnv4::{attention.OP}", attention.fake, lib=_library)
torch.library.register_autograd(f"mnv4::{attention.OP}", _no_backward(attention.OP), lib=_library)

_library.define("program" + program.SCHEMA, tags=(torch.Tag.flexible_layout,))
for _key, _device in BACKENDS.items():
    _library.impl("program", program.kernel(_device), _key)
torch.library.register_fake("mnv4::program", program.fake, lib=_library)
torch.library.register_autograd("mnv4::program", _no_backward("program"), lib=_library)

flops.register(flops.FORMULAS)
