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
from .mqa_config import key_pieces

if TYPE_CHECKING:
    from .mqa_block import MobileMQA


def folded(runner: MobileMQA) -> tuple[Tensor, Tensor]:
    """The convolutions of keys and values with the pre-norm in them, fp32."""
    if runner.folded is None:
        k, cp = runner.down, runner.norms.shape[1]
        ranges = k * (k + 1) // 2
        runner.folded = (
            torch.empty(2, k * k, cp, dtype=torch.float32, device=runner.device),
            torch.empty(ranges, ranges, 2, cp, dtype=torch.float32, device=runner.device),
        )
        fold(runner)
    return runner.folded


def fold(runner: MobileMQA) -> None:
    """Fills what `folded` has made, after a change of the norm or of a convolution."""
    if runner.folded is None:
        return
    k, taps = runner.down, runner.taps.double()
    kernels = taps[:, : k * k].unflatten(1, (k, k))
    runner.folded[0].copy_(taps[:, : k * k] * runner.norms[0].double())
    runner.folded[1].copy_(shift_table(kernels, runner.norms[1].double(), taps[:, k * k]))


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
    pixels = n * hk * wk
    scalars = {"PK": pixels, "H": h, "W": w, "HK": hk, "WK": wk, "PAD_Y": pads[0], "PAD_X": pads[1]}
    constants = {
        "C": runner.c, "CP": runner.norms.shape[1], "KERNEL": runner.down, "STRIDE": stride, "BLOCK_P": cfg["p"],
        "BLOCK_K": cfg["k"], "ZERO": 0, "WARPS": cfg["warps"],
    }  # fmt: skip
    return Build(
        mqa_depthwise_hopper_kernel, (-(-pixels // cfg["p"]), -(-runner.c // cfg["k"]), 1),
        lambda p, c, z, s: [x, *folded(runner), out, z], scalars, constants, options(cfg), runner.norms,
    )  # fmt: skip


def _descriptors(runner: MobileMQA, cfg: Config) -> dict[str, Any]:
    from .mqa_hopper import descriptors

    dims = (runner.native["key_dim"], runner.native["value_dim"], runner.dk)
    return descriptors(runner.w.w, runner.w_out.w, (cfg["c0"], cfg["c1"]), runner.heads, dims)


def keys(runner: MobileMQA, cfg: Config, pixels: int, x: Any, kv: Any) -> Build:
    """Keys and values of what `depthwise` made."""
    from .mqa_hopper_keys import mqa_keys_hopper_kernel

    found = _descriptors(runner, cfg)
    scalars = {"PK": pixels, "desc_q0": found["desc_q0"], "desc_q1": found["desc_q1"]}
    constants = {
        "C": runner.c, "HEADS": runner.heads, "DP": runner.dk, "BLOCK_P": cfg["p"], "BLOCK_C0": cfg["c0"],
        "BLOCK_C1": cfg["c1"], "ZERO": 0, "WARPS": cfg["warps"],
    }  # fmt: skip
    return Build(
        mqa_keys_hopper_kernel, (-(-pixels // cfg["p"]), 2, 1), lambda p, c, z, s: [x, kv, z],
        scalars, constants, options(cfg), runner.norms,
    )  # fmt: skip


def attend(runner: MobileMQA, cfg: Config, n: int, nq: int, nk: int, x: Any, kv: Any, out: Any) -> Build:
    """All that follows the keys and values of n images; with `inline` these too."""
    from .mqa_hopper import mqa_hopper_kernel

    native, inline = runner.native, int(cfg["inline"])
    keys0, keys1 = key_pieces(cfg, nq, nk, runner.down)
    tiles = -(-nq // cfg["p"])
    constants = {
        "C": runner.c, "CP": runner.norms.shape[1], "NP_OUT": runner.w_out.np, "HEADS": runner.heads,
        "DKP": runner.dk, "DVP": runner.dv, "INLINE": inline, "RESIDUAL": native["residual"], "BLOCK_P": cfg["p"],
        "BLOCK_C0": cfg["c0"], "BLOCK_C1": cfg["c1"], "KEYS0": keys0, "KEYS1": keys1,
        "SHORT": max(native["key_dim"], native["value_dim"]) <= 48,
        "FULL": full_pieces(keys0, keys1, nk), "ZERO": 0, "WARPS": cfg["warps"],
    }  # fmt: skip
    scalars = {
        "TILES": tiles, "NQ": nq, "NK": nk, "scale": native["key_dim"] ** -0.5 * LOG2_E,
        **_descriptors(runner, cfg),
    }  # fmt: skip
    return Build(
        mqa_hopper_kernel, (n * tiles, 1, 1),
        lambda p, c, z, s: [x, runner.norms, x if inline else kv, runner.w_out.affine, out, z],
        scalars, constants, options(cfg), runner.norms,
    )  # fmt: skip
