"""Random parameters for tests and benchmarks under which every layer matters and nothing over- or underflows."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn

_M = TypeVar("_M", bound=nn.Module)


@torch.no_grad()
def randomize_(module: _M, seed: int = 0) -> _M:
    """Draw all parameters and BN statistics of a block or model (this package's or timm's) in place; returns `module`.

    BN: weight, var ~ U(0.5, 1.5), mean ~ N(0, 0.1), bias ~ N(0, 0.2). Layer-scale gamma ~ U(0.2, 1): at 1e-5 (the
    initial value) a wrong branch would go unseen. Convolutions and linear layers: normal, then scaled layer by
    layer on a random input so that their output has rms 1, which keeps activations near 1 through the whole depth.
    The same seed gives the same values in every dtype (rounded) and on every device. Uses forward hooks: call it
    before `enable()` under `MNV4_OPS_STRICT=1`.
    """
    # drawn and calibrated on a float32 copy, so that half precision models get the same values
    work = copy.deepcopy(module).to("cpu", torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    def normal(like: Tensor, std: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * std

    for child in work.modules():
        if isinstance(child, nn.BatchNorm2d):
            if child.affine:
                child.weight.copy_(uniform(child.weight, 0.5, 1.5))
                child.bias.copy_(normal(child.bias, 0.2))
            if child.running_mean is not None and child.running_var is not None:
                child.running_mean.copy_(normal(child.running_mean, 0.1))
                child.running_var.copy_(uniform(child.running_var, 0.5, 1.5))
        elif isinstance(child, nn.Conv2d | nn.Linear):
            child.weight.copy_(normal(child.weight, 1 / math.sqrt(child.weight[0].numel())))
            if child.bias is not None:
                child.bias.copy_(normal(child.bias, 0.1))
        elif isinstance(gamma := getattr(child, "gamma", None), nn.Parameter):
            gamma.copy_(uniform(gamma, 0.2, 1.0))

    _scale_outputs(work, generator)
    module.load_state_dict(work.state_dict())
    return module


def _scale_outputs(module: nn.Module, generator: torch.Generator) -> None:
    """Scale the weight of each convolution and linear layer so that its output has rms 1 on a random input."""
    shape = _input_shape(module)
    if shape is None:
        return

    def hook(layer: nn.Module, _: object, output: Tensor) -> Tensor:
        rms = output.square().mean().sqrt().clamp_min(1e-6)
        for parameter in layer.parameters(recurse=False):
            parameter.div_(rms)
        return output / rms

    handles = [m.register_forward_hook(hook) for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        module(torch.randn(shape, generator=generator))
    finally:
        for handle in handles:
            handle.remove()


def _input_shape(module: nn.Module) -> tuple[int, ...] | None:
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            # images as large as in use: on smaller ones the padding covers much of the kernels of the last stage
            return (1, child.in_channels, 224, 224) if child.in_channels <= 4 else (2, child.in_channels, 14, 14)
        if isinstance(child, nn.BatchNorm2d):
            return 2, child.num_features, 14, 14
        if isinstance(child, nn.Linear):
            return 2, child.in_features
    return None
