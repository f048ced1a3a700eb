"""The CPU backend: native blocks built from a checked layout, packed from torch tensors, run on torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mnv4_ops import _native

from .layout import PER_STAGE, Layout, Params, empty_output

DEVICE = "cpu"


def unavailable() -> str | None:
    """Why there are no CPU kernels, or None."""
    return None if _native.core is not None else f"the native library is not loaded: {_native.reason}"


def build(layout: Layout) -> Any:
    """The native block or head of a layout, without parameters. ValueError where the kernels have no such block."""
    core = _native.core
    if core is None:
        raise RuntimeError(f"mnv4::{layout.op}: {unavailable()}")
    return (core.Head if layout.pooled else core.Block)(**dict(layout.native))


def _dense(t: Tensor | None) -> Tensor | None:
    # channels_last models hold dense k x k weights in other strides; the copy lives only while packing
    return None if t is None else t.detach().resolve_neg().contiguous()


def pack(native: Any, layout: Layout, params: Params, eps: Sequence[float]) -> None:
    """Folds and packs all stages; a block that is packed already keeps its buffer."""
    for stage, base in layout.stages:
        tensors = [_dense(t) for t in params[base : base + len(PER_STAGE)]]
        gamma = _dense(params[layout.gamma]) if layout.gamma is not None and stage == 3 else None
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        native.pack(stage, *addresses, eps[base // len(PER_STAGE)], 0 if gamma is None else gamma.data_ptr())


def run(native: Any, layout: Layout, x: Tensor) -> Tensor:
    """Runs one packed block on a checked input."""
    out = empty_output(layout, x)
    n, _, h, w = x.shape
    if n:
        native.run(x.data_ptr(), n, h, w, x.stride(), out.data_ptr(), torch.get_num_threads())
    return out
