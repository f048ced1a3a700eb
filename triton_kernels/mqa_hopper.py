"""`mqa_kernel` for Hopper's tensor cores, written in Gluon; what is computed is what `mqa.py` says.

A program has 64 pixels and four warps, so that two programs share a multiprocessor: one multiplies while the other
takes exponentials. In one program a head is divided by the sums of its weights, and its output projection started,
behind the queries of the next head; values are multiplied beside exponentials; weights are copied when all products
are done that were started before. 16-bit dtypes, heads of 64 columns (what lies beyond their channels is zero, not
read, and with at most 48 channels left out of two of the four products).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper import tile_layout
from .hopper_tile import (
    async_copy,
    barrier,
    begin,
    copy_affine,
    copy_head,
    copy_out,
    copy_rows,
    load_pixels,
    maxima,
    mbarrier,
    multiply,
    normalise,
    normalised,
    opaque_zero,
    project,
    publish,
    query_norm,
    store_rows,
    weigh,
)


@gluon.jit
def project_out(
    b_r, b_l, wo_s0, wo_s1, o_bar, phase, b_acc0, b_acc1,
    TWO: gl.constexpr, SHORT: gl.constexpr, ONES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Starts a head's part of the output projection; sums and the operands to wait with."""
    b_o = normalised(b_r, b_l, ONES).to(wo_s0.dtype)
    mbarrier.wait(o_bar, phase & 1)
    N0: gl.constexpr = wo_s0.shape[1]
    L_0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N0, 16])
    b_acc0, b_o0, b_o1 = multiply(b_o, wo_s0, b_acc0, L_0, SHORT, False)
    if TWO:
        N1: gl.constexpr = wo_s1.shape[1]
        L_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N1, 16])
        b_acc1, _, _ = multiply(b_o, wo_s1, b_acc1, L_1, SHORT, False)
    else:
        b_acc1 = b_acc0
    return b_acc0, b_acc1, (b_o0, b_o1)


@gluon.jit
def attend(
    b_q,  # [BLOCK_P, DKP]
    b_acc0,
    b_acc1,
    operands,  # of the output projection in flight
    x_s0,
    x_s1,
    wq_s0,
    wq_s1,
    wo_s0,
    wo_s1,
    k_s0,
    k_s1,
    v_s0,
    v_s1,
    q_bar,
    o_bar,
    desc_q0,
    desc_q1,
    desc_o0,
    desc_o1,
    p_x,
    i_p,
    i_h,
    more,  # whether another head follows
    NQ,
    NK,
    scale,
    C: gl.constexpr,
    FULL: gl.constexpr,
    RELOAD: gl.constexpr,  # behind the last head the pixels come once more, as they were
    TWO: gl.constexpr,  # pieces of channels
    TWO_KEYS: gl.constexpr,
    SHORT: gl.constexpr,  # heads of at most 48 channels
    ONES: gl.constexpr,  # values have a column of ones behind these, which makes the sum of the weights
    WARPS: gl.constexpr,
):
    """2^(scores - maxima) v, [BLOCK_P, DVP], what `normalised` wants with it, and the sums of the output projection.

    Once the products are done that were started before, weights are copied: of the next queries, of this head's output.
    """
    BLOCK_P: gl.constexpr = b_q.shape[0]
    KEYS0: gl.constexpr = k_s0.shape[0]
    L_0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS0, 16])
    b_z0 = gl.zeros([BLOCK_P, KEYS0], gl.float32, L_0)
    b_s0, b_q0, b_q1 = multiply(b_q, k_s0.permute((1, 0)), b_z0, L_0, SHORT, True)
    b_s1 = b_s0
    if TWO_KEYS:
        KEYS1: gl.constexpr = k_s1.shape[0]
        L_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS1, 16])
        b_z1 = gl.zeros([BLOCK_P, KEYS1], gl.float32, L_1)
        b_s1, _, _ = multiply(b_q, k_s1.permute((1, 0)), b_z1, L_1, SHORT, True)
    found = hopper.warpgroup_mma_wait(0, deps=(b_s0, b_s1, b_acc0, b_acc1, b_q0, b_q1) + operands)
    b_s0, b_s1, b_acc0, b_acc1 = found[0], found[1], found[2], found[3]
    if not TWO:
        b_acc1 = b_acc0
    barrier()
    if more:
        copy_head(wq_s0, wq_s1, desc_q0, desc_q1, i_h + 1, q_bar, TWO)
    elif RELOAD:
        # the place of the pixels, which are added in the end, is free; their addresses are computed anew, since those
        # of the first time would stay in registers
        N0: gl.constexpr = x_s0.shape[1]
        i_p += opaque_zero()
        copy_rows(x_s0, p_x, i_p, NQ, C, True, WARPS)
        if TWO:
            copy_rows(x_s1, p_x + N0, i_p, NQ, C, True, WARPS)
        async_copy.commit_group()
    copy_out(wo_s0, wo_s1, desc_o0, desc_o1, i_h, o_bar, TWO)
    b_s0, b_s1, b_m = maxima(b_s0, b_s1, NK, scale, FULL, TWO_KEYS, WARPS)
    b_r, b_l, operands = weigh(b_s0, b_s1, b_m, v_s0, v_s1, scale, TWO_KEYS, ONES, WARPS)
    b_r = hopper.warpgroup_mma_wait(0, deps=(b_r,) + operands)[0]
    return b_r, b_l, b_acc0, b_acc1


@gluon.jit
def _affine_place(tile, N: gl.constexpr):
    """The place of a tile, for two rows of N fp32."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ROWS: gl.constexpr = tile.shape[0] * tile.shape[1] // (2 * N)
    return tile._reinterpret(gl.float32, [ROWS, N], LAYOUT).slice(0, 2)


@gluon.jit
def _store(
    b_acc, tile, affine, p_out, i_p, NQ, i_n,
    C: gl.constexpr, RESIDUAL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Scale, shift, residual (the pixels in `tile`, which is overwritten); one rounding."""
    L_ACC: gl.constexpr = b_acc.type.layout
    b_y = b_acc * affine.slice(0, 1).load(L_ACC) + affine.slice(1, 1).load(L_ACC)
    if RESIDUAL:
        b_y += tile.load(L_ACC).to(gl.float32)
    tile.store(b_y.to(tile.dtype))
    store_rows(tile, p_out, i_p, NQ, i_n, C, WARPS)


@gluon.jit(do_not_specialize=("TILES", "NQ", "NK"))
def mqa_hopper_kernel(
    x,
    norms,
    kv,  # [images, NK, DKP + DVP]
    affine_out,
    out,
    counters_next,
    TILES,  # of one image
    NQ,
    NK,
    scale,
    desc_q0,  # w as [heads of queries | key | value, C, channels of a head]
    desc_q1,
    desc_o0,  # w_out as [heads, channels of a head, C]
    desc_o1,
    C: gl.constexpr,
    CP: gl.constexpr,
    NP_OUT: gl.constexpr,
    HEADS: gl.constexpr,
    DKP: gl.constexpr,
    DVP: gl.constexpr,
    INLINE: gl.constexpr,  # 1: keys and values are made here: one tile holds all pixels of an image
    RESIDUAL: gl.constexpr,
    BLOCK_P: gl.constexpr,
    BLOCK_C0: gl.constexpr,  # channels, in two pieces, those of the output too
    BLOCK_C1: gl.constexpr,
    KEYS0: gl.constexpr,
    KEYS1: gl.constexpr,
    SHORT: gl.constexpr,  # heads of at most 48 channels, of 64 columns
    ONES: gl.constexpr,  # values have a column of ones behind the 48
    FULL: gl.constexpr,  # of the pieces of keys, how many have no key beyond NK
    ZERO: gl.constexpr,
    WARPS: gl.constexpr,
):
    DTYPE: gl.constexpr = x.dtype.element_ty
    KV: gl.constexpr = DKP + DVP
    TWO: gl.constexpr = BLOCK_C1 > 0
    TWO_KEYS: gl.constexpr = KEYS1 > 0
    i_t = gl.program_id(0)
    if INLINE:
        begin(counters_next, i_t, ZERO, WARPS)
    i_b = (i_t // TILES).to(gl.int64)
    i_p = i_t % TILES * BLOCK_P
    S_C0: gl.constexpr = gl.NVMMASharedLayout(min(2 * BLOCK_C0, 128), 16)
    S_C1: gl.constexpr = gl.NVMMASharedLayout(min(2 * BLOCK_C1, 128), 16)
    S_K: gl.constexpr = gl.NVMMASharedLayout(2 * DKP, 16)
    S_V: gl.constexpr = gl.NVMMASharedLayout(2 * DVP, 16)
    L_Q: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DKP, 16])
    L_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DVP, 16])
    L_C0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_C0, 16])
    x_b0 = gl.allocate_shared_memory(DTYPE, [1, BLOCK_P, BLOCK_C0], S_C0)
    wq_b0 = gl.allocate_shared_memory(DTYPE, [1, BLOCK_C0, DKP], S_K)
    wo_b0 = gl.allocate_shared_memory(DTYPE, [1, DVP, BLOCK_C0], S_C0)
    k_b0 = gl.allocate_shared_memory(DTYPE, [1, KEYS0, DKP], S_K)
    v_b0 = gl.allocate_shared_memory(DTYPE, [1, KEYS0, DVP], S_V)
    x_b1, wq_b1, wo_b1, k_b1, v_b1 = x_b0, wq_b0, wo_b0, k_b0, v_b0
    if TWO:
        x_b1 = gl.allocate_shared_memory(DTYPE, [1, BLOCK_P, BLOCK_C1], S_C1)
        wq_b1 = gl.allocate_shared_memory(DTYPE, [1, BLOCK_C1, DKP], S_K)
        wo_b1 = gl.allocate_shared_memory(DTYPE, [1, DVP, BLOCK_C1], S_C1)
    if TWO_KEYS:
        k_b1 = gl.allocate_shared_memory(DTYPE, [1, KEYS1, DKP], S_K)
        v_b1 = gl.allocate_shared_memory(DTYPE, [1, KEYS1, DVP], S_V)
    x_s0, wq_s0, wo_s0, k_s0, v_s0 = x_b0.index(0), wq_b0.index(0), wo_b0.index(0), k_b0.index(0), v_b0.index(0)
    x_s1, wq_s1, wo_s1, k_s1, v_s1 = x_b1.index(0), wq_b1.index(0), wo_b1.index(0), k_b1.index(0), v_b1.index(0)
    q_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    o_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    o_p = i_p + gl.arange(0, BLOCK_P, gl.SliceLayout(1, L_O))
    p_x = x + i_b * NQ * C
    b_x0 = load_pixels(p_x, o_p, NQ, 0, C, BLOCK_C0, WARPS)
    b_scale0, b_shift0 = query_norm(norms, 0, CP, b_x0)
    if TWO:
        b_x1 = load_pixels(p_x, o_p, NQ, BLOCK_C0, C, BLOCK_C1, WARPS)
        b_scale1, b_shift1 = query_norm(norms, BLOCK_C0, CP, b_x1)
    mbarrier.init(q_bar, count=1)
    mbarrier.init(o_bar, count=1)
    if INLINE:
        wk_s0 = gl.allocate_shared_memory(DTYPE, [BLOCK_C0, DKP], S_K)
        wk_s1 = wk_s0
        if TWO:
            wk_s1 = gl.allocate_shared_memory(DTYPE, [BLOCK_C1, DKP], S_K)
        k_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(k_bar, count=1)
        wv_s0 = wo_s0._reinterpret(DTYPE, [BLOCK_C0, DVP], S_V)
        wv_s1 = wv_s0
        if TWO:
            wv_s1 = wo_s1._reinterpret(DTYPE, [BLOCK_C1, DVP], S_V)
    barrier()
    if INLINE:
        copy_head(wk_s0, wk_s1, desc_q0, desc_q1, HEADS, k_bar, TWO)
        copy_head(wv_s0, wv_s1, desc_q0, desc_q1, HEADS + 1, o_bar, TWO)
    copy_head(wq_s0, wq_s1, desc_q0, desc_q1, 0, q_bar, TWO)
    if not INLINE:
        # the kernel before made keys and values alone; pixels are from before it, and it has waited for them
        begin(counters_next, i_t, ZERO, WARPS)
        p_k = kv + i_b * NK * KV
        copy_rows(k_s0, p_k, 0, NK, KV, FULL < 1, WARPS)
        copy_rows(v_s0, p_k + DKP, 0, NK, KV, FULL < 1, WARPS)
        if TWO_KEYS:
            copy_rows(k_s1, p_k, KEYS0, NK, KV, FULL < 2, WARPS)
            copy_rows(v_s1, p_k + DKP, KEYS0, NK, KV, FULL < 2, WARPS)
        async_copy.commit_group()
    normalise(b_x0, b_scale0, b_shift0, x_s0)
    if TWO:
        normalise(b_x1, b_scale1, b_shift1, x_s1)
    if not INLINE:
        async_copy.wait_group(0)
    publish()
    b_zq = gl.zeros([BLOCK_P, DKP], gl.float32, L_Q)
    if INLINE:
        mbarrier.wait(k_bar, 0)
        b_k = project(x_s0, x_s1, wk_s0, wk_s1, b_zq, TWO)
        mbarrier.wait(o_bar, 0)
        b_v = project(x_s0, x_s1, wv_s0, wv_s1, gl.zeros([BLOCK_P, DVP], gl.float32, L_O), TWO)
        mbarrier.wait(q_bar, 0)
        b_q = project(x_s0, x_s1, wq_s0, wq_s1, b_zq, TWO)
        b_k = hopper.warpgroup_mma_wait(2 + 2 * TWO, deps=[b_k])
        k_s0.store(b_k.to(DTYPE))
        # what lies beyond the image has the weight 0 and must not be inf
        o_v = gl.arange(0, BLOCK_P, gl.SliceLayout(1, L_O))
        b_v = hopper.warpgroup_mma_wait(1 + TWO, deps=[b_v])
        v_s0.store(gl.where((o_v < NQ)[:, None], b_v, 0.0).to(DTYPE))
        publish()
    else:
        mbarrier.wait(q_bar, 0)
        b_q = project(x_s0, x_s1, wq_s0, wq_s1, b_zq, TWO)
    b_q = hopper.warpgroup_mma_wait(0, deps=[b_q])
    b_acc0 = gl.zeros([BLOCK_P, BLOCK_C0], gl.float32, L_C0)
    b_acc1 = b_acc0
    if TWO:
        L_C1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_C1, 16])
        b_acc1 = gl.zeros([BLOCK_P, BLOCK_C1], gl.float32, L_C1)
    b_r, b_l, b_acc0, b_acc1 = attend(
        b_q.to(DTYPE), b_acc0, b_acc1, (), x_s0, x_s1, wq_s0, wq_s1, wo_s0, wo_s1, k_s0, k_s1, v_s0, v_s1,
        q_bar, o_bar, desc_q0, desc_q1, desc_o0, desc_o1, p_x, i_p, 0, HEADS > 1, NQ, NK, scale,
        C, FULL, True, TWO, TWO_KEYS, SHORT, ONES, WARPS,
    )  # fmt: skip
    for i_h in range(1, HEADS):
        z = opaque_zero()
        x_s0, wq_s0, wo_s0, k_s0, v_s0 = x_b0.index(z), wq_b0.index(z), wo_b0.index(z), k_b0.index(z), v_b0.index(z)
        x_s1, wq_s1, wo_s1, k_s1, v_s1 = x_b1.index(z), wq_b1.index(z), wo_b1.index(z), k_b1.index(z), v_b1.index(z)
        mbarrier.wait(q_bar, i_h & 1)
        b_q = project(x_s0, x_s1, wq_s0, wq_s1, b_zq, TWO)
        b_acc0, b_acc1, operands = project_out(
            b_r, b_l, wo_s0, wo_s1, o_bar, i_h - 1 + INLINE, b_acc0, b_acc1, TWO, SHORT, ONES, WARPS
        )  # fmt: skip
        b_q = hopper.warpgroup_mma_wait((1 + SHORT) * (1 + TWO), deps=[b_q])
        b_r, b_l, b_acc0, b_acc1 = attend(
            b_q.to(DTYPE), b_acc0, b_acc1, operands, x_s0, x_s1, wq_s0, wq_s1, wo_s0, wo_s1, k_s0, k_s1, v_s0, v_s1,
            q_bar, o_bar, desc_q0, desc_q1, desc_o0, desc_o1, p_x, i_p, i_h, i_h + 1 < HEADS, NQ, NK, scale,
            C, FULL, True, TWO, TWO_KEYS, SHORT, ONES, WARPS,
        )  # fmt: skip
    # scale and shift of the output, in the places of keys and values
    a_s0 = _affine_place(k_b0.index(0), BLOCK_C0)
    a_s1 = a_s0
    barrier()
    copy_affine(a_s0, affine_out, NP_OUT, WARPS)
    if TWO:
        a_s1 = _affine_place(v_b0.index(0), BLOCK_C1)
        copy_affine(a_s1, affine_out + BLOCK_C0, NP_OUT, WARPS)
    async_copy.commit_group()
    b_acc0, b_acc1, operands = project_out(
        b_r, b_l, wo_b0.index(0), wo_b1.index(0), o_bar, HEADS - 1 + INLINE, b_acc0, b_acc1, TWO, SHORT, ONES, WARPS
    )  # fmt: skip
    async_copy.wait_group(0)
    barrier()
    found = hopper.warpgroup_mma_wait(0, deps=(b_acc0, b_acc1) + operands)
    # computed anew as well
    i_t += opaque_zero()
    i_p = i_t % TILES * BLOCK_P
    p_out = out + (i_t // TILES).to(gl.int64) * NQ * C
    _store(found[0], x_b0.index(0), a_s0, p_out, i_p, NQ, 0, C, RESIDUAL, WARPS)
    if TWO:
        _store(found[1], x_b1.index(0), a_s1, p_out, i_p, NQ, BLOCK_C0, C, RESIDUAL, WARPS)


def descriptors(w: Tensor, w_out: Tensor, c: tuple[int, int], heads: int, dims: tuple[int, int, int]) -> dict[str, Any]:
    """How the copy engine sees the packed weights; what it reads beyond a head's channels are zeros of its own.

    `c`: pieces of the channels; `dims`: channels of a query and of a value, and the columns that both take in memory.
    """
    dk, dv, padded = dims
    row, row_out = w.stride(0), w_out.stride(0)

    found = {}
    for i, size in enumerate((c[0], c[1] or c[0])):
        found[f"desc_q{i}"] = TensorDescriptor(
            w, [heads + 2, sum(c), max(dk, dv)], [padded, row, 1], [1, size, padded], tile_layout(padded)
        )
    for i, size in enumerate((c[0], c[1] or c[0])):
        found[f"desc_o{i}"] = TensorDescriptor(
            w_out, [heads, dv, sum(c)], [padded * row_out, row_out, 1], [1, padded, size], tile_layout(size)
        )
    return found
