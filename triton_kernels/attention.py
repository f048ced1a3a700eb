"""Multi-query attention: rows of queries against one key and one value head.

A row is one query of one head; all heads meet the same keys and values, so rows of several heads share a tile. Up to
KEYS0 + KEYS1 keys are met at once (two pieces, both powers of two, so that 144 keys waste 16), more of them in blocks
of KEYS0 by the online softmax. Sums, maxima and exponentials are fp32; the weights of the values have their dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import begin, clear_counters, rounded


@triton.jit
def load_rows(p, i_n, N, S_N, S_D, D: tl.constexpr, DP: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N, DP] rows from `i_n` on; zeros beyond N and D."""
    o_n = i_n + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, DP)
    m = (o_n < N)[:, None]
    if D < DP:
        m = m & (o_d < D)[None, :]
    return tl.load(p + o_n[:, None] * S_N + o_d[None, :] * S_D, mask=m, other=0.0)


@triton.jit
def load_pieces(p, i_n, N, S_N, S_D, D: tl.constexpr, DP: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr):
    """`load_rows` in pieces of PIECE channels."""
    b = ()
    for i_d in tl.static_range(0, DP, PIECE):
        b = b + (load_rows(p + i_d * S_D, i_n, N, S_N, S_D, D - i_d, PIECE, BLOCK_N),)
    return b


@triton.jit
def _product(b_a, b_b, PRECISION: tl.constexpr):
    return tl.dot(rounded(b_a, PRECISION), rounded(b_b, PRECISION), input_precision=PRECISION)


@triton.jit
def scores(b_q, b_k, i_n, N, BLOCK_N: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr):
    """q k^T, [BLOCK_P, BLOCK_N] fp32, -inf beyond N (unless FULL: there is nothing beyond).

    `b_q` and `b_k` are tuples of pieces of the channels.
    The sums of the pieces meet in an fma: a plain addition the compiler makes the start of the next product's chain.
    """
    b_s = _product(b_q[0], tl.trans(b_k[0]), PRECISION)
    for t in tl.static_range(1, len(b_q)):
        b_s = tl.fma(b_s, 1.0, _product(b_q[t], tl.trans(b_k[t]), PRECISION))
    if not FULL:
        b_s = tl.where((i_n + tl.arange(0, BLOCK_N) < N)[None, :], b_s, float("-inf"))
    return b_s


@triton.jit
def finite_max(b_m):
    """A row of -inf alone keeps its -inf scores: NaN only where torch has it."""
    return tl.where(b_m == float("-inf"), 0.0, b_m)


@triton.jit
def attend(
    b_q,  # pieces of [BLOCK_P, DKP]
    b_k0,  # pieces of [KEYS0, DKP]
    b_v0,  # [KEYS0, DVP]
    b_k1,
    b_v1,
    N,
    scale,  # > 0, times log2(e)
    KEYS0: tl.constexpr,
    KEYS1: tl.constexpr,
    FULL: tl.constexpr,  # of the pieces of keys, how many have no key beyond N
    PRECISION: tl.constexpr,
):
    """softmax(q k^T scale) v of all keys at once, [BLOCK_P, DVP] fp32."""
    b_s0 = scores(b_q, b_k0, 0, N, KEYS0, FULL > 0, PRECISION)
    b_m = tl.max(b_s0, 1)
    if KEYS1 > 0:
        b_s1 = scores(b_q, b_k1, KEYS0, N, KEYS1, FULL > 1, PRECISION)
        b_m = tl.maximum(b_m, tl.max(b_s1, 1))
    b_m = finite_max(b_m) * scale
    b_p0 = tl.exp2(tl.fma(b_s0, scale, -b_m[:, None]))
    b_l = tl.sum(b_p0, 1)
    b_o = _product(b_p0.to(b_v0.dtype), b_v0, PRECISION)
    if KEYS1 > 0:
        b_p1 = tl.exp2(tl.fma(b_s1, scale, -b_m[:, None]))
        b_l += tl.sum(b_p1, 1)
        b_p1 = rounded(b_p1.to(b_v1.dtype), PRECISION)
        b_o = tl.dot(b_p1, rounded(b_v1, PRECISION), b_o, input_precision=PRECISION)
    return b_o * (1.0 / b_l)[:, None]


@triton.jit
def attend_online(
    b_q,
    p_k,
    p_v,
    N,
    S_KN,
    S_KD,
    S_VN,
    S_VD,
    scale,  # > 0, times log2(e)
    DK: tl.constexpr,
    DKP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    KEYS: tl.constexpr,
    PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`attend` for any number of keys, KEYS at a time."""
    BLOCK_P: tl.constexpr = b_q[0].shape[0]
    b_m = tl.full([BLOCK_P], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BLOCK_P], dtype=tl.float32)
    b_o = tl.zeros([BLOCK_P, DVP], dtype=tl.float32)
    for i_n in tl.range(0, N, KEYS, num_stages=STAGES):
        b_k = load_pieces(p_k, i_n, N, S_KN, S_KD, DK, DKP, KEYS, PIECE)
        b_v = load_rows(p_v, i_n, N, S_VN, S_VD, DV, DVP, KEYS)
        b_s = scores(b_q, b_k, i_n, N, KEYS, False, PRECISION)
        b_next = tl.maximum(b_m, tl.max(b_s, 1))
        b_top = finite_max(b_next) * scale
        b_p = tl.exp2(b_s * scale - b_top[:, None])
        b_old = tl.exp2(b_m * scale - b_top)
        b_l = b_l * b_old + tl.sum(b_p, 1)
        if b_v.dtype == tl.float32:
            # a sum of sums: one chain over all keys would have several times the rounding error
            b_o = tl.fma(b_o, b_old[:, None], _product(b_p, b_v, PRECISION))
        else:
            b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_old[:, None], input_precision=PRECISION)
        b_m = b_next
    return b_o / b_l[:, None]


@triton.jit(do_not_specialize=("ROWS", "INNER", "NK", "TILES"))
def attention_kernel(
    q,
    k,
    v,
    out,
    counters_next,
    ROWS,  # of one image: heads * queries
    INNER,  # row = outer * INNER + inner, queries and heads in either order
    NK,
    TILES,
    S_QB,
    S_QO,
    S_QI,
    S_QD,
    S_KB,
    S_KN,
    S_KD,
    S_VB,
    S_VN,
    S_VD,
    S_OB,
    S_OO,
    S_OI,
    S_OD,
    scale,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    KEYS0: tl.constexpr,
    KEYS1: tl.constexpr,
    FULL: tl.constexpr,
    ONLINE: tl.constexpr,
    PIECE: tl.constexpr,  # channels of queries and keys in one product
    PRECISION: tl.constexpr,
    ZERO: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of rows of one image."""
    begin()
    i_t = tl.program_id(0)
    clear_counters(counters_next, i_t, ZERO)
    i_b, i_r = (i_t // TILES).to(tl.int64), i_t % TILES
    o_r = i_r * BLOCK_P + tl.arange(0, BLOCK_P)
    m_r = (o_r < ROWS)[:, None]
    o_outer, o_inner = o_r // INNER, o_r % INNER
    p_q = q + i_b * S_QB + (o_outer * S_QO + o_inner * S_QI)[:, None]
    b_q = ()
    for i_d in tl.static_range(0, DKP, PIECE):
        o_d = i_d + tl.arange(0, PIECE)
        m_q = m_r
        if DK < DKP:
            m_q = m_q & (o_d < DK)[None, :]
        b_q = b_q + (tl.load(p_q + o_d[None, :] * S_QD, mask=m_q, other=0.0),)  # [BLOCK_P, PIECE]
    p_k, p_v = k + i_b * S_KB, v + i_b * S_VB
    if ONLINE:
        b_o = attend_online(
            b_q, p_k, p_v, NK, S_KN, S_KD, S_VN, S_VD, scale, DK, DKP, DV, DVP, KEYS0, PIECE, PRECISION, STAGES
        )
    else:
        b_k0 = load_pieces(p_k, 0, NK, S_KN, S_KD, DK, DKP, KEYS0, PIECE)
        b_v0 = load_rows(p_v, 0, NK, S_VN, S_VD, DV, DVP, KEYS0)
        b_k1, b_v1 = b_k0, b_v0
        if KEYS1 > 0:
            b_k1 = load_pieces(p_k, KEYS0, NK, S_KN, S_KD, DK, DKP, KEYS1, PIECE)
            b_v1 = load_rows(p_v, KEYS0, NK, S_VN, S_VD, DV, DVP, KEYS1)
        b_o = attend(b_q, b_k0, b_v0, b_k1, b_v1, NK, scale, KEYS0, KEYS1, FULL, PRECISION)
    o_v = tl.arange(0, DVP)
    m_o = m_r
    if DV < DVP:
        m_o = m_o & (o_v < DV)[None, :]
    p_o = out + i_b * S_OB + (o_outer * S_OO + o_inner * S_OI)[:, None] + o_v[None, :] * S_OD
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_o)
