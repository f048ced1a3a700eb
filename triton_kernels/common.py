"""Device functions shared by the kernels: activations, tile coordinates, the depthwise tile, the epilogue.

A pixel tile is either `BLOCK_P` consecutive pixels of the flattened [N, H, W], or, where a depthwise convolution comes
first, `ROWS` output rows times `BLOCK_J` columns, a column index j running over the flattened (image, x) pairs, so that
narrow images waste nothing. The pixel order inside such a tile is row-major and matters only for addresses.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from .launch import dependent_programs

DEPENDENT = tl.constexpr(dependent_programs() > 0)


@triton.jit
def begin():
    """First in every kernel: with programmatic dependent launch it may start while the kernel before comes to its end.
    Waits until that one has ended and what it wrote can be seen, and lets the next one start.
    """
    if DEPENDENT:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def rounded(b_x, PRECISION: tl.constexpr):
    """An operand of a product: for tf32 to the nearest value with 10 bits of fraction, ties away from zero.

    The tensor cores cut off what they do not read. Left to them every product comes out a little small, which adds up
    over the layers: ten times the error of cuDNN, which rounds, in the logits of conv_small. Weights: `Packed.matrix`.
    """
    if PRECISION == "tf32":
        b_i = b_x.to(tl.int32, bitcast=True)
        b_r = ((b_i + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        # inf and NaN as they are
        b_x = tl.where((b_i & 0x7F800000) == 0x7F800000, b_x, b_r)
    return b_x


@triton.jit
def _normal_cdf(b_x, HALF: tl.constexpr):
    """(1 + erf(x / sqrt(2))) / 2 in fp32, one formula for all x: 2^P(|x|) is what lies beyond |x|.

    P: own minimax fits (Lawson iteration) of the logarithm, going to -inf. Error of x * cdf(x): 5e-8 by the long one,
    6e-6 by that for HALF, whose result is rounded to 16 bits: at most 4e-5 of a positive result, where float16 rounds
    by up to 5e-4. The library's erf chooses coefficients by the size of x: with many elements in flight that took three
    times the registers, and depthwise tiles spilled.
    """
    b_t = tl.abs(b_x)
    if HALF:
        b_p = -0.0003670961013995111 * b_t + 0.006291353143751621
        b_p = b_p * b_t - 0.04980460926890373
        b_p = b_p * b_t - 0.4620286226272583
        b_p = b_p * b_t - 1.1501226425170898
        b_p = b_p * b_t - 1.0000542402267456
    else:
        b_p = -2.772049356281059e-06 * b_t + 3.8620746636297554e-05
        b_p = b_p * b_t - 0.00018254760652780533
        b_p = b_p * b_t - 0.0001458701299270615
        b_p = b_p * b_t + 0.007075471803545952
        b_p = b_p * b_t - 0.05250502750277519
        b_p = b_p * b_t - 0.45920491218566895
        b_p = b_p * b_t - 1.1511057615280151
        b_p = b_p * b_t - 1.0
    b_tail = tl.exp2(b_p)
    return tl.where(b_x > 0, 1.0 - b_tail, b_tail)


@triton.jit
def activation(b_y, ACT: tl.constexpr):
    """none, relu, relu6, gelu (erf) or, for a result of 16 bits, gelu_half in fp32; NaN passes as in torch."""
    if ACT == "relu":
        b_y = tl.maximum(b_y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "relu6":
        b_y = tl.maximum(b_y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_y = tl.minimum(b_y, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "gelu":
        b_y = b_y * _normal_cdf(b_y, False)
    elif ACT == "gelu_half":
        b_y = b_y * _normal_cdf(b_y, True)
    return b_y


@triton.jit
def _stack(b_a, b_b):
    """Two [M, K] tiles to one [2 * M, K], the first on top."""
    return tl.reshape(tl.permute(tl.join(b_a, b_b), (2, 0, 1)), (2 * b_a.shape[0], b_a.shape[1]))


@triton.jit
def _add_column(
    b_rows,
    p_x,
    p_w,
    o_x,
    m_c,
    i_y,
    kx,
    H,
    W,
    C: tl.constexpr,
    CP: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    MASK_C: tl.constexpr,
):
    """Adds what column kx of the window contributes to each output row."""
    o_xx = (o_x + kx).to(tl.uint32)[:, None]
    b_w = ()
    for ky in tl.static_range(KERNEL):
        b_w = b_w + (tl.load(p_w + (ky * KERNEL + kx) * CP)[None, :],)  # [1, BLOCK_K]
    for iy in tl.static_range((ROWS - 1) * STRIDE + KERNEL):
        # one unsigned comparison for column and row; columns beyond J are far outside
        m = o_xx < tl.where((i_y + iy >= 0) & (i_y + iy < H), W, 0).to(tl.uint32)
        if MASK_C:
            m = m & m_c
        p_row = p_x + (((i_y + iy) * W).to(tl.int64) * C + kx * C)
        b_x = tl.load(p_row, mask=m, other=0.0).to(tl.float32)
        b_next = ()
        for r in tl.static_range(ROWS):
            if iy - r * STRIDE >= 0 and iy - r * STRIDE < KERNEL:
                b_next = b_next + (b_rows[r] + b_x * b_w[iy - r * STRIDE],)
            else:
                b_next = b_next + (b_rows[r],)
        b_rows = b_next
    return b_rows


@triton.jit
def depthwise_tile(
    x,
    taps,
    o_n,  # [BLOCK_J] int64, elements before the image of each column
    o_x,  # [BLOCK_J] first input column of the window, far outside for no column
    i_y,  # first input row of the window of the first output row
    i_c,
    H,
    W,
    C: tl.constexpr,
    CP: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    UNROLL: tl.constexpr = True,
):
    """Depthwise convolution of ROWS output rows: [ROWS * BLOCK_J, BLOCK_K] in DTYPE, from channel `i_c` on.

    An input row costs KERNEL shifted loads and serves all output rows that it touches. `taps` is
    [KERNEL * KERNEL + 1, CP] fp32, the shift last. Without UNROLL the columns of the window are a loop: fewer
    registers, fewer loads in flight.
    """
    o_c = i_c + tl.arange(0, BLOCK_K)
    b_shift = tl.load(taps + KERNEL * KERNEL * CP + o_c)  # [BLOCK_K]
    p_x = x + (o_n + o_x * C)[:, None] + o_c[None, :]  # [BLOCK_J, BLOCK_K]
    p_w = taps + o_c
    m_c = (o_c < C)[None, :]
    MASK_C: tl.constexpr = C % BLOCK_K != 0
    b_rows = ()
    for _r in tl.static_range(ROWS):
        b_rows = b_rows + (tl.zeros([o_x.shape[0], BLOCK_K], dtype=tl.float32) + b_shift[None, :],)
    if UNROLL:
        for kx in tl.static_range(KERNEL):
            b_rows = _add_column(b_rows, p_x, p_w, o_x, m_c, i_y, kx, H, W, C, CP, KERNEL, STRIDE, ROWS, MASK_C)
    else:
        for kx in tl.range(0, KERNEL, num_stages=1):
            b_rows = _add_column(b_rows, p_x, p_w, o_x, m_c, i_y, kx, H, W, C, CP, KERNEL, STRIDE, ROWS, MASK_C)
    b_out = ()
    for r in tl.static_range(ROWS):
        b_out = b_out + (activation(b_rows[r], ACT).to(DTYPE),)
    if ROWS == 1:
        return b_out[0]
    elif ROWS == 2:
        return _stack(b_out[0], b_out[1])
    elif ROWS == 4:
        return _stack(_stack(b_out[0], b_out[1]), _stack(b_out[2], b_out[3]))
    else:
        return _stack(
            _stack(_stack(b_out[0], b_out[1]), _stack(b_out[2], b_out[3])),
            _stack(_stack(b_out[4], b_out[5]), _stack(b_out[6], b_out[7])),
        )


@triton.jit
def tile_columns(i_j, J, H, W, WO, PAD_X, C: tl.constexpr, STRIDE: tl.constexpr, BLOCK_J: tl.constexpr):
    """(o_n, o_x) of a depthwise tile, see `depthwise_tile`."""
    o_j = i_j * BLOCK_J + tl.arange(0, BLOCK_J)
    o_n = (o_j // WO).to(tl.int64) * H * W * C
    return o_n, tl.where(o_j < J, (o_j % WO) * STRIDE - PAD_X, -(1 << 24))


@triton.jit
def tile_pixels(i_j, i_g, J, HO, WO, ROWS: tl.constexpr, BLOCK_J: tl.constexpr):
    """Output pixel numbers of a depthwise tile, [ROWS * BLOCK_J] int64, and their mask."""
    o_t = tl.arange(0, ROWS * BLOCK_J)
    o_j = i_j * BLOCK_J + o_t % BLOCK_J
    o_y = i_g * ROWS + o_t // BLOCK_J
    return ((o_j // WO).to(tl.int64) * HO + o_y) * WO + o_j % WO, (o_j < J) & (o_y < HO)


@triton.jit
def affine_act(b_acc, affine, o_n, NP: tl.constexpr, ACT: tl.constexpr):
    """act(acc * scale + shift) in fp32; `affine` is [2, NP] fp32."""
    b_scale = tl.load(affine + o_n)
    b_shift = tl.load(affine + NP + o_n)
    return activation(b_acc * b_scale[None, :] + b_shift[None, :], ACT)


@triton.jit
def hidden_tile(
    b_acc, affine, i_m, M: tl.constexpr, MP: tl.constexpr, BLOCK_M: tl.constexpr, ACT: tl.constexpr, FULL: tl.constexpr
):
    """`affine_act` of expanded channels from `i_m` on; exact zeros beyond M (unless
    FULL: there is nothing beyond), also where an input is inf or NaN."""
    o_m = i_m + tl.arange(0, BLOCK_M)
    b_h = affine_act(b_acc, affine, o_m, MP, ACT)
    if not FULL:
        b_h = tl.where((o_m < M)[None, :], b_h, 0.0)
    return b_h


@triton.jit
def store_tile(
    b_acc,  # [BLOCK_P, BLOCK_N] fp32
    affine,
    residual,
    out,
    o_p,  # [BLOCK_P] int64
    m_p,
    i_n,
    N: tl.constexpr,
    NP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Scale, shift, activation, residual; one rounding."""
    o_n = i_n + tl.arange(0, BLOCK_N)
    b_y = affine_act(b_acc, affine, o_n, NP, ACT)
    o_y = o_p[:, None] * N + o_n[None, :]
    m_y = m_p[:, None] & (o_n < N)[None, :]
    if RESIDUAL:
        b_y += tl.load(residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(out + o_y, b_y.to(out.dtype.element_ty), mask=m_y)


@triton.jit
def clear_counters(counters, i_first, ZERO: tl.constexpr):
    """Zeroes the counters of a later split kernel of the same call; nothing runs between two launches of one stream."""
    if ZERO > 0:  # noqa: SIM102 - settled when compiling, the inner one on the device
        if i_first == 0:
            tl.store(counters + tl.arange(0, ZERO), tl.zeros([ZERO], dtype=tl.int32))
