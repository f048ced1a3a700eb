"""NaN and inf go through as in torch [14], and the activations on special values."""

from __future__ import annotations

import math
import platform
from typing import Any

import pytest
import torch
from kernel_helpers import STRUCTURES, TestBlock, assert_2x, core, model_program, reference_chain, run, structure
from torch import Tensor

from mnv4_ops import _native
from mnv4_ops.check import native_block
from mnv4_ops.reference import functional as R
from mnv4_ops.spec import ACTS, HeadSpec

pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")

INF, NAN = math.inf, math.nan


def assert_same_kind(output: Tensor, expected: Tensor) -> None:
    """NaN, +inf and -inf in the same places, and finite values close (the 2x rule looks at their rounding)."""
    for mask in (torch.isnan, torch.isposinf, torch.isneginf):
        torch.testing.assert_close(mask(output), mask(expected), rtol=0, atol=0)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3, equal_nan=True)


def reference(block: TestBlock, x: Tensor) -> Tensor:
    """torch in float32; with a GELU in float64, because torch's own float32 GELU of +inf is inf or NaN by layout."""
    gelu = "gelu" in block.desc.values()
    return block.reference(x.double()).float() if gelu else block.reference(x)


def acted(stage: str, act: str) -> TestBlock:
    """A block of one channel that hands its input to the activation of one stage as it is."""
    desc: dict[str, Any] = {"c_in": 1, "c_mid": 1, "c_out": 1}
    if stage == "start":
        desc |= {"start_kernel": 3, "start_act": act}
    elif stage == "dense":
        desc |= {"expand": True, "expand_kernel": 3, "expand_act": act}
    elif stage == "expand":
        desc |= {"expand": True, "expand_act": act}
    elif stage == "expand+project":
        desc |= {"expand": True, "expand_act": act, "project": True}
    elif stage == "mid":
        desc |= {"expand": True, "mid_kernel": 3, "mid_act": act, "project": True}
    else:
        desc |= {"project": True, "project_act": act}
    block = TestBlock.random(bn=False, **desc)
    for layer in block.layers.values():
        layer.weight.zero_()
        layer.weight[0, 0, layer.weight.shape[2] // 2, layer.weight.shape[3] // 2] = 1
    return block


SPECIAL = [
    NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 3e38, -3e38, 6.0, 6.0000005, 5.9999995, -6.0, 1e-7, -1e-7,
    0.5, -0.5, 1.3, -1.3, 2.7, -2.7, 4.9, -4.9, 5.5, -5.5, 5.6, -5.6, 8.0, -8.0, 13.0, -13.0, 14.5, -14.5, 1e2, -1e2,
]  # fmt: skip


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("stage", ["start", "dense", "expand", "expand+project", "mid", "project"])
def test_special_values(stage: str, act: str, tier: str) -> None:
    block = acted(stage, act)
    native = block.native()
    for value in SPECIAL:
        # one pixel per image: its neighbours would turn into NaN beside an inf
        x = torch.full((1, 1, 1, 1), value)
        output, expected = run(native, x), R.activation(x.double(), act).float()
        if act == "gelu":
            torch.testing.assert_close(output, expected, rtol=2e-6, atol=1e-7, equal_nan=True)
        else:
            torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)


def test_gelu_over_its_range(tier: str) -> None:
    block = acted("expand", "gelu")
    for low, high in ((-16, 16), (-1.5, 1.5), (-1e-3, 1e-3), (3.5, 6), (-6, -3.5)):
        x = torch.linspace(low, high, 30_000).view(1, 1, 200, 150)
        assert_2x(run(block.native(), x), torch.nn.functional.gelu(x), torch.nn.functional.gelu(x.double()))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_one_bad_pixel(name: str, act: str, value: float, tier: str) -> None:
    """Exactly the pixels that torch's operations reach, from a corner, an edge and the middle, in both layouts."""
    block = TestBlock.random(**structure(name, act))
    native = block.native()
    c = STRUCTURES[name]["c_in"]
    for y, x_ in ((0, 0), (6, 4), (12, 10), (5, 0)):
        x = torch.randn(2, c, 13, 11)
        x[1, c // 2, y, x_] = value
        expected = reference(block, x)
        for image in (x, x.contiguous(memory_format=torch.channels_last)):
            for threads in (1, 2):
                assert_same_kind(run(native, image, threads), expected)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_one_bad_pixel_at_stride_2(value: float, padding: str, tier: str) -> None:
    for name in ("depthwise", "conv3x3", "FusedIB", "FusedIB24", "IB"):
        key = {"depthwise": "start_stride", "IB": "mid_stride"}.get(name, "expand_stride")
        block = TestBlock.random(**structure(name, "relu", padding=padding, **{key: 2}))
        native = block.native()
        for size in ((8, 8), (9, 7)):
            for at in ((0, 0), (size[0] - 1, size[1] - 1), (3, 4)):
                x = torch.randn(1, STRUCTURES[name]["c_in"], *size)
                x[0, 0, at[0], at[1]] = value
                assert_same_kind(run(native, x), block.reference(x))


def _inside(output: Tensor, x: Tensor) -> Tensor:
    """Pixels of which no window of a block reaches over the border."""
    border = 3 if output.shape[2:] == x.shape[2:] else 1
    mask = torch.zeros_like(output, dtype=torch.bool)
    mask[:, :, border:-border, border:-border] = True
    return mask


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", STRUCTURES)
def test_bad_weights_and_shifts(name: str, value: float, tier: str) -> None:
    for part in ("weight", "bias", "bn_bias", "bn_mean"):
        for stage in TestBlock.random(**structure(name)).layers:
            block = TestBlock.random(bias=True, **structure(name))
            layer = block.layers[stage]
            assert layer.bn is not None
            tensors = {"weight": layer.weight, "bias": layer.bias, "bn_bias": layer.bn.bias, "bn_mean": layer.bn.mean}
            tensor = tensors[part]
            tensor.view(tensor.shape[0], -1)[tensor.shape[0] // 2, -1] = value
            x = torch.rand(1, STRUCTURES[name]["c_in"], 10, 9) + 0.1
            output, plain, exact = run(block.native(), x), block.reference(x), block.reference(x.double()).float()
            # at borders torch's float32 skips the padding and its float64 multiplies it with the weight
            agreed = (torch.isnan(plain) == torch.isnan(exact)) & (torch.isinf(plain) == torch.isinf(exact))
            if platform.machine() not in ("x86_64", "AMD64"):
                agreed &= _inside(plain, x)  # torch's float32 multiplies it there, too
            assert agreed.any()
            # an activation may swallow an infinite shift
            assert not math.isnan(value) or torch.isnan(plain[agreed]).any()
            assert_same_kind(output[agreed], plain[agreed])


@pytest.mark.parametrize("value", [NAN, INF])
def test_bad_layer_scale(value: float, tier: str) -> None:
    block = TestBlock.random(gamma=True, **structure("ExtraDW"))
    assert block.gamma is not None
    block.gamma[7] = value
    x = torch.randn(1, 19, 6, 5)
    # folded into the weights, an infinite one gives NaN where the sum mixes signs
    output = run(block.native(), x)
    torch.testing.assert_close(torch.isfinite(output), torch.isfinite(block.reference(x)), rtol=0, atol=0)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("act", ACTS)
def test_one_bad_image_in_a_head(act: str, value: float, tier: str) -> None:
    spec = HeadSpec(19, 37, 40, 10, act)
    feat = TestBlock.random(c_in=19, c_mid=37, c_out=40, expand=True, project=True)
    linear = R.ConvBN(torch.randn(10, 40), None, torch.randn(10))
    params = R.HeadParams(feat.layers[1], feat.layers[3], linear)
    head = native_block(spec, params)
    x = torch.randn(18, 19, 5, 3)
    x[3, 4, 2, 1] = value
    for threads in (1, 2):
        output = run(head, x, threads)
        exact = act == "gelu"
        expected = R.head(x.double(), spec, R.cast(params, torch.float64)).float() if exact else R.head(x, spec, params)
        assert_same_kind(output, expected)
        assert torch.isfinite(output[torch.arange(18) != 3]).all()


def test_bad_pixels_through_blocked_tensors(tier: str) -> None:
    """Odd channels between the blocks of a Program: what lies in the padding never reaches a real channel."""
    blocks = [TestBlock.random(**structure(name)) for name in ("ConvNext", "FFN", "ExtraDW", "IB")]
    program = core().Program([block.native() for block in blocks])
    x = torch.randn(2, 19, 40, 12)
    x[0, 3, 5, 2], x[0, 4, 33, 9], x[1, 0, 39, 11] = NAN, INF, -INF
    expected = x
    for block in blocks:
        expected = block.reference(expected)
    assert not torch.isnan(expected).all()
    for threads in (1, 3):
        assert_same_kind(run(program, x, threads), expected)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_bad_pixel_in_a_whole_model(value: float, tier: str) -> None:
    program, parts = model_program("conv_small")
    x = torch.randn(2, 3, 64, 64)
    x[0, 1, 20, 33] = value
    output = run(program, x, 2)
    expected = reference_chain(parts, x)
    assert torch.isnan(output[0]).all() == torch.isnan(expected[0]).all()
    assert torch.isfinite(output[1]).all()
