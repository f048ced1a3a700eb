"""`mqa_hopper_kernel` for at most 64 pixels, each its own key: two groups of four warps with half of the heads each.

Such a program has a multiprocessor for itself. One group makes the keys, the other one the values; the parts of the
output projection are added in the end, each group finishes half of the channels.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from .hopper_tile import (
    barrier,
    barriers,
    begin,
    copy_head,
    halves,
    load_pixels,
    mbarrier,
    normalise,
    opaque_zero,
    project,
    publish,
    query_norm,
    store_rows,
)
from .mqa_hopper import attend, project_out


@gluon.jit
def _meet(bar, phase):
    """Waits for the other group, each once; what either has stored before may be read, by the tensor cores too."""
    publish()
    mbarrier.arrive(bar, count=1)
    mbarrier.wait(bar, phase)


@gluon.jit
def _group(
    x, norms, affine_out, out, counters_next, i_t, NQ, scale, desc_q0, desc_o0, x_b, r_s, wq_b, wo_b, wq_other, k_b,
    v_b, q_bar, o_bar, both,
    C: gl.constexpr, CP: gl.constexpr, NP_OUT: gl.constexpr, HEADS: gl.constexpr, FIRST: gl.constexpr,
    RESIDUAL: gl.constexpr, SHORT: gl.constexpr, FULL: gl.constexpr, ZERO: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Heads from FIRST on, HEADS of them in both groups together."""
    DTYPE: gl.constexpr = x_b.dtype
    BLOCK_P: gl.constexpr = x_b.shape[1]
    DKP: gl.constexpr = wq_b.shape[2]
    DVP: gl.constexpr = wo_b.shape[1]
    HALF: gl.constexpr = C // 2
    G: gl.constexpr = 1 if FIRST > 0 else 0
    L_Q: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DKP, 16])
    L_C: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, C, 16])
    L_H: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HALF, 16])
    S_V: gl.constexpr = gl.NVMMASharedLayout(2 * DVP, 16)
    x_s, wq_s, wo_s, k_s, v_s = x_b.index(0), wq_b.index(0), wo_b.index(0), k_b.index(0), v_b.index(0)
    # of the keys or the values, in the place of the output's
    w_s = wo_s._reinterpret(DTYPE, [C, DVP], S_V)
    copy_head(w_s, w_s, desc_q0, desc_q0, HEADS + G, o_bar, False)
    copy_head(wq_s, wq_s, desc_q0, desc_q0, FIRST, q_bar, False)
    begin(counters_next, i_t + G, ZERO, WARPS)
    i_b = i_t.to(gl.int64)
    p_x = x + i_b * NQ * C
    ROWS: gl.constexpr = BLOCK_P // 2
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [WARPS, 1], [1, 0])
    o_p = G * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    b_x = load_pixels(p_x, o_p, NQ, 0, C, C, WARPS)
    b_scale, b_shift = query_norm(norms, 0, CP, b_x)
    r_s.slice(G * ROWS, ROWS, dim=0).store(b_x)
    normalise(b_x, b_scale, b_shift, x_s.slice(G * ROWS, ROWS, dim=0))
    _meet(both, 0)
    b_zq = gl.zeros([BLOCK_P, DKP], gl.float32, L_Q)
    mbarrier.wait(o_bar, 0)
    b_k = hopper.warpgroup_mma_wait(0, deps=[project(x_s, x_s, w_s, w_s, b_zq, False)])
    mbarrier.wait(q_bar, 0)
    b_q = project(x_s, x_s, wq_s, wq_s, b_zq, False)
    if G == 0:
        k_s.store(b_k.to(DTYPE))
    else:
        # what lies beyond the image has the weight 0 and must not be inf
        o_v = gl.arange(0, BLOCK_P, gl.SliceLayout(1, L_Q))
        v_s.store(gl.where((o_v < NQ)[:, None], b_k, 0.0).to(DTYPE))
    _meet(both, 1)
    b_q = hopper.warpgroup_mma_wait(0, deps=[b_q])
    b_acc = gl.zeros([BLOCK_P, C], gl.float32, L_C)
    b_r, b_l, b_acc, _ = attend(
        b_q.to(DTYPE), b_acc, b_acc, (), x_s, x_s, wq_s, wq_s, wo_s, wo_s, k_s, k_s, v_s, v_s, q_bar, o_bar,
        desc_q0, desc_q0, desc_o0, desc_o0, p_x, 0, FIRST, HEADS > 2, NQ, NQ, scale,
        C, FULL, False, False, False, SHORT, False, WARPS,
    )  # fmt: skip
    for i in range(1, HEADS // 2):
        z = opaque_zero()
        x_s, wq_s, wo_s, k_s, v_s = x_b.index(z), wq_b.index(z), wo_b.index(z), k_b.index(z), v_b.index(z)
        mbarrier.wait(q_bar, i & 1)
        b_q = project(x_s, x_s, wq_s, wq_s, b_zq, False)
        b_acc, _, operands = project_out(b_r, b_l, wo_s, wo_s, o_bar, i, b_acc, b_acc, False, SHORT, False, WARPS)
        b_q = hopper.warpgroup_mma_wait(1 + SHORT, deps=[b_q])
        b_r, b_l, b_acc, _ = attend(
            b_q.to(DTYPE), b_acc, b_acc, operands, x_s, x_s, wq_s, wq_s, wo_s, wo_s, k_s, k_s, v_s, v_s, q_bar, o_bar,
            desc_q0, desc_q0, desc_o0, desc_o0, p_x, 0, FIRST + i, i + 1 < HEADS // 2, NQ, NQ, scale,
            C, FULL, False, False, False, SHORT, False, WARPS,
        )  # fmt: skip
    b_acc, _, operands = project_out(
        b_r, b_l, wo_b.index(0), wo_b.index(0), o_bar, HEADS // 2, b_acc, b_acc, False, SHORT, False, WARPS
    )  # fmt: skip
    found = hopper.warpgroup_mma_wait(0, deps=(b_acc,) + operands)
    # half of the sums change hands, through the places of the queries' weights
    b_left, b_right = halves(found[0])
    b_left = gl.convert_layout(b_left, L_H, assert_trivial=True)
    b_right = gl.convert_layout(b_right, L_H, assert_trivial=True)
    S_SUMS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    mine = wq_b.index(0)._reinterpret(gl.float32, [BLOCK_P, HALF], S_SUMS)
    other = wq_other.index(0)._reinterpret(gl.float32, [BLOCK_P, HALF], S_SUMS)
    if G == 0:
        mine.store(b_right)
        b_y = b_left
    else:
        mine.store(b_left)
        b_y = b_right
    p_a = affine_out + G * HALF + gl.arange(0, HALF, gl.SliceLayout(0, L_H))
    b_scale, b_shift = gl.load(p_a), gl.load(p_a + NP_OUT)
    _meet(both, 0)
    b_y = (b_y + other.load(L_H)) * b_scale[None, :] + b_shift[None, :]
    tile = r_s.slice(G * HALF, HALF, dim=1)
    if RESIDUAL:
        b_y += tile.load(L_H).to(gl.float32)
    tile.store(b_y.to(DTYPE))
    barrier()
    store_rows(tile, out + i_b * NQ * C, 0, NQ, G * HALF, C, WARPS)


@gluon.jit(do_not_specialize=("NQ",))
def mqa_small_hopper_kernel(
    x,
    norms,
    affine_out,
    out,
    counters_next,
    NQ,
    scale,
    desc_q0,  # as in `mqa_hopper_kernel`
    desc_o0,
    C: gl.constexpr,
    CP: gl.constexpr,
    NP_OUT: gl.constexpr,
    HEADS: gl.constexpr,
    DKP: gl.constexpr,
    DVP: gl.constexpr,
    RESIDUAL: gl.constexpr,
    BLOCK_P: gl.constexpr,
    SHORT: gl.constexpr,
    FULL: gl.constexpr,
    ZERO: gl.constexpr,
    WARPS: gl.constexpr,
):
    DTYPE: gl.constexpr = x.dtype.element_ty
    S_C: gl.constexpr = gl.NVMMASharedLayout(min(2 * C, 128), 16)
    S_K: gl.constexpr = gl.NVMMASharedLayout(2 * DKP, 16)
    S_V: gl.constexpr = gl.NVMMASharedLayout(2 * DVP, 16)
    SECOND: gl.constexpr = HEADS // 2
    x_b = gl.allocate_shared_memory(DTYPE, [1, BLOCK_P, C], S_C)
    r_s = gl.allocate_shared_memory(DTYPE, [BLOCK_P, C], S_C)
    wq_b0 = gl.allocate_shared_memory(DTYPE, [1, C, DKP], S_K)
    wq_b1 = gl.allocate_shared_memory(DTYPE, [1, C, DKP], S_K)
    wo_b0 = gl.allocate_shared_memory(DTYPE, [1, DVP, C], S_C)
    wo_b1 = gl.allocate_shared_memory(DTYPE, [1, DVP, C], S_C)
    k_b = gl.allocate_shared_memory(DTYPE, [1, BLOCK_P, DKP], S_K)
    v_b = gl.allocate_shared_memory(DTYPE, [1, BLOCK_P, DVP], S_V)
    q_bar0, q_bar1, o_bar0, o_bar1 = barriers(4, 1)
    (both,) = barriers(1, 2)
    barrier()
    i_t = gl.program_id(0)
    gl.warp_specialize(
        [
            (_group, (
                x, norms, affine_out, out, counters_next, i_t, NQ, scale, desc_q0, desc_o0, x_b, r_s, wq_b0, wo_b0,
                wq_b1, k_b, v_b, q_bar0, o_bar0, both,
                C, CP, NP_OUT, HEADS, 0, RESIDUAL, SHORT, FULL, ZERO, WARPS,
            )),
            (_group, (
                x, norms, affine_out, out, counters_next, i_t, NQ, scale, desc_q0, desc_o0, x_b, r_s, wq_b1, wo_b1,
                wq_b0, k_b, v_b, q_bar1, o_bar1, both,
                C, CP, NP_OUT, HEADS, SECOND, RESIDUAL, SHORT, FULL, ZERO, WARPS,
            )),
        ],
        [WARPS],
        [240],
    )  # fmt: skip
