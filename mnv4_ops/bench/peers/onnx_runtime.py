"""ONNX Runtime, CPU execution provider, all graph optimisations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mnv4_ops.bench.peers import _onnx
from mnv4_ops.bench.peers.base import Peer, arguments_of


class OnnxRuntime(Peer):
    name = "onnxruntime"
    label = "ONNX Runtime"
    order = 50
    several_inputs = True
    requires = ("onnxruntime", "onnx")

    def prepare(self, model: torch.nn.Module, example: Any, threads: int) -> Callable[[], Any]:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        # its pool spins by default, which is its fast setting; the clock waits until that is over before the next
        # variant
        options.log_severity_level = 3
        session = ort.InferenceSession(_onnx.export(model, example), options, providers=["CPUExecutionProvider"])
        # bound once, so that a call neither allocates nor copies
        sources = dict(zip(_onnx.input_names(example), (x.numpy() for x in arguments_of(example)), strict=True))
        target = np.empty(session.run(None, sources)[0].shape, np.float32)
        binding = session.io_binding()
        for name, source in sources.items():
            binding.bind_input(name, "cpu", 0, np.float32, source.shape, source.ctypes.data)
        binding.bind_output("y", "cpu", 0, np.float32, target.shape, target.ctypes.data)

        def run(_keep: Any = (example, sources)) -> Any:
            session.run_with_iobinding(binding)
            return target

        return run
