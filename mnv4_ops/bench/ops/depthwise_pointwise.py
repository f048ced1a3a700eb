"""A depthwise convolution and the 1x1 after it as one call: the first half of ConvNext, the second of IB."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mnv4_ops import _native, check
from mnv4_ops.bench.ops.base import Case, Op, raw_call
from mnv4_ops.bench.ops.conv import convolutions
from mnv4_ops.bench.peers.base import Run
from mnv4_ops.spec import ConvSpec, Spec


@dataclass(frozen=True)
class Pair:
    """Two convolutions in a row."""

    depthwise: ConvSpec
    pointwise: ConvSpec

    @property
    def channels(self) -> tuple[int, int]:
        return self.depthwise.c_in, self.pointwise.c_out

    def out_hw(self, h: int, w: int) -> tuple[int, int]:
        return self.depthwise.out_hw(h, w)

    def macs(self, h: int, w: int) -> int:
        return self.depthwise.macs(h, w) + self.pointwise.macs(*self.out_hw(h, w))

    def weights(self) -> int:
        return self.depthwise.weights() + self.pointwise.weights()


class DepthwisePointwise(Op):
    name = "depthwise_pointwise"
    label = "depthwise + 1x1"
    order = 30

    def specs(self, spec: Spec, h: int, w: int) -> Iterator[tuple[Pair, int, int]]:
        found = list(convolutions(spec, h, w))
        for (first, rows, columns), (second, _, _) in itertools.pairwise(found):
            if first.depthwise and second.kernel == 1:
                yield Pair(first, second), rows, columns

    def shape(self, spec: Pair) -> str:
        stride = " s2" if spec.depthwise.stride == 2 else ""
        acts = f"{spec.depthwise.act}/{spec.pointwise.act}"
        return f"{spec.channels[0]}-{spec.channels[1]} k{spec.depthwise.kernel}{stride} {acts}"

    def module(self, case: Case) -> torch.nn.Module:
        pair = (check.random_module(case.spec.depthwise), check.random_module(case.spec.pointwise, 1))
        # converters put the mode of the whole back on its children
        return torch.nn.Sequential(*pair).eval()

    def native(self, module: Any, case: Case) -> Any:
        assert _native.core is not None
        first, second = case.spec.depthwise, case.spec.pointwise
        keywords = {
            "c_in": first.c_in, "c_mid": first.c_in, "c_out": second.c_out, "padding": first.padding,
            "start_kernel": first.kernel, "start_stride": first.stride, "start_act": first.act,
            "project": True, "project_act": second.act,
        }  # fmt: skip
        stages: list[Any] = [(0, module[0].params(), None), (3, module[1].params(), None)]
        native = _native.core.Block(**keywords)
        return check.pack(native, check.Description("Block", keywords, stages), check._address)

    def called(self, module: Any, case: Case, x: Any, threads: int) -> Run:
        first, second = case.spec.depthwise, case.spec.pointwise
        stages = [module[0].params(), module[1].params()]
        options = (first.stride, first.padding, first.act, second.act, False)
        return raw_call(self.name, stages, x, threads, *options)
