"""Tiles worth measuring for one operation of a convolution block."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from . import config
from .config import Config
from .plan import Op, round_up


def unique(items: Iterable[Config]) -> list[Config]:
    seen: dict[str, Config] = {}
    for item in items:
        seen.setdefault(repr(sorted(item.items())), item)
    return list(seen.values())


def candidates(op: Op, n: int, h: int, w: int, dtype: torch.dtype, exact: bool, sms: int = 132) -> list[Config]:
    """Tiles worth measuring for one operation, the formula's among them."""
    ho, wo = op.out_hw(h, w)
    pixels = n * ho * wo
    first = config.formula(op, n, h, w, dtype.itemsize, exact, sms)
    out: list[Config] = [first]
    few = op.kind == "pointwise" and not op.kernel and pixels <= 4 * config.VECTOR_PIXELS
    if few:
        for k in (256, 512):
            out += [{**config.vector(op, n), "k": k, "warps": warps} for n in (16, 32) for warps in (4, 8)]
    if exact:
        if op.kind == "pointwise" and first["path"] == "pointwise":
            out += [{**first, "n0": 32}, {**first, "k": 16}, {**first, "j": first["j"] * 2, "warps": 8}]
        if op.kind == "dense":
            out += [{**first, "p": 64, "warps": 8}]
        return unique(out)
    large = pixels >= sms * 20
    rows = config.rows_for(ho, op.kernel)
    if op.kind == "depthwise":
        tiles = [(rows, 16, 64), (rows, 8, 64), (rows, 16, 32)]
        if pixels * op.c_in < sms << 16:
            tiles += [(2, 16, 64), (2, 8, 64), (1, 16, 64)]
        elif ho % 8 == 0 and op.stride == 1:
            tiles.append((8, 8, 64))
        for r, j, k in tiles:
            k = min(k, max(16, config.next_pow2(op.c_in)))
            out.append({"path": "depthwise", "rows": r, "j": j, "k": k, "warps": 4})
        if not pixels * op.c_in < sms << 16:
            out.append({**out[1], "regs": 128})
    elif op.kind == "dense":
        for p in (64, 128) if large else (32, 64, 128):
            out.append({**first, "p": p, "warps": 4, "stages": 3})
        if not large and not op.c_mid:
            out.append({**first, "p": 32, "warps": 4, "stages": 3, "m0": 32, "m1": 0})
    elif op.kind == "ffn":
        for p, warps, stages in ((64, 4, 2), (128, 8, 3), (128, 8, 2), (64, 8, 2)):
            out.append({**first, "rows": rows, "j": p // rows, "m": 64, "warps": warps, "stages": stages})
    else:
        out += _pointwise(op, rows, pixels, first, large, sms)
    return unique(out)


def _pointwise(op: Op, rows: int, pixels: int, first: Config, large: bool, sms: int) -> list[Config]:
    out: list[Config] = []
    n0, n1 = config.pieces(op.c_out)
    k = config.piece_k(op.c_in)
    full = (n0, n1) if n0 + n1 <= 256 else (256, 0)
    base = {"path": "pointwise", "split": 1, "stages": 1 if op.kernel else 3, "rows": rows}
    few, wide = pixels < sms * 48, sum(full) > 192
    # small tiles, several programs on a multiprocessor: one computes while another loads and stores
    small = [{**base, "j": 64, "k": k, "n0": 128, "n1": 0, "warps": 4, "stages": stages} for stages in (2, 3, 4)]
    expands = large and op.c_out > op.c_in and not op.residual and -(-op.c_in // k) <= config.MAX_PIECES
    if expands:
        # a wider one does not fit into shared memory
        for n in (64, 128) if op.c_in <= 256 else (64,):
            for parts in (2, 4) if few else (1, 2) if pixels < sms * 96 else (1,):
                out.append({
                    "path": "expand", "rows": rows, "j": 64 // rows, "k": max(k, 32), "n": n,
                    "n_program": round_up(-(-op.c_out // parts), n), "warps": 4, "stages": 2,
                })  # fmt: skip
        if op.c_in >= 128 and pixels >= sms * 96:
            out.append({**out[-1], "j": 128 // rows, "warps": 8})
        if not op.kernel:
            out.append({**base, "j": 128, "k": k, "n0": 128, "n1": 0, "warps": 4})
            out += small
        if op.c_out > 256 and pixels >= sms * 96:
            # the input tile is made once here; two matrices' worth of columns do not fit the other kernel
            return out
    if large and op.kernel:
        narrow = min(64, config.next_pow2(op.c_in))
        whole = {**base, "j": 64 // rows, "n0": full[0], "n1": full[1]}
        strip = {**whole, "k": max(k, 32), "stages": 2, "d": narrow, "warps": 8 if wide else 4}
        held = {**strip, "regs": 128 if wide else 168}
        out += [strip, held, {**whole, "k": k, "warps": 4}]
        if sum(full) <= 128:
            out.append({**held, "loop": 1})
        if op.c_in >= 192:
            out.append({**whole, "k": 64, "warps": 8})
        if pixels < sms * 96:
            out.append({**strip, "split": 2})
        if few:
            out += [{**strip, "split": 4}, {**whole, "k": k, "warps": 4, "split": 2}]
            out.append({**whole, "k": k, "n0": 128, "n1": 0, "warps": 4, "split": 2})
    elif large:
        out += [{**base, "j": 64, "k": k, "n0": full[0], "n1": full[1], "warps": 4, "stages": s} for s in (2, 3)]
        out += [{**base, "j": 128, "k": k, "n0": full[0], "n1": full[1], "warps": 8}]
        if k == 64 and full[0] >= 128:
            out.append({**out[-1], "stages": 4})
        if op.c_out >= 256:
            out.append({**base, "j": 128, "k": k, "n0": 128, "n1": 0, "warps": 4})
            out += small
            out.append({**base, "j": 128, "k": min(k, 32), "n0": 64 if few else 128, "n1": 0, "warps": 4})
    if large:
        return out
    if op.kernel:
        tiles = [(64, 64, k), (64, 128, k), (32, 32, k)]
        if k == 16:
            tiles.append((64, 64, 32))
    else:
        tiles = [(16, 32, k), (16, 64, k), (64, 32, k), (64, 64, k)]
        if op.c_in >= 256:
            tiles.append((16, 32, 128))
    for p, n, kk in tiles:
        if n > max(32, config.next_pow2(op.c_out)) or p > max(16, config.next_pow2(pixels)) * (2 if op.kernel else 1):
            continue
        r = min(rows, 2) if op.kernel and p == 32 else rows
        programs = -(-pixels // p) * -(-op.c_out // n)
        steps = -(-op.c_in // kk)
        split = max(1, min(8, steps // 2, 2 * sms // max(programs, 1)))
        out.append({**base, "rows": r, "j": p // r, "k": kk, "n0": n, "n1": 0, "split": split, "warps": 4})
    return out


__all__ = ["candidates", "unique"]
