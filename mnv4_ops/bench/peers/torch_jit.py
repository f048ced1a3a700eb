"""TorchScript frozen and optimised for inference (BN folded, MKL-DNN layouts)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch

from mnv4_ops.bench.peers.base import CPU_DTYPES, Peer


class JitChannelsLast(Peer):
    name = "torch_jit_cl"
    label = "torch.jit optimize_for_inference, channels_last"
    dtypes = CPU_DTYPES
    order = 30

    def prepare(self, model: torch.nn.Module, example: torch.Tensor, threads: int) -> Callable[[], Any]:
        torch.set_num_threads(threads)
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        example = example.to(memory_format=torch.channels_last)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, yet the fastest of torch on small models
            traced = torch.jit.freeze(torch.jit.trace(model, example, check_trace=False))
            script = torch.jit.optimize_for_inference(traced)
        # the profiling executor optimises during the first calls
        for _ in range(3):
            script(example)
        return lambda: script(example)
