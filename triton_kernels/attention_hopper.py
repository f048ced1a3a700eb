"""Multi-query attention for Hopper's tensor cores, written in Gluon: see `attention.py`, and `mqa_hopper.py`.

A program keeps all keys and values of an image on chip and takes tiles of 64 rows, a row being one head of one pixel,
in turn; the next tile comes while this one is worked on.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from .hopper_tile import async_copy, barrier, begin, copy_rows, maxima, normalised, opaque_zero, publish, weigh


@gluon.jit(do_not_specialize=("ROWS", "NK", "PARTS"))
def attention_hopper_kernel(
    qkv,  # [pixels, HEADS + 2, D]: queries, key, value
    out,  # [pixels, HEADS, D]
    counters_next,
    ROWS,  # of one image
    NK,
    PARTS,  # programs of one image
    scale,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    TURNS: gl.constexpr,  # tiles of a program
    BLOCK_P: gl.constexpr,
    KEYS0: gl.constexpr,
    KEYS1: gl.constexpr,
    FULL: gl.constexpr,  # of the pieces of keys, how many have no key beyond NK
    ZERO: gl.constexpr,
    WARPS: gl.constexpr,
):
    DTYPE: gl.constexpr = qkv.dtype.element_ty
    TWO_KEYS: gl.constexpr = KEYS1 > 0
    S_P: gl.constexpr = (HEADS + 2) * D
    S_D: gl.constexpr = gl.NVMMASharedLayout(2 * D, 16)
    L_0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS0, 16])
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    i_t = gl.program_id(0)
    i_b = (i_t // PARTS).to(gl.int64)
    i_r = i_t % PARTS * (TURNS * BLOCK_P)
    q_b = gl.allocate_shared_memory(DTYPE, [2, BLOCK_P, D], S_D)
    k_b0 = gl.allocate_shared_memory(DTYPE, [1, KEYS0, D], S_D)
    v_b0 = gl.allocate_shared_memory(DTYPE, [1, KEYS0, D], S_D)
    k_b1, v_b1 = k_b0, v_b0
    if TWO_KEYS:
        k_b1 = gl.allocate_shared_memory(DTYPE, [1, KEYS1, D], S_D)
        v_b1 = gl.allocate_shared_memory(DTYPE, [1, KEYS1, D], S_D)
    begin(counters_next, i_t, ZERO, WARPS)
    p_q = qkv + i_b * NK * S_P
    p_k = p_q + HEADS * D
    p_o = out + i_b * ROWS * D
    copy_rows(k_b0.index(0), p_k, 0, NK, S_P, FULL < 1, WARPS)
    copy_rows(v_b0.index(0), p_k + D, 0, NK, S_P, FULL < 1, WARPS)
    if TWO_KEYS:
        copy_rows(k_b1.index(0), p_k, KEYS0, NK, S_P, FULL < 2, WARPS)
        copy_rows(v_b1.index(0), p_k + D, KEYS0, NK, S_P, FULL < 2, WARPS)
    copy_rows(q_b.index(0), p_q, i_r, ROWS, S_P, True, WARPS, HEADS)
    async_copy.commit_group()
    # not known to be a single turn: unrolled, triton 3.6 does not compile it
    for t in range(TURNS + opaque_zero()):
        z = opaque_zero()
        q_s, k_s0, v_s0 = q_b.index(t & 1), k_b0.index(z), v_b0.index(z)
        async_copy.wait_group(0)
        publish()
        if t + 1 < TURNS:
            copy_rows(q_b.index(1 - (t & 1)), p_q, i_r + BLOCK_P, ROWS, S_P, True, WARPS, HEADS)
            async_copy.commit_group()
        b_z0 = gl.zeros([BLOCK_P, KEYS0], gl.float32, L_0)
        b_s0 = hopper.warpgroup_mma(q_s, k_s0.permute((1, 0)), b_z0, use_acc=False, is_async=True)
        if TWO_KEYS:
            L_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS1, 16])
            b_z1 = gl.zeros([BLOCK_P, KEYS1], gl.float32, L_1)
            b_s1 = hopper.warpgroup_mma(q_s, k_b1.index(z).permute((1, 0)), b_z1, use_acc=False, is_async=True)
            b_s0, b_s1 = hopper.warpgroup_mma_wait(0, deps=[b_s0, b_s1])
        else:
            b_s0 = hopper.warpgroup_mma_wait(0, deps=[b_s0])
            b_s1 = b_s0
        b_s0, b_s1, b_m = maxima(b_s0, b_s1, NK, scale, FULL, TWO_KEYS, WARPS)
        b_r, b_l, operands = weigh(b_s0, b_s1, b_m, v_s0, v_b1.index(z), scale, TWO_KEYS, False, WARPS)
        b_r = hopper.warpgroup_mma_wait(0, deps=(b_r,) + operands)[0]
        # through the place of the queries, whose rows a warp alone has read
        q_s.store(normalised(b_r, b_l, False).to(DTYPE))
        barrier()
        o_r = i_r + gl.arange(0, BLOCK_P, gl.SliceLayout(1, LAYOUT))
        o_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
        gl.store(p_o + o_r[:, None] * D + o_d[None, :], q_s.load(LAYOUT), mask=(o_r < ROWS)[:, None])
        i_r += BLOCK_P
