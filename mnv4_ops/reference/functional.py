"""The definition of correct: every block as plain torch operations on unfolded parameters.

Runs in any floating dtype (float64 is the ground truth of the tests), on any device, and propagates NaN and inf as
torch does. Parameters travel in the named tuples below; `cast` moves a whole set to another dtype. Images are
[N, C, H, W] of any strides.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import ConvSpec, FusedIBSpec, HeadSpec, MQASpec, UIBSpec, pad_before_after

_T = TypeVar("_T")


class BatchNorm(NamedTuple):
    """Inference batch norm: y = (x - mean) / sqrt(var + eps) * weight + bias; all [C]."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float


class ConvBN(NamedTuple):
    """Weight [O, I/groups, k, k], the batch norm behind it and the convolution's own bias [O] (None: without).

    Without a weight it is the batch norm alone, which only descriptions of packed stages have.
    """

    weight: Any
    bn: BatchNorm | None = None
    bias: Tensor | None = None


class UIBParams(NamedTuple):
    """start [Cin, 1, k, k], expand [Cmid, Cin, 1, 1], mid [Cmid, 1, k, k], project [Cout, Cmid, 1, 1], gamma [Cout].

    start, mid and gamma are None where the spec has none.
    """

    start: ConvBN | None
    expand: ConvBN
    mid: ConvBN | None
    project: ConvBN
    gamma: Tensor | None = None


class FusedIBParams(NamedTuple):
    """expand [Cmid, Cin, k, k], project [Cout, Cmid, 1, 1]."""

    expand: ConvBN
    project: ConvBN


class MQAParams(NamedTuple):
    """norm [C]; query [h*dk, C, 1, 1]; key [dk, C, 1, 1]; value [dv, C, 1, 1]; output [C, h*dv, 1, 1]; gamma [C].

    key_down, value_down [C, 1, k, k] with kv_stride > 1; query_norm [C] with query_stride > 1. norm and query_norm may
    be None: without.
    """

    norm: BatchNorm | None
    query: ConvBN
    key: ConvBN
    value: ConvBN
    output: ConvBN
    key_down: ConvBN | None = None
    value_down: ConvBN | None = None
    query_norm: BatchNorm | None = None
    gamma: Tensor | None = None


class HeadParams(NamedTuple):
    """feat [Cfeat, Cin, 1, 1], hidden [Chidden, C, 1, 1], classifier [classes, C] with bias; None where 0."""

    feat: ConvBN | None
    hidden: ConvBN | None
    classifier: ConvBN | None


def cast(params: _T, dtype: torch.dtype, device: torch.device | str | None = None) -> _T:
    """The same (nested) parameters in another dtype (and on another device); floats such as eps stay as they are."""
    if isinstance(params, Tensor):
        return params.detach().to(device=device, dtype=dtype)  # type: ignore[return-value]
    if isinstance(params, tuple) and hasattr(params, "_fields"):
        return type(params)(*(cast(field, dtype, device) for field in params))
    return params


def activation(x: Tensor, act: str) -> Tensor:
    """none, relu, relu6 or gelu (exact, erf)."""
    if act == "none":
        return x
    if act == "relu":
        return F.relu(x)
    if act == "relu6":
        return F.relu6(x)
    if act == "gelu":
        return F.gelu(x)
    raise ValueError(f"activation: expected act in {{none, relu, relu6, gelu}}, got {act!r}")


def batch_norm(x: Tensor, bn: BatchNorm) -> Tensor:
    """Inference batch norm of [N, C, H, W]."""
    return F.batch_norm(x, bn.mean, bn.var, bn.weight, bn.bias, training=False, eps=bn.eps)


def pad2d(x: Tensor, kernel: int, stride: int, padding: str) -> Tensor:
    """`x` with the zeros of "symmetric" or TF "same" padding around it."""
    top, bottom = pad_before_after(x.shape[-2], kernel, stride, padding)
    left, right = pad_before_after(x.shape[-1], kernel, stride, padding)
    return F.pad(x, (left, right, top, bottom)) if top or bottom or left or right else x


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: str = "symmetric",
    groups: int = 1,
) -> Tensor:
    """Convolution with a square kernel; "symmetric" pads k//2 on all sides, "same" as TF does."""
    kernel = weight.shape[-1]
    if padding == "symmetric":
        return F.conv2d(x, weight, bias, stride, kernel // 2, 1, groups)
    if padding == "same":
        return F.conv2d(pad2d(x, kernel, stride, padding), weight, bias, stride, 0, 1, groups)
    raise ValueError(f"conv2d: expected padding in {{symmetric, same}}, got {padding!r}")


def conv_bn_act(
    x: Tensor, params: ConvBN, *, stride: int = 1, act: str = "none", padding: str = "symmetric", groups: int = 1
) -> Tensor:
    """Convolution -> batch norm (if any) -> activation."""
    x = conv2d(x, params.weight, params.bias, stride=stride, padding=padding, groups=groups)
    if params.bn is not None:
        x = batch_norm(x, params.bn)
    return activation(x, act)


def conv(x: Tensor, spec: ConvSpec, params: ConvBN) -> Tensor:
    """`conv_bn_act` with the geometry taken from a spec."""
    groups = spec.c_in if spec.depthwise else 1
    return conv_bn_act(x, params, stride=spec.stride, act=spec.act, padding=spec.padding, groups=groups)


def depthwise(x: Tensor, params: ConvBN, *, stride: int = 1, act: str = "none", padding: str = "symmetric") -> Tensor:
    """Depthwise convolution, weight [C, 1, k, k] -> batch norm -> activation."""
    return conv_bn_act(x, params, stride=stride, act=act, padding=padding, groups=x.shape[1])


def pointwise(x: Tensor, params: ConvBN, *, act: str = "none") -> Tensor:
    """1x1 convolution, weight [O, I, 1, 1] -> batch norm -> activation."""
    return conv_bn_act(x, params, act=act)


def uib(x: Tensor, spec: UIBSpec, params: UIBParams) -> Tensor:
    """Universal Inverted Bottleneck, [N, c_in, H, W] -> [N, c_out, ceil(H/stride), ceil(W/stride)] (section 3.1)."""
    y = x
    if params.start is not None:
        y = depthwise(y, params.start, stride=spec.start_stride, padding=spec.padding)
    y = pointwise(y, params.expand, act=spec.act)
    if params.mid is not None:
        y = depthwise(y, params.mid, stride=spec.mid_stride, act=spec.act, padding=spec.padding)
    return _scale_add(pointwise(y, params.project), x, params.gamma, spec.residual)


def fused_ib(x: Tensor, spec: FusedIBSpec, params: FusedIBParams) -> Tensor:
    """Dense k x k expand + BN + act -> 1x1 project + BN -> residual (timm `EdgeResidual`)."""
    y = conv_bn_act(x, params.expand, stride=spec.stride, act=spec.act, padding=spec.padding)
    return _scale_add(pointwise(y, params.project), x, None, spec.residual)


def mobile_mqa(x: Tensor, spec: MQASpec, params: MQAParams) -> Tensor:
    """Mobile MQA block with pre-norm, layer scale and residual, [N, c, H, W] -> [N, c, H, W] (paper section 3.2)."""
    y = x if params.norm is None else batch_norm(x, params.norm)
    query = y
    if spec.query_stride > 1:
        query = query_pool(query, spec.query_stride, spec.padding)
        if params.query_norm is not None:
            query = batch_norm(query, params.query_norm)
    query = pointwise(query, params.query)
    key = value = y
    if spec.kv_stride > 1:
        assert params.key_down is not None
        assert params.value_down is not None
        key = depthwise(key, params.key_down, stride=spec.kv_stride, padding=spec.padding)
        value = depthwise(value, params.value_down, stride=spec.kv_stride, padding=spec.padding)
    out = attention(query, pointwise(key, params.key), pointwise(value, params.value), spec.heads)
    if spec.query_stride > 1:
        out = query_unpool(out, spec.query_stride)
    return _scale_add(pointwise(out, params.output), x, params.gamma, spec.residual)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(dk)) v with one key and one value head shared by all query heads.

    query [N, heads*dk, Hq, Wq] head-major, key [N, dk, Hk, Wk], value [N, dv, Hk, Wk] ->
    [N, heads*dv, Hq, Wq] head-major.
    """
    n, _, h, w = query.shape
    dim = key.shape[1]
    q = query.reshape(n, heads, dim, h * w).transpose(-1, -2)  # [N, heads, Hq*Wq, dk]
    k = key.reshape(n, 1, dim, -1)  # [N, 1, dk, Hk*Wk]
    v = value.reshape(n, 1, value.shape[1], -1).transpose(-1, -2)  # [N, 1, Hk*Wk, dv]
    out = torch.softmax((q * dim**-0.5) @ k, dim=-1) @ v  # [N, heads, Hq*Wq, dv]
    return out.transpose(-1, -2).reshape(n, -1, h, w)


def query_pool(x: Tensor, stride: int, padding: str) -> Tensor:
    """Average pool of the queries: [N, C, H, W] -> [N, C, H//s, W//s], "same": ceil(H/s), padding not counted."""
    return F.avg_pool2d(x, stride, stride, ceil_mode=padding == "same", count_include_pad=False)


def query_unpool(x: Tensor, stride: int) -> Tensor:
    """Bilinear up-sampling (align_corners=False) that undoes `query_pool`."""
    return F.interpolate(x, scale_factor=stride, mode="bilinear", align_corners=False)


def head(x: Tensor, spec: HeadSpec, params: HeadParams) -> Tensor:
    """1x1 + BN + act -> global average pool -> 1x1 + BN + act -> linear; [N, c_in, H, W] -> [N, features]."""
    if params.feat is not None:
        x = pointwise(x, params.feat, act=spec.act)
    x = x.mean((2, 3), keepdim=True)
    if params.hidden is not None:
        x = pointwise(x, params.hidden, act=spec.act)
    x = x.flatten(1)
    if params.classifier is not None:
        x = F.linear(x, params.classifier.weight, params.classifier.bias)
    return x


def run(x: Tensor, spec: Any, params: Any) -> Tensor:
    """The function that belongs to `spec`, applied to `x`. TypeError for a spec without one."""
    for kind, function in _FUNCTIONS.items():
        if isinstance(spec, kind):
            return function(x, spec, params)
    raise TypeError(f"run: expected spec of {', '.join(k.__name__ for k in _FUNCTIONS)}, got {type(spec).__name__}")


_FUNCTIONS: dict[type, Any] = {
    ConvSpec: conv,
    FusedIBSpec: fused_ib,
    HeadSpec: head,
    MQASpec: mobile_mqa,
    UIBSpec: uib,
}


def _scale_add(y: Tensor, x: Tensor, gamma: Tensor | None, residual: bool) -> Tensor:
    if gamma is not None:
        y = y * gamma.view(-1, 1, 1)
    return y + x if residual else y
