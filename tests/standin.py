"""A backend with the interface of mnv4_ops.triton_kernels, of plain torch operations: the GPU path without a GPU."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnv4_ops import graphs
from mnv4_ops.ops import backends, cuda, layout
from mnv4_ops.reference import functional as R

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAMES = ("weight", "bias", "bn_weight", "bn_bias", "bn_mean", "bn_var")
calls: list[tuple[str, bool]] = []  # (class, allow_tf32) of every run


def _pad(x: Tensor, kernel: int, stride: int, padding: str) -> Tensor:
    if padding == "symmetric":
        return F.pad(x, (kernel // 2,) * 4)
    pads: list[int] = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class _Runner:
    refuse: tuple[str, ...] = ()  # keywords that have no kernel

    def __init__(self, dtype: torch.dtype, device: Any, native: dict[str, Any]) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"{type(self).__name__}: expected dtype to be one of {DTYPES}, got {dtype}")
        for name in self.refuse:
            if native.get(name):
                raise ValueError(f"{type(self).__name__}: {name} has no kernel")
        self.dtype, self.device, self.native = dtype, torch.device(device), native
        self.packed: dict[int, dict[str, Tensor]] = {}
        self.packs = 0

    def pack(
        self, stage: int, weight: Tensor, bias: Any = None, bn_weight: Any = None, bn_bias: Any = None,
        bn_mean: Any = None, bn_var: Any = None, eps: float = 0.0, gamma: Any = None,
    ) -> None:  # fmt: skip
        like = bn_mean if weight is None else weight
        assert like.device == self.device
        self.packs += 1
        c = like.shape[0]
        scale, shift = torch.ones(c, dtype=torch.float64), torch.zeros(c, dtype=torch.float64)
        if bias is not None:
            shift = bias.double()
        if bn_mean is not None:
            scale = (bn_var.double() + eps).rsqrt() * (1 if bn_weight is None else bn_weight.double())
            shift = (shift - bn_mean.double()) * scale + (0 if bn_bias is None else bn_bias.double())
        if gamma is not None:
            scale, shift = scale * gamma.double(), shift * gamma.double()
        new = {"scale": scale.float(), "shift": shift.float()}
        if weight is not None:
            new["weight"] = weight.float()
        old = self.packed.setdefault(stage, {name: t.clone() for name, t in new.items()})
        for name, t in new.items():
            old[name].copy_(t)

    @property
    def packed_bytes(self) -> int:
        return sum(t.nbytes for stage in self.packed.values() for t in stage.values())

    def _stage(self, x: Tensor, stage: int, kernel: int, stride: int, act: str, depthwise: bool = False) -> Tensor:
        p = self.packed[stage]
        weight = p["weight"].reshape(p["weight"].shape[0], -1, kernel, kernel)
        x = _pad(x, kernel, stride, self.native.get("padding", "symmetric"))
        x = F.conv2d(x, weight, None, stride, groups=x.shape[1] if depthwise else 1)
        x = self._affine(x, stage)
        return {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6, "gelu": F.gelu}[act](x)

    def _affine(self, x: Tensor, stage: int) -> Tensor:
        p = self.packed[stage]
        return x * p["scale"].view(-1, 1, 1) + p["shift"].view(-1, 1, 1)

    def _write(self, x: Tensor, y: Tensor, out: Tensor, allow_tf32: bool) -> None:
        assert x.dtype == out.dtype == self.dtype
        assert out.shape == y.shape
        assert out.dim() == 2 or out.stride() == (
            y.shape[2] * y.shape[3] * y.shape[1], 1, y.shape[3] * y.shape[1], y.shape[1],
        )  # fmt: skip
        calls.append((type(self).__name__, allow_tf32))
        with torch.no_grad():
            out.copy_(y)


class Block(_Runner):
    def __init__(self, *, dtype: torch.dtype, device: Any, **native: Any) -> None:
        super().__init__(dtype, device, native)

    def run(self, x: Tensor, out: Tensor, *, allow_tf32: bool = False) -> None:
        n, y = self.native, x.detach().float()
        if n.get("start_kernel"):
            y = self._stage(y, 0, n["start_kernel"], n["start_stride"], n.get("start_act", "none"), True)
        if n.get("expand"):
            y = self._stage(y, 1, n.get("expand_kernel", 1), n.get("expand_stride", 1), n["expand_act"])
        if n.get("mid_kernel"):
            y = self._stage(y, 2, n["mid_kernel"], n["mid_stride"], n["mid_act"], True)
        if n.get("project"):
            y = self._stage(y, 3, 1, 1, n.get("project_act", "none"))
        self._write(x, y + x.float() if n.get("residual") else y, out, allow_tf32)


class Head(_Runner):
    def __init__(self, *, dtype: torch.dtype, device: Any, **native: Any) -> None:
        super().__init__(dtype, device, native)

    def run(self, x: Tensor, out: Tensor, *, allow_tf32: bool = False) -> None:
        n, y = self.native, x.detach().float()
        if n["c_feat"]:
            y = self._stage(y, 0, 1, 1, n["feat_act"])
        y = y.mean((2, 3), keepdim=True)
        if n["c_hidden"]:
            y = self._stage(y, 1, 1, 1, n["hidden_act"])
        if n["classes"]:
            y = self._stage(y, 2, 1, 1, "none")
        self._write(x, y.flatten(1), out, allow_tf32)


class MobileMQA(_Runner):
    def __init__(self, *, dtype: torch.dtype, device: Any, **native: Any) -> None:
        super().__init__(dtype, device, native)

    def run(self, x: Tensor, out: Tensor, *, allow_tf32: bool = False) -> None:
        n, y = self.native, x.detach().float()
        if n["norm"]:
            y = self._affine(y, 0)
        q = R.query_pool(y, n["query_stride"], n["padding"]) if n["query_stride"] > 1 else y
        q = self._stage(self._affine(q, 1) if n["query_norm"] else q, 2, 1, 1, "none")
        down = n["kv_stride"] > 1
        k, v = (self._stage(y, i, n["kv_kernel"], n["kv_stride"], "none", True) if down else y for i in (3, 5))
        y = R.attention(q, self._stage(k, 4, 1, 1, "none"), self._stage(v, 6, 1, 1, "none"), n["heads"])
        y = self._stage(y, 7, 1, 1, "none")
        if n["query_stride"] > 1:
            y = R.query_unpool(y, n["query_stride"])
        self._write(x, y + x.float() if n["residual"] else y, out, allow_tf32)


class Graph:
    """Replays by running the blocks again, as a graph reads the packed weights of the moment."""

    def __init__(self, program: Any, x: Tensor, out: Tensor) -> None:
        self.program, self.x, self.out, self.replays = program, x, out, 0

    def replay(self) -> None:
        self.replays += 1
        self.out.copy_(self.program.run(self.x))


class Device:
    """In the place of graphs._Device."""

    fails = False

    def __init__(self, device: torch.device) -> None:
        self.captures = 0

    def empty(self) -> None:
        self.emptied = getattr(self, "emptied", 0) + 1

    def begin(self) -> Any:
        return None

    def end(self, stream: Any) -> None:
        pass

    def capture(self, program: Any, x: Tensor) -> tuple[Any, Tensor]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captures += 1
        out = program.run(x).clone()
        return Graph(program, x, out), out


@contextmanager
def serving_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The GPU path, with this module's kernels, for tensors on the CPU."""
    with monkeypatch.context() as patch:
        patch.setitem(backends.BY_DEVICE, "cpu", cuda)
        patch.setitem(layout.DTYPES, "cpu", DTYPES)
        patch.setattr(cuda, "unavailable", lambda: None)
        patch.setattr(cuda, "kernels", lambda: types.SimpleNamespace(Block=Block, Head=Head, MobileMQA=MobileMQA))
        patch.setattr(graphs, "_usable", lambda x: x.shape[0] > 0)
        patch.setattr(graphs, "_open", Device)
        patch.setattr(graphs, "_pools", {})
        calls.clear()
        yield patch
