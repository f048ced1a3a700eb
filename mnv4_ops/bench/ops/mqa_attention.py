"""Scaled dot-product attention with one key and one value head, without projections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from mnv4_ops.bench.ops.base import Case, Op
from mnv4_ops.bench.peers.base import Run
from mnv4_ops.spec import MQASpec, Spec


@dataclass(frozen=True)
class Attention:
    """`heads` of `queries` rows against `keys` rows."""

    heads: int
    queries: int
    keys: int
    key_dim: int
    value_dim: int


class MultiQuery(torch.nn.Module):
    """q [N, heads, queries, key_dim], k [N, 1, keys, key_dim], v [N, 1, keys, value_dim]."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class MqaAttention(Op):
    name = "mqa_attention"
    label = "multi-query attention"
    order = 60

    def specs(self, spec: Spec, h: int, w: int) -> Iterator[tuple[Attention, int, int]]:
        if isinstance(spec, MQASpec):
            (hq, wq), (hk, wk) = spec.query_hw(h, w), spec.kv_hw(h, w)
            yield Attention(spec.heads, hq * wq, hk * wk, spec.key_dim, spec.value_dim), h, w

    def shape(self, spec: Attention) -> str:
        return f"h{spec.heads} d{spec.key_dim} {spec.queries} queries {spec.keys} keys"

    def tiny(self, case: Case) -> Case:
        return replace(case, spec=replace(case.spec, queries=15, keys=7), height=5, width=3)

    def module(self, case: Case) -> torch.nn.Module:
        return MultiQuery().eval()

    def example(self, case: Case, batch: int) -> tuple[torch.Tensor, ...]:
        spec, generator = case.spec, torch.Generator().manual_seed(0)
        shapes = (
            (batch, spec.heads, spec.queries, spec.key_dim),
            (batch, 1, spec.keys, spec.key_dim),
            (batch, 1, spec.keys, spec.value_dim),
        )
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)

    def macs(self, case: Case) -> int:
        spec = case.spec
        return int(spec.heads * spec.queries * spec.keys * (spec.key_dim + spec.value_dim))

    def bytes(self, case: Case, batch: int, itemsize: int) -> int:
        spec = case.spec
        rows = spec.heads * spec.queries + spec.keys
        return int(itemsize * batch * rows * (spec.key_dim + spec.value_dim))

    def ours(self, module: Any, case: Case, x: Any, threads: int) -> Run:
        torch.set_num_threads(threads)
        scale = case.spec.key_dim**-0.5
        if x[0].dtype is torch.float32 and x[0].device.type == "cpu":
            from mnv4_ops.ops import cpu

            q, k, v = x
            out = q.new_empty(*q.shape[:3], v.shape[3])

            def run() -> torch.Tensor:
                cpu.attention(q, k, v, scale, out)
                return out

            return run
        return lambda: torch.ops.mnv4.mqa_attention(*x, scale)
