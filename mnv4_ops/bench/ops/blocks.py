"""Whole blocks: the four kinds of UIB, FusedIB, Mobile MQA, and the head."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch

from mnv4_ops.bench.ops.base import Case, Op, raw_call
from mnv4_ops.bench.peers.base import Run
from mnv4_ops.spec import ConvSpec, FusedIBSpec, HeadSpec, MQASpec, Spec, UIBSpec, head_spec, ledger


class _Block(Op):
    kind: ClassVar[str]

    def specs(self, spec: Spec, h: int, w: int) -> Iterator[tuple[Spec, int, int]]:
        if spec.kind == self.kind:
            yield spec, h, w

    def shape(self, spec: Any) -> str:
        return shape(spec)


class ExtraDW(_Block):
    name = "extra_dw"
    label = "UIB ExtraDW"
    kind = "ExtraDW"
    order = 50


class InvertedBottleneck(_Block):
    name = "ib"
    label = "UIB IB"
    kind = "IB"
    order = 51


class ConvNext(_Block):
    name = "convnext"
    label = "UIB ConvNext-like"
    kind = "ConvNext"
    order = 52


class Ffn(_Block):
    name = "ffn"
    label = "UIB FFN"
    kind = "FFN"
    order = 53


class FusedIB(_Block):
    name = "fused_ib"
    label = "FusedIB"
    kind = "FusedIB"
    order = 54


class MobileMqa(_Block):
    name = "mqa"
    label = "Mobile MQA block"
    kind = "MQA"
    order = 61

    def module_on(self, case: Case, device: str) -> torch.nn.Module:
        # timm's own gives its attention to SDPA, whose fused kernels a reference of plain products would not meet
        if device == "cpu" or importlib.util.find_spec("timm") is None:
            return self.module(case)
        from mnv4_ops.bench import gpu_mqa

        return cast(torch.nn.Module, gpu_mqa.timm_block(case.spec))


class Head(_Block):
    name = "head"
    label = "head: 1x1, pool, 1x1, classifier"
    kind = "Head"
    order = 70

    def rows(self, model: str, resolution: int | None) -> Iterator[tuple[str, Spec, int, int]]:
        last = next(entry for entry in ledger(model, resolution) if entry.name == "4.0")
        yield "head", head_spec(model), last.height, last.width

    def called(self, module: Any, case: Case, x: Any, threads: int) -> Run:
        """The op: `enable()` knows a head by the model of which it is a part."""
        return raw_call(self.name, list(module.params()), x, threads, case.spec.act)


def shape(spec: Spec) -> str:
    """Channels and kernels in short: `96-384-96 k3,5 s2`; `ls` is a layer scale."""
    stride = " s2" if getattr(spec, "stride", 1) == 2 else ""
    act = getattr(spec, "act", "relu")
    act = "" if act == "relu" else f" {act}"
    if isinstance(spec, UIBSpec):
        kernels = ",".join(str(k) for k in (spec.start_kernel, spec.mid_kernel) if k)
        scale = " ls" if spec.layer_scale else ""
        return f"{spec.c_in}-{spec.c_mid}-{spec.c_out}" + (f" k{kernels}" if kernels else "") + stride + act + scale
    if isinstance(spec, FusedIBSpec):
        return f"{spec.c_in}-{spec.c_mid}-{spec.c_out} k{spec.kernel}{stride}{act}"
    if isinstance(spec, ConvSpec):
        return f"{spec.c_in}-{spec.c_out} k{spec.kernel}{stride}{act}"
    if isinstance(spec, MQASpec):
        dims = f"{spec.key_dim}" if spec.key_dim == spec.value_dim else f"{spec.key_dim},{spec.value_dim}"
        return f"{spec.c} h{spec.heads} d{dims}" + (" kv s2" if spec.kv_stride == 2 else "")
    if isinstance(spec, HeadSpec):
        return f"{spec.c_in}-{spec.c_feat}-{spec.c_hidden}-{spec.classes}{act}"
    return spec.kind
