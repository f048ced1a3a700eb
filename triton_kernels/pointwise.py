"""[depthwise ->] 1x1 convolution, the sum over input channels in a loop: projections, plain 1x1, small GEMMs.

A program owns a pixel tile and an output-channel tile of BLOCK_N0 + BLOCK_N1 (both powers of two, so that 160 or 96
channels waste nothing), and with SPLIT > 1 a share of the input channels: the last program of a tile to arrive adds
the partial sums in a fixed order.

The depthwise convolution is either computed step by step between the products (its sums then compete with the
accumulators for registers), or, with STRIP, for all channels first, through a strip of L2 of the program's own; the
products that follow are pipelined like those of a plain 1x1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import begin, clear_counters, depthwise_tile, rounded, store_tile, tile_columns, tile_pixels

RUNTIME = ("J", "H", "W", "HO", "WO", "PAD_Y", "PAD_X")


@triton.jit(do_not_specialize=RUNTIME)
def pointwise_kernel(
    x,
    taps,
    w,
    affine,
    residual,
    out,
    partial,
    strips,
    counters,
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
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N0: tl.constexpr,
    BLOCK_N1: tl.constexpr,
    SPLIT: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    PRECISION: tl.constexpr,
    ZERO: tl.constexpr,
    STAGES: tl.constexpr,
):
    begin()
    BLOCK_P: tl.constexpr = ROWS * BLOCK_J
    BLOCK_N: tl.constexpr = BLOCK_N0 + BLOCK_N1
    DTYPE: tl.constexpr = w.dtype.element_ty
    i_t, i_nb, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    clear_counters(counters_next, i_t + i_nb + i_s, ZERO)
    i_n = i_nb * BLOCK_N
    if KERNEL > 0:
        n_g = (HO + ROWS - 1) // ROWS
        i_j, i_g = i_t // n_g, i_t % n_g
        o_img, o_x = tile_columns(i_j, J, H, W, WO, PAD_X, C, STRIDE, BLOCK_J)
        o_p, m_p = tile_pixels(i_j, i_g, J, HO, WO, ROWS, BLOCK_J)
        i_y = i_g * ROWS * STRIDE - PAD_Y
    else:
        o_p = i_t.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        m_p = o_p < J
        o_img, o_x, i_y = o_p, o_p, 0

    # shares of whole steps of both loops: a step that reached over CP would spoil the next row of the strip
    STEP: tl.constexpr = BLOCK_D if BLOCK_D > BLOCK_K else BLOCK_K
    K_SPLIT: tl.constexpr = ((C + STEP - 1) // STEP + SPLIT - 1) // SPLIT * STEP
    i_k0 = i_s * K_SPLIT
    if STRIP:
        i_program = (i_s * tl.num_programs(1) + i_nb) * tl.num_programs(0) + i_t
        p_s = strips + i_program.to(tl.int64) * BLOCK_P * CP + tl.arange(0, BLOCK_P)[:, None] * CP
        for i_d in tl.range(i_k0, min(i_k0 + K_SPLIT, C), BLOCK_D, num_stages=1):
            b_d = depthwise_tile(
                x, taps, o_img, o_x, i_y, i_d, H, W, C, CP, KERNEL, STRIDE, ROWS, BLOCK_D, DW_ACT, DTYPE, UNROLL
            )  # [BLOCK_P, BLOCK_D]
            tl.store(p_s + (i_d + tl.arange(0, BLOCK_D))[None, :], b_d)
        tl.debug_barrier()
    b_acc0 = tl.zeros([BLOCK_P, BLOCK_N0], dtype=tl.float32)
    if BLOCK_N1 > 0:
        b_acc1 = tl.zeros([BLOCK_P, BLOCK_N1], dtype=tl.float32)
    else:
        b_acc1 = b_acc0
    o_k = tl.arange(0, BLOCK_K)
    p_w = w + o_k[:, None] * NP + i_n
    for i_k in tl.range(i_k0, min(i_k0 + K_SPLIT, C), BLOCK_K, num_stages=STAGES):
        b_w0 = tl.load(p_w + i_k * NP + tl.arange(0, BLOCK_N0)[None, :])  # [BLOCK_K, BLOCK_N0]
        if BLOCK_N1 > 0:
            b_w1 = tl.load(p_w + i_k * NP + BLOCK_N0 + tl.arange(0, BLOCK_N1)[None, :])
        if STRIP:
            # zeros beyond C: so are the taps and shifts there
            b_x = tl.load(p_s + (i_k + o_k)[None, :])  # [BLOCK_P, BLOCK_K]
        elif KERNEL > 0:
            b_x = depthwise_tile(
                x, taps, o_img, o_x, i_y, i_k, H, W, C, CP, KERNEL, STRIDE, ROWS, BLOCK_K, DW_ACT, DTYPE, UNROLL
            )  # [BLOCK_P, BLOCK_K]
        else:
            m_x = m_p[:, None]
            if C % BLOCK_K != 0:
                m_x = m_x & (i_k + o_k < C)[None, :]
            b_x = tl.load(x + o_p[:, None] * C + (i_k + o_k)[None, :], mask=m_x, other=0.0)
        b_x = rounded(b_x, PRECISION)
        b_acc0 = tl.dot(b_x, b_w0, b_acc0, input_precision=PRECISION)
        if BLOCK_N1 > 0:
            b_acc1 = tl.dot(b_x, b_w1, b_acc1, input_precision=PRECISION)

    if SPLIT == 1:
        store_tile(b_acc0, affine, residual, out, o_p, m_p, i_n, N, NP, BLOCK_N0, ACT, RESIDUAL)
        if BLOCK_N1 > 0:
            store_tile(b_acc1, affine, residual, out, o_p, m_p, i_n + BLOCK_N0, N, NP, BLOCK_N1, ACT, RESIDUAL)
    else:
        i_tile = i_t * tl.num_programs(1) + i_nb
        p_part = partial + (i_tile.to(tl.int64) * SPLIT + i_s) * BLOCK_P * BLOCK_N
        o_t0 = tl.arange(0, BLOCK_P)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N0)[None, :]
        tl.store(p_part + o_t0, b_acc0)
        if BLOCK_N1 > 0:
            o_t1 = BLOCK_N0 + tl.arange(0, BLOCK_P)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N1)[None, :]
            tl.store(p_part + o_t1, b_acc1)
        tl.debug_barrier()
        i_before = tl.atomic_add(counters + i_tile, 1, sem="acq_rel", scope="gpu")
        if i_before == SPLIT - 1:
            tl.store(counters + i_tile, 0)
            p_part = partial + i_tile.to(tl.int64) * SPLIT * BLOCK_P * BLOCK_N
            b_sum0 = tl.zeros([BLOCK_P, BLOCK_N0], dtype=tl.float32)
            for s in range(SPLIT):
                b_sum0 += tl.load(p_part + s * BLOCK_P * BLOCK_N + o_t0, cache_modifier=".cg")
            store_tile(b_sum0, affine, residual, out, o_p, m_p, i_n, N, NP, BLOCK_N0, ACT, RESIDUAL)
            if BLOCK_N1 > 0:
                b_sum1 = tl.zeros([BLOCK_P, BLOCK_N1], dtype=tl.float32)
                for s in range(SPLIT):
                    b_sum1 += tl.load(p_part + s * BLOCK_P * BLOCK_N + o_t1, cache_modifier=".cg")
                store_tile(b_sum1, affine, residual, out, o_p, m_p, i_n + BLOCK_N0, N, NP, BLOCK_N1, ACT, RESIDUAL)
