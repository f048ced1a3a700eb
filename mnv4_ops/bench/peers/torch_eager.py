"""PyTorch as it comes, in both memory formats."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from mnv4_ops.bench.peers.base import CPU_DTYPES, Peer, arguments_of


class Eager(Peer):
    """The model as the user has it: contiguous NCHW."""

    name = "torch_eager"
    label = "torch eager"
    dtypes = CPU_DTYPES
    order = 10
    several_inputs = True

    def prepare(self, model: torch.nn.Module, example: Any, threads: int) -> Callable[[], Any]:
        torch.set_num_threads(threads)
        inputs = arguments_of(example)
        return lambda: model(*inputs)


class EagerChannelsLast(Peer):
    name = "torch_eager_cl"
    label = "torch eager, channels_last"
    dtypes = CPU_DTYPES
    order = 11

    def prepare(self, model: torch.nn.Module, example: torch.Tensor, threads: int) -> Callable[[], Any]:
        torch.set_num_threads(threads)
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        example = example.to(memory_format=torch.channels_last)
        return lambda: model(example)
