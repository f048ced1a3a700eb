"""torch.compile of the channels_last model on a GPU: captured, called, and with its own CUDA graphs."""

from __future__ import annotations

import copy
import weakref
from typing import Any, ClassVar

import torch

from mnv4_ops.bench.peers.base import CudaPeer, Run

# one compilation of a model serves the call and the capture
_compiled: weakref.WeakKeyDictionary[torch.nn.Module, dict[str | None, Run]] = weakref.WeakKeyDictionary()


class CompileGraph(CudaPeer):
    """The best peer of whole models on the GPUs measured so far."""

    name = "compile_graph"
    label = "torch.compile + CUDA graph"
    captured = True
    order = 12
    mode: ClassVar[str | None] = None
    options: ClassVar[dict[str, Any] | None] = None
    variant: ClassVar[str] = ""

    def rewritten(self, model: torch.nn.Module) -> torch.nn.Module:
        """A copy to compile."""
        return copy.deepcopy(model)

    def prepare(self, model: torch.nn.Module, example: torch.Tensor, threads: int) -> Run:
        known = _compiled.setdefault(model, {})
        key = f"{self.variant} {self.mode} {self.options} {tuple(example.shape)}"
        if key not in known:
            own = self.rewritten(model).to(memory_format=torch.channels_last)
            x = example.to(memory_format=torch.channels_last)
            # fullgraph: a graph break would make a slow peer, and with it a flattering comparison
            compiled = torch.compile(own, fullgraph=True, dynamic=False, mode=self.mode, options=self.options)
            known[key] = lambda: compiled(x)
        return known[key]


class FreezeGraph(CompileGraph):
    """The strongest setting; it compiles for minutes."""

    name = "freeze_graph"
    label = "torch.compile max-autotune + freezing + CUDA graph"
    order = 14
    slow = True
    options: ClassVar[dict[str, Any] | None] = {"freezing": True, "max_autotune": True}


class CompileCall(CompileGraph):
    name = "compile"
    label = "torch.compile"
    captured = False
    order = 22


class ReduceOverhead(CompileGraph):
    name = "reduce_overhead"
    label = "torch.compile reduce-overhead"
    captured = False
    order = 23
    mode = "reduce-overhead"
