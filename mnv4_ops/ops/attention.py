"""`torch.ops.mnv4.mqa_attention`: `scaled_dot_product_attention` with one key and one value head.

    mqa_attention(q, k, v, scale=None) -> softmax(scale * q k^T) v

q [B, heads, Nq, d], k [B, 1, Nk, d], v [B, 1, Nk, dv] of one dtype and device and of any strides; `scale` is
1 / sqrt(d) unless given. The result is [B, heads, Nq, dv], laid out as [B, Nq, heads, dv] in memory like that of
torch's fused kernels. Inference only. `attn_mask`, `dropout_p` and `is_causal` are known by name and refused
(ValueError).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import BY_DEVICE
from .layout import dtypes_of, name_of

OP = "mqa_attention"
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, float? scale=None, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False) -> Tensor"
)


def _error(expected: str, got: object) -> ValueError:
    return ValueError(f"mnv4::{OP}: expected {expected}, got {got}")


def check(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any, dropout_p: float, is_causal: bool) -> None:
    """Raises for what no kernel takes, before any memory is touched."""
    if attn_mask is not None:
        raise _error("no attn_mask", f"shape {tuple(attn_mask.shape)}")
    if dropout_p != 0.0:
        raise _error("dropout_p 0", dropout_p)
    if is_causal:
        raise _error("is_causal False", is_causal)
    dtypes = dtypes_of(q.device)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise _error(f"{name} with 4 dimensions [batch, heads, rows, channels]", f"shape {tuple(t.shape)}")
        if t.dtype not in dtypes:
            raise _error(f"{name} of dtype {' or '.join(map(name_of, dtypes))}", name_of(t.dtype))
        if t.dtype is not q.dtype or t.device != q.device:
            raise _error(f"{name} like q ({name_of(q.dtype)} on {q.device})", f"{name_of(t.dtype)} on {t.device}")
        if t.layout is not torch.strided:
            raise _error(f"{name} to be a dense tensor", t.layout)
    batch, heads, _, d = q.shape
    if heads < 1 or d < 1:
        raise _error("q with at least one head and one channel", f"shape {tuple(q.shape)}")
    if k.shape[:2] != (batch, 1) or k.shape[3] != d:
        raise _error(f"k of shape [{batch}, 1, Nk, {d}]", f"shape {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3] or v.shape[3] < 1:
        raise _error(f"v of shape [{batch}, 1, {k.shape[2]}, dv]", f"shape {tuple(v.shape)}")
    if k.shape[2] < 1:
        raise _error("at least one key", f"shape {tuple(k.shape)}")


def empty(q: Tensor, v: Tensor) -> Tensor:
    batch, heads, rows, _ = q.shape
    return q.new_empty((batch, rows, heads, v.shape[3])).transpose(1, 2)


def kernel(device: str) -> Any:
    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
    ) -> Tensor:
        check(q, k, v, attn_mask, dropout_p, is_causal)
        backend = BY_DEVICE[device]
        if (reason := backend.unavailable()) is not None:
            raise RuntimeError(f"mnv4::{OP}: {reason}")
        out = empty(q, v)
        if out.numel():
            q, k, v = (t.resolve_neg() for t in (q, k, v))
            backend.attention(q, k, v, q.shape[3] ** -0.5 if scale is None else scale, out)
        return out

    return run


def fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    check(q, k, v, attn_mask, dropout_p, is_causal)
    return empty(q, v)
