"""mnv4_ops itself, as a user runs it: `enable(model)`, then the model is called."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from mnv4_ops import _native
from mnv4_ops.bench.peers.base import Peer


class Fused(Peer):
    name = "mnv4_ops"
    label = "mnv4_ops"

    def available(self) -> str | None:
        return None if _native.core is not None else f"no native library: {_native.reason}"

    def prepare(self, model: torch.nn.Module, example: torch.Tensor, threads: int) -> Callable[[], Any]:
        import mnv4_ops

        torch.set_num_threads(threads)
        model = copy.deepcopy(model)
        mnv4_ops.enable(model)
        return functools.partial(model, example)
