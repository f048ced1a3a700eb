"""Mobile MQA: pre-norm, projections, attention, output projection, layer scale, residual.

`mqa_project_kernel` makes keys and values (with their own strided depthwise convolutions), and queries where a kernel
of its own attends to them. `mqa_kernel` does the rest for a tile of query pixels: head by head it projects the queries,
attends, and feeds the result to the output projection, so that neither leaves the chip; for small maps it makes keys
and values too. `mqa_output_kernel` undoes the pooling of queries before the output projection.

The pre-norm is applied to the loaded pixels in fp32 and rounded as torch rounds it: folded into 16-bit weights it can
cost precision (`mqa_hopper_build.unrest` says how much), and before a padded depthwise convolution its shift counts for
taps inside the image alone.
Matrices: `w` [C, heads of queries | key | value], every head padded to a power of two with zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import attend, load_rows
from .common import begin, clear_counters, rounded, store_tile


@triton.jit
def _norm_tile(b_x, norms, o_k, ROW: tl.constexpr, CP: tl.constexpr):
    """x * scale + shift of the norm in rows ROW and ROW + 1 of `norms` [4, CP], fp32."""
    b_scale = tl.load(norms + ROW * CP + o_k)
    b_shift = tl.load(norms + (ROW + 1) * CP + o_k)
    return b_x.to(tl.float32) * b_scale[None, :] + b_shift[None, :]


@triton.jit
def _pixel_tile(
    x,
    norms,
    o_p,  # [BLOCK_P] int64
    m_p,
    o_k,
    ROW: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Normalised pixels, [BLOCK_P, BLOCK_K]."""
    m = m_p[:, None]
    if C % BLOCK_K != 0:
        m = m & (o_k < C)[None, :]
    b_x = tl.load(x + o_p[:, None] * C + o_k[None, :], mask=m, other=0.0)
    return _norm_tile(b_x, norms, o_k, ROW, CP).to(DTYPE)


@triton.jit
def _pooled_tile(
    x,
    norms,
    o_n,  # [BLOCK_P] int64, image
    o_y,
    o_x,
    m_p,
    o_k,
    H,
    W,
    C: tl.constexpr,
    CP: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Normalised means of windows of STRIDE x STRIDE pixels, those outside of the image left out."""
    b_sum = tl.zeros([o_n.shape[0], BLOCK_K], dtype=tl.float32)
    for ky in tl.static_range(STRIDE):
        for kx in tl.static_range(STRIDE):
            i_y, i_x = o_y * STRIDE + ky, o_x * STRIDE + kx
            m = (m_p & (i_y < H) & (i_x < W))[:, None] & (o_k < C)[None, :]
            p_x = x + (((o_n * H + i_y) * W + i_x) * C)[:, None] + o_k[None, :]
            b_sum += tl.load(p_x, mask=m, other=0.0).to(tl.float32)
    o_count = tl.minimum(H - o_y * STRIDE, STRIDE) * tl.minimum(W - o_x * STRIDE, STRIDE)
    b_mean = b_sum / tl.maximum(o_count, 1).to(tl.float32)[:, None]
    return _norm_tile(b_mean, norms, o_k, 2, CP).to(DTYPE)


@triton.jit
def _depthwise_tiles(
    x,
    norms,
    taps,  # [2, KERNEL * KERNEL + 1, CP] fp32: of keys, of values; the shift last
    o_n,
    o_y,  # first row of the window
    o_x,
    m_p,
    o_k,
    H,
    W,
    C: tl.constexpr,
    CP: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Both depthwise convolutions of the normalised pixels, [BLOCK_P, BLOCK_K] each; a pixel is loaded for both."""
    BRANCH: tl.constexpr = (KERNEL * KERNEL + 1) * CP
    p_t = taps + o_k
    b_k = tl.zeros([o_n.shape[0], BLOCK_K], dtype=tl.float32) + tl.load(p_t + KERNEL * KERNEL * CP)[None, :]
    b_v = tl.zeros([o_n.shape[0], BLOCK_K], dtype=tl.float32) + tl.load(p_t + BRANCH + KERNEL * KERNEL * CP)[None, :]
    b_scale, b_shift = tl.load(norms + o_k)[None, :], tl.load(norms + CP + o_k)[None, :]
    for ky in tl.static_range(KERNEL):
        for kx in tl.static_range(KERNEL):
            i_y, i_x = o_y + ky, o_x + kx
            m_in = (m_p & (i_y >= 0) & (i_y < H) & (i_x >= 0) & (i_x < W))[:, None]
            m = m_in
            if C % BLOCK_K != 0:
                m = m & (o_k < C)[None, :]
            b_x = tl.load(x + (((o_n * H + i_y) * W + i_x) * C)[:, None] + o_k[None, :], mask=m, other=0.0)
            # the padding is zero after the norm
            b_y = tl.where(m_in, b_x.to(tl.float32) * b_scale + b_shift, 0.0)
            b_k += b_y * tl.load(p_t + (ky * KERNEL + kx) * CP)[None, :]
            b_v += b_y * tl.load(p_t + BRANCH + (ky * KERNEL + kx) * CP)[None, :]
    return b_k.to(DTYPE), b_v.to(DTYPE)


@triton.jit
def _shifted(b_acc, affine, o_n, NP: tl.constexpr, AFFINE: tl.constexpr):
    """Bias or BatchNorm of a projection, which published models have not."""
    if AFFINE:
        b_acc = b_acc * tl.load(affine + o_n)[None, :] + tl.load(affine + NP + o_n)[None, :]
    return b_acc


@triton.jit
def _head(b_acc, affine, i_n, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, AFFINE: tl.constexpr):
    """The key or the value head; exact zeros beyond D, also where an input is inf or NaN."""
    o_d = tl.arange(0, DP)
    b_acc = _shifted(b_acc, affine, i_n + o_d, NP, AFFINE)
    if D < DP:
        b_acc = tl.where((o_d < D)[None, :], b_acc, 0.0)
    return b_acc


@triton.jit
def _project_kv(
    x,
    norms,
    taps,
    w,
    affine,
    kv,
    i_t,
    PK,
    H,
    W,
    HK,
    WK,
    PAD_Y,
    PAD_X,
    C: tl.constexpr,
    CP: tl.constexpr,
    NP: tl.constexpr,
    FIRST: tl.constexpr,  # column of the key head
    DK: tl.constexpr,
    DKP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AFFINE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Keys and values of BLOCK_P pixels; of the pixels themselves by one product where both are as wide in memory."""
    DTYPE: tl.constexpr = w.dtype.element_ty
    KV: tl.constexpr = DKP + DVP
    AT_ONCE: tl.constexpr = KERNEL == 0 and DKP == DVP
    o_c = tl.arange(0, BLOCK_K)
    o_p = i_t.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < PK
    p_w = w + o_c[:, None] * NP + FIRST
    p_kv = kv + o_p[:, None] * KV
    if AT_ONCE:
        o_n = tl.arange(0, KV)
        b_kv = tl.zeros([BLOCK_P, KV], dtype=tl.float32)
        for i_k in tl.range(0, C, BLOCK_K, num_stages=STAGES):
            b_w = tl.load(p_w + i_k * NP + o_n[None, :])  # [BLOCK_K, KV]
            b_y = rounded(_pixel_tile(x, norms, o_p, m_p, i_k + o_c, 0, C, CP, BLOCK_K, DTYPE), PRECISION)
            b_kv = tl.dot(b_y, b_w, b_kv, input_precision=PRECISION)
        b_kv = _shifted(b_kv, affine, FIRST + o_n, NP, AFFINE)
        if DK < DKP or DV < DVP:
            # as in `_head`
            b_kv = tl.where((tl.where(o_n < DKP, o_n + DV - DK, o_n - DKP) < DV)[None, :], b_kv, 0.0)
        tl.store(p_kv + o_n[None, :], b_kv.to(DTYPE), mask=m_p[:, None])
    else:
        b_k = tl.zeros([BLOCK_P, DKP], dtype=tl.float32)
        b_v = tl.zeros([BLOCK_P, DVP], dtype=tl.float32)
        for i_k in tl.range(0, C, BLOCK_K, num_stages=1 if KERNEL > 0 else STAGES):
            b_wk = tl.load(p_w + i_k * NP + tl.arange(0, DKP)[None, :])  # [BLOCK_K, DKP]
            b_wv = tl.load(p_w + i_k * NP + DKP + tl.arange(0, DVP)[None, :])
            if KERNEL > 0:
                o_in = (o_p % (HK * WK)).to(tl.int32)
                b_yk, b_yv = _depthwise_tiles(
                    x, norms, taps, o_p // (HK * WK), o_in // WK * STRIDE - PAD_Y, o_in % WK * STRIDE - PAD_X,
                    m_p, i_k + o_c, H, W, C, CP, KERNEL, BLOCK_K, DTYPE,
                )  # fmt: skip
            else:
                b_yk = _pixel_tile(x, norms, o_p, m_p, i_k + o_c, 0, C, CP, BLOCK_K, DTYPE)
                b_yv = b_yk
            b_yk, b_yv = rounded(b_yk, PRECISION), rounded(b_yv, PRECISION)
            b_k = tl.dot(b_yk, b_wk, b_k, input_precision=PRECISION)
            b_v = tl.dot(b_yv, b_wv, b_v, input_precision=PRECISION)
        b_k = _head(b_k, affine, FIRST, NP, DK, DKP, AFFINE)
        b_v = _head(b_v, affine, FIRST + DKP, NP, DV, DVP, AFFINE)
        tl.store(p_kv + tl.arange(0, DKP)[None, :], b_k.to(DTYPE), mask=m_p[:, None])
        tl.store(p_kv + DKP + tl.arange(0, DVP)[None, :], b_v.to(DTYPE), mask=m_p[:, None])


@triton.jit
def _project_queries(
    x,
    norms,
    w,
    affine,
    q,
    i_t,
    PQ,
    H,
    W,
    HQ,
    WQ,
    C: tl.constexpr,
    CP: tl.constexpr,
    NP: tl.constexpr,
    N: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AFFINE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_N columns of the queries of BLOCK_P pixels; the columns of a tile of pixels follow one another."""
    DTYPE: tl.constexpr = w.dtype.element_ty
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    o_c = tl.arange(0, BLOCK_K)
    o_p = (i_t // N_TILES).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < PQ
    o_n = i_t % N_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    p_w = w + o_c[:, None] * NP + o_n[None, :]
    b_q = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for i_k in tl.range(0, C, BLOCK_K, num_stages=STAGES):
        b_w = tl.load(p_w + i_k * NP)  # [BLOCK_K, BLOCK_N]
        if QUERY_STRIDE > 1:
            o_in = (o_p % (HQ * WQ)).to(tl.int32)
            b_y = _pooled_tile(
                x, norms, o_p // (HQ * WQ), o_in // WQ, o_in % WQ, m_p, i_k + o_c,
                H, W, C, CP, QUERY_STRIDE, BLOCK_K, DTYPE,
            )  # fmt: skip
        else:
            b_y = _pixel_tile(x, norms, o_p, m_p, i_k + o_c, 2, C, CP, BLOCK_K, DTYPE)
        b_q = tl.dot(rounded(b_y, PRECISION), b_w, b_q, input_precision=PRECISION)
    m_q = m_p[:, None] & (o_n < N)[None, :]
    b_q = _shifted(b_q, affine, o_n, NP, AFFINE).to(DTYPE)
    tl.store(q + o_p[:, None] * N + o_n[None, :], b_q, mask=m_q)


@triton.jit(do_not_specialize=("PK", "PQ", "H", "W", "HK", "WK", "HQ", "WQ", "PAD_Y", "PAD_X", "KV_TILES"))
def mqa_project_kernel(
    x,
    norms,
    taps,
    w,
    affine,
    kv,  # [PK, DKP + DVP]
    q,  # [PQ, HEADS * DKP]
    counters_next,
    PK,  # pixels of keys and values
    PQ,  # pixels of queries
    H,
    W,
    HK,
    WK,
    HQ,
    WQ,
    PAD_Y,
    PAD_X,
    KV_TILES,
    C: tl.constexpr,
    CP: tl.constexpr,
    NP: tl.constexpr,
    HEADS: tl.constexpr,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    KERNEL: tl.constexpr,  # of the depthwise convolutions, 0: none
    STRIDE: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,  # whether this kernel makes queries too
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # pixels and columns of a tile of queries
    BLOCK_N: tl.constexpr,
    AFFINE: tl.constexpr,
    PRECISION: tl.constexpr,
    ZERO: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Tiles of keys and values, then tiles of queries."""
    begin()
    i_t = tl.program_id(0)
    clear_counters(counters_next, i_t, ZERO)
    if QUERIES:
        if i_t < KV_TILES:
            _project_kv(
                x, norms, taps, w, affine, kv, i_t, PK, H, W, HK, WK, PAD_Y, PAD_X,
                C, CP, NP, HEADS * DKP, DK, DKP, DV, DVP, KERNEL, STRIDE, BLOCK_P, BLOCK_K, AFFINE, PRECISION, STAGES,
            )  # fmt: skip
        else:
            _project_queries(
                x, norms, w, affine, q, i_t - KV_TILES, PQ, H, W, HQ, WQ,
                C, CP, NP, HEADS * DKP, QUERY_STRIDE, BLOCK_Q, BLOCK_K, BLOCK_N, AFFINE, PRECISION, STAGES,
            )  # fmt: skip
    else:
        _project_kv(
            x, norms, taps, w, affine, kv, i_t, PK, H, W, HK, WK, PAD_Y, PAD_X,
            C, CP, NP, HEADS * DKP, DK, DKP, DV, DVP, KERNEL, STRIDE, BLOCK_P, BLOCK_K, AFFINE, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit
def _own_head(b_tiles, p_w, NP: tl.constexpr, BLOCK_K: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr):
    """The tile of pixels, in pieces of BLOCK_K channels, times DP columns of the weights: [BLOCK_P, DP] fp32."""
    p_w = p_w + tl.arange(0, BLOCK_K)[:, None] * NP + tl.arange(0, DP)[None, :]
    b_acc = tl.zeros([b_tiles[0].shape[0], DP], dtype=tl.float32)
    for t in tl.static_range(len(b_tiles)):
        b_acc = tl.dot(
            rounded(b_tiles[t], PRECISION), tl.load(p_w + t * BLOCK_K * NP), b_acc, input_precision=PRECISION
        )
    return b_acc


@triton.jit
def _anew(b, OPAQUE: tl.constexpr):
    """The same values, of which the compiler does not know that they are; no instruction."""
    if OPAQUE:
        PACK: tl.constexpr = 32 // b.dtype.primitive_bitwidth
        b = tl.inline_asm_elementwise("", "=r,0", [b], dtype=b.dtype, is_pure=True, pack=PACK)
    return b


@triton.jit(do_not_specialize=("TILES", "NQ", "NK"))
def mqa_kernel(
    x,
    norms,
    kv,  # [images, NK, DKP + DVP]
    w,
    affine,
    w_out,
    affine_out,
    out,  # of the block with PROJECT, else [images, NQ, HEADS * DVP]
    counters_next,
    TILES,  # of one image
    NQ,
    NK,
    scale,
    C: tl.constexpr,
    CP: tl.constexpr,
    NP: tl.constexpr,
    N: tl.constexpr,
    NP_OUT: tl.constexpr,
    HEADS: tl.constexpr,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    INLINE: tl.constexpr,  # keys and values are made here: one tile holds all pixels of an image
    PROJECT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N0: tl.constexpr,
    BLOCK_N1: tl.constexpr,
    KEYS0: tl.constexpr,
    KEYS1: tl.constexpr,
    SHARE: tl.constexpr,  # heads of one program
    FULL: tl.constexpr,  # of the pieces of keys, how many have no key beyond NK
    OPAQUE: tl.constexpr,  # see `_anew`
    AFFINE: tl.constexpr,
    PRECISION: tl.constexpr,
    ATTENTION: tl.constexpr,  # precision of the products of attention
    ZERO: tl.constexpr,
    STAGES: tl.constexpr,
):
    begin()
    DTYPE: tl.constexpr = w.dtype.element_ty
    KV: tl.constexpr = DKP + DVP
    i_t, i_s = tl.program_id(0), tl.program_id(1)
    clear_counters(counters_next, i_t + i_s, ZERO)
    i_b = (i_t // TILES).to(tl.int64)
    o_in = i_t % TILES * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_in < NQ
    o_p = i_b * NQ + o_in
    b_tiles = ()
    for i_k in tl.static_range(0, C, BLOCK_K):
        b_tiles = b_tiles + (_pixel_tile(x, norms, o_p, m_p, i_k + tl.arange(0, BLOCK_K), 2, C, CP, BLOCK_K, DTYPE),)
    p_k = kv + i_b * NK * KV
    p_v = p_k + DKP
    if INLINE:
        b_k0 = _own_head(b_tiles, w + HEADS * DKP, NP, BLOCK_K, DKP, PRECISION)
        b_v0 = _own_head(b_tiles, w + (HEADS + 1) * DKP, NP, BLOCK_K, DVP, PRECISION)
        b_k0 = _head(b_k0, affine, HEADS * DKP, NP, DK, DKP, AFFINE).to(DTYPE)
        b_v0 = _head(b_v0, affine, (HEADS + 1) * DKP, NP, DV, DVP, AFFINE)
        # what lies beyond the image has the weight 0 and must not be inf
        b_v0 = tl.where(m_p[:, None], b_v0, 0.0).to(DTYPE)
        b_k1, b_v1 = b_k0, b_v0
    else:
        b_k0 = load_rows(p_k, 0, NK, KV, 1, DKP, DKP, KEYS0)
        b_v0 = load_rows(p_v, 0, NK, KV, 1, DVP, DVP, KEYS0)
        b_k1, b_v1 = b_k0, b_v0
        if KEYS1 > 0:
            b_k1 = load_rows(p_k, KEYS0, NK, KV, 1, DKP, DKP, KEYS1)
            b_v1 = load_rows(p_v, KEYS0, NK, KV, 1, DVP, DVP, KEYS1)
    if PROJECT:
        b_acc0 = tl.zeros([BLOCK_P, BLOCK_N0], dtype=tl.float32)
        b_acc1 = b_acc0
        if BLOCK_N1 > 0:
            b_acc1 = tl.zeros([BLOCK_P, BLOCK_N1], dtype=tl.float32)
    for i_h in tl.range(i_s * SHARE, min((i_s + 1) * SHARE, HEADS), num_stages=STAGES):
        b_q = _own_head(b_tiles, w + i_h * DKP, NP, BLOCK_K, DKP, PRECISION)
        b_q = _shifted(b_q, affine, i_h * DKP + tl.arange(0, DKP), NP, AFFINE).to(DTYPE)
        b_o = attend((b_q,), (b_k0,), b_v0, (b_k1,), b_v1, NK, scale, KEYS0, KEYS1, FULL, ATTENTION)
        b_o = b_o.to(DTYPE)  # [BLOCK_P, DVP]
        if PROJECT:
            b_o = rounded(b_o, PRECISION)
            p_w = w_out + (i_h * DVP + tl.arange(0, DVP))[:, None] * NP_OUT
            b_w0 = tl.load(p_w + tl.arange(0, BLOCK_N0)[None, :])  # [DVP, BLOCK_N0]
            b_acc0 = tl.dot(b_o, b_w0, b_acc0, input_precision=PRECISION)
            if BLOCK_N1 > 0:
                b_w1 = tl.load(p_w + BLOCK_N0 + tl.arange(0, BLOCK_N1)[None, :])
                b_acc1 = tl.dot(b_o, b_w1, b_acc1, input_precision=PRECISION)
            # a product that is still in flight in the next turn makes ptxas wait for every single one
            b_acc0, b_acc1 = _anew(b_acc0, OPAQUE), _anew(b_acc1, OPAQUE)
        else:
            p_o = out + o_p[:, None] * (HEADS * DVP) + i_h * DVP + tl.arange(0, DVP)[None, :]
            tl.store(p_o, b_o, mask=m_p[:, None])
    if PROJECT:
        # not kept over the loop
        o_in = i_t % TILES * BLOCK_P + _anew(tl.arange(0, BLOCK_P), OPAQUE)
        m_p, o_p = o_in < NQ, i_b * NQ + o_in
        store_tile(b_acc0, affine_out, x, out, o_p, m_p, 0, N, NP_OUT, BLOCK_N0, "none", RESIDUAL)
        if BLOCK_N1 > 0:
            store_tile(b_acc1, affine_out, x, out, o_p, m_p, BLOCK_N0, N, NP_OUT, BLOCK_N1, "none", RESIDUAL)


@triton.jit
def _halfway(o, SIZE, STRIDE: tl.constexpr):
    """(first source, second source, weight of the second) of bilinear up-sampling, align_corners=False."""
    b_at = tl.maximum((o.to(tl.float32) + 0.5) / STRIDE - 0.5, 0.0)
    o_0 = b_at.to(tl.int32)
    return o_0, tl.minimum(o_0 + 1, SIZE - 1), b_at - o_0.to(tl.float32)


@triton.jit(do_not_specialize=("J", "HQ", "WQ"))
def mqa_output_kernel(
    o,  # [images, HQ * WQ, C]
    w,
    affine,
    residual,
    out,
    J,  # output pixels
    HQ,
    WQ,
    C: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    STRIDE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Bilinear up-sampling -> 1x1 -> layer scale [-> residual]."""
    begin()
    DTYPE: tl.constexpr = w.dtype.element_ty
    o_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < J
    i_n = tl.program_id(1) * BLOCK_N
    o_in = (o_p % (HQ * WQ * STRIDE * STRIDE)).to(tl.int32)
    o_image = o_p // (HQ * WQ * STRIDE * STRIDE) * HQ
    o_y0, o_y1, b_y = _halfway(o_in // (WQ * STRIDE), HQ, STRIDE)
    o_x0, o_x1, b_x = _halfway(o_in % (WQ * STRIDE), WQ, STRIDE)
    b_acc = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for i_k in tl.range(0, C, BLOCK_K, num_stages=1):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m = m_p[:, None] & (o_k < C)[None, :]
        p_0 = o + ((o_image + o_y0) * WQ * C)[:, None] + o_k[None, :]
        p_1 = o + ((o_image + o_y1) * WQ * C)[:, None] + o_k[None, :]
        b_00 = tl.load(p_0 + (o_x0 * C)[:, None], mask=m, other=0.0).to(tl.float32)
        b_01 = tl.load(p_0 + (o_x1 * C)[:, None], mask=m, other=0.0).to(tl.float32)
        b_10 = tl.load(p_1 + (o_x0 * C)[:, None], mask=m, other=0.0).to(tl.float32)
        b_11 = tl.load(p_1 + (o_x1 * C)[:, None], mask=m, other=0.0).to(tl.float32)
        b_top = b_00 * (1.0 - b_x)[:, None] + b_01 * b_x[:, None]
        b_bottom = b_10 * (1.0 - b_x)[:, None] + b_11 * b_x[:, None]
        b_o = (b_top * (1.0 - b_y)[:, None] + b_bottom * b_y[:, None]).to(DTYPE)
        b_w = tl.load(w + o_k[:, None] * NP + i_n + tl.arange(0, BLOCK_N)[None, :])
        b_acc = tl.dot(rounded(b_o, PRECISION), b_w, b_acc, input_precision=PRECISION)
    store_tile(b_acc, affine, residual, out, o_p, m_p, i_n, N, NP, BLOCK_N, "none", RESIDUAL)
