"""One ONNX export shared by the peers that read it."""

from __future__ import annotations

import io
import warnings
import weakref
from typing import Any

import torch

_exports: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[int, ...], bytes]] = weakref.WeakKeyDictionary()


def export(model: torch.nn.Module, example: torch.Tensor) -> bytes:
    """The model as ONNX bytes, static shapes, input `x`, output `y`. Kept while the model lives."""
    per_model = _exports.setdefault(model, {})
    key = tuple(example.shape)
    if key not in per_model:
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # the TorchScript exporter is several times faster than the dynamo one and gives the same graphs for these
            # models
            # the TorchScript exporter takes a buffer too, though its type says path
            export_to: Any = torch.onnx.export
            export_to(model, (example,), buffer, dynamo=False, opset_version=17, input_names=["x"], output_names=["y"])
        per_model[key] = buffer.getvalue()
    return per_model[key]
