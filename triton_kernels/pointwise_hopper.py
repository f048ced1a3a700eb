"""1x1 convolutions for Hopper's tensor cores, written in Gluon: [pixels, C] times [C, N], what `pointwise.py` says.

A program keeps the weights of BLOCK_N output channels in shared memory. Two groups of four warps take tiles of 64
pixels in turn, each on its own: what one does besides products runs beside those of the other. Everything else passes
by the copy engine: pixels STAGES - 1 steps of BLOCK_K channels ahead, across tiles, the residual, the result. Within a
tile a product is always in flight; the epilogue of a tile runs in pieces of columns beside the first products of the
next one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from .hopper_tile import barrier, barriers, begin, halves, mbarrier, publish, tma


@gluon.jit
def _places(DTYPE: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Tiles of their own: between uses of the parts of one tile the compiler puts barriers."""
    place = gl.allocate_shared_memory(DTYPE, [ROWS, COLUMNS], LAYOUT)
    if COUNT == 1:
        return (place,)
    else:
        return (place,) + _places(DTYPE, COUNT - 1, ROWS, COLUMNS, LAYOUT)


@gluon.jit
def _expect(tile, bar, wanted):
    """Before a copy to a tile; a barrier of the threads must come between."""
    mbarrier.expect(bar, tile.shape[0] * tile.shape[1] * 2, pred=wanted)


@gluon.jit
def _pieces(b_acc, PIECES: gl.constexpr):
    """Pieces of the columns, left to right: the same registers."""
    if PIECES == 1:
        return (b_acc,)
    else:
        b_0, b_1 = halves(b_acc)
        return _pieces(b_0, PIECES // 2) + _pieces(b_1, PIECES // 2)


@gluon.jit
def _row(p, SIZE: gl.constexpr, WARPS: gl.constexpr):
    """A row of as many columns as a tile of sums has, laid out as these."""
    L_ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, SIZE, 16])
    return gl.load(p + gl.arange(0, SIZE, gl.SliceLayout(0, L_ACC)))


@gluon.jit
def _affine(affine, NP: gl.constexpr, SIZE: gl.constexpr, SCALED: gl.constexpr, WARPS: gl.constexpr):
    """Scale and shift of a piece."""
    if SCALED:
        return _row(affine, SIZE, WARPS), _row(affine + NP, SIZE, WARPS)
    else:
        return ()


@gluon.jit
def _start(shift, N: gl.constexpr, SIZE: gl.constexpr, SCALED: gl.constexpr, WARPS: gl.constexpr):
    """Where the sums of a tile start."""
    L_ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, SIZE, 16])
    b_start = gl.zeros([N, SIZE], gl.float32, L_ACC)
    if not SCALED:
        b_start += _row(shift, SIZE, WARPS)[None, :]
    return b_start


@gluon.jit
def _store(
    b_acc, b_affine, y_s, y_bar, phase, desc_y, i_row, i_n,
    SCALED: gl.constexpr, RESIDUAL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Scale, shift, residual (in `y_s`, which is overwritten) of a piece of columns; one rounding."""
    SIZE: gl.constexpr = y_s.shape[1]
    L_ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, SIZE, 16])
    b_y = gl.convert_layout(b_acc, L_ACC)
    if SCALED:
        b_y = b_y * b_affine[0][None, :] + b_affine[1][None, :]
    if RESIDUAL:
        mbarrier.wait(y_bar, phase)
        b_y += y_s.load(L_ACC).to(gl.float32)
    y_s.store(b_y.to(y_s.dtype))
    publish()
    tma.async_copy_shared_to_global(desc_y, [i_row, i_n], y_s)


@gluon.jit
def _lane(
    desc_x, desc_r, desc_y, affine, counters_next, i_first, i_row, i_n, i_jump, J, w_b, x_b, y_b, w_bars, bars, y_bars,
    NP: gl.constexpr, SCALED: gl.constexpr, RESIDUAL: gl.constexpr, PIECES: gl.constexpr,
    ZERO: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Every tile that begins at `i_row` or `i_jump` pixels after another one, times the weights of a program."""
    STEPS: gl.constexpr = len(w_b)
    BLOCK_K: gl.constexpr = w_b[0].shape[0]
    BLOCK_N: gl.constexpr = w_b[0].shape[1]
    STAGES: gl.constexpr = len(x_b)
    BLOCK_P: gl.constexpr = x_b[0].shape[0]
    PLACES: gl.constexpr = len(y_b)
    SIZE: gl.constexpr = y_b[0].shape[1]
    gl.static_assert(STEPS % STAGES == 0)
    L_ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    begin(counters_next, i_first, ZERO, WARPS)
    for k in gl.static_range(STAGES - 1):
        i_r = i_row + i_jump * (k // STEPS)
        _expect(x_b[k], bars[k], i_r < J)
    # before the first tile stands one beyond the last pixel, of which nothing is read or written
    i_before = J
    if RESIDUAL:
        for i in gl.static_range(PIECES):
            _expect(y_b[i], y_bars[i], True)
    barrier()
    for k in gl.static_range(STAGES - 1):
        i_r = i_row + i_jump * (k // STEPS)
        tma.async_copy_global_to_shared(
            desc_x, [i_r, k % STEPS * BLOCK_K], bars[k], x_b[k], pred=i_r < J
        )  # fmt: skip
    if RESIDUAL:
        for i in gl.static_range(PIECES):
            tma.async_copy_global_to_shared(desc_r, [i_before, i_n + i * SIZE], y_bars[i], y_b[i])
    b_before = gl.zeros([BLOCK_P, BLOCK_N], gl.float32, L_ACC)
    b_start = _start(affine + i_n, BLOCK_P, BLOCK_N, SCALED, WARPS)
    i_g = 0
    phase = 0
    while i_row < J:
        b_acc = hopper.warpgroup_mma_init(b_start)
        b_pieces = _pieces(b_before, PIECES)
        for k in gl.static_range(STEPS):
            b_affine = _affine(affine + i_n + k * SIZE, NP, SIZE, SCALED and k < PIECES, WARPS)
            mbarrier.wait(w_bars[k], 0, pred=i_g == 0)
            mbarrier.wait(bars[k % STAGES], (i_g + k) // STAGES & 1)
            b_acc = hopper.warpgroup_mma(
                x_b[k % STAGES], w_b[k], b_acc, use_acc=k > 0 or not SCALED, is_async=True
            )  # fmt: skip
            # over the end of a turn no product may be in flight, or all are serialised
            if k == STEPS - 1:
                b_start = _start(affine + i_n, BLOCK_P, BLOCK_N, SCALED, WARPS)
                b_acc = hopper.warpgroup_mma_wait(0, deps=[b_acc])
            elif k > 0:
                b_acc = hopper.warpgroup_mma_wait(1, deps=[b_acc])
            if k <= PIECES:
                tma.store_wait(0)
            i_r = i_row + i_jump * ((k + STAGES - 1) // STEPS)
            x_next, next_bar = x_b[(k + STAGES - 1) % STAGES], bars[(k + STAGES - 1) % STAGES]
            _expect(x_next, next_bar, i_r < J)
            if RESIDUAL and k > 0 and k <= PIECES:
                _expect(y_b[k - 1], y_bars[k - 1], True)
            barrier()
            tma.async_copy_global_to_shared(
                desc_x, [i_r, (k + STAGES - 1) % STEPS * BLOCK_K], next_bar, x_next, pred=i_r < J
            )  # fmt: skip
            if RESIDUAL and k > 0 and k <= PIECES:
                # for the tile that is being multiplied, where the result of the one before has left
                tma.async_copy_global_to_shared(
                    desc_r, [i_row, i_n + (k - 1) * SIZE], y_bars[k - 1], y_b[k - 1]
                )  # fmt: skip
            if k < PIECES:
                _store(
                    b_pieces[k], b_affine, y_b[k % PLACES], y_bars[k % PLACES], phase, desc_y,
                    i_before, i_n + k * SIZE, SCALED, RESIDUAL, WARPS,
                )  # fmt: skip
        b_before = b_acc
        i_before = i_row
        i_row += i_jump
        i_g += STEPS
        phase ^= 1
    b_pieces = _pieces(b_before, PIECES)
    for i in gl.static_range(PIECES):
        if not RESIDUAL:
            tma.store_wait(0)
            barrier()
        b_affine = _affine(affine + i_n + i * SIZE, NP, SIZE, SCALED, WARPS)
        _store(
            b_pieces[i], b_affine, y_b[i % PLACES], y_bars[i % PLACES], phase, desc_y, i_before,
            i_n + i * SIZE, SCALED, RESIDUAL, WARPS,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=("J", "LANES"))
def pointwise_hopper_kernel(
    desc_x,  # [pixels, C]
    desc_r,  # [pixels, N]: the residual
    desc_y,  # [pixels, N]: the result
    affine,  # [2, NP] fp32: scale, shift; a shift alone, [1, NP], where not SCALED
    counters_next,
    J,  # pixels
    LANES,  # programs of the same columns, two tiles at once each
    desc_w,  # [C, N]
    C: gl.constexpr,
    N: gl.constexpr,
    NP: gl.constexpr,
    SCALED: gl.constexpr,
    RESIDUAL: gl.constexpr,
    BLOCK_P: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    PIECES: gl.constexpr,
    ZERO: gl.constexpr,
    WARPS: gl.constexpr,
):
    DTYPE: gl.constexpr = desc_w.dtype
    COLUMNS: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    # of the last ones some may be beyond C: zeros
    STEPS: gl.constexpr = (C + BLOCK_K * STAGES - 1) // (BLOCK_K * STAGES) * STAGES
    SIZE: gl.constexpr = BLOCK_N // PIECES
    # each piece a place of its own, where its residual waits for a whole tile
    PLACES: gl.constexpr = PIECES if RESIDUAL else 2
    S_X: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_K, 16)
    S_N: gl.constexpr = gl.NVMMASharedLayout(min(2 * BLOCK_N, 128), 16)
    S_Y: gl.constexpr = gl.NVMMASharedLayout(min(2 * SIZE, 128), 16)
    gl.static_assert(PIECES < STEPS)
    w_b = _places(DTYPE, STEPS, BLOCK_K, BLOCK_N, S_N)
    x_b0 = _places(DTYPE, STAGES, BLOCK_P, BLOCK_K, S_X)
    x_b1 = _places(DTYPE, STAGES, BLOCK_P, BLOCK_K, S_X)
    y_b0 = _places(DTYPE, PLACES, BLOCK_P, SIZE, S_Y)
    y_b1 = _places(DTYPE, PLACES, BLOCK_P, SIZE, S_Y)
    w_bars, bars0, bars1 = barriers(STEPS, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    y_bars0, y_bars1 = barriers(PLACES, 1), barriers(PLACES, 1)
    i_t = gl.program_id(0)
    i_n = i_t % COLUMNS * BLOCK_N
    i_row = i_t // COLUMNS * BLOCK_P
    i_jump = LANES * (2 * BLOCK_P)
    for k in gl.static_range(STEPS):
        mbarrier.expect(w_bars[k], BLOCK_K * BLOCK_N * 2)
    barrier()
    for k in gl.static_range(STEPS):
        tma.async_copy_global_to_shared(desc_w, [k * BLOCK_K, i_n], w_bars[k], w_b[k])
    # tiles of a last round that is not full fall to the first group of every program before a second group has one
    i_row1, i_t1 = i_row + LANES * BLOCK_P, i_t + 1
    gl.warp_specialize(
        [
            (_lane, (
                desc_x, desc_r, desc_y, affine, counters_next, i_t, i_row, i_n, i_jump, J, w_b, x_b0, y_b0, w_bars,
                bars0, y_bars0, NP, SCALED, RESIDUAL, PIECES, ZERO, WARPS,
            )),
            (_lane, (
                desc_x, desc_r, desc_y, affine, counters_next, i_t1, i_row1, i_n, i_jump, J, w_b, x_b1, y_b1, w_bars,
                bars1, y_bars1, NP, SCALED, RESIDUAL, PIECES, ZERO, WARPS,
            )),
        ],
        [WARPS],
        [240],
    )  # fmt: skip
