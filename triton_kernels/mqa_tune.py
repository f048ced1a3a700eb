"""What the tuner needs of Mobile MQA: the ways to run a block, tiles to try, the block in plain torch, weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mnv4_ops.spec import pad_before_after

from . import mqa_config
from .candidates import candidates, unique
from .config import Config, next_pow2, pieces
from .mqa_block import KEY, KEY_DOWN, OUTPUT, QUERY, VALUE, VALUE_DOWN, MobileMQA
from .plan import Op

# (fused, operations, candidates of each), as in tuner.py
Variant = tuple[bool, tuple[Op, ...], list[list[Config]]]


def _ops(runner: MobileMQA, lists: list[list[Config]]) -> tuple[Op, ...]:
    """Names for tables of times; the output projection has that of the same 1x1 elsewhere."""
    paths = [options[0]["path"] for options in lists]
    return tuple(
        runner.op if path == "pointwise" else replace(runner.op, kind=f"{path} {runner.key}") for path in paths
    )


def _projections(runner: MobileMQA, pixels: int, queries: int, sms: int) -> list[Config]:
    k = mqa_config.step(runner.c)
    out: list[Config] = []
    if runner.down and pixels < sms * 16:
        tiles = [(16, 32, 4), (16, 64, 4), (16, 64, 8), (16, 128, 8), (16, 128, 16), (16, 256, 8)]
    elif runner.down:
        tiles = [(16, 32, 4), (16, 64, 8), (32, 64, 4), (32, 128, 8), (64, 32, 8), (64, 64, 8), (64, 128, 8)]
        tiles += [(128, 32, 8), (128, 64, 8)] if pixels >= sms * 128 else []
    else:
        tiles = [(16, k, 4), (32, k, 4)] if pixels < sms * 32 else [(32, k, 4), (64, k, 4), (128, k, 8)]
    for p, kk, warps in tiles:
        out.append(mqa_config.project(p, kk, warps=warps, stages=1 if runner.down else 3))
    if runner.down and pixels >= sms * 16:
        # more programs on a multiprocessor for fewer registers
        out += [{**out[0], "regs": 96}, {**out[1], "regs": 128}]
    if not queries:
        return out
    # queries have their own tiles in the same kernel; the other ones are what they were made for
    large = queries >= sms * 16
    wide, p = [(16, 32, 4), (16, 64, 4), (32, 64, 4)], 16
    steps = [k, 128, 256]
    if large:
        wide, p, steps = [(128, 128, 4), (128, 256, 8), (64, 128, 4), (64, 256, 4)], 64, [k]
    p = min(p, 32) if runner.down else p
    tiles = [(kk, *tile, stages) for kk in steps for tile in wide for stages in ((3, 4) if large else (3,))]
    return [mqa_config.project(p, kk, q=1, pq=pq, n=n, warps=warps, stages=s) for kk, pq, n, warps, s in tiles]


def _attending(runner: MobileMQA, nq: int, nk: int, pixels: int, sms: int) -> list[Config]:
    """Tiles of `mqa_kernel` with the output projection in it. No loop over the heads of one stage: see `mqa_config`."""
    n0, n1 = pieces(runner.c)
    k = mqa_config.step(runner.c)
    base = {"path": "mqa", "inline": 0, "k": k, **mqa_config.keys(nk), "n0": n0, "n1": n1, "share": 0}
    if pixels >= sms * 16:
        tiles = [(64, 4), (64, 8)]
        if nq > 64:
            tiles.append((128, 8))
        if pixels < sms * 64:
            tiles += [(32, 4), (32, 8)]
    else:
        tiles = [(16, 4), (16, 8), (32, 4)]
    return [{**base, "p": p, "warps": warps, "stages": stages} for p, warps in tiles for stages in (2, 3)]


def _alone(runner: MobileMQA, nk: int, pixels: int, sms: int) -> list[Config]:
    """Tiles of the attention kernel."""
    half = runner.dtype != torch.float32
    if not half:
        tiles = [(32, 32, 0, 4), (16, 32, 0, 4), (64, 32, 0, 8), (32, 64, 0, 4)]
    else:
        k0, k1 = mqa_config.keys(nk).values()
        rows = [(128, 8), (64, 4), (128, 4)] if pixels * runner.heads >= sms * 64 else [(16, 4), (32, 4), (64, 4)]
        tiles = [(p, k0, k1, warps) for p, warps in rows]
        tiles += [(p, 64, 0, warps) for p, warps in rows[:2] if nk > 64]
    return [mqa_config.attention(*tile, stages=2 if half else 1) for tile in tiles]


def _shares(runner: MobileMQA, nk: int) -> list[Config]:
    """Tiles of `mqa_kernel` for a share of the heads, the output projection left to the next kernel."""
    k = mqa_config.step(runner.c)
    base = {"path": "mqa", "inline": 0, **mqa_config.keys(nk), "n0": 0, "n1": 0, "stages": 2}
    tiles = [(k, 16, 1, 4), (k, 32, 1, 4), (k, 16, 1, 2), (k, 16, 2, 4), (k, 64, 1, 4)]
    return [{**base, "k": kk, "p": p, "share": s, "warps": warps} for kk, p, s, warps in tiles if s <= runner.heads]


def variants(runner: MobileMQA, n: int, h: int, w: int, tf32: int, sms: int) -> list[Variant]:
    """The ways to run a block, the formula's among them."""
    first = mqa_config.formula(runner, n, h, w, tf32, sms)["ops"]
    (hq, wq), (hk, wk) = runner.query_hw(h, w), runner.kv_hw(h, w)
    nq, nk, pixels = hq * wq, hk * wk, n * hq * wq
    exact, pooled = runner.exact(tf32), runner.native["query_stride"] > 1
    last = [first[-1]] if pooled else candidates(runner.op, n, hq, wq, runner.dtype, exact, sms)
    projections = [_projections(runner, n * nk, queries, sms) for queries in (0, pixels)]
    if exact:
        projections[1] = [{**first[0], "p": 32, "pq": 64, "n": 64}, {**first[0], "k": 32}]
    ways: list[list[list[Config]]] = [[projections[1], _alone(runner, nk, pixels, sms), last]]
    if runner.dtype != torch.float32 and not pooled and nk <= mqa_config.MAX_KEYS:
        if runner.c <= 256:
            whole = _attending(runner, nq, nk, pixels, sms)
            ways.append([projections[0], whole])
            if not runner.down and nq <= 64:
                inline = {**whole[0], "inline": 1, "p": max(16, next_pow2(nq)), "keys0": 0, "keys1": 0}
                ways.append([[{**inline, "warps": warps, "stages": stages} for warps in (4, 8) for stages in (2, 3)]])
        if pixels < sms * 16:
            ways.append([projections[0], _shares(runner, nk), last])
    if found := mqa_config.on_hopper(runner, n, h, w):
        ways.append([_alike_hopper(cfg) for cfg in found["ops"]])
    for way in ways:
        if [options[0]["path"] for options in way] == [cfg["path"] for cfg in first] and _alike(way, first):
            for options, cfg in zip(way, first, strict=True):
                options.insert(0, cfg)
    return [(True, _ops(runner, way), [unique(options) for options in way]) for way in ways]


def _alike_hopper(cfg: Config) -> list[Config]:
    """Tiles to try in the place of one of Hopper's."""
    if cfg["path"] == "attention_hopper":
        return [cfg, *({**cfg, "turns": turns} for turns in (1, 2, 3))]
    if cfg.get("halves"):
        return [cfg, {**cfg, "halves": 0}]
    if cfg["path"] == "mqa_depthwise_hopper":
        tiles = ((8, 64, 2, 2), (8, 64, 4, 3), (8, 64, 12, 3), (16, 32, 4, 3))
        return [cfg, *({**cfg, "p": p, "k": k, "j": j, "stages": stages} for p, k, j, stages in tiles)]
    return [cfg]


def _alike(way: list[list[Config]], choice: list[Config]) -> bool:
    """Whether a choice is one of the candidates' kind: other flags are other kernels."""
    return all(
        bool(options[0].get(flag)) == bool(cfg.get(flag))
        for options, cfg in zip(way, choice, strict=True)
        for flag in ("inline", "share", "q")
    )


def plain(runner: MobileMQA, x: Tensor) -> Tensor:
    """The block in fp32 by torch's own operations on the packed parameters."""
    n = runner.native
    heads, dk, dv = runner.heads, runner.dk, runner.dv
    x = x.float()

    def normed(row: int, y: Tensor) -> Tensor:
        scale, shift = runner.norms[row, : runner.c], runner.norms[row + 1, : runner.c]
        return y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)

    def columns(y: Tensor, first: int, count: int) -> Tensor:
        weight = runner.w.w[: runner.c, first : first + count].float().t()
        y = F.conv2d(y, weight[:, :, None, None])
        scale, shift = (row[first : first + count] for row in runner.w.affine)
        # [N, pixels, count]
        return (y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).flatten(2).transpose(1, 2)

    def branch(index: int) -> Tensor:
        y = normed(0, x)
        if not runner.down:
            return y
        k, stride = runner.down, n["kv_stride"]
        sides = [pad_before_after(size, k, stride, n["padding"]) for size in (y.shape[3], y.shape[2])]
        taps = runner.taps[index, :, : runner.c]
        weight = taps[: k * k].t().reshape(runner.c, 1, k, k)
        return F.conv2d(F.pad(y, (*sides[0], *sides[1])), weight, taps[k * k], stride, 0, 1, runner.c)

    pooled = x
    if (s := n["query_stride"]) > 1:
        pooled = F.avg_pool2d(x, s, s, ceil_mode=n["padding"] == "same", count_include_pad=False)
    query = normed(2, pooled)
    q = columns(query, 0, heads * dk).unflatten(2, (heads, dk)).transpose(1, 2)
    k = columns(branch(0), heads * dk, dk)[:, None]
    v = columns(branch(1), (heads + 1) * dk, dv)[:, None]
    weights = torch.softmax(q @ k.transpose(2, 3) * n["key_dim"] ** -0.5, -1)
    o = (weights @ v).transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, query.shape[2:])
    if s > 1:
        o = F.interpolate(o, scale_factor=s, mode="bilinear", align_corners=False)
    out = F.conv2d(o, runner.w_out.w[: heads * dv, : runner.c].float().t()[:, :, None, None])
    scale, shift = runner.w_out.affine[:, : runner.c]
    out = out * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    return out + x if n["residual"] else out


def fill_random(runner: MobileMQA, random: Callable[..., Tensor] = torch.randn) -> None:
    """Packs weights of unit gain; sharper queries, so that attention is not a mean of all values."""
    n, c = runner.native, runner.c
    shapes = {
        QUERY: (runner.heads * n["key_dim"], c, 3.0), KEY: (n["key_dim"], c, 1.0), VALUE: (n["value_dim"], c, 1.0),
        OUTPUT: (c, runner.heads * n["value_dim"], 1.0), KEY_DOWN: (c, runner.down**2, 1.0),
        VALUE_DOWN: (c, runner.down**2, 1.0),
    }  # fmt: skip
    for stage in sorted(runner.stages):
        if stage not in shapes:
            parts = [random(c, device=runner.device) * 0.1 for _ in range(2)]
            runner.pack(stage, None, None, 1 + parts[0], parts[1], parts[0] * 0, parts[0] * 0 + 1, 1e-5)
            continue
        rows, fan, gain = shapes[stage]
        runner.pack(stage, (random(rows, fan, device=runner.device) * gain * fan**-0.5).to(runner.dtype))


__all__ = ["fill_random", "plain", "variants"]
