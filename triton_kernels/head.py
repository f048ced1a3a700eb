"""1x1 convolution + activation + global average pool in one kernel; without a weight, the pool alone."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import affine_act, begin, clear_counters, rounded


@triton.jit(do_not_specialize=("PIXELS",))
def pool_kernel(
    x,
    w,
    affine,
    out,
    counters_next,
    PIXELS,  # of one image
    C: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    FEAT: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    ZERO: tl.constexpr,
    STAGES: tl.constexpr,
):
    begin()
    i_b, i_n = tl.program_id(0), tl.program_id(1) * BLOCK_N
    clear_counters(counters_next, i_b + i_n, ZERO)
    o_n = i_n + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    p_x = x + i_b.to(tl.int64) * PIXELS * C
    b_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    for i_p in range(0, PIXELS, BLOCK_P):
        o_p = i_p + tl.arange(0, BLOCK_P)
        m_p = o_p < PIXELS
        if FEAT:
            b_acc = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
            p_w = w + o_k[:, None] * NP + o_n[None, :]
            for i_k in tl.range(0, C, BLOCK_K, num_stages=STAGES):
                m_x = m_p[:, None]
                if C % BLOCK_K != 0:
                    m_x = m_x & (i_k + o_k < C)[None, :]
                b_x = tl.load(p_x + o_p[:, None] * C + (i_k + o_k)[None, :], mask=m_x, other=0.0)
                b_acc = tl.dot(rounded(b_x, PRECISION), tl.load(p_w + i_k * NP), b_acc, input_precision=PRECISION)
            b_y = affine_act(b_acc, affine, o_n, NP, ACT)
            b_y = tl.where(m_p[:, None], b_y, 0.0)
        else:
            m_x = m_p[:, None] & (o_n < C)[None, :]
            b_y = tl.load(p_x + o_p[:, None] * C + o_n[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_sum += tl.sum(b_y, axis=0)
    tl.store(out + i_b.to(tl.int64) * N + o_n, (b_sum / PIXELS).to(out.dtype.element_ty), mask=o_n < N)
