"""LiteRT (TensorFlow Lite's successor) with its XNNPACK delegate, converted by litert-torch with NHWC at the edges."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import torch

from mnv4_ops.bench.peers.base import Peer, Run


class LiteRt(Peer):
    name = "litert"
    label = "LiteRT"
    requires = ("ai_edge_litert", "litert_torch")
    install = "pip install 'mnv4-ops[litert]'"
    order = 72
    slow = True

    def prepare(self, model: torch.nn.Module, example: torch.Tensor, threads: int) -> Run:
        import litert_torch
        from ai_edge_litert.interpreter import Interpreter

        with torch.inference_mode(False), torch.no_grad():
            shaped = model(example).dim() == 4
            wrapped = litert_torch.to_channel_last_io(model, args=[0], outputs=[0] if shaped else [])
            nhwc = example.clone().permute(0, 2, 3, 1).contiguous()
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                file = Path(folder) / "model.tflite"
                litert_torch.convert(wrapped.eval(), (nhwc,)).export(str(file))
                content = file.read_bytes()
        interpreter = Interpreter(model_content=content, num_threads=threads)
        interpreter.allocate_tensors()
        (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
        # input and output stay in the interpreter's own memory: the call is `invoke` alone
        interpreter.set_tensor(source["index"], nhwc.numpy())
        index = target["index"]

        def run(_keep: Any = content) -> Any:
            interpreter.invoke()
            return _Output(interpreter, index, shaped)

        return run


class _Output:
    """Read on demand, so that copying it out is not part of the call."""

    def __init__(self, interpreter: Any, index: int, nhwc: bool) -> None:
        self.interpreter, self.index, self.nhwc = interpreter, index, nhwc

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        array = self.interpreter.get_tensor(self.index)
        return array.transpose(0, 3, 1, 2) if self.nhwc else array
