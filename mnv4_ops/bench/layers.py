"""What a block or a model is made of, layer by layer: multiply-accumulates and elements moved, for rooflines.

A layer is one convolution, linear layer or attention (queries x keys and weights x values together, the scores not
counted); BatchNorm, activation, pooling, softmax and residual cost nothing of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mnv4_ops.spec import ConvSpec, FusedIBSpec, HeadSpec, LinearSpec, MQASpec, Spec, UIBSpec

KINDS = ("conv", "pointwise", "depthwise", "attention", "fc")


@dataclass(frozen=True)
class Layer:
    """For one image: multiply-accumulates, weight elements, input and output elements. `kind` is one of `KINDS`."""

    kind: str
    macs: int
    weights: int
    reads: int
    writes: int

    @property
    def elements(self) -> int:
        return self.weights + self.reads + self.writes


def _conv(c_in: int, c_out: int, kernel: int, stride: int, h: int, w: int, *, depthwise: bool = False) -> Layer:
    ho, wo = -(-h // stride), -(-w // stride)
    weights = c_out * (1 if depthwise else c_in) * kernel**2
    if depthwise:
        kind = "depthwise"
    elif h == w == 1:
        kind = "fc"
    else:
        kind = "pointwise" if kernel == 1 else "conv"
    return Layer(kind, ho * wo * weights, weights, c_in * h * w, c_out * ho * wo)


def of_spec(spec: Spec, h: int, w: int) -> tuple[Layer, ...]:
    """Layers of a block for an input of h x w pixels, in order of execution; pooling has none."""
    return tuple(_of_spec(spec, h, w))


def _of_spec(spec: Spec, h: int, w: int) -> Iterator[Layer]:
    if isinstance(spec, ConvSpec):
        yield _conv(spec.c_in, spec.c_out, spec.kernel, spec.stride, h, w, depthwise=spec.depthwise)
    elif isinstance(spec, FusedIBSpec):
        yield _conv(spec.c_in, spec.c_mid, spec.kernel, spec.stride, h, w)
        yield _conv(spec.c_mid, spec.c_out, 1, 1, *spec.out_hw(h, w))
    elif isinstance(spec, UIBSpec):
        if spec.start_kernel:
            yield _conv(spec.c_in, spec.c_in, spec.start_kernel, spec.start_stride, h, w, depthwise=True)
            h, w = -(-h // spec.start_stride), -(-w // spec.start_stride)
        yield _conv(spec.c_in, spec.c_mid, 1, 1, h, w)
        if spec.mid_kernel:
            yield _conv(spec.c_mid, spec.c_mid, spec.mid_kernel, spec.mid_stride, h, w, depthwise=True)
            h, w = -(-h // spec.mid_stride), -(-w // spec.mid_stride)
        yield _conv(spec.c_mid, spec.c_out, 1, 1, h, w)
    elif isinstance(spec, MQASpec):
        yield from _of_attention(spec, h, w)
    elif isinstance(spec, HeadSpec):
        c = spec.c_in
        if spec.c_feat:
            yield _conv(c, spec.c_feat, 1, 1, h, w)
            c = spec.c_feat
        for width in (spec.c_hidden, spec.classes):
            if width:
                yield _conv(c, width, 1, 1, 1, 1)
                c = width
    elif isinstance(spec, LinearSpec):
        yield _conv(spec.c_in, spec.c_out, 1, 1, 1, 1)


def _of_attention(spec: MQASpec, h: int, w: int) -> Iterator[Layer]:
    (hq, wq), (hk, wk), (ho, wo) = spec.query_hw(h, w), spec.kv_hw(h, w), spec.out_hw(h, w)
    queries, keys = hq * wq, hk * wk
    key_width, value_width = spec.heads * spec.key_dim, spec.heads * spec.value_dim
    yield _conv(spec.c, key_width, 1, 1, hq, wq)
    for dim in (spec.key_dim, spec.value_dim):
        if spec.kv_stride > 1:
            yield _conv(spec.c, spec.c, spec.kv_kernel, spec.kv_stride, h, w, depthwise=True)
        yield _conv(spec.c, dim, 1, 1, hk, wk)
    reads = queries * key_width + keys * (spec.key_dim + spec.value_dim)
    yield Layer("attention", queries * keys * (key_width + value_width), 0, reads, queries * value_width)
    yield _conv(value_width, spec.c, 1, 1, ho, wo)


def of_module(model: Any, side: int) -> tuple[Layer, ...]:
    """Convolutions and linear layers that a forward of a torch module (no attention) runs on 3 x side x side pixels.

    Runs on the meta device; the module is left there. For models outside of the ledger.
    """
    import torch
    from torch import nn

    found: list[Layer] = []

    def record(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        reads, writes, weights = inputs[0].numel(), output.numel(), module.weight.numel()
        if isinstance(module, nn.Linear) or tuple(inputs[0].shape[2:]) == (1, 1):
            kind, macs = "fc", weights
        else:
            macs = writes // module.out_channels * weights
            if module.groups > 1:
                kind = "depthwise"
            else:
                kind = "pointwise" if module.kernel_size == (1, 1) else "conv"
        found.append(Layer(kind, macs, weights, reads, writes))

    model = model.to("meta").eval()
    leaves = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    hooks = [module.register_forward_hook(record) for module in leaves]
    try:
        with torch.inference_mode():
            model(torch.empty(1, 3, side, side, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(found)
