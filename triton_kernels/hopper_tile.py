"""Device functions of the kernels in Gluon: copies to shared memory, products of the tensor cores of Hopper.

Gluon is Triton's language in which the place of every tile and every wait is chosen by the kernel. Weights come by the
copy engine (one thread asks, nobody waits in line), everything else by asynchronous copies of the threads. Tiles have
two pieces of channels where the channels are no power of two: `TWO`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.language.extra import cuda

from .common import DEPENDENT

async_copy, mbarrier, tma = hopper.async_copy, hopper.mbarrier, hopper.tma
# renamed in triton 3.8
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def begin(counters, i_first, ZERO: gl.constexpr, WARPS: gl.constexpr):
    """`common.begin` and `common.clear_counters`. What was there before the kernel before may be read before it."""
    if DEPENDENT:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    if ZERO > 0:  # noqa: SIM102 - settled when compiling, the inner one on the device
        if i_first == 0:
            LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
            gl.store(counters + gl.arange(0, ZERO, LAYOUT), gl.zeros([ZERO], gl.int32, LAYOUT))


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """So many, each complete when as many have arrived."""
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=ARRIVALS)
    if COUNT == 1:
        return (bar,)
    else:
        return (bar,) + barriers(COUNT - 1, ARRIVALS)


@gluon.jit
def store_rows(tile, p, i_row, ROWS, i_n, STRIDE: gl.constexpr, WARPS: gl.constexpr):
    """Rows of a tile before ROWS to memory from row `i_row`, column `i_n` on."""
    N: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [WARPS, 1], [1, 0])
    o_n = i_n + gl.arange(0, N, gl.SliceLayout(0, LAYOUT))
    o_r = i_row + gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT))
    p_y = p + o_r.to(gl.int64)[:, None] * STRIDE + o_n[None, :]
    gl.store(p_y, tile.load(LAYOUT), mask=(o_r < ROWS)[:, None])


@gluon.jit
def copy_rows(
    tile, p, i_row, ROWS, STRIDE: gl.constexpr, MASKED: gl.constexpr, WARPS: gl.constexpr, GROUP: gl.constexpr = 1
):
    """Starts the copy of rows from `i_row` on to the tile; with MASKED zeros from ROWS on.

    GROUP rows follow one another without a gap, groups by STRIDE.
    """
    N: gl.constexpr = tile.shape[0]
    D: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    o_n = i_row + gl.arange(0, N, gl.SliceLayout(1, LAYOUT))
    o_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    if GROUP == 1:
        p_t = p + o_n[:, None] * STRIDE + o_d[None, :]
    else:
        p_t = p + (o_n // GROUP * STRIDE + o_n % GROUP * D)[:, None] + o_d[None, :]
    if MASKED:
        async_copy.async_copy_global_to_shared(tile, p_t, mask=(o_n < ROWS)[:, None])
    else:
        async_copy.async_copy_global_to_shared(tile, p_t)


@gluon.jit
def copy_affine(tile, p, NP: gl.constexpr, WARPS: gl.constexpr):
    """Starts the copy of columns of scale and shift."""
    N: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [1, WARPS], [1, 0])
    o_r = gl.arange(0, 2, gl.SliceLayout(1, LAYOUT))
    o_n = gl.arange(0, N, gl.SliceLayout(0, LAYOUT))
    async_copy.async_copy_global_to_shared(tile, p + o_r[:, None] * NP + o_n[None, :])


@gluon.jit
def copy_pieces(tile0, tile1, desc0, desc1, i_h, bar, TWO: gl.constexpr, DIM: gl.constexpr):
    """Starts the copy of one head's matrix, in pieces along DIM; `mbarrier.wait(bar, ...)` waits for both.

    A barrier of the threads must come between the last use of the tiles and this.
    """
    SIZE1: gl.constexpr = tile1.shape[0] * tile1.shape[1] * TWO
    mbarrier.expect(bar, (tile0.shape[0] * tile0.shape[1] + SIZE1) * 2)
    tma.async_copy_global_to_shared(desc0, [i_h, 0, 0], bar, tile0)
    if TWO:
        FIRST: gl.constexpr = tile0.shape[DIM]
        tma.async_copy_global_to_shared(desc1, [i_h, FIRST * (1 - DIM), FIRST * DIM], bar, tile1)


@gluon.jit
def copy_head(tile0, tile1, desc0, desc1, i_h, bar, TWO: gl.constexpr):
    """Columns of a projection: pieces of rows."""
    copy_pieces(tile0, tile1, desc0, desc1, i_h, bar, TWO, 0)


@gluon.jit
def copy_out(tile0, tile1, desc0, desc1, i_h, bar, TWO: gl.constexpr):
    """Rows of the output projection: pieces of columns."""
    copy_pieces(tile0, tile1, desc0, desc1, i_h, bar, TWO, 1)


@gluon.jit
def opaque_zero():
    """0, unknown to the compiler, anew in every turn.

    Places in shared memory that depend on it are computed where they are used. Known ones are hoisted out of the loop,
    two registers for every single product.
    """
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def publish():
    """What was copied or stored may be read by the tensor cores, by all warps."""
    hopper.fence_async_shared()
    barrier()


@gluon.jit
def project(x_s0, x_s1, w_s0, w_s1, b_acc, TWO: gl.constexpr):
    """Starts pixels times weights."""
    b_acc = hopper.warpgroup_mma(x_s0, w_s0, b_acc, use_acc=False, is_async=True)
    if TWO:
        b_acc = hopper.warpgroup_mma(x_s1, w_s1, b_acc, is_async=True)
    return b_acc


@gluon.jit
def load_pixels(p_x, o_p, NQ, i_k, C: gl.constexpr, BLOCK_K: gl.constexpr, WARPS: gl.constexpr):
    """BLOCK_K channels from `i_k` on of pixels; zeros beyond NQ."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_K, BLOCK_K // 8], [WARPS, 1], [1, 0])
    o_r = gl.convert_layout(o_p, gl.SliceLayout(1, LAYOUT))
    o_k = i_k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, LAYOUT))
    return gl.load(p_x + o_r.to(gl.int64)[:, None] * C + o_k[None, :], mask=(o_r < NQ)[:, None], other=0.0)


@gluon.jit
def query_norm(norms, i_k, CP: gl.constexpr, b_x):
    """Scale and shift of the norm before queries, laid out as the pixels `b_x`."""
    BLOCK_K: gl.constexpr = b_x.shape[1]
    o_k = i_k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, b_x.type.layout))
    return gl.load(norms + 2 * CP + o_k), gl.load(norms + 3 * CP + o_k)


@gluon.jit
def normalise(b_x, b_scale, b_shift, tile):
    """Stores normalised pixels to the tile."""
    tile.store((b_x.to(gl.float32) * b_scale[None, :] + b_shift[None, :]).to(tile.dtype))


@gluon.jit
def as_operand(b_x, like: gl.constexpr):
    """A product's result as the first operand of another one: the same registers."""
    return gl.convert_layout(b_x, gl.DotOperandLayout(0, like, 2))


@gluon.jit
def halves(b_x):
    """Left and right half of the columns: the same registers."""
    BLOCK_P: gl.constexpr = b_x.shape[0]
    D: gl.constexpr = b_x.shape[1]
    return gl.split(gl.permute(gl.reshape(b_x, [BLOCK_P, 2, D // 2]), (0, 2, 1)))


@gluon.jit
def multiply(b_a, tile, b_acc, LIKE: gl.constexpr, SHORT: gl.constexpr, BEGIN: gl.constexpr):
    """Starts [BLOCK_P, D] in registers times the tile [D, N]; with SHORT columns and rows from 48 on are zero.

    Returns the accumulator and the operands to wait with.
    """
    if SHORT:
        b_a0, b_a1 = halves(b_a)
        b_a1, _ = halves(b_a1)
        b_a0, b_a1 = as_operand(b_a0, LIKE), as_operand(b_a1, LIKE)
        b_acc = hopper.warpgroup_mma(b_a0, tile.slice(0, 32, dim=0), b_acc, use_acc=not BEGIN, is_async=True)
        b_acc = hopper.warpgroup_mma(b_a1, tile.slice(32, 16, dim=0), b_acc, is_async=True)
    else:
        b_a0 = as_operand(b_a, LIKE)
        b_a1 = b_a0
        b_acc = hopper.warpgroup_mma(b_a0, tile, b_acc, use_acc=not BEGIN, is_async=True)
    return b_acc, b_a0, b_a1


@gluon.jit
def _folded(b_x, SUM: gl.constexpr, WARPS: gl.constexpr):
    """Sums or maxima of every 16th column: no exchange between threads, and no long chain of dependent steps."""
    if b_x.shape[1] == 16:
        L_16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 16, 16])
        return gl.convert_layout(b_x, L_16, assert_trivial=True)
    else:
        b_left, b_right = halves(b_x)
        return _folded(b_left + b_right if SUM else gl.maximum(b_left, b_right), SUM, WARPS)


@gluon.jit
def maxima(b_s0, b_s1, NK, scale, FULL: gl.constexpr, TWO_KEYS: gl.constexpr, WARPS: gl.constexpr):
    """Scores in one or two pieces with -inf beyond NK, and the largest of each row, scaled."""
    L_0: gl.constexpr = b_s0.type.layout
    KEYS0: gl.constexpr = b_s0.shape[1]
    if TWO_KEYS:
        L_1: gl.constexpr = b_s1.type.layout
        KEYS1: gl.constexpr = b_s1.shape[1]
        if FULL < 2:
            o_1 = KEYS0 + gl.arange(0, KEYS1, gl.SliceLayout(0, L_1))
            b_s1 = gl.where((o_1 < NK)[None, :], b_s1, float("-inf"))
        b_f = gl.maximum(_folded(b_s0, False, WARPS), _folded(b_s1, False, WARPS))
    else:
        if FULL < 1:
            b_s0 = gl.where((gl.arange(0, KEYS0, gl.SliceLayout(0, L_0)) < NK)[None, :], b_s0, float("-inf"))
        b_f = _folded(b_s0, False, WARPS)
    b_m = gl.convert_layout(gl.max(b_f, 1), gl.SliceLayout(1, L_0), assert_trivial=True)
    # a row of -inf alone keeps its -inf scores: NaN only where torch has it
    return b_s0, b_s1, gl.where(b_m == float("-inf"), 0.0, b_m) * scale


@gluon.jit
def _weigh(b_s, b_m, v_s, i_k, b_r, scale, BEGIN: gl.constexpr, ONES: gl.constexpr, WARPS: gl.constexpr):
    """Adds to the product; sums of every 16th weight, operands. In turns of 32 keys: products run beside exponentials.

    `i_k`: where the keys of `b_s` begin in the tile of values.
    """
    N: gl.constexpr = b_s.shape[1]
    if N > 32:
        b_left, b_right = halves(b_s)
        b_r, b_l0, b_a0 = _weigh(b_left, b_m, v_s, i_k, b_r, scale, BEGIN, ONES, WARPS)
        b_r, b_l1, b_a1 = _weigh(b_right, b_m, v_s, i_k + N // 2, b_r, scale, False, ONES, WARPS)
        return b_r, b_l0 + b_l1, b_a0 + b_a1
    else:
        b_m = gl.convert_layout(b_m, gl.SliceLayout(1, b_s.type.layout), assert_trivial=True)
        b_p = gl.exp2(gl.fma(b_s, scale, -b_m[:, None]))
        b_l = 0
        if not ONES:
            b_l = _folded(b_p, True, WARPS)
        L_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, v_s.shape[1], 16])
        b_a = as_operand(b_p.to(v_s.dtype), L_O)
        b_r = hopper.warpgroup_mma(b_a, v_s.slice(i_k, N, dim=0), b_r, use_acc=not BEGIN, is_async=True)
        return b_r, b_l, (b_a,)


@gluon.jit
def weigh(
    b_s0, b_s1, b_m, v_s0, v_s1, scale,
    TWO_KEYS: gl.constexpr, ONES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Starts the product of 2^(scores - maxima) and values; that, what `normalised` wants, operands to wait with.

    With ONES the sums of the weights come out of the product.
    """
    N: gl.constexpr = b_s0.shape[0]
    D: gl.constexpr = v_s0.shape[1]
    L_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    b_r = gl.zeros([N, D], gl.float32, L_O)
    if TWO_KEYS:
        b_r, b_l1, b_a1 = _weigh(b_s1, b_m, v_s1, 0, b_r, scale, True, ONES, WARPS)
        b_r, b_l0, b_a0 = _weigh(b_s0, b_m, v_s0, 0, b_r, scale, False, ONES, WARPS)
        return b_r, b_l0 + b_l1, b_a0 + b_a1
    else:
        return _weigh(b_s0, b_m, v_s0, 0, b_r, scale, True, ONES, WARPS)


@gluon.jit
def normalised(b_r, b_l, ONES: gl.constexpr):
    """The product of weights and values over the sums of the weights, which are in its column 48 with ONES."""
    if ONES:
        # the other columns beyond the channels are zero
        _, b_half = halves(b_r)
        _, b_l = halves(b_half)
    b_l = gl.convert_layout(gl.sum(b_l, 1), gl.SliceLayout(1, b_r.type.layout), assert_trivial=True)
    return b_r * (1.0 / b_l)[:, None]
