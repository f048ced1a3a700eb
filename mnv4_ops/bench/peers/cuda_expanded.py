"""torch.compile on a GPU with the keys and values of multi-query attention expanded by a stride of zero."""

from __future__ import annotations

import importlib.util

import torch

from mnv4_ops.bench.peers.base import Unsupported
from mnv4_ops.bench.peers.cuda_compile import CompileGraph


class CompileExpandedGraph(CompileGraph):
    """The best peer of the hybrids where SDPA knows no single head of keys: its fused kernels serve this form."""

    name = "compile_expanded_graph"
    label = "torch.compile, K/V expanded, + CUDA graph"
    order = 13
    variant = "expanded"

    def suits(self, model: torch.nn.Module) -> bool:
        from mnv4_ops.bench import gpu_mqa

        return importlib.util.find_spec("timm") is not None and gpu_mqa.has_attention(model)

    def rewritten(self, model: torch.nn.Module) -> torch.nn.Module:
        # imports this folder's list of peers itself
        from mnv4_ops.bench import gpu_mqa

        if not gpu_mqa.has_attention(model):
            raise Unsupported("the model has no multi-query attention")
        return gpu_mqa.expanded(model)
