"""1x1 of very few pixels (the classifier of one image): bound by how soon all weights are read.

A program owns one pixel and BLOCK_N output channels and asks for all their weights at once: no product of tiles, which
would be 15/16 empty, and no partial sums to wait for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import begin, clear_counters, store_tile


@triton.jit(do_not_specialize=("J",))
def vector_kernel(
    x,
    w,
    affine,
    residual,
    out,
    counters_next,
    J,
    C: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ZERO: tl.constexpr,
):
    begin()
    i_p, i_n = tl.program_id(0), tl.program_id(1) * BLOCK_N
    clear_counters(counters_next, i_p + i_n, ZERO)
    o_k = tl.arange(0, BLOCK_K)
    o_n = i_n + tl.arange(0, BLOCK_N)
    o_p = i_p.to(tl.int64) + tl.arange(0, 1)
    b_sum = tl.zeros([BLOCK_K, BLOCK_N], dtype=tl.float32)
    for i_k in tl.static_range(0, C, BLOCK_K):
        m_k = i_k + o_k < C
        b_x = tl.load(x + i_p.to(tl.int64) * C + i_k + o_k, mask=m_k, other=0.0)  # [BLOCK_K]
        b_w = tl.load(w + (i_k + o_k)[:, None] * NP + o_n[None, :], mask=m_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        b_sum += b_x.to(tl.float32)[:, None] * b_w.to(tl.float32)
    b_acc = tl.sum(b_sum, axis=0)[None, :]  # [1, BLOCK_N]
    store_tile(b_acc, affine, residual, out, o_p, o_p < J, i_n, N, NP, BLOCK_N, ACT, RESIDUAL)
