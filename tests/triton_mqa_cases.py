"""Mobile MQA and multi-query attention on the Triton kernels, by the 2x rule.

Run as a program it executes the small cases in the interpreter (TRITON_INTERPRET=1, set before triton is imported) and
prints one line of JSON per case.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton_cases import judge, output

from mnv4_ops.reference import functional as R
from mnv4_ops.reference import modules, randomize_
from mnv4_ops.spec import MQASpec

HALF, SINGLE = torch.float16, torch.float32


class MQACase:
    """A block of a spec with random parameters in `dtype`."""

    def __init__(self, spec: MQASpec, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        module = randomize_(modules.MobileMQA(spec), seed).to(device, dtype)
        self.params = R.cast(module.params(), dtype)

    def build(self) -> Any:
        from mnv4_ops.triton_kernels import MobileMQA

        s = self.spec
        block = MobileMQA(
            dtype=self.dtype, device=self.device, c=s.c, heads=s.heads, key_dim=s.key_dim, value_dim=s.value_dim,
            kv_kernel=s.kv_kernel, kv_stride=s.kv_stride, query_stride=s.query_stride, norm=True,
            query_norm=s.query_stride > 1, padding=s.padding, residual=s.residual,
        )  # fmt: skip
        self.pack(block)
        return block

    def pack(self, block: Any) -> None:
        p = self.params
        stages = (p.norm, p.query_norm, p.query, p.key_down, p.key, p.value_down, p.value, p.output)
        for stage, layer in enumerate(stages):
            if layer is None:
                continue
            if isinstance(layer, R.BatchNorm):
                block.pack(stage, None, None, *layer[:4], layer.eps)
                continue
            norm = (None, None, None, None, 0.0) if layer.bn is None else (*layer.bn[:4], layer.bn.eps)
            block.pack(stage, layer.weight, layer.bias, *norm, p.gamma if stage == 7 else None)

    def reference(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return R.mobile_mqa(x.to(dtype), self.spec, R.cast(self.params, dtype))

    def naive(self, x: Tensor) -> Tensor:
        """In float64, the shift of the pre-norm folded into the shift of the depthwise convolutions, which is wrong
        where their windows reach over the border.
        """
        p = R.cast(self.params, torch.float64)
        scale = p.norm.weight * (p.norm.var + p.norm.eps).rsqrt()
        shift = p.norm.bias - p.norm.mean * scale
        y = x.double() * scale.view(-1, 1, 1)

        def branch(down: Any, proj: Any) -> Tensor:
            constant = down.weight.sum((1, 2, 3)) * shift
            z = R.depthwise(y, down._replace(bn=None), stride=self.spec.kv_stride, padding=self.spec.padding)
            return R.pointwise(R.batch_norm(z + constant.view(-1, 1, 1), down.bn), proj)

        query = R.pointwise(y + shift.view(-1, 1, 1), p.query)
        o = R.attention(query, branch(p.key_down, p.key), branch(p.value_down, p.value), self.spec.heads)
        out = R.pointwise(o, p.output) * p.gamma.view(-1, 1, 1)
        return out + x.double() if self.spec.residual else out


def run_mqa(
    case: MQACase, n: int, h: int, w: int, block: Any = None, x: Tensor | None = None, allow_tf32: int = 0
) -> tuple[float, float]:
    """Fraction of the allowed error, (max, rms); two runs must agree to the bit."""
    block = block or case.build()
    if x is None:
        x = torch.randn(n, case.spec.c, h, w, device=case.device).to(case.dtype)
        x = x.to(memory_format=torch.channels_last)
    outs = []
    for _ in range(2):
        outs.append(output(block, n, h, w, case.dtype, case.device))
        block.run(x, outs[-1], allow_tf32=allow_tf32)
    assert torch.equal(*outs), "two runs differ"
    return judge(outs[0], case.reference(x, case.dtype), case.reference(x, torch.float64))


def spec(**more: Any) -> MQASpec:
    return MQASpec(**{"c": 40, "heads": 3, "key_dim": 16, "value_dim": 24, "layer_scale": True, **more})


def choices() -> dict[str, tuple[MQASpec, tuple[int, int, int], dict[str, Any] | None]]:
    """(spec, (n, h, w), configuration or None for the formula) of each path of the kernels."""
    down, flat = spec(kv_stride=2), spec(heads=2, key_dim=48, value_dim=32)
    project = {"path": "mqa_project", "p": 16, "k": 32, "q": 0, "pq": 16, "n": 32, "warps": 4, "stages": 1}
    whole = {
        "path": "mqa", "inline": 0, "p": 32, "k": 32, "keys0": 64, "keys1": 0, "n0": 32, "n1": 32, "share": 0,
        "warps": 4, "stages": 1,
    }  # fmt: skip
    alone = {"path": "attention", "p": 32, "keys0": 32, "keys1": 0, "warps": 4, "stages": 1}
    last = {"path": "pointwise", "rows": 1, "j": 16, "k": 32, "n0": 32, "n1": 0, "split": 2, "warps": 4, "stages": 1}

    def ops(*configs: dict[str, Any]) -> dict[str, Any]:
        return {"fused": True, "chunk": 0, "ops": list(configs)}

    return {
        "down": (down, (2, 9, 7), None),
        "flat": (flat, (2, 5, 6), None),
        "5x5, same padding": (spec(kv_stride=2, kv_kernel=5, padding="same", layer_scale=False), (2, 9, 8), None),
        "pooled queries": (spec(kv_stride=2, query_stride=2), (2, 8, 6), None),
        "pooled queries, same padding": (spec(query_stride=2, padding="same", residual=False), (2, 7, 5), None),
        "one pixel": (down, (3, 1, 1), None),
        "two kernels": (down, (2, 9, 7), ops(project, whole)),
        "keys in two pieces": (flat, (2, 7, 9), ops(project, {**whole, "keys0": 32, "keys1": 32})),
        "heads apart": (down, (2, 9, 7), ops(project, {**whole, "share": 2}, last)),
        "one kernel": (flat, (2, 5, 6), ops({**whole, "inline": 1})),
        "three kernels": (down, (2, 9, 7), ops({**project, "q": 1}, alone, last)),
        "three kernels, online": (flat, (1, 9, 9), ops({**project, "q": 1}, alone, {**last, "split": 1})),
        "three kernels, heads of one width": (
            spec(heads=2, key_dim=40, value_dim=56), (2, 5, 6), ops({**project, "q": 1}, alone, last),
        ),
        "three kernels, two pieces": (
            flat, (1, 9, 9), ops({**project, "q": 1, "k": 16}, {**alone, "keys0": 64, "keys1": 32}, last),
        ),
    }  # fmt: skip


def small_mqa_cases() -> Iterator[tuple[str, torch.dtype, Any]]:
    for name, (s, size, choice) in choices().items():
        for dtype in (SINGLE, HALF):
            yield name, dtype, (s, size, choice)


def attention_inputs(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, device: str, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of (batch, heads, queries, keys, key channels, value channels)."""
    b, heads, nq, nk, dk, dv = shape
    q = torch.randn(b, heads, nq, dk, device=device) * 2
    k, v = torch.randn(b, 1, nk, dk, device=device), torch.randn(b, 1, nk, dv, device=device)
    if layout == "channels first":
        q, k, v = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v))
    elif layout == "heads last":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "sliced":
        q, k, v = (F.pad(t, (1, 2, 1, 0)).to(dtype)[:, :, 1:, 1:-2] for t in (q, k, v))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, repeats: int = 1) -> tuple[float, float]:
    from mnv4_ops.triton_kernels import mqa_attention

    scale = q.shape[3] ** -0.5 if scale is None else scale
    for _ in range(repeats):
        out = torch.full((*q.shape[:1], q.shape[2], q.shape[1], v.shape[3]), float("nan"), dtype=q.dtype)
        out = out.to(q.device).transpose(1, 2)
        mqa_attention(q, k, v, scale, out)

    def plain(dtype: torch.dtype) -> Tensor:
        a, b, c = (t.to(dtype) for t in (q, k, v))
        return torch.softmax((a * scale) @ b.transpose(2, 3), -1) @ c

    return judge(out, plain(q.dtype), plain(torch.float64))


ATTENTION = (
    ((2, 3, 5, 7, 16, 24), "contiguous", None),
    ((1, 2, 33, 65, 48, 48), "heads last", None),
    ((1, 2, 9, 300, 16, 32), "channels first", 0.3),
    ((2, 1, 4, 5, 33, 17), "sliced", None),
    ((1, 4, 17, 40, 128, 128), "contiguous", None),
    ((1, 2, 6, 9, 16, 16), "contiguous", -0.4),
)


def special_values(device: str) -> None:
    """NaN and inf as in torch, large and equal logits, an empty batch, packing again, biases."""
    for s, size in ((spec(kv_stride=2), (2, 5, 6)), (spec(), (2, 5, 4))):
        case = MQACase(s, SINGLE, device)
        block = case.build()
        for value in (float("nan"), float("inf"), float("-inf")):
            x = torch.randn(size[0], s.c, *size[1:], device=device).to(memory_format=torch.channels_last)
            x[0, 3, 2, 2] = value
            out = output(block, *size, SINGLE, device)
            block.run(x, out)
            want = case.reference(x, SINGLE)
            assert torch.equal(out.isnan(), want.isnan()), value
            assert not out[1].isnan().any()
        block.run(x[:0], out[:0])
        again = MQACase(s, SINGLE, device, seed=5)
        again.pack(block)
        worst, rms = run_mqa(again, *size, block=block)
        assert max(worst, rms) <= 1, "packed again"
        x = torch.zeros(size[0], s.c, *size[1:], device=device)
        assert max(run_mqa(case, *size, x=x)) <= 1, "equal logits"
    # exponentials of the first overflow unless the maximum is taken off; float16 cannot hold much larger ones
    for dtype, scale in ((SINGLE, 1e4), (SINGLE, 1e-4), (HALF, 40.0), (HALF, 1e-4)):
        q, k, v = attention_inputs((2, 2, 9, 70, 16, 16), dtype, device, "contiguous")
        assert max(run_attention(q, k, v, scale)) <= 1, ("scale", scale)
    bias = MQACase(spec(), SINGLE, device)
    layers = {
        name: getattr(bias.params, name)._replace(bias=torch.randn(rows, device=device))
        for name, rows in (("query", 48), ("key", 16), ("value", 24), ("output", 40))
    }
    bias.params = bias.params._replace(**layers)
    assert max(run_mqa(bias, 2, 4, 3)) <= 1, "biases"


def main() -> None:
    torch.manual_seed(0)
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    failed = 0

    def report(name: str, dtype: torch.dtype, found: tuple[float, float]) -> None:
        nonlocal failed
        worst, rms = found
        ok = worst <= 1 and rms <= 1
        failed += not ok
        print(json.dumps({"case": name, "dtype": str(dtype), "max": round(worst, 3), "rms": round(rms, 3), "ok": ok}))

    for name, dtype, (s, size, choice) in small_mqa_cases():
        case = MQACase(s, dtype, device)
        block = case.build()
        block.choice = choice
        report(name, dtype, run_mqa(case, *size, block=block))
    for shape, layout, scale in ATTENTION:
        for dtype in (SINGLE, HALF):
            q, k, v = attention_inputs(shape, dtype, device, layout)
            report(f"attention {shape} {layout}", dtype, run_attention(q, k, v, scale, repeats=2))
    special_values(device)
    print(json.dumps({"failed": failed}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
