"""ncnn on the CPU, converted by pnnx. It has no batch: images run one after the other."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnv4_ops.bench.peers.base import Peer, Run, Unsupported


class Ncnn(Peer):
    name = "ncnn"
    label = "ncnn"
    requires = ("ncnn", "pnnx")
    install = "pip install 'mnv4-ops[ncnn]'"
    order = 74

    def prepare(self, model: torch.nn.Module, example: torch.Tensor, threads: int) -> Run:
        import ncnn
        import pnnx

        net = ncnn.Net()
        net.opt.num_threads = threads
        net.opt.use_vulkan_compute = False
        # fp32 throughout, like everyone in the table
        for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
            setattr(net.opt, option, False)
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "model"
            names = {
                f"{kind}{part}": str(base.with_suffix(f".{kind}.{part}"))
                for kind in ("pnnx", "ncnn")
                for part in ("param", "bin")
            }
            extra = {"pnnxpy": str(base) + "_pnnx.py", "ncnnpy": str(base) + "_ncnn.py"}
            extra["pnnxonnx"] = str(base) + ".onnx"
            # it also writes and imports Python code, which is none where children of a module are called "0"
            with contextlib.suppress(SyntaxError):
                file = str(base.with_suffix(".pt"))
                pnnx.export(model, file, inputs=example[:1], check_trace=False, fp16=False, **names, **extra)
            if not Path(names["ncnnparam"]).is_file():
                raise Unsupported("pnnx converts it to no ncnn model")
            if net.load_param(names["ncnnparam"]) or net.load_model(names["ncnnbin"]):
                raise Unsupported("ncnn does not load what pnnx made of it")
        images = [ncnn.Mat(image.contiguous().numpy()).clone() for image in example]

        def run(_keep: Any = (net, images)) -> Any:
            outputs = []
            for image in images:
                extractor = net.create_extractor()
                extractor.input("in0", image)
                status, output = extractor.extract("out0")
                if status:
                    raise RuntimeError(f"ncnn: extract returned {status}")
                outputs.append(np.array(output))
            return np.stack(outputs)

        return run
