"""Operation + configuration -> grid and arguments of one kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .config import Config, next_pow2
from .dense import dense_kernel
from .depthwise import depthwise_kernel
from .expand import expand_kernel, ffn_kernel
from .head import pool_kernel
from .launch import Launch, dependent_programs
from .plan import Op, Packed
from .pointwise import pointwise_kernel
from .vector import vector_kernel

MAX_COUNTERS = 4096


class Build:
    """A kernel start that still lacks the places of partial sums, counters and strips."""

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        addresses: Callable[[Any, Any, Any, Any], list[Any]],
        scalars: dict[str, Any],
        constants: dict[str, Any],
        options: dict[str, Any],
        dummy: Any,
        split: int = 1,
        tile: int = 0,
        strip: tuple[int, Any] = (0, None),
        early: bool = False,
    ) -> None:
        self.kernel, self.grid, self.addresses, self.scalars = kernel, grid, addresses, scalars
        self.constants, self.options, self.dummy = constants, options, dummy
        self.split, self._tile = split, tile
        self._strip_bytes, self._strip_dtype = strip
        # gains by an early start however many programs it has, see `launch.dependent_programs`
        self._early = early
        if split > 1 and self.tiles > MAX_COUNTERS:
            self.unsplit()

    @property
    def tiles(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def strip_bytes(self) -> int:
        """Of all programs."""
        return self.tiles * self.split * self._strip_bytes

    @property
    def partial_bytes(self) -> int:
        return self.tiles * self.split * self._tile * 4 if self.split > 1 else 0

    @property
    def zero(self) -> int:
        """Counters to zero: one per tile, a power of two."""
        return next_pow2(self.tiles) if self.split > 1 else 0

    def unsplit(self) -> None:
        """One program per tile: no kernel of this call runs before it that could zero its counters."""
        self.split = self.constants["SPLIT"] = 1
        self.grid = (*self.grid[:2], 1)

    def launch(self, places: tuple[int, int, int], next_counters: int | None, zero: int, early: bool = False) -> Launch:
        """`early`: may start before the kernel before it has ended, if it is small enough."""
        split = self.split > 1
        partial = ("scratch", places[0], torch.float32) if split else self.dummy
        strips = ("scratch", places[2], self._strip_dtype) if self._strip_bytes else self.dummy
        counters = ("scratch", places[1], torch.int32) if split else self.dummy
        following = ("scratch", next_counters, torch.int32) if next_counters is not None else self.dummy
        if "ZERO" in self.constants:
            self.constants["ZERO"] = zero
        elif zero:
            raise AssertionError("a kernel that cannot zero counters comes before a split one")
        most = dependent_programs()
        early = most > 0 and (self._early or (early and math.prod(self.grid) <= most))
        return Launch(
            self.kernel, self.grid, self.addresses(partial, counters, following, strips),
            self.scalars, self.constants, self.options | ({"launch_pdl": True} if early else {}),
        )  # fmt: skip


def pad_before(size: int, kernel: int, stride: int, padding: str) -> int:
    """Zeros before a side."""
    if padding == "symmetric":
        return kernel // 2
    return max((-(-size // stride) - 1) * stride + kernel - size, 0) // 2


def options(cfg: Config) -> dict[str, int]:
    found = {"num_warps": cfg["warps"], "num_stages": max(cfg.get("stages", 1), 1)}
    if cfg.get("regs"):
        found["maxnreg"] = cfg["regs"]
    return found


def _act(name: str, dtype: torch.dtype) -> str:
    """What `common.activation` calls it: results of 16 bits have a shorter GELU."""
    return "gelu_half" if name == "gelu" and dtype != torch.float32 else name


def build_op(
    op: Op,
    cfg: Config,
    packed: dict[int, Packed],
    padding: str,
    precision: str,
    n: int,
    h: int,
    w: int,
    x: Any,
    residual: Any,
    out: Any,
    strides: tuple[int, ...] | None,
) -> Build:
    """One operation on n images of h x w at `x`."""
    dtype = packed[op.stages[0]].dtype
    op = replace(op, **{name: _act(getattr(op, name), dtype) for name in ("dw_act", "mid_act", "act")})
    ho, wo = op.out_hw(h, w)
    kernel, stride = op.kernel, op.stride
    scalars = {
        "J": n * ho * wo, "H": h, "W": w, "HO": ho, "WO": wo,
        "PAD_Y": pad_before(h, kernel, stride, padding) if kernel else 0,
        "PAD_X": pad_before(w, kernel, stride, padding) if kernel else 0,
    }  # fmt: skip
    if op.kind == "dense":
        return _build_dense(op, cfg, packed, precision, scalars, x, residual, out, strides)
    if cfg["path"] == "vector":
        return _build_vector(op, cfg, packed[op.stages[0]], scalars["J"], x, residual, out)
    rows = cfg["rows"] if kernel else 1
    block_j = cfg["j"] if kernel else cfg["j"] * cfg["rows"]
    if kernel:
        scalars["J"] = n * wo
    tiles = -(-scalars["J"] // block_j) * (-(-ho // rows) if kernel else 1)
    stages = list(op.stages)
    taps = packed[stages.pop(0)] if kernel else None
    place = {"ROWS": rows, "BLOCK_J": block_j, "BLOCK_K": cfg["k"]}
    depth = {"C": op.c_in, "CP": taps.cp if taps else 1}
    if op.kind == "depthwise":
        assert taps is not None
        constants = {
            **depth, "KERNEL": kernel, "STRIDE": stride, "ACT": op.act, "RESIDUAL": op.residual, **place,
            "UNROLL": not cfg.get("loop"),
            "ZERO": 0,
        }  # fmt: skip
        return Build(
            depthwise_kernel, (tiles, -(-op.c_in // cfg["k"]), 1), lambda p, c, z, s: [x, taps.taps, residual, out, z],
            scalars, constants, options(cfg), taps.taps,
        )  # fmt: skip
    first = packed[stages[0]]
    w = first.matrix(precision)
    t = taps.taps if taps else first.affine
    # the depthwise result of one program, all channels
    strip = (rows * block_j * taps.cp * first.dtype.itemsize, first.dtype) if taps else (0, None)
    resident = {"ROWS": rows, "BLOCK_J": block_j, "BLOCK_D": min(64, next_pow2(max(op.c_in, 16))), "BLOCK_K": cfg["k"]}
    dw = {"KERNEL": kernel, "STRIDE": stride, "DW_ACT": op.dw_act}
    if op.kind == "ffn":
        last = packed[stages[1]]
        w_last = last.matrix(precision)
        constants = {
            **depth, "M": op.c_mid, "MP": first.np, "N": op.c_out, "NP": last.np, **dw, "MID_ACT": op.mid_act,
            "ACT": op.act, "RESIDUAL": op.residual, **resident, "BLOCK_M": cfg["m"],
            "BLOCK_N0": cfg["n0"], "BLOCK_N1": cfg["n1"], "UNROLL": not cfg.get("loop"), "PRECISION": precision,
            "STAGES": cfg["stages"],
        }  # fmt: skip
        return Build(
            ffn_kernel, (tiles, 1, 1),
            lambda p, c, z, s: [x, t, w, first.affine, w_last, last.affine, out, s if taps else x],
            scalars, constants, options(cfg), first.affine, strip=strip,
        )  # fmt: skip
    if cfg["path"] == "expand":
        if op.residual:
            raise ValueError("expand: expected an operation without residual")
        constants = {
            **depth, "N": op.c_out, "NP": first.np, **dw, "ACT": op.act, **resident, "BLOCK_N": cfg["n"],
            "N_PROGRAM": cfg["n_program"], "UNROLL": not cfg.get("loop"), "PRECISION": precision, "ZERO": 0,
            "STAGES": cfg["stages"],
        }  # fmt: skip
        return Build(
            expand_kernel, (tiles, -(-op.c_out // cfg["n_program"]), 1),
            lambda p, c, z, s: [x, t, w, first.affine, out, s if taps else x, z],
            scalars, constants, options(cfg), first.affine, strip=strip,
        )  # fmt: skip
    block_n = cfg["n0"] + cfg["n1"]
    with_strip = bool(kernel and cfg.get("d"))
    steps = -(-op.c_in // max(cfg["k"], cfg["d"] if with_strip else 0))
    # every share has at least one step
    split = -(-steps // -(-steps // max(cfg["split"], 1)))
    constants = {
        **depth, "N": op.c_out, "NP": first.np, **dw, "ACT": op.act, "RESIDUAL": op.residual, **place,
        "BLOCK_N0": cfg["n0"], "BLOCK_N1": cfg["n1"], "SPLIT": split,
        "STRIP": with_strip, "BLOCK_D": cfg["d"] if with_strip else cfg["k"],
        "UNROLL": not cfg.get("loop"), "PRECISION": precision, "ZERO": 0,
        "STAGES": cfg["stages"],
    }  # fmt: skip
    return Build(
        pointwise_kernel, (tiles, -(-op.c_out // block_n), split),
        lambda p, c, z, s: [x, t, w, first.affine, residual, out, p, s if with_strip else x, c, z],
        scalars, constants, options(cfg), first.affine, split, rows * block_j * block_n,
        strip=strip if with_strip else (0, None),
    )  # fmt: skip


def _build_vector(op: Op, cfg: Config, only: Packed, pixels: int, x: Any, residual: Any, out: Any) -> Build:
    constants = {
        "C": op.c_in, "N": op.c_out, "NP": only.np, "ACT": op.act, "RESIDUAL": op.residual, "BLOCK_K": cfg["k"],
        "BLOCK_N": cfg["n"], "ZERO": 0,
    }  # fmt: skip
    return Build(
        vector_kernel, (pixels, -(-op.c_out // cfg["n"]), 1),
        # sums of fp32 products whatever is allowed: exact weights
        lambda p, c, z, s: [x, only.w, only.affine, residual, out, z],
        {"J": pixels}, constants, options(cfg), only.affine,
    )  # fmt: skip


def _build_dense(
    op: Op,
    cfg: Config,
    packed: dict[int, Packed],
    precision: str,
    scalars: dict[str, int],
    x: Any,
    residual: Any,
    out: Any,
    strides: tuple[int, ...] | None,
) -> Build:
    first = packed[op.stages[0]]
    project = len(op.stages) > 1
    last = packed[op.stages[-1]]
    w, w_last = first.matrix(precision), last.matrix(precision)
    n, c, y, xx = strides or (0, 1, 0, 0)
    scalars.update(S_N=n, S_Y=y, S_X=xx, S_C=c)
    m = op.c_mid if project else op.c_out
    block_m = cfg["m0"] + cfg["m1"]
    constants = {
        "C": op.c_in, "M": m, "MP": first.np, "N": op.c_out, "NP": last.np, "KERNEL": op.kernel, "STRIDE": op.stride,
        "MID_ACT": op.mid_act if project else op.act, "ACT": op.act, "PROJECT": project, "RESIDUAL": op.residual,
        "FLAT": op.c_in < 16, "CHANNELS_LAST": strides is None, "BLOCK_P": cfg["p"], "BLOCK_K": cfg["k"],
        "BLOCK_M0": cfg["m0"], "BLOCK_M1": cfg["m1"], "BLOCK_N0": cfg["n0"], "BLOCK_N1": cfg["n1"],
        "PRECISION": precision, "ZERO": 0, "STAGES": cfg["stages"],
    }  # fmt: skip
    grid = (-(-scalars["J"] // cfg["p"]), 1 if project else -(-m // block_m), 1)
    return Build(
        dense_kernel, grid,
        lambda p, c, z, s: [x, w, first.affine, w_last, last.affine, residual, out, z],
        scalars, constants, options(cfg), first.affine,
    )  # fmt: skip


def build_pool(
    cfg: Config,
    feat: Packed | None,
    c_in: int,
    act: str,
    precision: str,
    n: int,
    pixels: int,
    x: Any,
    out: Any,
) -> Build:
    """[1x1 + act ->] global average pool of n images."""
    width = feat.c_out if feat else c_in
    constants = {
        "C": c_in, "N": width, "NP": feat.np if feat else 1, "FEAT": feat is not None,
        "ACT": _act(act, feat.dtype) if feat else act,
        "BLOCK_P": cfg["p"], "BLOCK_K": cfg["k"], "BLOCK_N": cfg["n"], "PRECISION": precision, "ZERO": 0,
        "STAGES": cfg["stages"],
    }  # fmt: skip
    dummy = feat.affine if feat else x
    return Build(
        pool_kernel, (n, -(-width // cfg["n"]), 1),
        lambda p, c, z, s: [x, feat.matrix(precision) if feat else x, feat.affine if feat else x, out, z],
        {"PIXELS": pixels}, constants, options(cfg), dummy,
    )  # fmt: skip
