"""Block lists of the MobileNetV4 models: the one place where they are written down. No torch here.

Source: timm `_gen_mobilenet_v4` (1.0.31), which agrees with TF Model Garden `mobilenet.py`; Hybrid-M follows the code,
not the paper's table 13 (public weights do too). The ledger and the reference models are both generated from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

HIDDEN = 1280  # width of conv_head; not scaled by the width multiplier


class Row(NamedTuple):
    """One block before width scaling. `op` is conv, fused_ib, uib or mqa; fields an op has no use for stay 0."""

    op: str
    c_out: int
    kernel: int = 0
    stride: int = 1
    ratio: int = 1
    start: int = 0
    mid: int = 0
    heads: int = 0
    head_dim: int = 0
    kv_stride: int = 1


Stage = tuple[Row, ...]


def _conv(kernel: int, c_out: int, stride: int = 1) -> Row:
    return Row("conv", c_out, kernel=kernel, stride=stride)


def _fused(ratio: int, c_out: int) -> Row:
    return Row("fused_ib", c_out, kernel=3, stride=2, ratio=ratio)


def _uib(start: int, mid: int, ratio: int, c_out: int, stride: int = 1) -> Row:
    return Row("uib", c_out, stride=stride, ratio=ratio, start=start, mid=mid)


def _mqa(heads: int, head_dim: int, c_out: int, kv_stride: int = 1) -> Row:
    return Row("mqa", c_out, kernel=3, heads=heads, head_dim=head_dim, kv_stride=kv_stride)


_CONV_SMALL: tuple[Stage, ...] = (
    (_conv(3, 32, stride=2), _conv(1, 32)),
    (_conv(3, 96, stride=2), _conv(1, 64)),
    (_uib(5, 5, 3, 96, stride=2), *[_uib(0, 3, 2, 96)] * 4, _uib(3, 0, 4, 96)),
    (
        _uib(3, 3, 6, 128, stride=2),
        _uib(5, 5, 4, 128),
        _uib(0, 5, 4, 128),
        _uib(0, 5, 3, 128),
        *[_uib(0, 3, 4, 128)] * 2,
    ),
    (_conv(1, 960),),
)

_CONV_MEDIUM: tuple[Stage, ...] = (
    (_fused(4, 48),),
    (_uib(3, 5, 4, 80, stride=2), _uib(3, 3, 2, 80)),
    (
        _uib(3, 5, 6, 160, stride=2),
        *[_uib(3, 3, 4, 160)] * 2,
        _uib(3, 5, 4, 160),
        _uib(3, 3, 4, 160),
        _uib(3, 0, 4, 160),
        _uib(0, 0, 2, 160),
        _uib(3, 0, 4, 160),
    ),
    (
        _uib(5, 5, 6, 256, stride=2),
        _uib(5, 5, 4, 256),
        *[_uib(3, 5, 4, 256)] * 2,
        _uib(0, 0, 4, 256),
        _uib(3, 0, 4, 256),
        _uib(3, 5, 2, 256),
        _uib(5, 5, 4, 256),
        *[_uib(0, 0, 4, 256)] * 2,
        _uib(5, 0, 2, 256),
    ),
    (_conv(1, 960),),
)

_CONV_LARGE: tuple[Stage, ...] = (
    (_fused(4, 48),),
    (_uib(3, 5, 4, 96, stride=2), _uib(3, 3, 4, 96)),
    (
        _uib(3, 5, 4, 192, stride=2),
        *[_uib(3, 3, 4, 192)] * 3,
        _uib(3, 5, 4, 192),
        *[_uib(5, 3, 4, 192)] * 5,
        _uib(3, 0, 4, 192),
    ),
    (
        _uib(5, 5, 4, 512, stride=2),
        *[_uib(5, 5, 4, 512)] * 3,
        _uib(5, 0, 4, 512),
        _uib(5, 3, 4, 512),
        *[_uib(5, 0, 4, 512)] * 2,
        _uib(5, 3, 4, 512),
        _uib(5, 5, 4, 512),
        *[_uib(5, 0, 4, 512)] * 3,
    ),
    (_conv(1, 960),),
)

_HYBRID_MEDIUM: tuple[Stage, ...] = (
    (_fused(4, 48),),
    (_uib(3, 5, 4, 80, stride=2), _uib(3, 3, 2, 80)),
    (
        _uib(3, 5, 6, 160, stride=2),
        _uib(0, 0, 2, 160),
        _uib(3, 3, 4, 160),
        _uib(3, 5, 4, 160),
        *[_mqa(4, 64, 160, kv_stride=2), _uib(3, 3, 4, 160), _mqa(4, 64, 160, kv_stride=2), _uib(3, 0, 4, 160)] * 2,
    ),
    (
        _uib(5, 5, 6, 256, stride=2),
        _uib(5, 5, 4, 256),
        *[_uib(3, 5, 4, 256)] * 2,
        _uib(0, 0, 2, 256),
        _uib(3, 5, 2, 256),
        _uib(0, 0, 2, 256),
        _uib(0, 0, 4, 256),
        _mqa(4, 64, 256),
        _uib(3, 0, 4, 256),
        _mqa(4, 64, 256),
        _uib(5, 5, 4, 256),
        *[_mqa(4, 64, 256), _uib(5, 0, 4, 256)] * 2,
    ),
    (_conv(1, 960),),
)

_HYBRID_LARGE: tuple[Stage, ...] = (
    (_fused(4, 48),),
    (_uib(3, 5, 4, 96, stride=2), _uib(3, 3, 4, 96)),
    (
        _uib(3, 5, 4, 192, stride=2),
        *[_uib(3, 3, 4, 192)] * 3,
        _uib(3, 5, 4, 192),
        *[_uib(5, 3, 4, 192)] * 2,
        *[_mqa(8, 48, 192, kv_stride=2), _uib(5, 3, 4, 192)] * 3,
        _mqa(8, 48, 192, kv_stride=2),
        _uib(3, 0, 4, 192),
    ),
    (
        _uib(5, 5, 4, 512, stride=2),
        *[_uib(5, 5, 4, 512)] * 3,
        _uib(5, 0, 4, 512),
        _uib(5, 3, 4, 512),
        *[_uib(5, 0, 4, 512)] * 2,
        _uib(5, 3, 4, 512),
        _uib(5, 5, 4, 512),
        *[_mqa(8, 64, 512), _uib(5, 0, 4, 512)] * 4,
    ),
    (_conv(1, 960),),
)


@dataclass(frozen=True)
class ModelDefinition:
    """One model: `stem` channels, activation, block rows by stage, width multiplier and standard square resolution."""

    name: str
    stages: tuple[Stage, ...]
    stem: int
    resolution: int
    act: str = "relu"
    layer_scale: bool = False
    width: float = 1.0

    def scale(self, channels: int) -> int:
        """Channels after the width multiplier, a multiple of 8 (timm `round_channels`)."""
        return make_divisible(channels * self.width)

    @property
    def stem_channels(self) -> int:
        # timm does not narrow the stem of the small widths (fix_stem)
        return self.stem if self.width < 1.0 else self.scale(self.stem)


def make_divisible(value: float, divisor: int = 8, round_limit: float = 0.9) -> int:
    """`value` rounded to a multiple of `divisor`, never below `round_limit * value` (timm `make_divisible`)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < round_limit * value else rounded


_ALL = (
    ModelDefinition("conv_small", _CONV_SMALL, stem=32, resolution=224),
    ModelDefinition("conv_medium", _CONV_MEDIUM, stem=32, resolution=256),
    ModelDefinition("conv_large", _CONV_LARGE, stem=24, resolution=384),
    ModelDefinition("hybrid_medium", _HYBRID_MEDIUM, stem=32, resolution=256, layer_scale=True),
    ModelDefinition("hybrid_large", _HYBRID_LARGE, stem=24, resolution=384, act="gelu", layer_scale=True),
    ModelDefinition("conv_small_035", _CONV_SMALL, stem=32, resolution=224, width=0.35),
    ModelDefinition("conv_small_050", _CONV_SMALL, stem=32, resolution=224, width=0.50),
    ModelDefinition("hybrid_medium_075", _HYBRID_MEDIUM, stem=32, resolution=224, layer_scale=True, width=0.75),
    ModelDefinition(
        "hybrid_large_075", _HYBRID_LARGE, stem=24, resolution=256, act="gelu", layer_scale=True, width=0.75
    ),
)

DEFINITIONS: dict[str, ModelDefinition] = {d.name: d for d in _ALL}
MODELS: tuple[str, ...] = tuple(d.name for d in _ALL if d.width == 1.0)
VARIANTS: tuple[str, ...] = tuple(DEFINITIONS)


def definition(model: str) -> ModelDefinition:
    """Look a model up: `conv_small`, timm's `mobilenetv4_conv_small`, also with a `.tag`. ValueError lists all."""
    name = model.removeprefix("mobilenetv4_").partition(".")[0] if isinstance(model, str) else model
    if name not in DEFINITIONS:
        raise ValueError(f"model: expected one of {', '.join(DEFINITIONS)}, got {model!r}")
    return DEFINITIONS[name]
