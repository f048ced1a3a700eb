"""Blocks with any combination of stages, their definition in plain torch, and the 2x rule for the kernel tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnv4_ops import _native
from mnv4_ops.check import native_block, random_module
from mnv4_ops.reference import functional as R
from mnv4_ops.spec import HeadSpec, Spec, head_spec, ledger

STAGES = ("start", "expand", "mid", "project")
THREADS = (1, 2, 3, 4)
RMS_FROM = 1024
NAN = float("nan")


def core() -> Any:
    assert _native.core is not None
    return _native.core


def random_layer(c_out: int, per_group: int, kernel: int, *, bn: bool = True, bias: bool = False) -> R.ConvBN:
    """Random weights from torch's global generator, outputs of about unit size."""
    weight = torch.randn(c_out, per_group, kernel, kernel) / (per_group * kernel * kernel) ** 0.5
    norm = None
    if bn:
        scale, shift, mean = torch.rand(c_out) + 0.5, torch.randn(c_out) * 0.2, torch.randn(c_out) * 0.1
        norm = R.BatchNorm(scale, shift, mean, torch.rand(c_out) + 0.5, 1e-3)
    return R.ConvBN(weight, norm, torch.randn(c_out) * 0.1 if bias else None)


def pack(native: Any, stage: int, layer: R.ConvBN, gamma: Tensor | None = None) -> None:
    def address(t: Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    bn = layer.bn
    norm = (0, 0, 0, 0, 0.0) if bn is None else (*map(address, bn[:4]), bn.eps)
    native.pack(stage, address(layer.weight), address(layer.bias), *norm, address(gamma))


@dataclass
class TestBlock:
    """A block as `_core.Block` takes it (`desc`), with random parameters by stage index and a layer scale, if any."""

    __test__ = False

    desc: dict[str, Any]
    layers: dict[int, R.ConvBN]
    gamma: Tensor | None = None

    @classmethod
    def random(cls, *, bn: bool = True, bias: bool = False, gamma: bool = False, **desc: Any) -> TestBlock:
        c_in, c_mid, c_out = desc["c_in"], desc["c_mid"], desc["c_out"]
        layers = {}
        if desc.get("start_kernel"):
            layers[0] = random_layer(c_in, 1, desc["start_kernel"], bn=bn, bias=bias)
        if desc.get("expand"):
            layers[1] = random_layer(c_mid, c_in, desc.get("expand_kernel", 1), bn=bn, bias=bias)
        if desc.get("mid_kernel"):
            layers[2] = random_layer(c_mid, 1, desc["mid_kernel"], bn=bn, bias=bias)
        if desc.get("project"):
            layers[3] = random_layer(c_out, c_mid, 1, bn=bn, bias=bias)
        return cls(desc, layers, torch.rand(c_out) * 0.8 + 0.2 if gamma else None)

    def native(self) -> Any:
        block = core().Block(**self.desc)
        for stage, layer in self.layers.items():
            pack(block, stage, layer, self.gamma if stage == 3 else None)
        return block

    def reference(self, x: Tensor) -> Tensor:
        """Plain torch on the unfolded parameters, in the dtype of `x`."""
        y = x
        for stage, layer in self.layers.items():
            name = STAGES[stage]
            act = self.desc.get(f"{name}_act", "none")
            scaled = self.gamma is not None and name == "project"
            y = R.conv_bn_act(
                y,
                R.cast(layer, x.dtype),
                stride=self.desc.get(f"{name}_stride", 1),
                act="none" if scaled else act,
                padding=self.desc.get("padding", "symmetric"),
                groups=y.shape[1] if name in ("start", "mid") else 1,
            )
            if scaled:
                # the layer scale belongs to the convolution: before an activation, if there is one
                y = R.activation(y * self.gamma.to(x.dtype).view(-1, 1, 1), act)
        return y + x if self.desc.get("residual") else y


def ib(c_in: int, c_mid: int, c_out: int, act: str = "relu", **desc: Any) -> dict[str, Any]:
    """Description of expand + project with `act` behind all but the last stage; further stages by keyword."""
    mid_act = act if desc.get("mid_kernel") else "none"
    base = {"c_in": c_in, "c_mid": c_mid, "c_out": c_out, "expand": True, "expand_act": act, "mid_act": mid_act}
    return {**base, "project": True, **desc}


# one description of each structure, odd channels; the act is that of the stages that have one
STRUCTURES: dict[str, dict[str, Any]] = {
    "depthwise": {"c_in": 19, "c_mid": 19, "c_out": 19, "start_kernel": 3, "start_act": "ACT"},
    "pointwise": {"c_in": 19, "c_mid": 19, "c_out": 37, "project": True, "project_act": "ACT"},
    "conv1x1": {"c_in": 19, "c_mid": 37, "c_out": 37, "expand": True, "expand_act": "ACT"},
    "conv3x3": {
        "c_in": 3, "c_mid": 21, "c_out": 21,
        "expand": True, "expand_kernel": 3, "expand_stride": 2, "expand_act": "ACT",
    },
    "dw+pw": {"c_in": 19, "c_mid": 19, "c_out": 37, "start_kernel": 5, "start_act": "ACT", "project": True},
    "FFN": ib(19, 53, 19, "ACT", residual=True),
    "FusedIB": ib(19, 53, 21, "ACT", expand_kernel=3, expand_stride=2),
    # channels that the Winograd transforms serve
    "FusedIB24": ib(24, 53, 21, "ACT", expand_kernel=3, expand_stride=2),
    "ConvNext": ib(19, 53, 19, "ACT", start_kernel=5, residual=True),
    "IB": ib(19, 53, 21, "ACT", mid_kernel=3, mid_stride=2),
    "ExtraDW": ib(19, 53, 19, "ACT", start_kernel=3, mid_kernel=5, residual=True),
}  # fmt: skip


def structure(name: str, act: str = "relu", **more: Any) -> dict[str, Any]:
    return {key: act if value == "ACT" else value for key, value in STRUCTURES[name].items()} | more


def nan_output(shape: Sequence[int]) -> Tensor:
    """NaN everywhere; canonical channels_last where the shape has rank 4."""
    if len(shape) == 2:
        return torch.full(tuple(shape), NAN)
    n, c, h, w = shape
    return torch.full((n, h, w, c), NAN).permute(0, 3, 1, 2)


def run(native: Any, x: Tensor, threads: int = 1) -> Tensor:
    """Output of a Block, Head or Program on float32 [N, C, H, W] of any strides."""
    n, _, h, w = x.shape
    if isinstance(native, core().Head):
        out = nan_output((n, native.output_features()))
    else:
        out = nan_output(native.output_shape(n, h, w))
    address, sizes = x.data_ptr(), (n, h, w, tuple(x.stride()), out.data_ptr())
    if isinstance(native, core().Program):
        workspace = torch.full((native.workspace_bytes(n, h, w, threads) // 4,), NAN)
        native.run(address, *sizes, workspace.data_ptr(), threads)
    else:
        native.run(address, *sizes, threads)
    return out


def assert_2x(
    output: Tensor, plain: Tensor, truth: Tensor, sample: tuple[Tensor, Tensor] | None = None, independent: int = 0
) -> None:
    """The 2x rule [13]. `sample`: (plain, truth) of the same block on more inputs; on a handful of elements torch may
    be exact by luck, its error is then the largest over these too. `independent`: how many errors are independent
    where elements follow from fewer values, as behind a layer of few channels; an rms takes `RMS_FROM` of them.
    """
    assert output.shape == truth.shape
    if truth.numel() == 0:
        return
    error, error_torch = (output.double() - truth).abs(), (plain.double() - truth).abs()
    allowed, scale = float(error_torch.max()), float(truth.abs().max())
    if sample is not None:
        allowed = max(allowed, float((sample[0].double() - sample[1]).abs().max()))
        scale = max(scale, float(sample[1].abs().max()))
    ulp = float(np.spacing(np.float32(scale)))
    worst = float(error.max())
    assert worst <= 2 * allowed + 2 * ulp, f"max error {worst:.3g}, torch {allowed:.3g}, ulp {ulp:.3g}"
    if (independent or truth.numel()) >= RMS_FROM:
        rms, rms_torch = (float(e.square().mean().sqrt()) for e in (error, error_torch))
        assert rms <= max(2 * rms_torch, ulp * 1e-3), f"rms error {rms:.3g}, torch {rms_torch:.3g}"


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()


def model_program(model: str, seed: int = 0) -> tuple[Any, list[tuple[Spec, Any]]]:
    """A whole convolutional model as one Program, and its (spec, parameters) in order."""
    # the head holds the last 1x1 as well
    specs = [e.spec for e in ledger(model) if e.name not in ("4.0", "pool", "conv_head", "classifier")]
    parts: list[tuple[Spec, Any]] = []
    for i, spec in enumerate([*specs, head_spec(model)]):
        parts.append((spec, random_module(spec, seed + i).params()))
    assert isinstance(parts[-1][0], HeadSpec)
    return core().Program([native_block(spec, params) for spec, params in parts]), parts


@torch.no_grad()
def reference_chain(parts: list[tuple[Spec, Any]], x: Tensor) -> Tensor:
    for spec, params in parts:
        x = R.run(x, spec, R.cast(params, x.dtype))
    return x
