"""Which tiles for Mobile MQA: a formula, and what the tuner tries.

A choice is {"fused": True, "chunk": 0, "ops": [Config, ...]} with one of these lists of paths:

- "mqa" with `inline`: keys and values of a small map in the same kernel;
- "mqa_project", "mqa": keys and values first; with `share` (heads of one program) a "pointwise" follows;
- "mqa_project" with `q`, "attention", then "pointwise", or "mqa_output" where the queries are pooled;
- on Hopper "mqa_hopper" in the place of "mqa", with `inline` or after "mqa_project" or, for keys and values with
  strided convolutions, "mqa_depthwise_hopper" and "mqa_keys_hopper"; for blocks of more channels "mqa_project_hopper",
  "attention_hopper" and "pointwise_hopper".

"mqa" holds all keys of an image at once. Its loop over the heads must be pipelined: without (one stage, or a loop over
blocks of keys inside) triton 3.6 made code for Hopper that read outside of shared memory.

`p` pixels (of "attention": rows; of a 1x1 on Hopper: for each of two groups of warps), `k` input channels of a step,
`n` columns of a tile of queries, of `pq` pixels; `keys0` + `keys1` keys at once, see attention.py; `n0` + `n1` output
channels, `c0` + `c1` channels of both sides; `j` columns that a thread walks, `turns` tiles of a program, `pieces` of
columns of an epilogue, `halves` of the heads for two groups of warps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import config, hopper
from .config import Config, next_pow2, pieces

if TYPE_CHECKING:
    from .mqa_block import MobileMQA

# more keys than these go through the online softmax
MAX_KEYS = 256
# and with more than these the scores of 64 pixels have no room in registers beside their output
HOPPER_KEYS = 160


def width(dim: int) -> int:
    """Channels of a head in memory: no product is narrower than 32 columns, see `config.pieces`."""
    return max(32, next_pow2(dim))


def keys(nk: int, most: int = MAX_KEYS) -> dict[str, int]:
    """All keys at once in one or two pieces, or blocks of 64."""
    if nk > most:
        return {"keys0": 64, "keys1": 0}
    k0, k1 = pieces(nk)
    return {"keys0": k0, "keys1": k1}


def key_pieces(cfg: Config, nq: int, nk: int, down: int) -> tuple[int, int]:
    """Keys that a tile of an attending kernel meets at once, in two pieces; ValueError where these are not all."""
    if cfg.get("inline"):
        if nq > cfg["p"] or nk != nq or down:
            raise ValueError(f"MobileMQA: expected a tile of all {nq} pixels, each with its own key, got {cfg}")
        return cfg["p"], 0
    if cfg["keys0"] + cfg["keys1"] < nk:
        raise ValueError(f"MobileMQA: expected all {nk} keys at once, got {cfg}")
    return cfg["keys0"], cfg["keys1"]


def _hopper_keys(nk: int) -> tuple[int, int] | None:
    """Pieces of keys for the kernel in Gluon; None where they are too many."""
    k0, k1 = pieces(nk, 16)
    return (k0, k1) if k0 + k1 <= HOPPER_KEYS else None


def step(c: int, high: int = 64) -> int:
    """Channels of a step: at least 32, so that few pixels have loads of 16 bytes."""
    return min(high, max(32, config.piece_k(c, high)))


def _list(*ops: Config) -> Config:
    return {"fused": True, "chunk": 0, "ops": list(ops)}


def project(p: int, k: int, *, q: int = 0, pq: int = 16, n: int = 32, warps: int = 4, stages: int = 1) -> Config:
    """Tiles of the projections, those of queries only with `q`."""
    return {"path": "mqa_project", "p": p, "k": k, "q": q, "pq": pq, "n": n, "warps": warps, "stages": stages}


def _last(runner: MobileMQA, n: int, h: int, w: int, exact: bool, sms: int) -> Config:
    """The output projection as a kernel of its own."""
    hq, wq = runner.query_hw(h, w)
    if runner.native["query_stride"] > 1:
        return {"path": "mqa_output", "p": 32, "k": 32, "n": 32, "warps": 4, "stages": 1}
    return config.formula(runner.op, n, hq, wq, runner.dtype.itemsize, exact, sms)


def small(runner: MobileMQA, n: int, h: int, w: int) -> Config:
    """Three kernels of the smallest tiles: what runs where shared memory is short, and IEEE fp32."""
    first = project(16, 16, q=1, pq=32, n=32)
    return _list(first, attention(32, 32, 0, 4, 1), _last(runner, n, h, w, True, 132))


def attention(p: int, keys0: int, keys1: int, warps: int, stages: int) -> Config:
    """A tile of the attention kernel."""
    return {"path": "attention", "p": p, "keys0": keys0, "keys1": keys1, "warps": warps, "stages": stages}


def straight(runner: MobileMQA) -> bool:
    """Whether 1x1 convolutions of `pointwise_hopper` serve on both sides: the weights of 128 columns have room beside
    pixels, and there are more steps than pieces of an epilogue.
    """
    widths = (runner.c, runner.heads * runner.dv)
    return not runner.down and runner.c % 8 == 0 and all(256 < width <= 512 for width in widths)


def _stages(channels: int) -> int:
    """Steps of 64 channels on chip; a tile has a multiple of them, as few as may be beyond the last channel."""
    steps = (channels + 63) // 64
    return min((4, 3, 5), key=lambda count: -steps % count)


def _in_three(runner: MobileMQA, tiles: int, keys0: int, keys1: int) -> Config:
    """Projections, attention to so many tiles of 64 rows, output projection."""
    # three programs share a multiprocessor, four where there are enough of them for all
    sms = runner._sms()
    turns = min(max(round(tiles / (3 * sms)), 1), 3)
    attend = {"path": "attention_hopper", "p": 64, "turns": turns, "keys0": keys0, "keys1": keys1}
    attend |= {"regs": 168 if tiles < 4 * sms * turns else 0, "warps": 4, "stages": 1}
    first, last = (
        {"path": path, "p": 64, "n": 128, "k": 64, "pieces": 4, "warps": 4, "stages": _stages(channels)}
        for path, channels in (("mqa_project_hopper", runner.c), ("pointwise_hopper", runner.heads * runner.dv))
    )
    return _list(first, attend, last)


def on_hopper(runner: MobileMQA, n: int, h: int, w: int) -> Config | None:
    """The kernels in Gluon; None where they do not serve."""
    (hq, wq), (hk, wk) = runner.query_hw(h, w), runner.kv_hw(h, w)
    nq, nk = hq * wq, hk * wk
    c0, c1 = pieces(runner.c)
    at_once = _hopper_keys(nk)
    if (
        not hopper.available()
        or runner.dtype == torch.float32
        or runner.biased
        or runner.native["query_stride"] > 1
        or not runner.dk == runner.dv == 64
        or at_once is None
    ):
        return None
    if straight(runner):
        return _in_three(runner, n * -(-nq * runner.heads // 64), *at_once) if runner.steady else None
    if c0 + c1 != runner.c or runner.c > 256 or runner.down not in (0, 3):
        return None
    inline = not runner.down and nq <= 64
    k0, k1 = (64, 0) if inline else at_once
    last = {
        "path": "mqa_hopper", "inline": int(inline), "p": 64, "keys0": k0, "keys1": k1, "c0": c0, "c1": c1, "warps": 4,
        "stages": 1,
    }  # fmt: skip
    if inline:
        # a program has a multiprocessor for itself, where two groups of warps have room
        return _list(last | {"halves": int(runner.heads % 2 == 0 and not c1 and runner.c >= 128)})
    if not runner.down:
        return _list(project(32, step(runner.c), stages=3), last)
    depthwise = {"path": "mqa_depthwise_hopper", "p": 8, "j": 4, "k": 64, "warps": 4, "stages": 3}
    made = {"path": "mqa_keys_hopper", "p": 64, "c0": c0, "c1": c1, "warps": 4, "stages": 1}
    return _list(depthwise, made, last)


def formula(runner: MobileMQA, n: int, h: int, w: int, allow_tf32: int = 0, sms: int = 132) -> Config:
    """A choice that is never bad."""
    exact, half = runner.exact(allow_tf32), runner.dtype != torch.float32
    if exact:
        return small(runner, n, h, w)
    (hq, wq), (hk, wk) = runner.query_hw(h, w), runner.kv_hw(h, w)
    nq, nk = hq * wq, hk * wk
    c, pixels = runner.c, n * nq
    # fewer tiles, of 64 pixels, leave most of the device idle, and one takes longer than one of `mqa_kernel`
    if n * -(-nq // 64) >= sms // 4 and (found := on_hopper(runner, n, h, w)):
        return found
    large = pixels >= sms * 32
    k = step(c, 64 if half else 32)
    last = _last(runner, n, h, w, False, sms)
    p_kv = 32 if n * nk >= sms * 16 else 16
    if half and c <= 256 and nk <= MAX_KEYS and runner.native["query_stride"] == 1 and max(runner.dk, runner.dv) <= 64:
        tile = {"path": "mqa", "inline": 0, "k": k, **keys(nk), "share": 0, "stages": 2}
        n0, n1 = pieces(c)
        if nq <= 64 and not runner.down:
            inline = {"inline": 1, "p": max(16, next_pow2(nq)), "keys0": 0, "keys1": 0, "warps": 8 if nq > 32 else 4}
            return _list({**tile, "n0": n0, "n1": n1, **inline})
        first = project(p_kv, 32 if large else k, stages=1 if runner.down else 3)
        if large:
            p = 128 if pixels >= sms * 128 and nq > 64 else 64
            return _list(first, {**tile, "p": p, "n0": n0, "n1": n1, "warps": 8})
        return _list(first, {**tile, "p": 16, "n0": 0, "n1": 0, "share": 1, "warps": 4}, last)
    if large:
        first = project(p_kv, k, q=1, pq=128 if half else 64, n=128 if half else 64, warps=8, stages=3 if half else 2)
    else:
        first = project(16, k, q=1, pq=16 if pixels <= 256 else 64, n=64, stages=3 if half else 2)
    if not half:
        # the products of attention are IEEE as torch comes
        return _list(first, attention(32, 32, 0, 4, 1), last)
    rows = 128 if large else 32 if pixels * runner.heads >= sms * 32 else 16
    return _list(first, attention(rows, *keys(nk).values(), 8 if rows == 128 else 4, 2), last)


def fitted(runner: MobileMQA, choice: Config, nq: int, nk: int) -> Config | None:
    """A choice measured for another map, with the keys at once that this one needs; None where its path takes fewer."""
    ops = []
    for cfg in choice["ops"]:
        found = cfg
        if cfg["path"] == "mqa" and cfg["inline"]:
            if nq > cfg["p"]:
                return None
        elif cfg["path"] == "mqa":
            if nk > MAX_KEYS:
                return None
            # more keys in shared memory may leave no room for three stages
            deep = cfg["keys0"] + cfg["keys1"] >= nk
            found = {**cfg, **keys(nk), "stages": cfg["stages"] if deep else 2}
        elif cfg["path"] in ("mqa_hopper", "attention_hopper"):
            at_once, inline = _hopper_keys(nk), cfg.get("inline")
            if not hopper.available() or runner.biased or at_once is None or (inline and nq > cfg["p"]):
                return None
            found = cfg if inline else {**cfg, "keys0": at_once[0], "keys1": at_once[1]}
        elif cfg["path"] == "mqa_project_hopper" and not runner.steady:
            return None
        elif cfg["path"] == "attention" and cfg["keys1"] and cfg["keys0"] + cfg["keys1"] < nk:
            found = {**cfg, **keys(nk)}
        ops.append(found)
    return {**choice, "ops": ops}


__all__ = ["attention", "fitted", "formula", "keys", "project", "small", "step", "straight", "width"]
