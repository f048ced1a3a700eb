"""Single convolutions with BN and activation: 1x1, depthwise, dense k x k."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mnv4_ops.bench.ops.base import Case, Op, raw_call
from mnv4_ops.bench.peers.base import Run
from mnv4_ops.spec import ConvSpec, FusedIBSpec, HeadSpec, Spec, UIBSpec


def convolutions(spec: Spec, h: int, w: int) -> Iterator[tuple[ConvSpec, int, int]]:
    """The convolutions of a row of the ledger, each with its own activation, and their input sizes."""
    if isinstance(spec, ConvSpec):
        yield spec, h, w
    elif isinstance(spec, FusedIBSpec):
        yield ConvSpec(spec.c_in, spec.c_mid, spec.kernel, spec.stride, spec.act, spec.padding), h, w
        yield ConvSpec(spec.c_mid, spec.c_out, 1, 1, "none", spec.padding), *spec.out_hw(h, w)
    elif isinstance(spec, UIBSpec):
        if spec.start_kernel:
            yield depthwise(spec.c_in, spec.start_kernel, spec.start_stride, "none", spec.padding), h, w
            h, w = -(-h // spec.start_stride), -(-w // spec.start_stride)
        yield ConvSpec(spec.c_in, spec.c_mid, 1, 1, spec.act, spec.padding), h, w
        if spec.mid_kernel:
            yield depthwise(spec.c_mid, spec.mid_kernel, spec.mid_stride, spec.act, spec.padding), h, w
            h, w = -(-h // spec.mid_stride), -(-w // spec.mid_stride)
        yield ConvSpec(spec.c_mid, spec.c_out, 1, 1, "none", spec.padding), h, w


def depthwise(c: int, kernel: int, stride: int, act: str, padding: str) -> ConvSpec:
    return ConvSpec(c, c, kernel, stride, act, padding, True)


class _Conv(Op):
    def specs(self, spec: Spec, h: int, w: int) -> Iterator[tuple[ConvSpec, int, int]]:
        assert not isinstance(spec, HeadSpec)
        return (found for found in convolutions(spec, h, w) if self.takes(found[0]) and found[1] * found[2] > 1)

    def takes(self, spec: ConvSpec) -> bool:
        raise NotImplementedError

    def shape(self, spec: ConvSpec) -> str:
        channels = f"{spec.c_in}" if spec.depthwise else f"{spec.c_in}-{spec.c_out}"
        kernel = f" k{spec.kernel}" if spec.kernel > 1 else ""
        act = "" if spec.act == "none" else f" {spec.act}"
        return channels + kernel + (" s2" if spec.stride == 2 else "") + act


class Pointwise(_Conv):
    name = "pointwise"
    label = "1x1 convolution"
    order = 10

    def takes(self, spec: ConvSpec) -> bool:
        return spec.kernel == 1


class Depthwise(_Conv):
    name = "depthwise"
    label = "depthwise convolution"
    order = 20

    def takes(self, spec: ConvSpec) -> bool:
        return spec.depthwise

    def called(self, module: Any, case: Case, x: Any, threads: int) -> Run:
        spec = case.spec
        return raw_call("depthwise", [module.params()], x, threads, spec.stride, spec.padding, spec.act)


class Dense(_Conv):
    name = "dense"
    label = "dense k x k convolution"
    order = 40

    def takes(self, spec: ConvSpec) -> bool:
        return spec.kernel > 1 and not spec.depthwise
