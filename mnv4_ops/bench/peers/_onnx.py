"""One ONNX export shared by the peers that read it."""

from __future__ import annotations

import io
import warnings
import weakref
from typing import Any

import torch

from mnv4_ops.bench.peers.base import arguments_of

_exports: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[int, ...], bytes]] = weakref.WeakKeyDictionary()


def input_names(example: Any) -> list[str]:
    return ["x", *(f"x{index}" for index in range(1, len(arguments_of(example))))]


def export(model: torch.nn.Module, example: Any) -> bytes:
    """The model as ONNX bytes, static shapes, inputs `x`, `x1`, ..., output `y`. Kept while the model lives."""
    per_model = _exports.setdefault(model, {})
    inputs = arguments_of(example)
    key = tuple(size for x in inputs for size in x.shape)
    if key not in per_model:
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # several times faster than the dynamo exporter, with the same graphs; takes a buffer, unlike its type says
            export_to: Any = torch.onnx.export
            names = input_names(example)
            export_to(model, inputs, buffer, dynamo=False, opset_version=17, input_names=names, output_names=["y"])
        per_model[key] = buffer.getvalue()
    return per_model[key]
