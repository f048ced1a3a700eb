"""Depthwise convolution + shift + activation [+ residual] alone."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import begin, clear_counters, depthwise_tile, tile_columns, tile_pixels
from .pointwise import RUNTIME


@triton.jit(do_not_specialize=RUNTIME)
def depthwise_kernel(
    x,
    taps,
    residual,
    out,
    counters_next,
    J,
    H,
    W,
    HO,
    WO,
    PAD_Y,
    PAD_X,
    C: tl.constexpr,
    CP: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    ZERO: tl.constexpr,
):
    begin()
    i_t, i_k = tl.program_id(0), tl.program_id(1) * BLOCK_K
    clear_counters(counters_next, i_t + i_k, ZERO)
    n_g = (HO + ROWS - 1) // ROWS
    i_j, i_g = i_t // n_g, i_t % n_g
    o_img, o_x = tile_columns(i_j, J, H, W, WO, PAD_X, C, STRIDE, BLOCK_J)
    o_p, m_p = tile_pixels(i_j, i_g, J, HO, WO, ROWS, BLOCK_J)
    b_y = depthwise_tile(
        x, taps, o_img, o_x, i_g * ROWS * STRIDE - PAD_Y, i_k, H, W,
        C, CP, KERNEL, STRIDE, ROWS, BLOCK_K, ACT, tl.float32, UNROLL,
    )  # fmt: skip
    o_c = i_k + tl.arange(0, BLOCK_K)
    o_y = o_p[:, None] * C + o_c[None, :]
    m_y = m_p[:, None] & (o_c < C)[None, :]
    if RESIDUAL:
        b_y += tl.load(residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(out + o_y, b_y.to(out.dtype.element_ty), mask=m_y)
