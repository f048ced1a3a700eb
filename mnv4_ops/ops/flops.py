"""What `torch.utils.flop_counter` counts for the ops: two for each multiply-accumulate of `mnv4_ops.spec`.

That is what the original modules count, attention products included. (Torch has no formula for the attention kernel
that the originals call on a CPU, so there it leaves those products of the originals out.)
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mnv4_ops.imports import once
from mnv4_ops.spec import ConvSpec, FusedIBSpec, HeadSpec, MQASpec, Spec, UIBSpec

from . import attention
from .layout import LAYOUTS, Layout
from .program import layouts as layouts_of_program

_SPECS: dict[str, tuple[type[Spec], tuple[str, ...]]] = {
    "uib": (UIBSpec, ("c_in", "c_mid", "c_out", "start_kernel", "mid_kernel")),
    "fused_ib": (FusedIBSpec, ("c_in", "c_mid", "c_out", "expand_kernel")),
    "conv_bn_act": (ConvSpec, ("c_in", "c_out", "expand_kernel")),
    "pointwise": (ConvSpec, ("c_in", "c_out")),
    "depthwise": (ConvSpec, ("c_in", "c_out", "start_kernel")),
    "head": (HeadSpec, ("c_in", "c_feat", "c_hidden", "classes")),
    "mobile_mqa": (MQASpec, ("c", "heads", "key_dim", "value_dim", "kv_stride", "query_stride", "kv_kernel")),
}


def _specs(layout: Layout) -> list[Spec]:
    native = dict(layout.native)
    if layout.op == "depthwise_pointwise":
        first = ConvSpec(layout.c_in, layout.c_in, native["start_kernel"], layout.stride, depthwise=True)
        return [first, ConvSpec(layout.c_in, layout.c_out)]
    cls, names = _SPECS[layout.op]
    options: dict[str, Any] = {"padding": native["padding"]} if cls is MQASpec else {}
    if cls in (UIBSpec, FusedIBSpec, ConvSpec):
        options["stride"] = layout.stride
    if layout.op == "depthwise":
        options["depthwise"] = True
    return [cls(*(native[name] for name in names), **options)]


def count(layouts: Sequence[Layout], n: int, h: int, w: int) -> int:
    """Of ops one after the other, on an input of [n, c, h, w]."""
    total = 0
    for layout in layouts:
        for spec in _specs(layout):
            total += 2 * n * spec.macs(h, w)
            h, w = spec.out_hw(h, w)
    return total


def _formula(op: str) -> Callable[..., int]:
    def flops(x: Any, params: Any, eps: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
        if op == "head":
            kwargs["c_in"] = x.shape[1]
        return count([LAYOUTS[op](params, eps, *args, **kwargs)], x.shape[0], *x.shape[2:])

    return flops


def _program(x: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return count(layouts_of_program(x, *args, **kwargs), x.shape[0], *x.shape[2:])


def _attention(q: Any, k: Any, v: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    n, heads, queries, dim = q.shape
    return 2 * n * heads * queries * k.shape[2] * (dim + v.shape[3])


def register(formulas: Mapping[str, Callable[..., int]]) -> None:
    """Gives torch formulas of ops as soon as its counter is imported, which takes a while: triton comes with it."""

    def give(counter: types.ModuleType) -> None:
        for op, formula in formulas.items():
            counter.register_flop_formula(getattr(torch.ops.mnv4, op), get_raw=True)(formula)

    once("torch.utils.flop_counter", give)


FORMULAS = {op: _formula(op) for op in LAYOUTS} | {"program": _program, attention.OP: _attention}
