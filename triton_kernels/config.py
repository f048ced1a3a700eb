"""Which tile for which operation: a formula from the limits of the device; tables of measured tiles come before it.

A configuration is a flat dict of ints (a JSON object in the tables): "path" names the kernel, the rest its tile.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import torch

from .plan import Op

Config = dict[str, Any]
TUNED = Path(__file__).parent / "tuned"
BUCKETS = (1, 8, 64, 256)
# one expanded kernel holds all input channels in pieces of one tile each
MAX_PIECES = 8
# a 1x1 of up to so many pixels reads its weights for each of them instead of using the tensor cores
VECTOR_PIXELS = 2
# a measured choice serves sizes up to this factor in pixels away
NEAR = 6


def next_pow2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def pieces(n: int, low: int = 32) -> tuple[int, int]:
    """The cheapest cover of `n` channels by one or two powers of two, the larger first: 160 -> (128, 32).

    No piece of 16: with triton 3.6 on Hopper the second of two products with one 16 columns wide came out wrong.
    """
    if n <= low:
        return low, 0
    big = next_pow2(n)
    if big == n:
        return n, 0
    rest = max(next_pow2(n - big // 2), low)
    return (big, 0) if rest >= big // 2 else (big // 2, rest)


def piece_k(c: int, high: int = 64) -> int:
    """Channels per step: the largest power of two in [16, high] that divides `c`, else what wastes least."""
    for k in (64, 32):
        if k <= high and c % k == 0:
            return k
    if c % 16 == 0 and c < 128:
        return 16
    return min(high, max(16, next_pow2(c))) if c < 64 else min(high, 32)


@functools.cache
def device_limits(index: int) -> tuple[int, int]:
    """(multiprocessors, shared memory of one program in bytes)."""
    p = torch.cuda.get_device_properties(index)
    shared = getattr(p, "shared_memory_per_block_optin", 65536)
    return p.multi_processor_count, int(shared)


def rows_for(ho: int, kernel: int, limit: int = 4) -> int:
    """Output rows of a depthwise tile: a power of two that wastes little of `ho`, more rows for fewer loads."""
    if not kernel:
        return 1
    best, best_cost = 1, math.inf
    r = 1
    while r <= limit:
        cost = (-(-ho // r) * r / ho) * (1 + (kernel - 1) / r)
        if cost < best_cost:
            best, best_cost = r, cost
        r *= 2
    return best


def wants_apart(op: Op, pixels: int, exact: bool, sms: int = 132) -> bool:
    """Whether a depthwise convolution runs as a kernel of its own before its 1x1: where the latter has several tiles
    of output channels, sums over so many that too few programs are left, or has few `pixels` of output. Of the choices
    measured in 16 bits five of six are so.
    """
    if op.kind != "pointwise" or not op.kernel:
        return False
    if exact:
        return op.c_in >= 512 or op.c_out > 64
    return op.c_in >= 512 or op.kernel > 3 or (op.c_in > 64 and pixels < sms * 64)


def vector(op: Op, n: int) -> Config:
    """The tile of a 1x1 of very few pixels: `n` output channels a program."""
    return {"path": "vector", "k": min(8192 // n, next_pow2(op.c_in)), "n": n, "warps": 4 if n == 16 else 8}


def formula(op: Op, n: int, h: int, w: int, itemsize: int, exact: bool, sms: int = 132) -> Config:
    """A tile that is never bad. `exact`: fp32 products outside the tensor cores, which wants small tiles."""
    ho, wo = op.out_hw(h, w)
    pixels = n * ho * wo
    n_out = op.c_out
    if op.kind == "depthwise":
        rows = rows_for(ho, op.kernel)
        block_k = min(64, max(16, next_pow2(op.c_in)))
        small = pixels * op.c_in < sms * 2 * 64 * 64
        return {"path": "depthwise", "rows": rows, "j": 8 if small else 16, "k": block_k, "warps": 4}
    if op.kind == "dense":
        flat = op.c_in < 16
        k = min(64, max(16, next_pow2(op.kernel**2 * op.c_in))) if flat else min(64, next_pow2(op.c_in))
        m0, m1 = pieces(op.c_mid or op.c_out)
        n0, n1 = (next_pow2(max(op.c_out, 32)), 0) if op.c_mid else (32, 0)
        p = 128 if pixels >= sms * 128 else 64 if pixels >= sms * 32 else 32
        if not op.c_mid:
            if m0 + m1 > 256:
                m0, m1 = 128, 0
            if p == 32 and m0 + m1 > 64:
                m0, m1 = 32, 0
        if exact:
            p, k = 32, 16
            if not op.c_mid and m0 > 64:
                m0, m1 = 64, 0
        return {
            "path": "dense", "p": p, "k": k, "m0": m0, "m1": m1, "n0": n0, "n1": n1,
            "warps": 4, "stages": 1 if exact else 3,
        }  # fmt: skip
    if op.kind == "ffn":
        rows = rows_for(ho, op.kernel)
        p = 128 if pixels >= sms * 128 else 64
        n0, n1 = pieces(n_out)
        return {
            "path": "ffn", "rows": rows, "j": p // rows, "k": piece_k(op.c_in), "m": 64, "n0": n0, "n1": n1,
            "warps": 8 if p == 128 or n0 > 128 else 4, "stages": 2,
        }  # fmt: skip
    if pixels <= VECTOR_PIXELS and not op.kernel:
        return vector(op, 16 if pixels == 1 else 32)
    rows = rows_for(ho, op.kernel)
    if exact:
        return {
            "path": "pointwise", "rows": rows, "j": 32 // rows, "k": min(32, piece_k(op.c_in)), "n0": 64, "n1": 0,
            "split": 1, "warps": 4, "stages": 1,
        }  # fmt: skip
    k = piece_k(op.c_in)
    n0, n1 = pieces(n_out)
    if pixels >= sms * 20:
        if op.kernel and n_out > op.c_in and not op.residual and -(-op.c_in // k) <= MAX_PIECES:
            n = 128 if op.c_in <= 192 else 64
            parts = 2 if pixels < sms * 64 else 1
            share = -(-n_out // parts)
            per = -(-share // n) * n
            return {
                "path": "expand", "rows": rows, "j": 64 // rows, "k": k, "n": n, "n_program": per,
                "warps": 4, "stages": 2,
            }  # fmt: skip
        if n0 + n1 > 256:
            n0, n1 = 256, 0
        wide = n0 + n1 > 192
        if op.kernel:
            # the depthwise result of all channels first, through a strip of L2
            return {
                "path": "pointwise", "rows": rows, "j": 64 // rows, "k": max(k, 32), "n0": n0, "n1": n1,
                "split": 2 if pixels < sms * 48 and op.c_in >= 256 else 1, "warps": 8 if wide else 4, "stages": 2,
                "d": min(64, next_pow2(op.c_in)),
            }  # fmt: skip
        p = 64 if pixels < sms * 128 else 128
        return {
            "path": "pointwise", "rows": rows, "j": p // rows, "k": k, "n0": n0, "n1": n1, "split": 1,
            "warps": 8 if n0 > 128 else 4, "stages": 3,
        }  # fmt: skip
    # few pixels: narrow output tiles, and the sum over channels split until there are programs enough
    if op.kernel:
        p = 64 if pixels > 32 else 32
        n = 128 if n_out > op.c_in * 2 and pixels > 256 else 64
        rows = min(rows, 2) if op.stride == 2 else rows
    else:
        p = 32 if pixels > 16 else 16
        n = 128 if pixels * n_out > sms * 64 * 192 else 64 if pixels * n_out > sms * 64 * 64 else 32
    n = min(n, max(next_pow2(n_out), 32))
    programs = -(-pixels // p) * -(-n_out // n)
    split = max(1, min(8, -(-op.c_in // k) // 2, 2 * sms // max(programs, 1)))
    return {
        "path": "pointwise", "rows": rows, "j": max(p // rows, 4), "k": k, "n0": n, "n1": 0, "split": split,
        "warps": 4, "stages": 1 if op.kernel else 3,
    }  # fmt: skip


def shrink(cfg: Config) -> Config | None:
    """The next smaller configuration after the device ran out of shared memory or registers; None: there is none."""
    out = dict(cfg)
    if out.get("stages", 1) > 1:
        out["stages"] -= 1
        return out
    for name, low in (("m", 16), ("n", 16), ("p", 16), ("j", 4), ("k", 16)):
        if out.get(name, 0) > low:
            if name == "j" and out.get("rows", 1) * (out["j"] // 2) < 16:
                continue
            out[name] //= 2
            return out
    return None


def table_name(device_name: str) -> str:
    """File name of a device's table: "NVIDIA H100 80GB HBM3" -> nvidia_h100_80gb_hbm3."""
    return "".join(c if c.isalnum() else "_" for c in device_name.lower())


def alike(key: str) -> str:
    """The key of the same block with ReLU in the place of other activations: what is fast for one is for the other."""
    return re.sub(r"\b(relu6|gelu)\b", "relu", key)


def lookup(entries: dict[str, Any], key: str, n: int, h: int, w: int) -> Config | None:
    """The measured choice for a block of the nearest number of pixels; None where there is none or it is far away.

    Entries: {block key: {"NxHxW": {"fused": bool, "chunk": images, "ops": [Config, ...]}}}.
    """
    found = entries.get(key)
    if not found:
        return None

    def distance(size: str) -> tuple[float, float]:
        b, hh, ww = map(int, size.split("x"))
        return abs(math.log(n * h * w / (b * hh * ww))), abs(math.log(h * w / (hh * ww)))

    nearest = min(found, key=distance)
    return found[nearest] if distance(nearest)[0] <= math.log(NEAR) else None
