"""[depthwise ->] 1x1 expansion and [depthwise ->] expansion -> projection (FFN, ConvNext), the input tile on chip.

A program makes the [BLOCK_P, C] input tile once (all channels) and walks over the expanded channels. A depthwise
convolution in front is computed once, in a loop that passes its result through a strip of L2 of the program's own
(unrolled over the channels instead, it took half a minute to compile). The FFN kernel feeds each piece of the expanded
activation to the projection at once, so that it never leaves the chip.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import begin, clear_counters, depthwise_tile, hidden_tile, rounded, store_tile, tile_columns, tile_pixels
from .pointwise import RUNTIME


@triton.jit
def _input_tiles(
    x,
    taps,
    strip,  # [BLOCK_P, CP] of this program
    i_t,
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
    DW_ACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """(o_p, m_p, tuple of [BLOCK_P, BLOCK_K] tiles that cover C)."""
    b_tiles = ()
    if KERNEL > 0:
        n_g = (HO + ROWS - 1) // ROWS
        i_j, i_g = i_t // n_g, i_t % n_g
        o_img, o_x = tile_columns(i_j, J, H, W, WO, PAD_X, C, STRIDE, BLOCK_J)
        o_p, m_p = tile_pixels(i_j, i_g, J, HO, WO, ROWS, BLOCK_J)
        i_y = i_g * ROWS * STRIDE - PAD_Y
        o_s = tl.arange(0, ROWS * BLOCK_J)[:, None] * CP
        for i_d in tl.range(0, C, BLOCK_D, num_stages=1):
            b_x = depthwise_tile(
                x, taps, o_img, o_x, i_y, i_d, H, W, C, CP, KERNEL, STRIDE, ROWS, BLOCK_D, DW_ACT, DTYPE, UNROLL
            )
            tl.store(strip + o_s + (i_d + tl.arange(0, BLOCK_D))[None, :], b_x)
        tl.debug_barrier()
        for i_k in tl.static_range(0, C, BLOCK_K):
            # zeros beyond C: so are the taps and shifts there
            b_tiles = b_tiles + (tl.load(strip + o_s + (i_k + tl.arange(0, BLOCK_K))[None, :]),)
    else:
        o_p = i_t.to(tl.int64) * (ROWS * BLOCK_J) + tl.arange(0, ROWS * BLOCK_J)
        m_p = o_p < J
        for i_k in tl.static_range(0, C, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            m_x = m_p[:, None]
            if C % BLOCK_K != 0:
                m_x = m_x & (o_k < C)[None, :]
            b_tiles = b_tiles + (tl.load(x + o_p[:, None] * C + o_k[None, :], mask=m_x, other=0.0),)
    return o_p, m_p, b_tiles


@triton.jit(do_not_specialize=RUNTIME)
def expand_kernel(
    x,
    taps,
    w,
    affine,
    out,
    strips,
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
    N: tl.constexpr,
    NP: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DW_ACT: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    N_PROGRAM: tl.constexpr,  # output channels of one program
    UNROLL: tl.constexpr,
    PRECISION: tl.constexpr,
    ZERO: tl.constexpr,
    STAGES: tl.constexpr,
):
    begin()
    DTYPE: tl.constexpr = w.dtype.element_ty
    i_t, i_nb = tl.program_id(0), tl.program_id(1)
    clear_counters(counters_next, i_t + i_nb, ZERO)
    o_p, m_p, b_tiles = _input_tiles(
        x, taps, strips + (i_nb.to(tl.int64) * tl.num_programs(0) + i_t) * (ROWS * BLOCK_J * CP), i_t,
        J, H, W, HO, WO, PAD_Y, PAD_X, C, CP, KERNEL, STRIDE, DW_ACT, ROWS, BLOCK_J, BLOCK_D, BLOCK_K, DTYPE, UNROLL,
    )  # fmt: skip
    p_w = w + tl.arange(0, BLOCK_K)[:, None] * NP + tl.arange(0, BLOCK_N)[None, :]
    for i_n in tl.range(i_nb * N_PROGRAM, min((i_nb + 1) * N_PROGRAM, N), BLOCK_N, num_stages=STAGES):
        b_acc = tl.zeros([ROWS * BLOCK_J, BLOCK_N], dtype=tl.float32)
        for t in tl.static_range((C + BLOCK_K - 1) // BLOCK_K):
            b_w = tl.load(p_w + t * BLOCK_K * NP + i_n)  # [BLOCK_K, BLOCK_N]
            b_acc = tl.dot(rounded(b_tiles[t], PRECISION), b_w, b_acc, input_precision=PRECISION)
        store_tile(b_acc, affine, x, out, o_p, m_p, i_n, N, NP, BLOCK_N, ACT, False)


@triton.jit(do_not_specialize=RUNTIME)
def ffn_kernel(
    x,
    taps,
    w_expand,
    affine_expand,
    w_project,
    affine_project,
    out,
    strips,
    J,
    H,
    W,
    HO,
    WO,
    PAD_Y,
    PAD_X,
    C: tl.constexpr,
    CP: tl.constexpr,
    M: tl.constexpr,  # expanded channels
    MP: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DW_ACT: tl.constexpr,
    MID_ACT: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N0: tl.constexpr,
    BLOCK_N1: tl.constexpr,
    UNROLL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    begin()
    BLOCK_P: tl.constexpr = ROWS * BLOCK_J
    DTYPE: tl.constexpr = w_expand.dtype.element_ty
    i_t = tl.program_id(0)
    o_p, m_p, b_tiles = _input_tiles(
        x, taps, strips + i_t.to(tl.int64) * (BLOCK_P * CP), i_t,
        J, H, W, HO, WO, PAD_Y, PAD_X, C, CP, KERNEL, STRIDE, DW_ACT, ROWS, BLOCK_J, BLOCK_D, BLOCK_K, DTYPE, UNROLL,
    )  # fmt: skip
    b_acc0 = tl.zeros([BLOCK_P, BLOCK_N0], dtype=tl.float32)
    if BLOCK_N1 > 0:
        b_acc1 = tl.zeros([BLOCK_P, BLOCK_N1], dtype=tl.float32)
    else:
        b_acc1 = b_acc0
    o_m = tl.arange(0, BLOCK_M)
    p_we = w_expand + tl.arange(0, BLOCK_K)[:, None] * MP + o_m[None, :]
    p_wp = w_project + o_m[:, None] * NP
    for i_m in tl.range(0, M, BLOCK_M, num_stages=STAGES):
        b_h = tl.zeros([BLOCK_P, BLOCK_M], dtype=tl.float32)
        for t in tl.static_range((C + BLOCK_K - 1) // BLOCK_K):
            b_we = tl.load(p_we + t * BLOCK_K * MP + i_m)  # [BLOCK_K, BLOCK_M]
            b_h = tl.dot(rounded(b_tiles[t], PRECISION), b_we, b_h, input_precision=PRECISION)
        b_h16 = hidden_tile(b_h, affine_expand, i_m, M, MP, BLOCK_M, MID_ACT, M % BLOCK_M == 0).to(DTYPE)
        b_h16 = rounded(b_h16, PRECISION)
        b_wp0 = tl.load(p_wp + i_m * NP + tl.arange(0, BLOCK_N0)[None, :])  # [BLOCK_M, BLOCK_N0]
        b_acc0 = tl.dot(b_h16, b_wp0, b_acc0, input_precision=PRECISION)
        if BLOCK_N1 > 0:
            b_wp1 = tl.load(p_wp + i_m * NP + BLOCK_N0 + tl.arange(0, BLOCK_N1)[None, :])
            b_acc1 = tl.dot(b_h16, b_wp1, b_acc1, input_precision=PRECISION)
    store_tile(b_acc0, affine_project, x, out, o_p, m_p, 0, N, NP, BLOCK_N0, ACT, RESIDUAL)
    if BLOCK_N1 > 0:
        store_tile(b_acc1, affine_project, x, out, o_p, m_p, BLOCK_N0, N, NP, BLOCK_N1, ACT, RESIDUAL)
