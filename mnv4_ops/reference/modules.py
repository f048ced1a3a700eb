"""MobileNetV4 blocks as plain PyTorch modules, built from specs; parameter names are timm's.

`module.spec` describes a block and `module.params()` gives the unfolded parameters for
`functional.run(x, spec, params)`, which computes what `module(x)` computes in eval mode.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec import ConvSpec, FusedIBSpec, MQASpec, Spec, UIBSpec
from . import functional as R

__all__ = ["UIB", "Conv2d", "ConvBNAct", "ConvNormAct", "FusedIB", "LayerScale", "MobileMQA", "build_block"]


class Conv2d(nn.Conv2d):
    """nn.Conv2d without bias, square odd kernel, padding by name: "symmetric" (k//2) or TF "same"."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        padding: str = "symmetric",
        **factory: Any,
    ) -> None:
        # at stride 1 both paddings are the same zeros
        tf_same = padding == "same" and stride > 1
        super().__init__(
            c_in, c_out, kernel, stride, 0 if tf_same else kernel // 2, groups=groups, bias=False, **factory
        )
        self.tf_same = tf_same

    def forward(self, input: Tensor) -> Tensor:
        if self.tf_same:
            input = R.pad2d(input, self.kernel_size[0], self.stride[0], "same")
        return super().forward(input)


class LayerScale(nn.Module):
    """Multiplies each channel of [N, C, H, W] by gamma [C]."""

    def __init__(self, channels: int, value: float = 1e-5, **factory: Any) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.full((channels,), value, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(1, -1, 1, 1)


def make_act(act: str) -> nn.Module:
    """Module of an activation name; gelu is the exact one."""
    return {"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "gelu": nn.GELU}[act]()


def unfolded(conv: nn.Conv2d, bn: nn.BatchNorm2d | None = None) -> R.ConvBN:
    """Unfolded parameters of a convolution and the batch norm behind it."""
    return R.ConvBN(conv.weight, batch_norm_params(bn) if bn is not None else None, conv.bias)


def batch_norm_params(bn: nn.BatchNorm2d) -> R.BatchNorm:
    """Unfolded parameters and statistics of a BatchNorm2d with affine and running statistics."""
    if bn.running_mean is None or bn.running_var is None or not bn.affine:
        raise ValueError("batch_norm_params: expected BatchNorm2d with affine=True and track_running_stats=True")
    return R.BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)


class ConvNormAct(nn.Module):
    """conv, bn, act: one stage inside a UIB (timm `ConvNormAct`)."""

    def __init__(self, spec: ConvSpec, norm: dict[str, Any] | None = None, **factory: Any) -> None:
        super().__init__()
        self.spec = spec
        groups = spec.c_in if spec.depthwise else 1
        self.conv = Conv2d(spec.c_in, spec.c_out, spec.kernel, spec.stride, groups, spec.padding, **factory)
        self.bn = nn.BatchNorm2d(spec.c_out, **(norm or {}), **factory)
        self.act = make_act(spec.act)

    def params(self) -> R.ConvBN:
        return unfolded(self.conv, self.bn)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class ConvBNAct(nn.Module):
    """conv, bn1, act: a block of its own (timm `ConvBnAct`). [N, c_in, H, W] -> [N, c_out, ceil(H/s), ceil(W/s)]."""

    def __init__(self, spec: ConvSpec, norm: dict[str, Any] | None = None, **factory: Any) -> None:
        super().__init__()
        self.spec = spec
        groups = spec.c_in if spec.depthwise else 1
        self.conv = Conv2d(spec.c_in, spec.c_out, spec.kernel, spec.stride, groups, spec.padding, **factory)
        self.bn1 = nn.BatchNorm2d(spec.c_out, **(norm or {}), **factory)
        self.act = make_act(spec.act)

    def params(self) -> R.ConvBN:
        return unfolded(self.conv, self.bn1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn1(self.conv(x)))


class UIB(nn.Module):
    """Universal Inverted Bottleneck: ExtraDW, IB, ConvNext and FFN (timm `UniversalInvertedResidual`)."""

    def __init__(self, spec: UIBSpec, norm: dict[str, Any] | None = None, **factory: Any) -> None:
        super().__init__()
        self.spec = s = spec

        def stage(c_in: int, c_out: int, kernel: int, stride: int, act: str, depthwise: bool) -> nn.Module:
            if not kernel:
                return nn.Identity()
            return ConvNormAct(ConvSpec(c_in, c_out, kernel, stride, act, s.padding, depthwise), norm, **factory)

        self.dw_start = stage(s.c_in, s.c_in, s.start_kernel, s.start_stride, "none", True)
        self.pw_exp = stage(s.c_in, s.c_mid, 1, 1, s.act, False)
        self.dw_mid = stage(s.c_mid, s.c_mid, s.mid_kernel, s.mid_stride, s.act, True)
        self.pw_proj = stage(s.c_mid, s.c_out, 1, 1, "none", False)
        self.layer_scale = LayerScale(s.c_out, **factory) if s.layer_scale else nn.Identity()

    def params(self) -> R.UIBParams:
        def stage(module: nn.Module) -> Any:
            return module.params() if isinstance(module, ConvNormAct) else None

        gamma = self.layer_scale.gamma if isinstance(self.layer_scale, LayerScale) else None
        return R.UIBParams(stage(self.dw_start), stage(self.pw_exp), stage(self.dw_mid), stage(self.pw_proj), gamma)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pw_proj(self.dw_mid(self.pw_exp(self.dw_start(x))))
        y = self.layer_scale(y)
        return y + x if self.spec.residual else y


class FusedIB(nn.Module):
    """Dense k x k expand and 1x1 project (timm `EdgeResidual`)."""

    def __init__(self, spec: FusedIBSpec, norm: dict[str, Any] | None = None, **factory: Any) -> None:
        super().__init__()
        self.spec = s = spec
        norm = norm or {}
        self.conv_exp = Conv2d(s.c_in, s.c_mid, s.kernel, s.stride, padding=s.padding, **factory)
        self.bn1 = nn.BatchNorm2d(s.c_mid, **norm, **factory)
        self.act1 = make_act(s.act)
        self.conv_pwl = Conv2d(s.c_mid, s.c_out, 1, **factory)
        self.bn2 = nn.BatchNorm2d(s.c_out, **norm, **factory)

    def params(self) -> R.FusedIBParams:
        return R.FusedIBParams(unfolded(self.conv_exp, self.bn1), unfolded(self.conv_pwl, self.bn2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv_pwl(self.act1(self.bn1(self.conv_exp(x)))))
        return y + x if self.spec.residual else y


class QueryPool(nn.Module):
    """Average pool of the queries; no padding with "symmetric", TF's with "same"."""

    def __init__(self, stride: int, padding: str) -> None:
        super().__init__()
        self.stride = stride
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return R.query_pool(x, self.stride, self.padding)


class MultiQueryAttention(nn.Module):
    """Attention of h query heads to one key and one value head (timm `MultiQueryAttention2d`): [N, C, H, W] -> same."""

    def __init__(self, spec: MQASpec, norm: dict[str, Any] | None = None, **factory: Any) -> None:
        super().__init__()
        self.spec = s = spec
        norm = norm or {}

        query: OrderedDict[str, nn.Module] = OrderedDict()
        if s.query_stride > 1:
            query["down_pool"] = QueryPool(s.query_stride, s.padding)
            query["norm"] = nn.BatchNorm2d(s.c, **norm, **factory)
        query["proj"] = Conv2d(s.c, s.heads * s.key_dim, 1, **factory)
        self.query = nn.Sequential(query)

        def key_or_value(dim: int) -> nn.Sequential:
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            if s.kv_stride > 1:
                layers["down_conv"] = Conv2d(s.c, s.c, s.kv_kernel, s.kv_stride, s.c, s.padding, **factory)
                layers["norm"] = nn.BatchNorm2d(s.c, **norm, **factory)
            layers["proj"] = Conv2d(s.c, dim, 1, **factory)
            return nn.Sequential(layers)

        self.key = key_or_value(s.key_dim)
        self.value = key_or_value(s.value_dim)

        output: OrderedDict[str, nn.Module] = OrderedDict()
        if s.query_stride > 1:
            output["upsample"] = nn.Upsample(scale_factor=s.query_stride, mode="bilinear", align_corners=False)
        output["proj"] = Conv2d(s.heads * s.value_dim, s.c, 1, **factory)
        self.output = nn.Sequential(output)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.spec.heads
        q, k, v = self.query(x), self.key(x), self.value(x)
        n, _, h, w = q.shape
        q = q.reshape(n, heads, -1, h * w).transpose(-1, -2).contiguous()  # [N, h, Hq*Wq, dk]
        k = k.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()  # [N, 1, Hk*Wk, dk]
        v = v.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()  # [N, 1, Hk*Wk, dv]
        out = F.scaled_dot_product_attention(q, k, v)
        return self.output(out.transpose(-1, -2).reshape(n, -1, h, w))


class MobileMQA(nn.Module):
    """Pre-norm, multi-query attention, layer scale and residual (timm `MobileAttention`)."""

    def __init__(self, spec: MQASpec, norm: dict[str, Any] | None = None, **factory: Any) -> None:
        super().__init__()
        self.spec = spec
        self.norm = nn.BatchNorm2d(spec.c, **(norm or {}), **factory) if spec.norm else nn.Identity()
        self.attn = MultiQueryAttention(spec, norm, **factory)
        self.layer_scale = LayerScale(spec.c, **factory) if spec.layer_scale else nn.Identity()

    def params(self) -> R.MQAParams:
        def proj(branch: nn.Sequential) -> R.ConvBN:
            return R.ConvBN(branch.get_submodule("proj").weight)

        def down(branch: nn.Sequential) -> R.ConvBN | None:
            if self.spec.kv_stride == 1:
                return None
            norm = branch.get_submodule("norm")
            assert isinstance(norm, nn.BatchNorm2d)
            return R.ConvBN(branch.get_submodule("down_conv").weight, batch_norm_params(norm))

        attn = self.attn
        query_norm = attn.query.get_submodule("norm") if self.spec.query_stride > 1 else None
        return R.MQAParams(
            norm=batch_norm_params(self.norm) if isinstance(self.norm, nn.BatchNorm2d) else None,
            query=proj(attn.query),
            key=proj(attn.key),
            value=proj(attn.value),
            output=proj(attn.output),
            key_down=down(attn.key),
            value_down=down(attn.value),
            query_norm=batch_norm_params(query_norm) if isinstance(query_norm, nn.BatchNorm2d) else None,
            gamma=self.layer_scale.gamma if isinstance(self.layer_scale, LayerScale) else None,
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_scale(self.attn(self.norm(x)))
        return y + x if self.spec.residual else y


_BLOCKS: dict[type[Spec], Any] = {ConvSpec: ConvBNAct, FusedIBSpec: FusedIB, MQASpec: MobileMQA, UIBSpec: UIB}


def build_block(spec: Spec, norm: dict[str, Any] | None = None, **factory: Any) -> nn.Module:
    """The module of a block spec. `norm`: keywords of BatchNorm2d (eps, momentum); `factory`: device, dtype."""
    if type(spec) not in _BLOCKS:
        raise TypeError(f"build_block: expected spec of {', '.join(c.__name__ for c in _BLOCKS)}, got {spec!r}")
    return _BLOCKS[type(spec)](spec, norm, **factory)
