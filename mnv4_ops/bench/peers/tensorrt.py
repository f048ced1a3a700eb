"""TensorRT on the stream of torch, strongly typed: the engine computes in the dtypes of the exported model."""

from __future__ import annotations

from typing import Any

import torch

from mnv4_ops.bench.peers import _onnx
from mnv4_ops.bench.peers.base import CudaPeer, Run, Unsupported


class TensorRt(CudaPeer):
    name = "tensorrt_graph"
    label = "TensorRT + CUDA graph"
    requires = ("tensorrt", "onnx")
    dtypes = ("float16", "float32")
    captured = True
    order = 13

    def prepare(self, model: torch.nn.Module, example: torch.Tensor, threads: int) -> Run:
        import tensorrt as trt

        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(_onnx.export(model, example)):
            raise Unsupported(f"TensorRT does not parse it: {parser.get_error(0).desc()}")
        plan = builder.build_serialized_network(network, builder.create_builder_config())
        if plan is None:
            raise Unsupported("TensorRT builds no engine for it")
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        context = engine.create_execution_context()
        output = torch.empty_like(model(example), memory_format=torch.contiguous_format)
        source = example.contiguous()
        context.set_tensor_address("x", source.data_ptr())
        context.set_tensor_address("y", output.data_ptr())

        def run(_keep: Any = (engine, source)) -> torch.Tensor:
            # a graph is captured on a stream of its own, so the stream is asked for at every call
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise RuntimeError("TensorRT: execute_async_v3 failed")
            return output

        return run
