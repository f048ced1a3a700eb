"""`mqa_attention`: multi-query attention of tensors of any strides; and the launch that blocks share with it."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from . import config, mqa_config
from .attention import attention_kernel
from .block import LINEAR_TF32
from .build import Build, options
from .config import Config
from .launch import Launch, OutOfResources, current_stream

LOG2_E = math.log2(math.e)
MAX_DIM = 256
_LAUNCHES = 64
_launches: OrderedDict[tuple[Any, ...], Launch] = OrderedDict()


def mqa_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, *, allow_tf32: int = 0) -> None:
    """Writes softmax(scale * q k^T) v to `out` on the current stream.

    q [B, heads, Nq, d], k [B, 1, Nk, d], v [B, 1, Nk, dv], out [B, heads, Nq, dv] of one dtype and any strides, none of
    them empty. ValueError for heads of more than 256 channels.
    """
    dims = q.shape[3], v.shape[3]
    if max(dims) > MAX_DIM:
        raise ValueError(f"mqa_attention: expected heads of at most {MAX_DIM} channels, got {dims[0]} and {dims[1]}")
    if scale <= 0:
        # the kernel takes maxima before it scales
        q, scale = q * scale, 1.0
    tensors = {"q": q, "k": k, "v": v, "out": out}
    key: tuple[Any, ...] = (q.dtype, q.device, scale, allow_tf32)
    for t in tensors.values():
        key += (t.shape, t.stride(), t.data_ptr() % 16 == 0)
    launch = _launches.get(key)
    if launch is not None and launch.ready:
        base: dict[str | None, int] = {name: t.data_ptr() for name, t in tensors.items()}
        launch.again({**base, None: 0}, current_stream(q.device.index))
        return
    tile: Config | None = _tile(q, k, v, allow_tf32)
    while True:
        assert tile is not None
        launch = _plan(tile, q, k, v, scale, out, allow_tf32)
        try:
            launch.first(tensors)
            break
        except OutOfResources:
            tile = config.shrink(tile)
            if tile is None:
                raise
    _launches[key] = launch
    if len(_launches) > _LAUNCHES:
        _launches.popitem(last=False)


def _precision(dtype: torch.dtype, allow_tf32: int) -> str:
    return "tf32" if dtype == torch.float32 and allow_tf32 & LINEAR_TF32 else "ieee"


def _tile(q: Tensor, k: Tensor, v: Tensor, allow_tf32: int) -> Config:
    wide = max(q.shape[3], v.shape[3]) > 64
    if q.dtype == torch.float32:
        exact = _precision(q.dtype, allow_tf32) == "ieee"
        return mqa_config.attention(32 if exact or wide else 64, 32, 0, 4, 1)
    sms = config.device_limits(q.device.index or 0)[0] if q.is_cuda else 132
    rows = math.prod(q.shape[:3])
    p = 16 if rows < sms * 32 else 64 if wide or rows < sms * 128 else 128
    found = mqa_config.keys(k.shape[2], 128 if wide else mqa_config.MAX_KEYS)
    return mqa_config.attention(p, *found.values(), warps=8 if p == 128 else 4, stages=2)


def _plan(cfg: Config, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, allow_tf32: int) -> Launch:
    batch, heads, nq, dk = q.shape
    dv = v.shape[3]

    # rows that follow one another in memory are rows of one tile
    by_head = q.stride(1) >= q.stride(2)

    def address(name: str, t: Tensor) -> tuple[Any, tuple[int, ...]]:
        b, head, row, channel = t.stride()
        return (name, 0, t.dtype), (b, head, row, channel) if by_head else (b, row, head, channel)

    built = build_attention(
        cfg, _precision(q.dtype, allow_tf32), batch, heads * nq, nq if by_head else heads, k.shape[2],
        (dk, mqa_config.width(dk), dv, mqa_config.width(dv)), scale,
        address("q", q), _shared("k", k), _shared("v", v), address("out", out), ("q", 0, q.dtype),
    )  # fmt: skip
    return built.launch((0, 0, 0), None, 0)


def _shared(name: str, t: Tensor) -> tuple[Any, tuple[int, ...]]:
    b, _, row, channel = t.stride()
    return (name, 0, t.dtype), (b, row, channel)


def full_pieces(keys0: int, keys1: int, nk: int) -> int:
    """Of the pieces of keys that are met at once, how many are full; 0 where there are more keys."""
    return 0 if keys0 + keys1 < nk else (nk >= keys0) + (keys1 > 0 and nk == keys0 + keys1)


def build_attention(
    cfg: Config,
    precision: str,
    n: int,
    rows: int,
    inner: int,
    nk: int,
    dims: tuple[int, int, int, int],
    scale: float,
    q: tuple[Any, tuple[int, ...]],
    k: tuple[Any, tuple[int, ...]],
    v: tuple[Any, tuple[int, ...]],
    out: tuple[Any, tuple[int, ...]],
    dummy: Any,
) -> Build:
    """Attention of `rows` rows (outer * inner + inner index) of n images to `nk` keys.

    Addresses come with their strides: q and out (image, outer, inner, channel), k and v (image, key, channel); `dims`
    are key and value channels, each followed by its padded width.
    """
    strides = {}
    for name, values, letters in (("Q", q[1], "BOID"), ("K", k[1], "BND"), ("V", v[1], "BND"), ("O", out[1], "BOID")):
        strides |= {f"S_{name}{letter}": value for letter, value in zip(letters, values, strict=True)}
    tiles = -(-rows // cfg["p"])
    at_once = cfg["keys0"] + cfg["keys1"]
    constants = {
        "DK": dims[0], "DKP": dims[1], "DV": dims[2], "DVP": dims[3], "BLOCK_P": cfg["p"], "KEYS0": cfg["keys0"],
        "KEYS1": cfg["keys1"], "FULL": full_pieces(cfg["keys0"], cfg["keys1"], nk), "ONLINE": at_once < nk,
        # outside of the tensor cores short chains: torch's products have them too
        "PIECE": 16 if q[0][2] == torch.float32 and precision == "ieee" else dims[1], "PRECISION": precision, "ZERO": 0,
        "STAGES": cfg["stages"],
    }  # fmt: skip
    scalars = {
        "ROWS": rows, "INNER": inner, "NK": nk, "TILES": tiles, **strides, "scale": scale * LOG2_E,
    }  # fmt: skip
    return Build(
        attention_kernel, (n * tiles, 1, 1), lambda p, c, z, s: [q[0], k[0], v[0], out[0], z],
        scalars, constants, options(cfg), dummy,
    )  # fmt: skip
