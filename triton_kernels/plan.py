"""What a block is made of: its stages as a chain of operations, and the packed parameters of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

K_PAD = 128
N_PAD = 256


@dataclass(frozen=True)
class Op:
    """One kernel's worth of a block.

    kind: "depthwise" | "pointwise" ([depthwise ->] 1x1) | "ffn" ([depthwise ->] 1x1 -> 1x1) | "dense" (k x k [-> 1x1]).
    `kernel`, `stride` belong to the depthwise or the dense convolution (kernel 0: none). `stages` are the native stages
    in order; `c_mid` is 0 where there is one matrix only.
    """

    kind: str
    c_in: int
    c_mid: int
    c_out: int
    kernel: int
    stride: int
    dw_act: str
    mid_act: str
    act: str
    stages: tuple[int, ...]
    residual: bool = False

    def out_hw(self, h: int, w: int) -> tuple[int, int]:
        """Odd kernels give ceil(size / stride) under both paddings."""
        return -(-h // self.stride), -(-w // self.stride)

    @property
    def key(self) -> str:
        """Name for tables: everything that a kernel is compiled for but the tile."""
        acts = "-".join(a for a in (self.dw_act, self.mid_act, self.act))
        mid = f"-{self.c_mid}" if self.c_mid else ""
        return f"{self.kind} {self.c_in}{mid}-{self.c_out} k{self.kernel}s{self.stride} {acts}" + " +x" * self.residual


def chain(native: dict) -> tuple[Op, ...]:
    """The operations of a block given by the keywords of `_core.Block`, nothing fused but depthwise into 1x1."""
    ops: list[Op] = []
    c_in, c_mid, c_out = native["c_in"], native["c_mid"], native["c_out"]
    depthwise: Op | None = None

    def flush() -> None:
        nonlocal depthwise
        if depthwise is not None:
            ops.append(depthwise)
            depthwise = None

    def pointwise(stage: int, n_in: int, n_out: int, act: str) -> None:
        nonlocal depthwise
        d, depthwise = depthwise, None
        ops.append(
            Op("pointwise", n_in, 0, n_out, 0, 1, "none", "none", act, (stage,))
            if d is None
            else Op("pointwise", n_in, 0, n_out, d.kernel, d.stride, d.act, "none", act, (*d.stages, stage))
        )

    def dw(stage: int, c: int, kernel: int, stride: int, act: str) -> Op:
        return Op("depthwise", c, 0, c, kernel, stride, "none", "none", act, (stage,))

    if native["start_kernel"]:
        depthwise = dw(0, c_in, native["start_kernel"], native["start_stride"], native["start_act"])
    if native["expand"]:
        kernel, stride, act = native["expand_kernel"], native["expand_stride"], native["expand_act"]
        if kernel == 1 and stride == 1:
            pointwise(1, c_in, c_mid, act)
        else:
            flush()
            ops.append(Op("dense", c_in, 0, c_mid, kernel, stride, "none", "none", act, (1,)))
    if native["mid_kernel"]:
        flush()
        depthwise = dw(2, c_mid, native["mid_kernel"], native["mid_stride"], native["mid_act"])
    if native["project"]:
        pointwise(3, c_mid, c_out, native["project_act"])
    flush()
    if native["residual"] and ops:
        ops[-1] = replace(ops[-1], residual=True)
    return tuple(ops)


def fused(ops: tuple[Op, ...]) -> tuple[Op, ...] | None:
    """The chain with its last two matrices in one kernel (FFN, ConvNext, FusedIB), or None where they cannot be."""
    if len(ops) < 2:
        return None
    first, last = ops[-2:]
    if last.kind != "pointwise" or last.kernel or first.kind not in ("pointwise", "dense"):
        return None
    kind = "ffn" if first.kind == "pointwise" else "dense"
    joined = replace(
        first, kind=kind, c_mid=first.c_out, c_out=last.c_out, mid_act=first.act, act=last.act,
        stages=first.stages + last.stages, residual=last.residual,
    )  # fmt: skip
    return (*ops[:-2], joined)


def apart(op: Op) -> tuple[Op, ...]:
    """A depthwise convolution and its 1x1 as two kernels: for wide blocks, where one would compute the former again
    for every tile of output channels.
    """
    if op.kind != "pointwise" or not op.kernel:
        return (op,)
    first, second = op.stages
    return (
        Op("depthwise", op.c_in, 0, op.c_in, op.kernel, op.stride, "none", "none", op.dw_act, (first,)),
        Op("pointwise", op.c_in, 0, op.c_out, 0, 1, "none", "none", op.act, (second,), op.residual),
    )


def spread(ops: tuple[Op, ...], paths: Sequence[str]) -> tuple[Op, ...]:
    """The operations that a list of configurations stands for: where "depthwise" comes for a 1x1, the two are apart."""
    out: list[Op] = []
    for op in ops:
        is_apart = op.kind == "pointwise" and len(out) < len(paths) and paths[len(out)] == "depthwise"
        out += apart(op) if is_apart else (op,)
    return tuple(out)


def place(sizes: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Offsets of buffers (bytes, first use, last use), the largest placed first, and the bytes of all."""
    placed: list[tuple[int, int, int, int]] = []
    offsets = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
        size, first, last = sizes[i]
        at = 0
        for start, end, f, last_use in sorted(placed):
            if f <= last and first <= last_use and start < at + size:
                at = max(at, end)
        placed.append((at, at + round_up(size, 256), first, last))
        offsets[i] = at
    return offsets, max((p[1] for p in placed), default=0)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def batch_norm_affine(
    c: int,
    device: object,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    bn_mean: Tensor | None,
    bn_var: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(scale, shift) [c] float64 of a bias and the BatchNorm after it; None: there is none."""
    scale = torch.ones(c, dtype=torch.float64, device=device)
    shift = torch.zeros_like(scale) if bias is None else bias.detach().to(torch.float64)
    if bn_mean is not None and bn_var is not None:
        scale = (bn_var.detach().to(torch.float64) + eps).rsqrt()
        if bn_weight is not None:
            scale = scale * bn_weight.detach().to(torch.float64)
        shift = (shift - bn_mean.detach().to(torch.float64)) * scale
        if bn_bias is not None:
            shift = shift + bn_bias.detach().to(torch.float64)
    return scale, shift


def to_tf32(w: Tensor) -> Tensor:
    """fp32 values to the nearest with 10 bits of fraction, ties away from zero; inf and NaN stay."""
    bits = ((w.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(w.isfinite(), bits, w)


class Packed:
    """Folded parameters of one stage in memory that is filled again in place.

    Depthwise: `taps` [k * k + 1, CP] fp32, the shift last. Otherwise `w` [KP, NP] (rows: (ky, kx, input channel)) and
    `affine` [2, NP] fp32 (scale, shift); zeros beyond the channels.
    """

    def __init__(self, c_out: int, c_in: int, kernel: int, depthwise: bool, dtype: torch.dtype, device: object) -> None:
        self.c_out, self.c_in, self.kernel, self.depthwise, self.dtype = c_out, c_in, kernel, depthwise, dtype
        self.filled = False
        self._tf32: Tensor | None = None
        if depthwise:
            self.cp = round_up(c_out, K_PAD)
            self.taps = torch.zeros(kernel * kernel + 1, self.cp, dtype=torch.float32, device=device)
            self.tensors: tuple[Tensor, ...] = (self.taps,)
        else:
            self.np = round_up(c_out, N_PAD)
            rows = round_up(kernel * kernel * c_in, K_PAD) + (K_PAD if kernel > 1 else 0)
            self.w = torch.zeros(rows, self.np, dtype=dtype, device=device)
            self.affine = torch.zeros(2, self.np, dtype=torch.float32, device=device)
            self.tensors = (self.w, self.affine)

    @torch.no_grad()
    def fill(
        self,
        weight: Tensor,
        bias: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        bn_mean: Tensor | None,
        bn_var: Tensor | None,
        eps: float,
        gamma: Tensor | None,
    ) -> None:
        """Folds in float64. In 16 bits a matrix stays as it is; scale and shift go to the epilogue in fp32."""
        c, c_in, k = self.c_out, self.c_in, self.kernel
        w = weight.detach().to(torch.float64).reshape(c, 1 if self.depthwise else c_in, k, k)
        scale, shift = batch_norm_affine(c, w.device, bias, bn_weight, bn_bias, bn_mean, bn_var, eps)
        if gamma is not None:
            scale, shift = scale * gamma.detach().to(torch.float64), shift * gamma.detach().to(torch.float64)
        if self.depthwise:
            self.taps[: k * k, :c].copy_((w.reshape(c, k * k) * scale[:, None]).t())
            self.taps[k * k, :c].copy_(shift)
        else:
            if self.dtype == torch.float32:
                w, scale = w * scale[:, None, None, None], torch.ones_like(scale)
            self.w[: k * k * c_in, :c].copy_(w.permute(2, 3, 1, 0).reshape(k * k * c_in, c))
            self.affine[0, :c].copy_(scale)
            self.affine[1, :c].copy_(shift)
            self.settle()
        self.filled = True

    def matrix(self, precision: str) -> Tensor:
        """`w` for products of "ieee" or "tf32"; the latter rounded, in memory of its own that later fills write too."""
        if precision != "tf32":
            return self.w
        if self._tf32 is None:
            self._tf32 = torch.empty_like(self.w)
            self.settle()
        return self._tf32

    @torch.no_grad()
    def settle(self) -> None:
        """Brings the rounded matrix, if there is one, up to date with `w`."""
        if self._tf32 is not None:
            self._tf32.copy_(to_tf32(self.w))

    @property
    def bytes(self) -> int:
        held = self.tensors if self._tf32 is None else (*self.tensors, self._tf32)
        return sum(t.numel() * t.element_size() for t in held)
