"""Blocks for the Triton kernels with random parameters, their definition in plain torch, and the 2x rule.

Run as a program it executes the small cases in the interpreter (TRITON_INTERPRET=1, set before triton is imported) and
prints one line of JSON per case.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mnv4_ops.reference import functional as R

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import add_by_halves

    add_by_halves()

STAGES = ("start", "expand", "mid", "project")


def layer(
    c_out: int, per_group: int, kernel: int, dtype: torch.dtype, *, bn: bool = True, bias: bool = False
) -> R.ConvBN:
    weight = (torch.randn(c_out, per_group, kernel, kernel) / (per_group * kernel * kernel) ** 0.5).to(dtype)
    norm = None
    if bn:
        parts = (torch.rand(c_out) + 0.5, torch.randn(c_out) * 0.2, torch.randn(c_out) * 0.1, torch.rand(c_out) + 0.5)
        norm = R.BatchNorm(*(p.to(dtype) for p in parts), 1e-3)
    return R.ConvBN(weight, norm, (torch.randn(c_out) * 0.1).to(dtype) if bias else None)


class Case:
    """A block (or, with c_feat, a head) with random parameters in `dtype`."""

    def __init__(
        self, dtype: torch.dtype, device: str, *, bn: bool = True, bias: bool = False, gamma: bool = False, **desc: Any
    ) -> None:
        self.desc, self.dtype, self.device = desc, dtype, device
        self.layers: dict[int, R.ConvBN] = {}
        self.gamma = None
        self.head = "c_feat" in desc
        c_in = desc["c_in"]
        if self.head:
            c = c_in
            for stage, name in enumerate(("c_feat", "c_hidden", "classes")):
                if desc[name]:
                    last = name == "classes"
                    self.layers[stage] = layer(desc[name], c, 1, dtype, bn=not last, bias=last)
                    c = desc[name]
        else:
            c_mid, c_out = desc["c_mid"], desc["c_out"]
            if desc.get("start_kernel"):
                self.layers[0] = layer(c_in, 1, desc["start_kernel"], dtype, bn=bn, bias=bias)
            if desc.get("expand"):
                self.layers[1] = layer(c_mid, c_in, desc.get("expand_kernel", 1), dtype, bn=bn, bias=bias)
            if desc.get("mid_kernel"):
                self.layers[2] = layer(c_mid, 1, desc["mid_kernel"], dtype, bn=bn, bias=bias)
            if desc.get("project"):
                self.layers[3] = layer(c_out, c_mid, 1, dtype, bn=bn, bias=bias)
            self.gamma = (torch.rand(c_out) * 0.8 + 0.2).to(dtype) if gamma else None
        self.layers = {s: R.cast(p, dtype, device) for s, p in self.layers.items()}
        if self.gamma is not None:
            self.gamma = self.gamma.to(device)

    def build(self) -> Any:
        from mnv4_ops.triton_kernels import Block, Head

        block = (Head if self.head else Block)(dtype=self.dtype, device=self.device, **self.desc)
        self.pack(block)
        return block

    def pack(self, block: Any) -> None:
        for stage, p in self.layers.items():
            bn = p.bn
            norm = (None, None, None, None, 0.0) if bn is None else (*bn[:4], bn.eps)
            block.pack(stage, p.weight, p.bias, *norm, self.gamma if stage == 3 and not self.head else None)

    def reference(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Plain torch on the unfolded parameters, in `dtype`."""
        x = x.to(dtype)
        y = x
        if self.head:
            p = {s: R.cast(v, dtype) for s, v in self.layers.items()}
            if 0 in p:
                y = R.conv_bn_act(y, p[0], act=self.desc["feat_act"])
            y = y.mean((2, 3), keepdim=True)
            if 1 in p:
                y = R.conv_bn_act(y, p[1], act=self.desc["hidden_act"])
            return R.conv_bn_act(y, p[2]).flatten(1) if 2 in p else y.flatten(1)
        for stage, p in self.layers.items():
            name = STAGES[stage]
            act = self.desc.get(f"{name}_act", "none")
            scaled = self.gamma is not None and name == "project"
            y = R.conv_bn_act(
                y,
                R.cast(p, dtype),
                stride=self.desc.get(f"{name}_stride", 1),
                act="none" if scaled else act,
                padding=self.desc.get("padding", "symmetric"),
                groups=y.shape[1] if name in ("start", "mid") else 1,
            )
            if scaled:
                y = R.activation(y * self.gamma.to(dtype).view(-1, 1, 1), act)
        return y + x if self.desc.get("residual") else y


def output(block: Any, n: int, h: int, w: int, dtype: torch.dtype, device: str) -> Tensor:
    """NaN everywhere, canonical channels_last."""
    shape = block.output_shape(n, h, w)
    if len(shape) == 2:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)
    n, c, h, w = shape
    return torch.full((n, h, w, c), float("nan"), dtype=dtype, device=device).permute(0, 3, 1, 2)


def judge(out: Tensor, plain: Tensor, truth: Tensor) -> tuple[float, float]:
    """Error as a fraction of what the 2x rule allows: (max, rms); NaN fails a `<= 1`."""
    dtype = out.dtype
    error, error_torch = (out.double() - truth).abs(), (plain.double() - truth).abs()
    scale = float(truth.abs().max())
    ulp = torch.finfo(dtype).eps * 2.0 ** torch.tensor(max(scale, 1e-30)).log2().floor().item()
    worst = float(error.max()) / (2 * float(error_torch.max()) + 2 * ulp)
    rms = 0.0
    if truth.numel() >= 1024:
        rms = float(error.square().mean().sqrt()) / max(2 * float(error_torch.square().mean().sqrt()), ulp * 1e-3)
    return worst, rms


def run_case(
    case: Case, n: int, h: int, w: int, layout: str = "channels_last", block: Any = None, allow_tf32: int = 0
) -> tuple[float, float]:
    block = block or case.build()
    x = torch.randn(n, case.desc["c_in"], h, w, device=case.device).to(case.dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.randn(n, case.desc["c_in"] + 1, h, w + 2, device=case.device).to(case.dtype)[:, 1:, :, 1:-1]
    out = output(block, n, h, w, case.dtype, case.device)
    block.run(x, out, allow_tf32=allow_tf32)
    again = output(block, n, h, w, case.dtype, case.device)
    block.run(x, again, allow_tf32=allow_tf32)
    assert torch.equal(out, again), "two runs differ"
    return judge(out, case.reference(x, case.dtype), case.reference(x, torch.float64))


def ib(c_in: int, c_mid: int, c_out: int, act: str = "relu", **more: Any) -> dict[str, Any]:
    mid_act = act if more.get("mid_kernel") else "none"
    base = {"c_in": c_in, "c_mid": c_mid, "c_out": c_out, "expand": True, "expand_act": act, "mid_act": mid_act}
    return {**base, "project": True, **more}


def structures(act: str, a: int, m: int, b: int) -> dict[str, dict[str, Any]]:
    """One description of each structure with `a` -> `m` -> `b` channels."""
    return {
        "depthwise": {"c_in": a, "c_mid": a, "c_out": a, "start_kernel": 3, "start_act": act},
        "depthwise s2": {"c_in": a, "c_mid": a, "c_out": a, "start_kernel": 5, "start_stride": 2, "padding": "same"},
        "pointwise": {"c_in": a, "c_mid": a, "c_out": b, "project": True, "project_act": act},
        "conv1x1": {"c_in": a, "c_mid": b, "c_out": b, "expand": True, "expand_act": act},
        "stem": {
            "c_in": 3, "c_mid": b, "c_out": b,
            "expand": True, "expand_kernel": 3, "expand_stride": 2, "expand_act": act,
        },
        "conv5x5": {"c_in": a, "c_mid": b, "c_out": b, "expand": True, "expand_kernel": 5, "expand_act": act},
        "dw+pw": {
            "c_in": a, "c_mid": a, "c_out": b, "start_kernel": 5, "start_act": act, "start_stride": 2,
            "project": True, "padding": "same",
        },
        "FFN": ib(a, m, a, act, residual=True, gamma=True),
        "FusedIB": ib(a, m, b, act, expand_kernel=3, expand_stride=2),
        "FusedIB s1": ib(a, m, a, act, expand_kernel=3, residual=True, gamma=True, padding="same"),
        "ConvNext": ib(a, m, a, act, start_kernel=5, residual=True),
        "ConvNext s2": ib(a, m, b, act, start_kernel=3, start_stride=2),
        "IB": ib(a, m, b, act, mid_kernel=3, mid_stride=2, bn=False, bias=True),
        "ExtraDW": ib(a, m, a, act, start_kernel=3, mid_kernel=5, residual=True, gamma=True),
        "ExtraDW s2": ib(a, m, b, act, start_kernel=5, mid_kernel=5, mid_stride=2, padding="same"),
        "dw+dense": {
            "c_in": a, "c_mid": b, "c_out": b, "start_kernel": 3, "expand": True, "expand_kernel": 3, "expand_act": act,
        },
        "dw+dw": {
            "c_in": a, "c_mid": a, "c_out": a, "start_kernel": 3, "mid_kernel": 5, "mid_act": act, "residual": True,
        },
        "head": {"c_in": a, "c_feat": m, "feat_act": act, "c_hidden": b, "hidden_act": act, "classes": 11},
        "pool": {"c_in": a, "c_feat": 0, "feat_act": "none", "c_hidden": 0, "hidden_act": "none", "classes": 0},
    }  # fmt: skip


def small_cases() -> Iterator[tuple[str, torch.dtype, dict[str, Any], tuple[int, int, int], str, dict | None]]:
    """(name, dtype, description, (n, h, w), layout, configuration or None for the formula)."""
    sizes = ((2, 5, 6), (1, 7, 9))
    acts = ("relu", "gelu", "relu6", "none")
    for d, dtype in enumerate((torch.float32, torch.float16)):
        for i, (name, desc) in enumerate(structures("ACT", 19, 40, 21).items()):
            act = acts[(i + d) % 4]
            desc = {k: act if v == "ACT" else v for k, v in desc.items()}
            yield name, dtype, desc, sizes[i % 2], ("channels_last", "nchw", "sliced")[i % 3], None
    tile = {"rows": 2, "j": 8, "k": 16, "warps": 4, "stages": 2}
    pw = {"path": "pointwise", **tile, "n0": 16, "n1": 16, "split": 1}
    expand = {"path": "expand", **tile, "n": 16, "n_program": 32}
    alone = {"path": "depthwise", "rows": 2, "j": 8, "k": 16, "warps": 4}
    vector = {"path": "vector", "k": 64, "n": 16, "warps": 4}
    ffn = {"path": "ffn", **tile, "m": 32, "n0": 16, "n1": 16}
    variants = {
        "split": ("ExtraDW", {"fused": False, "chunk": 0, "ops": [pw, {**pw, "split": 3, "rows": 4, "j": 4}]}),
        "expand": (
            "ExtraDW",
            {"fused": False, "chunk": 2, "ops": [expand, {**pw, "rows": 1, "j": 16, "n0": 32, "n1": 0}]},
        ),
        "expand of IB": ("IB", {"fused": False, "chunk": 1, "ops": [expand, {**pw, "rows": 8, "j": 4, "split": 2}]}),
        "strip": ("ExtraDW", {"fused": False, "chunk": 2, "ops": [pw, {**pw, "d": 32, "split": 2}]}),
        "apart": (
            "ExtraDW",
            {"fused": False, "chunk": 2, "ops": [pw, alone, {**pw, "rows": 1, "j": 16, "split": 2}]},
        ),
        "apart twice": (
            "ExtraDW s2",
            {"fused": False, "chunk": 0, "ops": [
                alone, {**pw, "rows": 1, "j": 16}, {**alone, "rows": 1}, {**pw, "split": 2},
            ]},
        ),
        "strip alone": ("dw+pw", {"fused": False, "chunk": 0, "ops": [{**pw, "d": 16, "n0": 32, "n1": 0}]}),
        "looped": ("ExtraDW s2", {"fused": False, "chunk": 0, "ops": [{**expand, "loop": 1}, {**pw, "loop": 1}]}),
        "ffn": ("ConvNext", {"fused": True, "chunk": 0, "ops": [ffn]}),
        "ffn without depthwise": ("FFN", {"fused": True, "chunk": 2, "ops": [{**ffn, "m": 16}]}),
        "vector": ("FFN", {"fused": False, "chunk": 0, "ops": [{**vector, "k": 16}, vector]}),
        "fused dense": (
            "FusedIB",
            {"fused": True, "chunk": 0, "ops": [
                {"path": "dense", "p": 16, "k": 16, "m0": 32, "m1": 16, "n0": 16, "n1": 16, "warps": 4, "stages": 2},
            ]},
        ),
    }  # fmt: skip
    for i, (name, (structure, choice)) in enumerate(variants.items()):
        desc = structures(acts[i % 4], 19, 40, 21)[structure]
        # two images and one in chunks of two; pixels enough for the rms where the stride is 1
        size = (3, 4, 5) if choice["chunk"] == 2 else (2, 5, 5)
        for dtype in (torch.float32, torch.float16):
            yield name, dtype, desc, size, "channels_last", choice


def special_values(device: str) -> None:
    """NaN and inf go through as in torch; an empty batch; packing again is seen."""
    case = Case(torch.float32, device, **ib(16, 32, 16, "relu", mid_kernel=3))
    block = case.build()
    x = torch.randn(1, 16, 5, 5, device=device)
    x[0, 3, 2, 2], x[0, 5, 0, 0] = float("nan"), float("inf")
    x = x.to(memory_format=torch.channels_last)
    out = output(block, 1, 5, 5, torch.float32, device)
    block.run(x, out)
    want = case.reference(x, torch.float32)
    assert torch.equal(out.isnan(), want.isnan()), "NaN"
    block.run(x[:0], out[:0])
    again = Case(torch.float32, device, **case.desc)
    again.pack(block)
    x = torch.randn(1, 16, 5, 5, device=device).to(memory_format=torch.channels_last)
    block.run(x, out)
    assert torch.allclose(out, again.reference(x, torch.float32), atol=1e-4), "packed again"


def gelu_values(device: str) -> None:
    """GELU of given numbers, through the middle of a depthwise window on images of one pixel."""
    numbers = torch.cat([torch.linspace(-14, 14, 4093), torch.tensor([float("inf"), float("-inf"), float("nan")])])
    # the formula's own error: of fp32, of that for 16 bits
    for dtype, own in ((torch.float32, 1e-7), (torch.float16, 6.5e-6)):
        case = Case(dtype, device, bn=False, c_in=64, c_mid=64, c_out=64, start_kernel=3, start_act="gelu")
        middle = torch.zeros_like(case.layers[0].weight)
        middle[:, :, 1, 1] = 1
        case.layers[0] = case.layers[0]._replace(weight=middle)
        block = case.build()
        x = numbers.to(device, dtype).reshape(64, 64, 1, 1).to(memory_format=torch.channels_last)
        out = output(block, 64, 1, 1, dtype, device)
        block.run(x, out)
        want = torch.nn.functional.gelu(x.double())
        assert torch.equal(out.isnan(), want.isnan()), "NaN of GELU"
        assert torch.equal(out.isinf(), want.isinf()), "infinity of GELU"
        rounding = want.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        over = ((out.double() - want).abs() - rounding - own)[want.isfinite()].max()
        assert over <= 0, f"GELU in {dtype}: {float(over):.3g} too much"


def main() -> None:
    torch.manual_seed(0)
    # the reference on a GPU
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    failed = 0
    only = sys.argv[2] if len(sys.argv) > 2 else None
    for name, dtype, desc, (n, h, w), layout, choice in small_cases():
        if only and only not in name:
            continue
        case = Case(dtype, device, **desc)
        block = case.build()
        block.choice = choice
        worst, rms = run_case(case, n, h, w, layout, block)
        ok = worst <= 1 and rms <= 1
        failed += not ok
        print(json.dumps({"case": name, "dtype": str(dtype), "max": round(worst, 3), "rms": round(rms, 3), "ok": ok}))
    special_values(device)
    gelu_values(device)
    print(json.dumps({"failed": failed}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
