"""Dense k x k convolution as an implicit GEMM [-> 1x1 projection] (stem, conv + BN + act, FusedIB).

The rows of the packed weight are (ky, kx, input channel). With FLAT they are walked as one index (few input channels:
the stem's 27 rows fit one tile of 32), else tap by tap.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import begin, clear_counters, hidden_tile, rounded, store_tile
from .hopper import series
from .pointwise import RUNTIME

# Where nothing in a tile is contiguous, consecutive threads take consecutive elements of its first dimension with
# triton 3.6, of its last one from 3.7 on. These must be pixels: a thread then has one pixel and all taps, whose places
# are known when compiling, and a third of the instructions.
TAPS_FIRST = tl.constexpr(series() != "3.6")


@triton.jit(do_not_specialize=(*RUNTIME, "S_N", "S_Y", "S_X", "S_C"))
def dense_kernel(
    x,
    w,
    affine,
    w_project,
    affine_project,
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
    S_N,
    S_Y,
    S_X,
    S_C,
    C: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    MID_ACT: tl.constexpr,
    ACT: tl.constexpr,
    PROJECT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FLAT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M0: tl.constexpr,
    BLOCK_M1: tl.constexpr,
    BLOCK_N0: tl.constexpr,
    BLOCK_N1: tl.constexpr,
    PRECISION: tl.constexpr,
    ZERO: tl.constexpr,
    STAGES: tl.constexpr,
):
    begin()
    DTYPE: tl.constexpr = w.dtype.element_ty
    i_t, i_mb = tl.program_id(0), tl.program_id(1)
    clear_counters(counters_next, i_t + i_mb, ZERO)
    i_m = i_mb * (BLOCK_M0 + BLOCK_M1)
    o_p = i_t.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < J
    o_q = (o_p // WO).to(tl.int32)
    o_y = (o_q % HO) * STRIDE - PAD_Y
    o_x = (o_p % WO).to(tl.int32) * STRIDE - PAD_X
    if CHANNELS_LAST:
        # by way of C, whose divisibility the compiler knows: 16-byte loads
        s_n, s_y, s_x, s_c = (H * W).to(tl.int64) * C, W * C, C, 1
    else:
        s_n, s_y, s_x, s_c = S_N, S_Y, S_X, S_C
    p_x = x + (o_q // HO).to(tl.int64) * s_n + o_y.to(tl.int64) * s_y + o_x.to(tl.int64) * s_x  # [BLOCK_P]
    b_acc0 = tl.zeros([BLOCK_P, BLOCK_M0], dtype=tl.float32)
    if BLOCK_M1 > 0:
        b_acc1 = tl.zeros([BLOCK_P, BLOCK_M1], dtype=tl.float32)
    else:
        b_acc1 = b_acc0
    o_k = tl.arange(0, BLOCK_K)
    p_w = w + o_k[:, None] * MP + i_m
    K_TAP: tl.constexpr = KERNEL * KERNEL * C if FLAT else (C + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = (K_TAP + BLOCK_K - 1) // BLOCK_K if FLAT else KERNEL * KERNEL * K_TAP
    for i in tl.range(0, STEPS, num_stages=STAGES):
        if FLAT:
            i_row = i * BLOCK_K
            o_r = i_row + o_k
            o_tap = o_r // C
            o_ky, o_kx, o_c = o_tap // KERNEL, o_tap % KERNEL, o_r % C
            o_e = o_ky.to(tl.int64) * s_y + o_kx * s_x + o_c * s_c
            # the other dimension of what goes by pixels, of what goes by taps
            ACROSS: tl.constexpr = 0 if TAPS_FIRST and DTYPE.primitive_bitwidth == 16 else 1
            ALONG: tl.constexpr = 1 - ACROSS
            o_yy = tl.expand_dims(o_y, ACROSS) + tl.expand_dims(o_ky, ALONG)
            o_xx = tl.expand_dims(o_x, ACROSS) + tl.expand_dims(o_kx, ALONG)
            m_x = (
                (o_yy >= 0) & (o_yy < H) & (o_xx >= 0) & (o_xx < W)
                & tl.expand_dims(m_p, ACROSS) & tl.expand_dims(o_tap < KERNEL * KERNEL, ALONG)
            )  # fmt: skip
            b_x = tl.load(tl.expand_dims(p_x, ACROSS) + tl.expand_dims(o_e, ALONG), mask=m_x, other=0.0)
            if ACROSS == 0:
                b_x = tl.trans(b_x)  # [BLOCK_P, BLOCK_K]
        else:
            i_tap = i // K_TAP
            i_ky, i_kx, i_c = i_tap // KERNEL, i_tap % KERNEL, (i % K_TAP) * BLOCK_K
            i_row = i_tap * C + i_c
            m_r = m_p & (o_y + i_ky >= 0) & (o_y + i_ky < H) & (o_x + i_kx >= 0) & (o_x + i_kx < W)
            m_x = m_r[:, None]
            if C % BLOCK_K != 0:
                m_x = m_x & (i_c + o_k < C)[None, :]
            p_tap = p_x + (i_ky.to(tl.int64) * s_y + i_kx * s_x)
            b_x = tl.load(p_tap[:, None] + ((i_c + o_k) * s_c)[None, :], mask=m_x, other=0.0)
        b_w0 = tl.load(p_w + i_row * MP + tl.arange(0, BLOCK_M0)[None, :])  # [BLOCK_K, BLOCK_M0]
        b_x = rounded(b_x, PRECISION)
        b_acc0 = tl.dot(b_x, b_w0, b_acc0, input_precision=PRECISION)
        if BLOCK_M1 > 0:
            b_w1 = tl.load(p_w + i_row * MP + BLOCK_M0 + tl.arange(0, BLOCK_M1)[None, :])
            b_acc1 = tl.dot(b_x, b_w1, b_acc1, input_precision=PRECISION)

    if PROJECT:
        o_m = tl.arange(0, BLOCK_M0)
        o_n0 = tl.arange(0, BLOCK_N0)[None, :]
        b_h0 = hidden_tile(b_acc0, affine, 0, M, MP, BLOCK_M0, MID_ACT, M >= BLOCK_M0).to(DTYPE)
        b_h0 = rounded(b_h0, PRECISION)
        b_y0 = tl.dot(b_h0, tl.load(w_project + o_m[:, None] * NP + o_n0), input_precision=PRECISION)
        if BLOCK_N1 > 0:
            o_n1 = BLOCK_N0 + tl.arange(0, BLOCK_N1)[None, :]
            b_y1 = tl.dot(b_h0, tl.load(w_project + o_m[:, None] * NP + o_n1), input_precision=PRECISION)
        if BLOCK_M1 > 0:
            o_m1 = BLOCK_M0 + tl.arange(0, BLOCK_M1)
            b_h1 = hidden_tile(b_acc1, affine, BLOCK_M0, M, MP, BLOCK_M1, MID_ACT, M == BLOCK_M0 + BLOCK_M1).to(DTYPE)
            b_h1 = rounded(b_h1, PRECISION)
            b_y0 = tl.dot(b_h1, tl.load(w_project + o_m1[:, None] * NP + o_n0), b_y0, input_precision=PRECISION)
            if BLOCK_N1 > 0:
                b_y1 = tl.dot(b_h1, tl.load(w_project + o_m1[:, None] * NP + o_n1), b_y1, input_precision=PRECISION)
        store_tile(b_y0, affine_project, residual, out, o_p, m_p, 0, N, NP, BLOCK_N0, ACT, RESIDUAL)
        if BLOCK_N1 > 0:
            store_tile(b_y1, affine_project, residual, out, o_p, m_p, BLOCK_N0, N, NP, BLOCK_N1, ACT, RESIDUAL)
    else:
        store_tile(b_acc0, affine, residual, out, o_p, m_p, i_m, M, MP, BLOCK_M0, MID_ACT, RESIDUAL)
        if BLOCK_M1 > 0:
            store_tile(b_acc1, affine, residual, out, o_p, m_p, i_m + BLOCK_M0, M, MP, BLOCK_M1, MID_ACT, RESIDUAL)
