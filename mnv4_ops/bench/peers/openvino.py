"""OpenVINO's CPU plug-in: latency hint, fp32 kept as fp32, bf16 where asked."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch

from mnv4_ops.bench.peers import _onnx
from mnv4_ops.bench.peers.base import Peer, arguments_of


class OpenVino(Peer):
    name = "openvino"
    label = "OpenVINO"
    dtypes = ("float32", "bfloat16")
    order = 60
    several_inputs = True
    requires = ("openvino", "onnx")

    def prepare(self, model: torch.nn.Module, example: Any, threads: int) -> Callable[[], Any]:
        import openvino as ov

        core = ov.Core()
        inputs = tuple(x.float() for x in arguments_of(example))
        half = arguments_of(example)[0].dtype is torch.bfloat16
        # the network stays fp32 and computes in bf16: the same weights, input and output as everyone else's
        single = copy.deepcopy(model).float() if half else model
        network = core.read_model(io.BytesIO(_onnx.export(single, inputs)))
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
            # the process is pinned already
            "ENABLE_CPU_PINNING": False,
        }
        request = core.compile_model(network, "CPU", settings).create_infer_request()
        arrays = [x.numpy() for x in inputs]
        for index, array in enumerate(arrays):
            request.set_input_tensor(index, ov.Tensor(array, shared_memory=True))

        def run(_keep: Any = arrays) -> Any:
            request.infer()
            return request.get_output_tensor().data

        return run
