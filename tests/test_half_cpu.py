"""float16 and bfloat16 on a CPU with their arithmetic: ops and a whole model by the 2x rule, and what is not served."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rule import assert_2x
from torch import Tensor, nn

import mnv4_ops
from mnv4_ops import _native, patch
from mnv4_ops.check import random_module
from mnv4_ops.ops.layout import DTYPES
from mnv4_ops.reference import randomize_
from mnv4_ops.spec import ConvSpec, FusedIBSpec, MQASpec, Spec, UIBSpec

pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")


def served(*dtypes: tuple[str, torch.dtype]) -> pytest.MarkDecorator:
    """Parametrizes `dtype`; skipped on a CPU without its arithmetic."""
    return pytest.mark.parametrize(
        "dtype",
        [
            pytest.param(
                dtype, marks=pytest.mark.skipif(dtype not in DTYPES["cpu"], reason=f"no ARM CPU with {name}"), id=name
            )
            for name, dtype in dtypes
        ],
    )


FP16, BF16 = ("fp16", torch.float16), ("bf16", torch.bfloat16)


@pytest.fixture(autouse=True)
def _off() -> Any:
    yield
    patch.disable()


class _Depthwise(nn.Module):
    """A depthwise convolution alone is no block that is patched: the op, while mnv4_ops is enabled."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float64 or not patch._switch.on:
            return self.block(x)
        norm = self.block.bn1
        params = [self.block.conv.weight, None, norm.weight, norm.bias, norm.running_mean, norm.running_var]
        return torch.ops.mnv4.depthwise(x, params, [norm.eps], 1, "symmetric", "relu")


def plain_or_op(spec: ConvSpec, dtype: torch.dtype) -> nn.Module:
    model = random_module(spec).to(dtype)
    return _Depthwise(model) if spec.depthwise else model


def outputs(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Tensor]:
    """Of the kernels, of plain torch in the same dtype, of float64 on the same parameters."""
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    with torch.inference_mode():
        plain, double = model(x), copy.deepcopy(model).double()(x.double())
        with mnv4_ops.enable():
            return model(x), plain, double


SPECS: list[tuple[Spec, int, int]] = [
    (UIBSpec(64, 192, 96, start_kernel=5, mid_kernel=5, stride=2), 14, 14),  # conv_small 2.0, ExtraDW
    (UIBSpec(96, 192, 96, mid_kernel=3, residual=True), 14, 14),  # IB
    (UIBSpec(96, 384, 96, start_kernel=3, residual=True), 9, 14),  # ConvNext
    (UIBSpec(96, 576, 128, start_kernel=3, mid_kernel=3, stride=2), 14, 14),
    (UIBSpec(128, 512, 128, mid_kernel=5, residual=True), 7, 7),
    (UIBSpec(128, 512, 128, residual=True), 7, 7),  # FFN
    (UIBSpec(24, 72, 40, start_kernel=3, mid_kernel=5, stride=2, act="gelu"), 11, 13),
    (UIBSpec(20, 60, 20, mid_kernel=3, act="relu6", padding="same", residual=True), 10, 9),
    (UIBSpec(32, 64, 32, mid_kernel=3, residual=True, layer_scale=True), 12, 12),
    (ConvSpec(3, 32, kernel=3, stride=2), 48, 50),  # stem
    (ConvSpec(32, 32, kernel=3, stride=2), 24, 24),
    (ConvSpec(32, 32), 16, 16),
    (FusedIBSpec(16, 48, 32, stride=2), 18, 18),
    (ConvSpec(20, 24, kernel=3), 7, 8),  # runs of terms that are no multiple of 8
    (MQASpec(48, 2, 24, 16, kv_stride=2), 10, 7),
]


@served(FP16, BF16)
@pytest.mark.parametrize(("spec", "h", "w"), SPECS, ids=lambda v: v.kind if isinstance(v, Spec) else str(v))
def test_parity(dtype: torch.dtype, spec: Spec, h: int, w: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_module(spec).to(dtype)
    x = torch.randn(2, spec.channels[0], h, w).to(dtype)
    if h % 2 == 0:
        x = x.to(memory_format=torch.channels_last)
    got, plain, double = outputs(model, x, monkeypatch)
    assert_2x(got, plain, double)
    if got.dim() == 4:
        assert got.is_contiguous(memory_format=torch.channels_last)
    assert bool(torch.isfinite(got).all())


@served(FP16, BF16)
@pytest.mark.parametrize(("widths", "h", "w"), [((128, 960, 1280, 1000), 7, 7), ((40, 96, 72, 37), 5, 4)], ids=str)
def test_head(dtype: torch.dtype, widths: tuple[int, int, int, int], h: int, w: int) -> None:
    c_in, feat, hidden, classes = widths
    layers = [
        nn.Conv2d(c_in, feat, 1, bias=False), nn.BatchNorm2d(feat), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(feat, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(), nn.Flatten(),
        nn.Linear(hidden, classes),
    ]  # fmt: skip
    model = randomize_(nn.Sequential(*layers).eval()).to(dtype)
    params: list[Tensor | None] = []
    for conv, norm in ((layers[0], layers[1]), (layers[4], layers[5])):
        params += [conv.weight, None, norm.weight, norm.bias, norm.running_mean, norm.running_var]
    params += [layers[8].weight, layers[8].bias, None, None, None, None]
    x = torch.randn(3, c_in, h, w).to(dtype)
    with torch.inference_mode():
        plain, double = model(x), copy.deepcopy(model).double()(x.double())
        assert_2x(torch.ops.mnv4.head(x, params, [1e-5, 1e-5, 0.0], "relu"), plain, double)


@served(FP16, BF16)
@pytest.mark.parametrize("size", [(1, 96, 96), (2, 65, 70)], ids=str)
def test_whole_model(dtype: torch.dtype, size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    model = randomize_(timm.create_model("mobilenetv4_conv_small")).eval().to(dtype)
    n, h, w = size
    x = torch.randn(n, 3, h, w).to(dtype).to(memory_format=torch.channels_last)
    assert_2x(*outputs(model, x, monkeypatch))
    with torch.inference_mode(), mnv4_ops.enable():
        report = mnv4_ops.explain(model, x)
    assert report.served
    assert not report.fallbacks


@served(FP16, BF16)
@pytest.mark.parametrize("kernel", [3, 5])
def test_convolutions_without_batch_norm(dtype: torch.dtype, kernel: int) -> None:
    x = torch.randn(1, 48, 12, 12).to(dtype)
    none: list[Tensor | None] = [None] * 4
    for depthwise in (True, False):
        weight = torch.randn(48, 1 if depthwise else 48, kernel, kernel) / (kernel * (1 if depthwise else 7))
        weight, bias = weight.to(dtype), torch.randn(48).to(dtype)
        args = {"padding": kernel // 2, "groups": 48 if depthwise else 1}
        plain = nn.functional.conv2d(x, weight, bias, **args)
        double = nn.functional.conv2d(x.double(), weight.double(), bias.double(), **args)
        op = torch.ops.mnv4.depthwise if depthwise else torch.ops.mnv4.conv_bn_act
        assert_2x(op(x, [weight, bias, *none], [0.0], 1, "symmetric", "none"), plain, double)


@served(FP16, BF16)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinities_and_nan_go_through(dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (ConvSpec(32, 48), ConvSpec(48, 48, kernel=5, depthwise=True), ConvSpec(3, 16, kernel=3, stride=2)):
        model = plain_or_op(spec, dtype)
        x = torch.randn(1, spec.channels[0], 9, 9).to(dtype)
        x[0, 1, 4, 3] = value
        got, plain, _ = outputs(model, x, monkeypatch)
        assert torch.equal(torch.isnan(got), torch.isnan(plain)), spec
        assert torch.equal(torch.isinf(got), torch.isinf(plain)), spec
        assert torch.equal(torch.sign(got[torch.isinf(got)]), torch.sign(plain[torch.isinf(plain)])), spec


@served(FP16)
def test_sums_beyond_the_range_of_16_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_module(ConvSpec(32, 16)).to(dtype)
    with torch.no_grad():
        conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        conv.weight[:, :16], conv.weight[:, 16:] = 1.0, -1.0
    x = torch.full((1, 32, 4, 4), 20000.0).to(dtype)
    got, plain, _ = outputs(model, x, monkeypatch)
    assert bool(torch.isfinite(plain).all())
    assert torch.allclose(got.float(), plain.float(), rtol=2e-3, atol=1e-3)


@served(FP16, BF16)
@pytest.mark.parametrize("scale", [1e-6, 3e-3, 700.0, 1e6])
def test_unusual_scales(dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (ConvSpec(32, 48), ConvSpec(32, 32, kernel=3, depthwise=True)):
        model = plain_or_op(spec, dtype)
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).float()
        with torch.no_grad():
            norm.running_mean.mul_(1 / scale)
            norm.running_var.fill_(1.0 / scale**2)
            norm.eps = 0.0
            next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight.mul_(min(1 / scale, 1000.0))
        x = torch.randn(1, 32, 8, 8).to(dtype)
        assert_2x(*outputs(model, x, monkeypatch))


@served(FP16, BF16)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    model = random_module(UIBSpec(64, 192, 96, start_kernel=5, mid_kernel=5, stride=2)).to(dtype)
    x = torch.randn(1, 64, 28, 28).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        with torch.inference_mode(), mnv4_ops.enable():
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(model(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@served(FP16, BF16)
def test_attention(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, heads, 9, d).to(dtype) for heads, d in ((3, 16), (1, 16), (1, 20)))
    plain = nn.functional.scaled_dot_product_attention(q, k.expand(2, 3, 9, 16), v.expand(2, 3, 9, 20))
    double = nn.functional.scaled_dot_product_attention(
        q.double(), k.expand(2, 3, 9, 16).double(), v.expand(2, 3, 9, 20).double()
    )
    assert_2x(torch.ops.mnv4.mqa_attention(q, k, v), plain, double)


def test_without_kernels_the_original_forward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MNV4_OPS_STRICT", raising=False)
    for dtype in {torch.float16, torch.bfloat16} - set(DTYPES["cpu"]):
        x = torch.randn(1, 2, 3, 4).to(dtype)
        with pytest.raises(ValueError, match="float32"):
            torch.ops.mnv4.mqa_attention(x, x[:, :1], x[:, :1])
        for spec in (ConvSpec(32, 32), MQASpec(32, 2, 16, 16)):
            model, x = random_module(spec).to(dtype), torch.randn(1, 32, 8, 8).to(dtype)
            with torch.inference_mode():
                plain = model(x)
                with mnv4_ops.enable():
                    report = mnv4_ops.explain(model, x)
                    assert torch.equal(model(x), plain)
            assert not report.served
            assert "kernels take float32" in str(report)
