"""Frozen descriptions of MobileNetV4 blocks, and the ledger of all blocks of all models. No torch, no timm here.

One spec drives everything: adapters produce it, ops take it apart into arguments, tests and benchmarks iterate over the
ledger. `macs` counts multiply-accumulates of convolutions, linear layers and attention products per image (the rest
counts 0); `params` counts learnable parameters (BN affine and layer scale, not BN statistics).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .reference.definitions import MODELS, VARIANTS

if TYPE_CHECKING:
    from .reference.ledger import LedgerEntry, head_spec, ledger, model_specs, standard_resolution

__all__ = [
    "ACTS",
    "MODELS",
    "PADDINGS",
    "VARIANTS",
    "BlockSpec",
    "ConvSpec",
    "FusedIBSpec",
    "HeadSpec",
    "LedgerEntry",
    "LinearSpec",
    "MQASpec",
    "PoolSpec",
    "Spec",
    "UIBSpec",
    "head_spec",
    "ledger",
    "model_specs",
    "pad_before_after",
    "standard_resolution",
]

ACTS = ("none", "relu", "relu6", "gelu")
PADDINGS = ("symmetric", "same")
ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

_S = TypeVar("_S", bound="Spec")


def pad_before_after(size: int, kernel: int, stride: int, padding: str) -> tuple[int, int]:
    """Zeros before and after one spatial side of `size` pixels.

    "symmetric" is k//2 on both sides (timm); "same" is TF SAME: what ceil(size/stride) outputs need, an odd one after.
    """
    if padding == "symmetric":
        return kernel // 2, kernel // 2
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _strided(h: int, w: int, stride: int) -> tuple[int, int]:
    # odd kernels give ceil(size / stride) under both paddings
    return -(-h // stride), -(-w // stride)


class _Part(NamedTuple):
    """One layer of a block: output pixels, weight elements, channels that carry a BN (or a bias)."""

    pixels: int
    weights: int
    shifts: int


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What every spec has: three element types (input and weights, arithmetic, output), counts and shapes.

    `h`, `w` are input rows and columns in pixels. All geometry is validated on construction (TypeError, ValueError).
    """

    dtype: str = "float32"
    compute_dtype: str = "float32"
    out_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("dtype", "compute_dtype", "out_dtype"):
            self._one_of(name, tuple(ITEMSIZE))
        self._validate()

    def with_dtype(self: _S, dtype: str, *, compute_dtype: str | None = None, out_dtype: str | None = None) -> _S:
        """The same block in another element type; arithmetic is float32 (float64 for float64) unless given."""
        compute = compute_dtype or ("float64" if dtype == "float64" else "float32")
        return replace(self, dtype=dtype, compute_dtype=compute, out_dtype=out_dtype or dtype)

    @property
    def kind(self) -> str:
        """Short name of the instantiation, as in the paper's tables."""
        raise NotImplementedError

    @property
    def channels(self) -> tuple[int, int]:
        """Input and output channels."""
        raise NotImplementedError

    def out_hw(self, h: int, w: int) -> tuple[int, int]:
        """Output rows and columns for an input of h x w pixels."""
        raise NotImplementedError

    def macs(self, h: int, w: int) -> int:
        """Multiply-accumulates for one image of h x w pixels at the input of the block."""
        _check_hw(self, h, w)
        return sum(part.pixels * part.weights for part in self._parts(h, w))

    def weights(self) -> int:
        """Elements of the convolution and linear weights, without bias and BN."""
        return sum(part.weights for part in self._parts(1, 1))

    def biases(self) -> int:
        """Shifts that remain after BN is folded: one per channel of each BN, and real biases."""
        return sum(part.shifts for part in self._parts(1, 1))

    def params(self) -> int:
        """Learnable parameters: weights, BN affine, layer scale, classifier bias."""
        scale = self.channels[1] if getattr(self, "layer_scale", False) else 0
        return self.weights() + 2 * self.biases() + scale

    def bytes(self, h: int, w: int, batch: int = 1) -> int:
        """Bytes moved by one fused call: input and weights read once, output written once; folded shifts in fp32."""
        _check_hw(self, h, w)
        c_in, c_out = self.channels
        ho, wo = self.out_hw(h, w)
        weights = self.weights() * ITEMSIZE[self.dtype] + self.biases() * 4
        return batch * (c_in * h * w * ITEMSIZE[self.dtype] + c_out * ho * wo * ITEMSIZE[self.out_dtype]) + weights

    def _parts(self, h: int, w: int) -> Iterator[_Part]:
        raise NotImplementedError

    def _validate(self) -> None:
        raise NotImplementedError

    def _fail(self, name: str, expected: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: expected {name} {expected}, got {getattr(self, name)!r}")

    def _one_of(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        # True == 1, so the type is compared as well
        if not any(type(value) is type(a) and value == a for a in allowed):
            raise self._fail(name, "in {" + ", ".join(str(a) for a in allowed) + "}")

    def _at_least(self, low: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if type(value) is not int:
                raise TypeError(f"{type(self).__name__}: expected {name} to be an int, got {value!r}")
            if value < low:
                raise self._fail(name, f">= {low}")

    def _flags(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if type(value) is not bool:
                raise TypeError(f"{type(self).__name__}: expected {name} to be a bool, got {value!r}")


def _check_hw(spec: Spec, h: int, w: int) -> None:
    if h < 1 or w < 1:
        raise ValueError(f"{type(spec).__name__}: expected an input of at least 1 x 1 pixels, got {h} x {w}")


class _Strided(Spec):
    """Blocks with c_in, c_out, stride, act and padding: shapes and the checks they share."""

    c_in: int
    c_out: int
    stride: int

    @property
    def channels(self) -> tuple[int, int]:
        return self.c_in, self.c_out

    def out_hw(self, h: int, w: int) -> tuple[int, int]:
        return _strided(h, w, self.stride)

    def _check_common(self) -> None:
        self._at_least(1, "c_in", "c_out")
        self._one_of("stride", (1, 2))
        self._one_of("act", ACTS)
        self._one_of("padding", PADDINGS)

    def _check_residual(self, residual: bool) -> None:
        self._flags("residual")
        if residual and (self.stride != 1 or self.c_in != self.c_out):
            raise ValueError(
                f"{type(self).__name__}: residual expected stride 1 and c_in == c_out, "
                f"got stride {self.stride}, c_in {self.c_in}, c_out {self.c_out}"
            )


@dataclass(frozen=True)
class UIBSpec(_Strided):
    """Universal Inverted Bottleneck (paper section 3.1; timm `UniversalInvertedResidual`).

    [DW start + BN] -> 1x1 expand + BN + act -> [DW mid + BN + act] -> 1x1 project + BN -> [layer scale] -> [+ x].
    Input [N, c_in, h, w], output [N, c_out, ceil(h/stride), ceil(w/stride)]. `start_kernel`, `mid_kernel` in {0, 3, 5},
    0 means absent; the stride sits on the mid depthwise if there is one, else on the start depthwise (no act there).
    """

    c_in: int
    c_mid: int
    c_out: int
    start_kernel: int = 0
    mid_kernel: int = 0
    stride: int = 1
    act: str = "relu"
    padding: str = "symmetric"
    residual: bool = False
    layer_scale: bool = False

    def _validate(self) -> None:
        self._check_common()
        self._at_least(1, "c_mid")
        self._one_of("start_kernel", (0, 3, 5))
        self._one_of("mid_kernel", (0, 3, 5))
        self._flags("layer_scale")
        if self.stride == 2 and not (self.start_kernel or self.mid_kernel):
            raise self._fail("stride", "1 without a depthwise convolution (start_kernel = mid_kernel = 0)")
        self._check_residual(self.residual)

    @property
    def kind(self) -> str:
        """ExtraDW, ConvNext, IB or FFN."""
        if self.start_kernel:
            return "ExtraDW" if self.mid_kernel else "ConvNext"
        return "IB" if self.mid_kernel else "FFN"

    @property
    def start_stride(self) -> int:
        return self.stride if self.start_kernel and not self.mid_kernel else 1

    @property
    def mid_stride(self) -> int:
        return self.stride if self.mid_kernel else 1

    def _parts(self, h: int, w: int) -> Iterator[_Part]:
        hs, ws = _strided(h, w, self.start_stride)
        ho, wo = self.out_hw(h, w)
        if self.start_kernel:
            yield _Part(hs * ws, self.c_in * self.start_kernel**2, self.c_in)
        yield _Part(hs * ws, self.c_in * self.c_mid, self.c_mid)
        if self.mid_kernel:
            yield _Part(ho * wo, self.c_mid * self.mid_kernel**2, self.c_mid)
        yield _Part(ho * wo, self.c_mid * self.c_out, self.c_out)


@dataclass(frozen=True)
class FusedIBSpec(_Strided):
    """Fused inverted bottleneck (timm `EdgeResidual`): dense k x k expand + BN + act -> 1x1 project + BN -> [+ x].

    Input [N, c_in, h, w], output [N, c_out, ceil(h/stride), ceil(w/stride)].
    """

    c_in: int
    c_mid: int
    c_out: int
    kernel: int = 3
    stride: int = 1
    act: str = "relu"
    padding: str = "symmetric"
    residual: bool = False

    def _validate(self) -> None:
        self._check_common()
        self._at_least(1, "c_mid")
        self._one_of("kernel", (1, 3, 5, 7))
        self._check_residual(self.residual)

    @property
    def kind(self) -> str:
        return "FusedIB"

    def _parts(self, h: int, w: int) -> Iterator[_Part]:
        ho, wo = self.out_hw(h, w)
        yield _Part(ho * wo, self.c_mid * self.c_in * self.kernel**2, self.c_mid)
        yield _Part(ho * wo, self.c_mid * self.c_out, self.c_out)


@dataclass(frozen=True)
class ConvSpec(_Strided):
    """Convolution + BN + act (timm `ConvBnAct`, `ConvNormAct`, the stem): dense, or depthwise with c_in == c_out.

    Input [N, c_in, h, w], output [N, c_out, ceil(h/stride), ceil(w/stride)].
    """

    c_in: int
    c_out: int
    kernel: int = 1
    stride: int = 1
    act: str = "relu"
    padding: str = "symmetric"
    depthwise: bool = False

    def _validate(self) -> None:
        self._check_common()
        self._one_of("kernel", (1, 3, 5, 7))
        self._flags("depthwise")
        if self.depthwise and self.c_in != self.c_out:
            raise self._fail("c_out", f"== c_in == {self.c_in} for a depthwise convolution")

    @property
    def kind(self) -> str:
        """Conv3x3, Conv1x1, DW5x5 ..."""
        return f"{'DW' if self.depthwise else 'Conv'}{self.kernel}x{self.kernel}"

    def _parts(self, h: int, w: int) -> Iterator[_Part]:
        ho, wo = self.out_hw(h, w)
        yield _Part(ho * wo, self.c_out * (1 if self.depthwise else self.c_in) * self.kernel**2, self.c_out)


@dataclass(frozen=True)
class MQASpec(Spec):
    """Mobile multi-query attention block (paper section 3.2; timm `MobileAttention` with `MultiQueryAttention2d`).

    BN (pre-norm, shortcut taken before it) -> attention of `heads` query heads to one key and one value head
    -> [layer scale] -> [+ x]. K and V each: [DW kv_kernel stride kv_stride + BN] (only if kv_stride > 1) -> 1x1.
    Q: [average pool query_stride + BN] -> 1x1, undone by bilinear up-sampling (align_corners=False) before the 1x1 out.
    Without `norm` it is the attention alone (timm `MultiQueryAttention2d`). No biases. Input and output [N, c, h, w];
    with query_stride s and symmetric padding the output is [N, c, h//s*s, w//s*s], so that a residual needs h and w
    divisible by s.
    """

    c: int
    heads: int
    key_dim: int
    value_dim: int
    kv_stride: int = 1
    query_stride: int = 1
    kv_kernel: int = 3
    residual: bool = True
    layer_scale: bool = False
    padding: str = "symmetric"
    norm: bool = True

    def _validate(self) -> None:
        self._at_least(1, "c", "heads", "key_dim", "value_dim")
        self._one_of("kv_stride", (1, 2))
        self._one_of("query_stride", (1, 2))
        self._one_of("kv_kernel", (3, 5))
        self._flags("residual", "layer_scale", "norm")
        self._one_of("padding", PADDINGS)

    @property
    def kind(self) -> str:
        return "MQA"

    @property
    def channels(self) -> tuple[int, int]:
        return self.c, self.c

    def query_hw(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of queries."""
        if self.padding == "same":
            return _strided(h, w, self.query_stride)
        return h // self.query_stride, w // self.query_stride

    def kv_hw(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of keys and values."""
        return _strided(h, w, self.kv_stride)

    def out_hw(self, h: int, w: int) -> tuple[int, int]:
        hq, wq = self.query_hw(h, w)
        return hq * self.query_stride, wq * self.query_stride

    def macs(self, h: int, w: int) -> int:
        """Projections, depthwise, and the two attention products (queries x keys x heads x (key_dim + value_dim))."""
        (hq, wq), (hk, wk) = self.query_hw(h, w), self.kv_hw(h, w)
        return super().macs(h, w) + hq * wq * hk * wk * self.heads * (self.key_dim + self.value_dim)

    def _parts(self, h: int, w: int) -> Iterator[_Part]:
        (hq, wq), (hk, wk), (ho, wo) = self.query_hw(h, w), self.kv_hw(h, w), self.out_hw(h, w)
        if self.norm:
            yield _Part(0, 0, self.c)
        if self.query_stride > 1:
            yield _Part(0, 0, self.c)
        yield _Part(hq * wq, self.c * self.heads * self.key_dim, 0)
        for dim in (self.key_dim, self.value_dim):
            if self.kv_stride > 1:
                yield _Part(hk * wk, self.c * self.kv_kernel**2, self.c)
            yield _Part(hk * wk, self.c * dim, 0)
        yield _Part(ho * wo, self.heads * self.value_dim * self.c, 0)


@dataclass(frozen=True)
class PoolSpec(Spec):
    """Global average pool: [N, c, h, w] -> [N, c, 1, 1]."""

    c: int

    def _validate(self) -> None:
        self._at_least(1, "c")

    @property
    def kind(self) -> str:
        return "AvgPool"

    @property
    def channels(self) -> tuple[int, int]:
        return self.c, self.c

    def out_hw(self, h: int, w: int) -> tuple[int, int]:
        return 1, 1

    def _parts(self, h: int, w: int) -> Iterator[_Part]:
        return iter(())


@dataclass(frozen=True)
class LinearSpec(Spec):
    """Classifier: [N, c_in] -> [N, c_out], with bias; `h` and `w` of the counts are 1."""

    c_in: int
    c_out: int

    def _validate(self) -> None:
        self._at_least(1, "c_in", "c_out")

    @property
    def kind(self) -> str:
        return "Linear"

    @property
    def channels(self) -> tuple[int, int]:
        return self.c_in, self.c_out

    def out_hw(self, h: int, w: int) -> tuple[int, int]:
        return 1, 1

    def params(self) -> int:
        return self.weights() + self.c_out

    def _parts(self, h: int, w: int) -> Iterator[_Part]:
        yield _Part(1, self.c_in * self.c_out, self.c_out)


@dataclass(frozen=True)
class HeadSpec(Spec):
    """The end of a model as one unit: 1x1 + BN + act -> global average pool -> 1x1 + BN + act -> linear with bias.

    Every stage but the pool is optional: c_feat, c_hidden or classes 0 leaves it out. Input [N, c_in, h, w], output
    [N, features].
    """

    c_in: int
    c_feat: int
    c_hidden: int
    classes: int
    act: str = "relu"

    def _validate(self) -> None:
        self._at_least(1, "c_in")
        self._at_least(0, "c_feat", "c_hidden", "classes")
        self._one_of("act", ACTS)

    @property
    def kind(self) -> str:
        return "Head"

    @property
    def features(self) -> int:
        """Width of the output."""
        return self.classes or self.c_hidden or self.c_feat or self.c_in

    @property
    def channels(self) -> tuple[int, int]:
        return self.c_in, self.features

    def out_hw(self, h: int, w: int) -> tuple[int, int]:
        return 1, 1

    def params(self) -> int:
        # the classifier has a bias and no BN
        return super().params() - self.classes

    def _parts(self, h: int, w: int) -> Iterator[_Part]:
        c = self.c_in
        for pixels, width in ((h * w, self.c_feat), (1, self.c_hidden), (1, self.classes)):
            if width:
                yield _Part(pixels, c * width, width)
                c = width


BlockSpec = UIBSpec | FusedIBSpec | ConvSpec | MQASpec

_LEDGER = ("LedgerEntry", "head_spec", "ledger", "model_specs", "standard_resolution")


def __getattr__(name: str) -> Any:
    # lazy, because the ledger is made of the classes above
    if name in _LEDGER:
        return getattr(importlib.import_module("mnv4_ops.reference.ledger"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
