"""Starts of the kernels of Mobile MQA for Hopper, and the parameters that only they want.

The kernels are imported when first used: their language, Gluon, is not in every Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention_op import LOG2_E, full_pieces
from .build import Build, options, pad_before
from .config import Config
from .hopper import tile_layout
from .launch import Mapped
from .mqa_config import key_pieces, straight

if TYPE_CHECKING:
    from .mqa_block import MobileMQA


# see `unrest`
MAX_UNREST = 1.5


def fold(runner: MobileMQA) -> None:
    """Fills `runner.folded`, parameters with the pre-norm in them, once all stages are packed and after each change.

    With strided convolutions: their taps [2, k * k, CP] and `shift_table`, fp32. For `mqa_config.straight` blocks: the
    matrix of all projections [KP, NP] in 16 bits and what the shift adds [1, NP], fp32.
    """
    k, cp, w = runner.down, runner.norms.shape[1], runner.w
    if not k and not straight(runner):
        return
    if runner.folded is None:
        ranges = k * (k + 1) // 2
        shapes = [(2, k * k, cp), (ranges, ranges, 2, cp)] if k else [w.w.shape, (1, w.np)]
        types = [torch.float32 if k else runner.dtype, torch.float32]
        runner.folded = tuple(
            torch.zeros(shape, dtype=dtype, device=runner.device) for shape, dtype in zip(shapes, types, strict=True)
        )
    norms = runner.norms.double()
    if k:
        taps = runner.taps.double()
        runner.folded[0].copy_(taps[:, : k * k] * norms[0])
        runner.folded[1].copy_(shift_table(taps[:, : k * k].unflatten(1, (k, k)), norms[1], taps[:, k * k]))
        return
    queries, matrix, norms = runner.heads * runner.dk, w.w[: runner.c].double(), norms[:, : runner.c]
    for columns, scale, shift in ((slice(queries), *norms[2:]), (slice(queries, None), *norms[:2])):
        runner.folded[0][: runner.c, columns].copy_(matrix[:, columns] * scale[:, None])
        runner.folded[1][0, columns].copy_(shift @ matrix[:, columns])
    runner.steady = all(unrest(norms[i], norms[i + 1], *runner.moments) <= MAX_UNREST for i in (0, 2))


def _folded(runner: MobileMQA) -> tuple[Tensor, ...]:
    """Also where a choice was made by hand for a device on which it would not run."""
    if runner.folded is None:
        fold(runner)
    assert runner.folded is not None
    return runner.folded


def unrest(scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor) -> float:
    """Error of products with 16-bit weights that hold a norm's scale, over that with pixels rounded after the norm.

    The rounding of a weight counts as often as what it meets: `scale` times a pixel of this mean and variance there, a
    pixel after the norm, shifted by `shift`, here. 1 without a mean and a shift, about 3 for a mean of three standard
    deviations that the norm takes away.
    """
    raw, normal = scale**2 * (mean**2 + var), scale**2 * var + (scale * mean + shift) ** 2
    return float((raw.sum() / normal.sum()).sqrt())


def shift_table(taps: Tensor, shift: Tensor, constant: Tensor) -> Tensor:
    """What the shift of the pre-norm adds to both convolutions: it counts for the taps inside of the image alone.

    `taps` [2, k, k, C], `shift` [C] of the norm, `constant` [2, C] that both add anyway. The taps inside are a range of
    rows times a range of columns, a range [a, b) numbered by a, then by b: [k (k + 1) / 2, k (k + 1) / 2, 2, C].
    """
    k = taps.shape[1]
    ranges = [[a <= i < b for i in range(k)] for a in range(k) for b in range(a + 1, k + 1)]
    inside = torch.tensor(ranges, device=taps.device)
    # [ranges of rows, ranges of columns, 1, k, k, 1]
    inside = (inside[:, None, :, None] & inside[:, None])[:, :, None, :, :, None]
    return torch.where(inside, taps, 0).sum((3, 4)) * shift + constant


def depthwise(runner: MobileMQA, cfg: Config, n: int, h: int, w: int, x: Any, out: Any) -> Build:
    """Both depthwise convolutions of n images of h x w, to [pixels, 2, c]."""
    from .mqa_hopper_keys import mqa_depthwise_hopper_kernel

    (hk, wk), stride = runner.kv_hw(h, w), runner.native["kv_stride"]
    pads = [pad_before(size, runner.down, stride, runner.native["padding"]) for size in (h, w)]
    tables, rows, j = _folded(runner), n * hk, min(cfg.get("j", 4), wk)
    scalars = {"ROWS": rows, "H": h, "W": w, "HK": hk, "WK": wk, "PAD_Y": pads[0], "PAD_X": pads[1]}
    constants = {
        "C": runner.c, "CP": runner.norms.shape[1], "KERNEL": runner.down, "STRIDE": stride, "BLOCK_P": cfg["p"],
        "BLOCK_J": j, "BLOCK_K": cfg["k"], "AHEAD": min(cfg["stages"], j) - 1, "ZERO": 0, "WARPS": cfg["warps"],
    }  # fmt: skip
    return Build(
        mqa_depthwise_hopper_kernel, (-(-runner.c // cfg["k"]) * -(-rows // cfg["p"]), -(-wk // j), 1),
        lambda p, c, z, s: [x, *tables, out, z], scalars, constants, options(cfg), runner.norms, early=True,
    )  # fmt: skip


def _descriptors(runner: MobileMQA, cfg: Config) -> dict[str, Any]:
    from .mqa_hopper import descriptors

    dims = (runner.native["key_dim"], runner.native["value_dim"], runner.dk)
    return descriptors(runner.w.w, runner.w_out.w, (cfg["c0"], cfg["c1"]), runner.heads, dims)


def _short(runner: MobileMQA) -> bool:
    """Whether a quarter of the columns of each head is left out of products; there is room for one of ones."""
    return max(runner.native["key_dim"], runner.native["value_dim"]) <= 48


def keys(runner: MobileMQA, cfg: Config, pixels: int, x: Any, kv: Any) -> Build:
    """Keys and values of what `depthwise` made."""
    from .mqa_hopper_keys import mqa_keys_hopper_kernel

    found = _descriptors(runner, cfg)
    scalars = {"PK": pixels, "desc_q0": found["desc_q0"], "desc_q1": found["desc_q1"]}
    constants = {
        "C": runner.c, "HEADS": runner.heads, "DP": runner.dk, "BLOCK_P": cfg["p"], "BLOCK_C0": cfg["c0"],
        "BLOCK_C1": cfg["c1"], "ONES": _short(runner), "ZERO": 0, "WARPS": cfg["warps"],
    }  # fmt: skip
    return Build(
        mqa_keys_hopper_kernel, (-(-pixels // cfg["p"]), 2, 1), lambda p, c, z, s: [x, kv, z],
        scalars, constants, options(cfg), runner.norms, early=True,
    )  # fmt: skip


def attend(runner: MobileMQA, cfg: Config, n: int, nq: int, nk: int, x: Any, kv: Any, out: Any) -> Build:
    """All that follows the keys and values of n images; with `inline` these too."""
    if cfg.get("halves"):
        return _small(runner, cfg, n, nq, x, out)
    from .mqa_hopper import mqa_hopper_kernel

    native, inline = runner.native, int(cfg["inline"])
    keys0, keys1 = key_pieces(cfg, nq, nk, runner.down)
    tiles = -(-nq // cfg["p"])
    constants = {
        "C": runner.c, "CP": runner.norms.shape[1], "NP_OUT": runner.w_out.np, "HEADS": runner.heads,
        "DKP": runner.dk, "DVP": runner.dv, "INLINE": inline, "RESIDUAL": native["residual"], "BLOCK_P": cfg["p"],
        "BLOCK_C0": cfg["c0"], "BLOCK_C1": cfg["c1"], "KEYS0": keys0, "KEYS1": keys1,
        "SHORT": _short(runner), "ONES": _short(runner) and runner.down > 0,
        "FULL": full_pieces(keys0, keys1, nk), "ZERO": 0, "WARPS": cfg["warps"],
    }  # fmt: skip
    scalars = {
        "TILES": tiles, "NQ": nq, "NK": nk, "scale": native["key_dim"] ** -0.5 * LOG2_E,
        **_descriptors(runner, cfg),
    }  # fmt: skip
    return Build(
        mqa_hopper_kernel, (n * tiles, 1, 1),
        lambda p, c, z, s: [x, runner.norms, x if inline else kv, runner.w_out.affine, out, z],
        scalars, constants, options(cfg), runner.norms, early=True,
    )  # fmt: skip


def _small(runner: MobileMQA, cfg: Config, n: int, nq: int, x: Any, out: Any) -> Build:
    """All of a block of few pixels, each half of the heads by a group of warps."""
    from .mqa_small_hopper import mqa_small_hopper_kernel

    native, found = runner.native, _descriptors(runner, cfg)
    scalars = {
        "NQ": nq, "scale": native["key_dim"] ** -0.5 * LOG2_E, "desc_q0": found["desc_q0"], "desc_o0": found["desc_o0"],
    }  # fmt: skip
    constants = {
        "C": runner.c, "CP": runner.norms.shape[1], "NP_OUT": runner.w_out.np, "HEADS": runner.heads,
        "DKP": runner.dk, "DVP": runner.dv, "RESIDUAL": native["residual"], "BLOCK_P": cfg["p"],
        "SHORT": _short(runner), "FULL": full_pieces(cfg["p"], 0, nq), "ZERO": 0, "WARPS": cfg["warps"],
    }  # fmt: skip
    return Build(
        mqa_small_hopper_kernel, (n, 1, 1), lambda p, c, z, s: [x, runner.norms, runner.w_out.affine, out, z],
        scalars, constants, options(cfg), runner.norms, early=True,
    )  # fmt: skip


def project(runner: MobileMQA, cfg: Config, pixels: int, x: Any, out: Any) -> Build:
    """Queries of all heads, key and value of all pixels: [pixels, heads + 2, DP]."""
    n = (runner.heads + 2) * runner.dk
    return _pointwise(cfg, runner, pixels, (runner.c, n), *_folded(runner), x, None, out)


def attention(runner: MobileMQA, cfg: Config, n: int, nk: int, qkv: Any, out: Any) -> Build:
    """Attention of what `project` made, each pixel with its own key."""
    from .attention_hopper import attention_hopper_kernel

    rows = nk * runner.heads
    parts = -(-rows // (cfg["p"] * cfg["turns"]))
    keys0, keys1 = key_pieces(cfg, nk, nk, runner.down)
    scalars = {"ROWS": rows, "NK": nk, "PARTS": parts, "scale": runner.native["key_dim"] ** -0.5 * LOG2_E}
    constants = {
        "HEADS": runner.heads, "D": runner.dk, "TURNS": cfg["turns"], "BLOCK_P": cfg["p"], "KEYS0": keys0,
        "KEYS1": keys1, "FULL": full_pieces(keys0, keys1, nk), "ZERO": 0, "WARPS": cfg["warps"],
    }  # fmt: skip
    return Build(
        attention_hopper_kernel, (n * parts, 1, 1), lambda p, c, z, s: [qkv, out, z],
        scalars, constants, options(cfg), runner.norms, early=True,
    )  # fmt: skip


def output(runner: MobileMQA, cfg: Config, pixels: int, o: Any, x: Any, out: Any) -> Build:
    """The output projection."""
    residual = x if runner.native["residual"] else None
    sizes = (runner.heads * runner.dv, runner.c)
    return _pointwise(cfg, runner, pixels, sizes, runner.w_out.w, runner.w_out.affine, o, residual, out)


def _pointwise(
    cfg: Config, runner: MobileMQA, pixels: int, sizes: tuple[int, int], w: Tensor, affine: Tensor, x: Any,
    residual: Any, out: Any,
) -> Build:  # fmt: skip
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .pointwise_hopper import pointwise_hopper_kernel

    (c, n), (p, block_n, k) = sizes, (cfg["p"], cfg["n"], cfg["k"])
    columns = -(-n // block_n)
    lanes = max(1, min(runner._sms() // columns, -(-pixels // (2 * p))))
    piece = [p, block_n // cfg["pieces"]]
    pixels_in = Mapped(x, (pixels, c), (p, k))
    added, result = (Mapped(matrix, (pixels, n), piece) for matrix in (residual or out, out))
    scalars = {
        "J": pixels, "LANES": lanes,
        "desc_w": TensorDescriptor(w, [w.shape[0], n], [w.stride(0), 1], [k, block_n], tile_layout(block_n)),
    }  # fmt: skip
    constants = {
        "C": c, "N": n, "NP": w.shape[1], "SCALED": affine.shape[0] == 2, "RESIDUAL": residual is not None,
        "BLOCK_P": p, "BLOCK_N": block_n, "BLOCK_K": k, "STAGES": cfg["stages"], "PIECES": cfg["pieces"], "ZERO": 0,
        "WARPS": cfg["warps"],
    }  # fmt: skip
    return Build(
        pointwise_hopper_kernel, (columns * lanes, 1, 1), lambda p, c, z, s: [pixels_in, added, result, affine, z],
        scalars, constants, options(cfg), runner.norms, early=True,
    )  # fmt: skip
