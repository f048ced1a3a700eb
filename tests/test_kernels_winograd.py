"""Dense 3 x 3 convolutions at stride 2 (core/winograd.h): tiles at every edge, any layout, what is not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_helpers import TestBlock, assert_2x, assert_same_bits, run

from mnv4_ops import _native
from mnv4_ops.spec import ACTS, PADDINGS

pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")

# one output, odd and even, several groups of tiles, rows of tiles cut into parts
SIZES = ((1, 1), (2, 5), (5, 2), (7, 8), (8, 7), (30, 33), (61, 64), (3, 601), (130, 6))


def conv(c_in: int, c_mid: int, act: str = "relu", **more: Any) -> TestBlock:
    desc = {"expand": True, "expand_kernel": 3, "expand_stride": 2, "expand_act": act}
    return TestBlock.random(c_in=c_in, c_mid=c_mid, c_out=c_mid, **desc, **more)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("channels", [(16, 16), (24, 96), (32, 21)])
def test_sizes(channels: tuple[int, int], padding: str, tier: str) -> None:
    torch.manual_seed(0)
    block = conv(*channels, padding=padding)
    native = block.native()
    sample = torch.randn(16, channels[0], 14, 14)
    more = block.reference(sample), block.reference(sample.double())
    for h, w in SIZES:
        x = torch.randn(1, channels[0], h, w)
        output = run(native, x)
        assert_2x(output, block.reference(x), block.reference(x.double()), more)
        assert_same_bits(output, run(native, x.contiguous(memory_format=torch.channels_last)))


def test_errors_of_positive_images(tier: str) -> None:
    """Differences of inputs lose nothing where these are alike: images of mean 3 and deviation 0.1 to 1."""
    torch.manual_seed(0)
    block = conv(32, 64, "none")
    for deviation in (0.1, 1.0):
        x = (torch.randn(2, 32, 40, 40) * deviation + 3).contiguous(memory_format=torch.channels_last)
        assert_2x(run(block.native(), x), block.reference(x), block.reference(x.double()))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -2e38])
def test_what_is_not_finite_stays_where_it_is(value: float, act: str, tier: str) -> None:
    """An infinity, and sums that overflow only in the transforms, give what the direct convolution gives."""
    torch.manual_seed(0)
    block = conv(32, 40, act)
    native = block.native()
    for at in ((0, 0), (16, 16), (15, 16), (33, 34)):
        x = torch.rand(1, 32, 34, 35)
        x[0, 3, at[0], at[1]] = value
        x[0, 3, max(0, at[0] - 2), at[1]] = -value
        output = run(native, x)
        # torch's own float32 GELU of an infinity is inf or NaN by layout
        expected = block.reference(x.double()).float() if act == "gelu" else block.reference(x)
        for mask in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(mask(output), mask(expected))
        near = torch.zeros(expected.shape[2:], dtype=torch.bool)
        near[max(0, at[0] // 2 - 2) : at[0] // 2 + 2] = True
        assert torch.isfinite(output[:, :, ~near.any(1)]).all()
        for threads in (2, 3):
            assert_same_bits(output, run(native, x, threads))


def test_rows_near_infinities_do_not_depend_on_threads(tier: str) -> None:
    torch.manual_seed(0)
    block = conv(16, 32)
    native = block.native()
    x = torch.randn(3, 16, 45, 29)
    x[1, :, 20, 11] = math.inf
    x[2, 0, 44, 28] = -math.inf
    one = run(native, x)
    for threads in (2, 3, 4):
        assert_same_bits(one, run(native, x, threads))
    for i in range(3):
        assert_same_bits(one[i : i + 1], run(native, x[i : i + 1]))
