"""How the arguments of the ops are laid out, and what they must be. Every error is raised before any memory is touched.

`params` is a list of optional tensors, six per stage in the order of `PER_STAGE`, stages in the order of `STAGES[op]`,
then the layer scale `gamma` for the ops in `WITH_GAMMA`. An absent stage is six times None. A stage without BatchNorm
has None for all four `bn_*`; `bn_mean` and `bn_var` come together, `bn_weight` and `bn_bias` are optional beside them.
`eps` has one number per stage. Weights are `[c_out, c_in / groups, k, k]`, everything else `[c_out]` of its stage.

All weights, conv biases and gamma have the dtype of the first weight, one of `DTYPES` of its device; the tensors of a
BatchNorm may be float32 beside 16-bit weights, as torch allows.

The stages `norm` and `query_norm` of `mobile_mqa` are a BatchNorm alone: their weight and conv_bias are None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mnv4_ops import _native
from mnv4_ops.spec import ACTS, PADDINGS

PER_STAGE = ("weight", "conv_bias", "bn_weight", "bn_bias", "bn_mean", "bn_var")
STAGES = {
    "uib": ("start", "expand", "mid", "project"),
    "fused_ib": ("expand", "project"),
    "conv_bn_act": ("expand",),
    "pointwise": ("project",),
    "depthwise": ("start",),
    "depthwise_pointwise": ("start", "project"),
    "head": ("feat", "hidden", "classifier"),
    "mobile_mqa": ("norm", "query_norm", "query", "key_down", "key", "value_down", "value", "output"),
}
WITH_GAMMA = ("uib", "fused_ib", "mobile_mqa")
NATIVE_STAGE = {"start": 0, "expand": 1, "mid": 2, "project": 3, "feat": 0, "hidden": 1, "classifier": 2}
NATIVE_STAGE |= {name: i for i, name in enumerate(STAGES["mobile_mqa"])}


# beside float32, by tier: MNV4_OPS_CPU_ISA may ask for one that has less than the machine
_HALF = {"neon_fp16": (torch.float16,), "neon_bf16": (torch.float16, torch.bfloat16)}


def _half_on_cpu() -> tuple[torch.dtype, ...]:
    core = _native.core
    return _HALF.get(core.cpu_info()["tier"], ()) if core is not None else ()


# by type of device; fake tensors have the device that they stand for
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, *_half_on_cpu()),
    "cuda": (torch.float16, torch.bfloat16, torch.float32),
    "meta": (torch.float16, torch.bfloat16, torch.float32),
}

Params = Sequence[Tensor | None]


@dataclass(frozen=True)
class Layout:
    """A checked op call without its input: what the native block is made from, and the shape of the output.

    `dtype` and `device` are those of the weights; None for a head without any.
    """

    op: str
    native: tuple[tuple[str, Any], ...]  # keywords of the native class
    stages: tuple[tuple[int, int], ...]  # (native stage, index of its first entry in params)
    gamma: int | None  # index in params
    c_in: int
    c_out: int
    stride: int = 1
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    query_stride: int = (
        1  # of an attention block, whose output has `query_stride` times the rows and columns of queries
    )

    @property
    def pooled(self) -> bool:
        return self.op == "head"

    @property
    def native_class(self) -> str:
        """Name of the class in `_core` and in the GPU kernels that `native` are the keywords of."""
        return "Head" if self.pooled else "MobileMQA" if self.op == "mobile_mqa" else "Block"

    @property
    def gamma_stage(self) -> int:
        """The native stage that the layer scale is packed with."""
        return NATIVE_STAGE["output" if self.op == "mobile_mqa" else "project"]

    def output_shape(self, n: int, h: int, w: int) -> tuple[int, ...]:
        """Odd kernels give ceil(size / stride) under both paddings."""
        if self.pooled:
            return (n, self.c_out)
        if (q := self.query_stride) > 1:
            up = q - 1 if dict(self.native)["padding"] == "same" else 0
            return (n, self.c_out, (h + up) // q * q, (w + up) // q * q)
        s = self.stride
        return (n, self.c_out, h, w) if s == 1 else (n, self.c_out, (h + s - 1) // s, (w + s - 1) // s)

    def refuses(self, h: int, w: int) -> str | None:
        """What an input of h x w pixels should be, None if it is."""
        if (q := self.query_stride) == 1:
            return None
        native = dict(self.native)
        if native["residual"] and (h % q or w % q):
            return f"rows and columns divisible by {q} (query_stride, with a residual)"
        if native["padding"] != "same" and (h < q or w < q):
            return f"at least {q} rows and columns (query_stride)"
        return None


def _error(op: str, expected: str, got: object) -> ValueError:
    return ValueError(f"mnv4::{op}: expected {expected}, got {got}")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtypes_of(device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes that kernels on this device take."""
    return DTYPES.get(device.type, (torch.float32,))


def _one_of(op: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise _error(op, f"{name} to be one of {', '.join(map(str, allowed))}", repr(value))


class _Reader:
    """Takes the parameters of an op apart stage by stage and checks each tensor against the first weight."""

    def __init__(self, op: str, params: Params, eps: Sequence[float]) -> None:
        self.op, self.params, self.eps = op, params, eps
        self.names = STAGES[op]
        self.stages: list[tuple[int, int]] = []
        want = len(self.names) * len(PER_STAGE) + (op in WITH_GAMMA)
        if len(params) != want:
            raise _error(op, f"params to hold {want} entries (see mnv4_ops.ops.layout)", len(params))
        if len(eps) != len(self.names):
            raise _error(op, f"eps to hold {len(self.names)} numbers, one per stage", len(eps))
        self.device: torch.device | None = None
        self.dtype: torch.dtype | None = None

    def _tensor(self, name: str, t: Tensor, dims: int, norm: bool = False) -> None:
        if self.dtype is None and t.dtype in dtypes_of(t.device):
            self.dtype = t.dtype
        # in words what is allowed: the dtype of the first weight, or all that its device has
        if t.dtype is not self.dtype and not (norm and t.dtype is torch.float32):
            allowed = dtypes_of(t.device) if self.dtype is None else (self.dtype,)
            raise _error(self.op, f"{name} of dtype {' or '.join(map(name_of, allowed))}", name_of(t.dtype))
        if t.dim() != dims:
            raise _error(self.op, f"{name} with {dims} dimension{'s' * (dims > 1)}", f"shape {tuple(t.shape)}")
        if self.device is None:
            self.device = t.device
        elif t.device != self.device:
            raise _error(self.op, f"{name} on {self.device} like the other parameters", t.device)

    def stage(self, name: str, required: bool = False) -> tuple[int, int, int] | None:
        """(c_out, c_in per group, kernel) of a stage, or None where it is absent."""
        index = self.names.index(name)
        base = index * len(PER_STAGE)
        weight, *rest = self.params[base : base + len(PER_STAGE)]
        if weight is None:
            for part, t in zip(PER_STAGE[1:], rest, strict=True):
                if t is not None:
                    raise _error(self.op, f"{name}.{part} to be None without {name}.weight", f"shape {tuple(t.shape)}")
            if required:
                raise _error(self.op, f"{name}.weight to be a tensor", None)
            return None
        linear = name == "classifier"
        self._tensor(f"{name}.weight", weight, 2 if linear else 4)
        c_out, c_in = weight.shape[:2]
        kernel = 1 if linear else weight.shape[2]
        if not linear and weight.shape[2] != weight.shape[3]:
            raise _error(self.op, f"{name}.weight with a square kernel", f"shape {tuple(weight.shape)}")
        if c_out < 1 or c_in < 1:
            raise _error(self.op, f"{name}.weight with at least one channel", f"shape {tuple(weight.shape)}")
        for part, t in zip(PER_STAGE[1:], rest, strict=True):
            if t is None:
                continue
            self._tensor(f"{name}.{part}", t, 1, norm=part.startswith("bn_"))
            if t.shape[0] != c_out:
                raise _error(self.op, f"{name}.{part} with {c_out} elements", t.shape[0])
        _, bn_weight, bn_bias, bn_mean, bn_var = rest
        if (bn_mean is None) != (bn_var is None):
            raise _error(self.op, f"{name}.bn_mean and {name}.bn_var together", "one of them")
        if bn_mean is None and (bn_weight is not None or bn_bias is not None):
            raise _error(self.op, f"{name}.bn_mean and {name}.bn_var with {name}.bn_weight or bn_bias", "None")
        if bn_mean is not None and not self.eps[index] >= 0:
            raise _error(self.op, f"eps of {name} to be at least 0", self.eps[index])
        self.stages.append((NATIVE_STAGE[name], base))
        return c_out, c_in, kernel

    def norm(self, name: str, channels: int) -> bool:
        """Whether there is a BatchNorm without a convolution. To be asked after a stage with a weight, which has the
        dtype.
        """
        index = self.names.index(name)
        base = index * len(PER_STAGE)
        weight, bias, *rest = self.params[base : base + len(PER_STAGE)]
        for part, t in zip(PER_STAGE, (weight, bias), strict=False):
            if t is not None:
                raise _error(self.op, f"{name}.{part} to be None", f"shape {tuple(t.shape)}")
        if all(t is None for t in rest):
            return False
        if rest[2] is None or rest[3] is None:
            raise _error(self.op, f"{name}.bn_mean and {name}.bn_var together", "one of them, or neither")
        for part, t in zip(PER_STAGE[2:], rest, strict=True):
            if t is not None:
                self._tensor(f"{name}.{part}", t, 1, norm=True)
                if t.shape[0] != channels:
                    raise _error(self.op, f"{name}.{part} with {channels} elements", t.shape[0])
        if not self.eps[index] >= 0:
            raise _error(self.op, f"eps of {name} to be at least 0", self.eps[index])
        self.stages.append((NATIVE_STAGE[name], base))
        return True

    def gamma(self, c_out: int) -> int | None:
        t = self.params[-1]
        if t is None:
            return None
        self._tensor("gamma", t, 1)
        if t.shape[0] != c_out:
            raise _error(self.op, f"gamma with {c_out} elements", t.shape[0])
        return len(self.params) - 1

    def depthwise(self, name: str, channels: int | None, required: bool = False) -> tuple[int, int]:
        """(kernel, channels); kernel 0 where the stage is absent."""
        found = self.stage(name, required)
        if found is None:
            assert channels is not None
            return 0, channels
        c_out, per_group, kernel = found
        if per_group != 1:
            raise _error(self.op, f"{name}.weight of a depthwise convolution, [C, 1, k, k]", f"{per_group} per group")
        if channels is not None and c_out != channels:
            raise _error(self.op, f"{name}.weight with {channels} channels", c_out)
        _one_of(self.op, f"kernel of {name}.weight", kernel, (3, 5))
        return kernel, c_out

    def dense(self, name: str, c_in: int | None, kernels: tuple[int, ...]) -> tuple[int, int, int]:
        """(c_out, c_in, kernel) of a convolution over all channels."""
        found = self.stage(name, required=True)
        assert found is not None
        if c_in is not None and found[1] != c_in:
            raise _error(self.op, f"{name}.weight with {c_in} input channels", found[1])
        _one_of(self.op, f"kernel of {name}.weight", found[2], kernels)
        return found


def _check_residual(op: str, residual: bool, c_in: int, c_out: int, stride: int) -> None:
    if residual and (c_in != c_out or stride != 1):
        raise _error(
            op,
            "residual only with stride 1 and as many output as input channels",
            f"stride {stride}, {c_in} -> {c_out}",
        )


def _names(op: str, stride: int, padding: str, *acts: str) -> None:
    _one_of(op, "stride", stride, (1, 2))
    _one_of(op, "padding", padding, PADDINGS)
    for act in acts:
        _one_of(op, "act", act, ACTS)


def _finish(r: _Reader, c_in: int, c_out: int, stride: int, gamma: int | None = None, /, **native: Any) -> Layout:
    return Layout(r.op, tuple(native.items()), tuple(r.stages), gamma, c_in, c_out, stride, r.dtype, r.device)


def uib(params: Params, eps: Sequence[float], stride: int, padding: str, act: str, residual: bool) -> Layout:
    r = _Reader("uib", params, eps)
    _names("uib", stride, padding, act)
    c_mid, c_in, _ = r.dense("expand", None, (1,))
    start, _ = r.depthwise("start", c_in)
    mid, _ = r.depthwise("mid", c_mid)
    c_out, _, _ = r.dense("project", c_mid, (1,))
    if stride != 1 and not (start or mid):
        raise _error("uib", "stride 1 without a depthwise convolution", stride)
    _check_residual("uib", residual, c_in, c_out, stride)
    return _finish(
        r, c_in, c_out, stride, r.gamma(c_out),
        c_in=c_in, c_mid=c_mid, c_out=c_out, padding=padding, residual=residual,
        start_kernel=start, start_stride=1 if mid or not start else stride,
        expand=True, expand_act=act,
        mid_kernel=mid, mid_stride=stride if mid else 1, mid_act=act if mid else "none",
        project=True,
    )  # fmt: skip


def fused_ib(params: Params, eps: Sequence[float], stride: int, padding: str, act: str, residual: bool) -> Layout:
    r = _Reader("fused_ib", params, eps)
    _names("fused_ib", stride, padding, act)
    c_mid, c_in, kernel = r.dense("expand", None, (1, 3, 5) if stride == 1 else (3, 5))
    c_out, _, _ = r.dense("project", c_mid, (1,))
    _check_residual("fused_ib", residual, c_in, c_out, stride)
    return _finish(
        r, c_in, c_out, stride, r.gamma(c_out),
        c_in=c_in, c_mid=c_mid, c_out=c_out, padding=padding, residual=residual,
        expand=True, expand_kernel=kernel, expand_stride=stride, expand_act=act, project=True,
    )  # fmt: skip


def conv_bn_act(params: Params, eps: Sequence[float], stride: int, padding: str, act: str) -> Layout:
    r = _Reader("conv_bn_act", params, eps)
    _names("conv_bn_act", stride, padding, act)
    c_out, c_in, kernel = r.dense("expand", None, (1, 3, 5) if stride == 1 else (3, 5))
    return _finish(
        r, c_in, c_out, stride,
        c_in=c_in, c_mid=c_out, c_out=c_out, padding=padding,
        expand=True, expand_kernel=kernel, expand_stride=stride, expand_act=act,
    )  # fmt: skip


def pointwise(params: Params, eps: Sequence[float], act: str, residual: bool) -> Layout:
    r = _Reader("pointwise", params, eps)
    _names("pointwise", 1, "symmetric", act)
    c_out, c_in, _ = r.dense("project", None, (1,))
    _check_residual("pointwise", residual, c_in, c_out, 1)
    return _finish(
        r, c_in, c_out, 1, c_in=c_in, c_mid=c_in, c_out=c_out, project=True, project_act=act, residual=residual
    )


def depthwise(params: Params, eps: Sequence[float], stride: int, padding: str, act: str) -> Layout:
    r = _Reader("depthwise", params, eps)
    _names("depthwise", stride, padding, act)
    kernel, c = r.depthwise("start", None, required=True)
    return _finish(
        r, c, c, stride,
        c_in=c, c_mid=c, c_out=c, padding=padding, start_kernel=kernel, start_stride=stride, start_act=act,
    )  # fmt: skip


def depthwise_pointwise(
    params: Params, eps: Sequence[float], stride: int, padding: str, depthwise_act: str, act: str, residual: bool
) -> Layout:
    op = "depthwise_pointwise"
    r = _Reader(op, params, eps)
    _names(op, stride, padding, depthwise_act, act)
    kernel, c = r.depthwise("start", None, required=True)
    c_out, _, _ = r.dense("project", c, (1,))
    _check_residual(op, residual, c, c_out, stride)
    return _finish(
        r, c, c_out, stride,
        c_in=c, c_mid=c, c_out=c_out, padding=padding, residual=residual,
        start_kernel=kernel, start_stride=stride, start_act=depthwise_act, project=True, project_act=act,
    )  # fmt: skip


def head(params: Params, eps: Sequence[float], act: str, c_in: int) -> Layout:
    """`c_in` is the number of channels of the input: a bare pool has no weight that tells it."""
    r = _Reader("head", params, eps)
    _names("head", 1, "symmetric", act)
    widths = {"feat": 0, "hidden": 0, "classifier": 0}
    c = c_in
    for name in widths:
        found = r.stage(name)
        if found is not None:
            if found[1] != c:
                raise _error("head", f"{name}.weight with {c} input channels", found[1])
            if found[2] != 1:
                raise _error("head", f"{name}.weight with a 1x1 kernel", f"{found[2]}x{found[2]}")
            c = widths[name] = found[0]
    return _finish(
        r, c_in, c, 1,
        c_in=c_in, c_feat=widths["feat"], feat_act=act if widths["feat"] else "none",
        c_hidden=widths["hidden"], hidden_act=act if widths["hidden"] else "none", classes=widths["classifier"],
    )  # fmt: skip


def mobile_mqa(
    params: Params, eps: Sequence[float], heads: int, kv_stride: int, query_stride: int, padding: str, residual: bool
) -> Layout:
    op = "mobile_mqa"
    r = _Reader(op, params, eps)
    _names(op, 1, padding)
    _one_of(op, "kv_stride", kv_stride, (1, 2))
    _one_of(op, "query_stride", query_stride, (1, 2))
    if heads < 1:
        raise _error(op, "heads to be at least 1", heads)
    wide, c, _ = r.dense("query", None, (1,))
    key_dim, _, _ = r.dense("key", c, (1,))
    value_dim, _, _ = r.dense("value", c, (1,))
    if wide != heads * key_dim:
        raise _error(op, f"query.weight with heads * key_dim = {heads} * {key_dim} output channels", wide)
    c_out, _, _ = r.dense("output", heads * value_dim, (1,))
    if c_out != c:
        raise _error(op, f"output.weight with {c} output channels like the input", c_out)
    kernels = [r.depthwise(name, c, required=kv_stride > 1)[0] for name in ("key_down", "value_down")]
    if kv_stride == 1 and any(kernels):
        raise _error(op, "no key_down and value_down with kv_stride 1", f"kernels {kernels}")
    if kernels[0] != kernels[1]:
        raise _error(op, "key_down and value_down of one kernel size", kernels)
    norm, query_norm = r.norm("norm", c), r.norm("query_norm", c)
    if query_norm and query_stride == 1:
        raise _error(op, "no query_norm with query_stride 1", "one")
    gamma = r.gamma(c)
    r.stages.sort()
    layout = _finish(
        r, c, c, 1, gamma,
        c=c, heads=heads, key_dim=key_dim, value_dim=value_dim, kv_kernel=kernels[0] or 3, kv_stride=kv_stride,
        query_stride=query_stride, norm=norm, query_norm=query_norm, padding=padding, residual=residual,
    )  # fmt: skip
    return replace(layout, query_stride=query_stride)


LAYOUTS: dict[str, Callable[..., Layout]] = {
    f.__name__: f for f in (uib, fused_ib, conv_bn_act, pointwise, depthwise, depthwise_pointwise, head, mobile_mqa)
}


def check_input(op: str, x: Tensor, c_in: int | None) -> None:
    """`x` must be a [N, c_in, H, W] of a dtype of its device with at least one pixel; N may be 0."""
    if x.dim() != 4:
        raise _error(op, "x with 4 dimensions [N, C, H, W]", f"shape {tuple(x.shape)}")
    if x.dtype not in dtypes_of(x.device):
        raise _error(op, f"x of dtype {' or '.join(map(name_of, dtypes_of(x.device)))}", name_of(x.dtype))
    if x.layout is not torch.strided:
        raise _error(op, "x to be a dense tensor", x.layout)
    if c_in is not None and x.shape[1] != c_in:
        raise _error(op, f"x with {c_in} channels", f"{x.shape[1]} (shape {tuple(x.shape)})")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise _error(op, "x with at least one row and one column", f"shape {tuple(x.shape)}")


def check_size(layout: Layout, x: Tensor) -> None:
    """`x` must have a size that the block takes."""
    expected = layout.refuses(x.shape[2], x.shape[3])
    if expected is not None:
        raise _error(layout.op, f"x with {expected}", f"shape {tuple(x.shape)}")


def empty_output(layout: Layout, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The one way in which outputs are allocated, real and fake: canonical channels_last, whatever the sizes."""
    shape = layout.output_shape(x.shape[0], x.shape[2], x.shape[3])
    if layout.pooled:
        return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)
