"""torch.compile: as it comes in both memory formats, and the strongest setting (constants folded in, GEMMs
autotuned).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from mnv4_ops.bench.peers.base import CPU_DTYPES, Peer, arguments_of


class Compile(Peer):
    name = "torch_compile"
    label = "torch.compile"
    dtypes = CPU_DTYPES
    order = 20
    several_inputs = True
    slow = True
    channels_last = False
    options: ClassVar[dict[str, Any] | None] = None

    def prepare(self, model: torch.nn.Module, example: Any, threads: int) -> Callable[[], Any]:
        torch.set_num_threads(threads)
        model = copy.deepcopy(model)
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
            example = example.to(memory_format=torch.channels_last)
        inputs = arguments_of(example)
        # fullgraph: a graph break would make a slow peer, and with it a flattering comparison
        compiled = torch.compile(model, fullgraph=True, dynamic=False, options=self.options)

        def run() -> Any:
            return compiled(*inputs)

        run()
        return run


class CompileChannelsLast(Compile):
    name = "torch_compile_cl"
    label = "torch.compile, channels_last"
    order = 21
    several_inputs = False
    channels_last = True


class FreezeChannelsLast(Compile):
    name = "torch_freeze_cl"
    label = "torch.compile max-autotune + freezing, channels_last"
    order = 40
    several_inputs = False
    channels_last = True
    options: ClassVar[dict[str, Any] | None] = {"freezing": True, "max_autotune": True}
