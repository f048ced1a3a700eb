"""Keys and values of Mobile MQA on Hopper, where they have strided depthwise convolutions; see `mqa_hopper`.

`mqa_depthwise_hopper_kernel` makes both convolutions of pixels that it normalises on the way, a pixel loaded once for
both; `mqa_keys_hopper_kernel` projects them. Two kernels, since programs that do both are few and each waits for
memory several times (15 us instead of 12.5 for 24x24x192, batch 64).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from .hopper_tile import async_copy, barrier, begin, copy_head, copy_rows, mbarrier, project, publish


@gluon.jit
def _range(i_0, SIZE, KERNEL: gl.constexpr):
    """Number of the range of taps that lie inside of the image, see `mqa_hopper_build.shift_table`."""
    i_a = gl.maximum(-i_0, 0)
    i_b = gl.minimum(SIZE - i_0, KERNEL)
    return i_a * KERNEL - i_a * (i_a - 1) // 2 + i_b - i_a - 1


@gluon.jit
def _column(p_x, m_y, i_x, W, C: gl.constexpr, KERNEL: gl.constexpr):
    """The pixels of one column under the rows of the kernel."""
    b_x = ()
    inside = (i_x >= 0) & (i_x < W)
    for ky in gl.static_range(KERNEL):
        b_x = b_x + (gl.load(p_x + (ky * W + i_x) * C, mask=m_y[ky] & inside, other=0.0),)
    return b_x


@gluon.jit(do_not_specialize=("ROWS", "H", "W", "HK", "WK", "PAD_Y", "PAD_X"))
def mqa_depthwise_hopper_kernel(
    x,
    taps,  # [2, KERNEL * KERNEL, CP] fp32: of keys, of values, times the scale of the norm
    shifts,  # [ranges of rows, ranges of columns, 2, CP] fp32: see `mqa_hopper_build.shift_table`
    out,  # [pixels of keys, 2, C]
    counters_next,
    ROWS,  # of keys and values, of all images
    H,
    W,
    HK,
    WK,
    PAD_Y,
    PAD_X,
    C: gl.constexpr,
    CP: gl.constexpr,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    BLOCK_P: gl.constexpr,
    BLOCK_J: gl.constexpr,
    BLOCK_K: gl.constexpr,
    AHEAD: gl.constexpr,
    ZERO: gl.constexpr,
    WARPS: gl.constexpr,
):
    """BLOCK_K channels of both convolutions, of BLOCK_J columns in each of BLOCK_P rows.

    A thread walks along its row: the taps stay in its registers, columns that two neighbours read are loaded once, and
    those of AHEAD further outputs are in flight.
    """
    PARTS: gl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    i_k, i_t = gl.program_id(0) % PARTS * BLOCK_K, gl.program_id(0) // PARTS
    i_j = gl.program_id(1) * BLOCK_J
    RANGES: gl.constexpr = KERNEL * (KERNEL + 1) // 2
    TAPS: gl.constexpr = KERNEL * KERNEL
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BLOCK_K, BLOCK_K // 4], [WARPS, 1], [1, 0])
    o_k = i_k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, LAYOUT))
    m_k = o_k < C
    b_t = ()  # keys, then values
    for t in gl.static_range(2 * TAPS):
        b_t = b_t + (gl.load(taps + t * CP + o_k, mask=m_k, other=0.0)[None, :],)
    o_r = i_t * BLOCK_P + gl.arange(0, BLOCK_P, gl.SliceLayout(1, LAYOUT))
    m = (o_r < ROWS)[:, None] & m_k[None, :]
    o_r = gl.minimum(o_r, ROWS - 1)
    o_y = o_r % HK * STRIDE - PAD_Y
    p_x = x + ((o_r // HK).to(gl.int64) * H + o_y)[:, None] * W * C + o_k[None, :]
    p_s = shifts + (_range(o_y, H, KERNEL) * (RANGES * 2 * CP))[:, None] + o_k[None, :]
    p_o = out + (o_r.to(gl.int64) * WK + i_j)[:, None] * (2 * C) + o_k[None, :]
    m_y = ()
    for ky in gl.static_range(KERNEL):
        m_y = m_y + (m & ((o_y + ky >= 0) & (o_y + ky < H))[:, None],)
    i_x = i_j * STRIDE - PAD_X
    begin(counters_next, i_k + i_t + i_j, ZERO, WARPS)
    b_x = ()  # column by column
    for i in gl.static_range(KERNEL + AHEAD * STRIDE):
        b_x = b_x + _column(p_x, m_y, i_x + i, W, C, KERNEL)
    for j in gl.static_range(BLOCK_J):
        i_s = _range(i_x + j * STRIDE, W, KERNEL) * (2 * CP)
        left = i_j + j < WK
        b_k = gl.load(p_s + i_s, mask=m & left, other=0.0)
        b_v = gl.load(p_s + i_s + CP, mask=m & left, other=0.0)
        if j + AHEAD + 1 < BLOCK_J:
            for i in gl.static_range(STRIDE):
                b_x = b_x + _column(p_x, m_y, i_x + (j + AHEAD) * STRIDE + KERNEL + i, W, C, KERNEL)
        for kx in gl.static_range(KERNEL):
            for ky in gl.static_range(KERNEL):
                b_y = b_x[(j * STRIDE + kx) * KERNEL + ky].to(gl.float32)
                b_k = gl.fma(b_y, b_t[ky * KERNEL + kx], b_k)
                b_v = gl.fma(b_y, b_t[TAPS + ky * KERNEL + kx], b_v)
        gl.store(p_o + j * (2 * C), b_k.to(out.dtype.element_ty), mask=m & left)
        gl.store(p_o + j * (2 * C) + C, b_v.to(out.dtype.element_ty), mask=m & left)


@gluon.jit(do_not_specialize=("PK",))
def mqa_keys_hopper_kernel(
    pixels,  # [PK, 2, C]
    kv,  # [PK, 2, DP]
    counters_next,
    PK,  # pixels of keys and values
    desc_q0,  # w as [heads of queries | key | value, C, channels of a head]
    desc_q1,
    C: gl.constexpr,
    HEADS: gl.constexpr,
    DP: gl.constexpr,
    BLOCK_P: gl.constexpr,
    BLOCK_C0: gl.constexpr,  # channels, in two pieces
    BLOCK_C1: gl.constexpr,
    ONES: gl.constexpr,  # of values column 48 is 1, see `mqa_hopper`
    ZERO: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Keys or values of BLOCK_P pixels."""
    DTYPE: gl.constexpr = pixels.dtype.element_ty
    TWO: gl.constexpr = BLOCK_C1 > 0
    i_t, i_v = gl.program_id(0), gl.program_id(1)
    S_C0: gl.constexpr = gl.NVMMASharedLayout(min(2 * BLOCK_C0, 128), 16)
    S_C1: gl.constexpr = gl.NVMMASharedLayout(min(2 * BLOCK_C1, 128), 16)
    S_D: gl.constexpr = gl.NVMMASharedLayout(2 * DP, 16)
    L_D: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DP, 16])
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DP, DP // 8], [WARPS, 1], [1, 0])
    x_s0 = gl.allocate_shared_memory(DTYPE, [BLOCK_P, BLOCK_C0], S_C0)
    w_s0 = gl.allocate_shared_memory(DTYPE, [BLOCK_C0, DP], S_D)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    i_p = i_t.to(gl.int64) * BLOCK_P
    p_x = pixels + i_p * (2 * C) + i_v * C
    left = PK - i_t * BLOCK_P
    x_s1, w_s1 = x_s0, w_s0
    if TWO:
        x_s1 = gl.allocate_shared_memory(DTYPE, [BLOCK_P, BLOCK_C1], S_C1)
        w_s1 = gl.allocate_shared_memory(DTYPE, [BLOCK_C1, DP], S_D)
    mbarrier.init(bar, count=1)
    barrier()
    copy_head(w_s0, w_s1, desc_q0, desc_q1, HEADS + i_v, bar, TWO)
    begin(counters_next, i_t + i_v, ZERO, WARPS)
    copy_rows(x_s0, p_x, 0, left, 2 * C, True, WARPS)
    if TWO:
        copy_rows(x_s1, p_x + BLOCK_C0, 0, left, 2 * C, True, WARPS)
    async_copy.commit_group()
    async_copy.wait_group(0)
    publish()
    mbarrier.wait(bar, 0)
    b_acc = project(x_s0, x_s1, w_s0, w_s1, gl.zeros([BLOCK_P, DP], gl.float32, L_D), TWO)
    b_acc = hopper.warpgroup_mma_wait(0, deps=[b_acc])
    b_y = gl.convert_layout(b_acc.to(DTYPE), LAYOUT)
    o_r = gl.arange(0, BLOCK_P, gl.SliceLayout(1, LAYOUT))
    o_d = gl.arange(0, DP, gl.SliceLayout(0, LAYOUT))
    if ONES:
        b_y = gl.where(((o_d == 48) & (i_v == 1))[None, :], 1.0, b_y).to(DTYPE)
    p_y = kv + i_p * (2 * DP) + i_v * DP + o_r[:, None] * (2 * DP) + o_d[None, :]
    gl.store(p_y, b_y, mask=(o_r < left)[:, None])
