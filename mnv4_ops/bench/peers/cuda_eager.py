"""PyTorch as it comes on a GPU (cuDNN), called and captured; depthwise layers by torch's own kernel where it lets one
choose.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from mnv4_ops.bench.peers.base import CudaPeer, Run


class _Eager(CudaPeer):
    channels_last = True

    def prepare(self, model: torch.nn.Module, example: torch.Tensor, threads: int) -> Run:
        if not self.channels_last:
            return lambda: model(example)
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        example = example.to(memory_format=torch.channels_last)
        return lambda: model(example)


class CudnnGraph(_Eager):
    name = "cudnn_graph"
    label = "cuDNN channels_last + CUDA graph"
    captured = True
    order = 10


class NativeDepthwiseGraph(_Eager):
    """`torch.backends.cudnn.depthwise_kernel = "native"`, where torch has that."""

    name = "native_dw_graph"
    label = "native depthwise, cuDNN otherwise, + CUDA graph"
    captured = True
    order = 11

    def available(self) -> str | None:
        if not hasattr(torch.backends.cudnn, "depthwise_kernel"):
            return f"torch {torch.__version__} does not let one choose the depthwise kernel"
        return super().available()

    def prepare(self, model: torch.nn.Module, example: torch.Tensor, threads: int) -> Run:
        call = super().prepare(model, example, threads)

        settings: Any = torch.backends.cudnn

        def run() -> Any:
            before = settings.depthwise_kernel
            settings.depthwise_kernel = "native"
            try:
                return call()
            finally:
                settings.depthwise_kernel = before

        return run


class EagerCall(_Eager):
    name = "eager"
    label = "timm eager NCHW"
    channels_last = False
    order = 20


class EagerChannelsLastCall(_Eager):
    name = "eager_cl"
    label = "timm eager channels_last"
    order = 21
