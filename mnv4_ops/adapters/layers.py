"""Convolution, norm and activation layers as stages of a fused op. A `Family` says which classes they may have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .record import Recorder, Unsupported

ABSENT: list[Tensor | None] = [None] * 6


@dataclass(frozen=True)
class Family:
    """Exact classes of one library's layers."""

    convs: tuple[type, ...]  # torch's meaning of padding
    same_convs: tuple[type, ...]  # TF SAME by class
    norms: tuple[type, ...]
    frozen_norms: tuple[type, ...]
    layer_scales: tuple[type, ...]
    activations: dict[type, str]
    is_same: Callable[[Recorder, int], bool] | None = None  # TF SAME by instance


@dataclass
class Stage:
    """A convolution with its norm: `params` in the order of `ops.layout.PER_STAGE`."""

    params: list[Tensor | None]
    eps: float
    c_in: int
    c_out: int
    kernel: int
    stride: int
    groups: int
    padding: str | None  # None where both meanings agree
    act: str = "none"

    @property
    def depthwise(self) -> bool:
        return self.groups == self.c_in == self.c_out


def _square(rec: Recorder, node: int, name: str) -> int:
    value = rec.attribute(node, name)
    if not (isinstance(value, tuple) and len(value) == 2 and value[0] == value[1]):
        raise Unsupported(f"{rec.path(node, name)} = {value!r}: only square ones have a kernel")
    return int(value[0])


def conv(rec: Recorder, node: int, family: Family) -> Stage:
    kind = type(rec.modules[node])
    if kind not in family.convs and kind not in family.same_convs:
        # wrappers are often named after what they wrap
        raise Unsupported(f"{rec.path(node)} is a {kind.__module__}.{kind.__name__}, not a plain convolution")
    kernel, stride = _square(rec, node, "kernel_size"), _square(rec, node, "stride")
    dilation = _square(rec, node, "dilation")
    if dilation != 1:
        raise Unsupported(f"{rec.path(node)}: dilation {dilation} has no kernel")
    mode = rec.attribute(node, "padding_mode")
    if mode != "zeros":
        raise Unsupported(f"{rec.path(node)}: padding_mode {mode!r} has no kernel")
    pad = rec.attribute(node, "padding")
    by_class = kind in family.same_convs
    if by_class or (family.is_same is not None and family.is_same(rec, node)):
        padding: str | None = "same"
    elif pad == "same" or pad == (kernel // 2, kernel // 2):
        padding = "symmetric"
    else:
        raise Unsupported(f"{rec.path(node)}: padding {pad!r} of a {kernel}x{kernel} convolution has no kernel")
    if stride == 1 and kernel % 2:
        padding = None
    c_in, c_out = rec.attribute(node, "in_channels"), rec.attribute(node, "out_channels")
    groups = rec.attribute(node, "groups")
    if groups != 1 and not groups == c_in == c_out:
        raise Unsupported(f"{rec.path(node)}: {groups} groups of {c_in} -> {c_out} channels have no kernel")
    weight, bias = rec.tensor(node, "weight"), rec.tensor(node, "bias", optional=True)
    return Stage([weight, bias, None, None, None, None], 0.0, c_in, c_out, kernel, stride, groups, padding)


def act_of(rec: Recorder, node: int, family: Family) -> str:
    module = rec.modules[node]
    name = family.activations.get(type(module))
    if name is None:
        raise Unsupported(f"{rec.path(node)}: activation {type(module).__name__} has no kernel")
    if isinstance(module, nn.GELU) and rec.attribute(node, "approximate") != "none":
        raise Unsupported(f"{rec.path(node)}: GELU with approximate={module.approximate!r} has no kernel")
    return name


def bare_norm(rec: Recorder, node: int, family: Family) -> Stage | None:
    """A BatchNorm without a convolution before it and without an activation; None for Identity."""
    if type(rec.modules[node]) is nn.Identity:
        return None
    found = norm(rec, node, family, Stage(list(ABSENT), 0.0, 0, 0, 1, 1, 1, None))
    if found.act != "none":
        raise Unsupported(f"{rec.path(node)}: an activation ({found.act}) here has no kernel")
    return found


def norm(rec: Recorder, node: int, family: Family, stage: Stage) -> Stage:
    """Adds the BatchNorm to the stage, and the activation that timm keeps inside it."""
    module = rec.modules[node]
    kind = type(module)
    if kind is nn.Identity:
        return stage
    if kind in family.norms:
        rec.evaluating(node)
        if "num_batches_tracked" in module._buffers:
            # moves with the running statistics, whose own versions do not
            rec.tensor(node, "num_batches_tracked", optional=True)
    elif kind not in family.frozen_norms:
        raise Unsupported(f"{rec.path(node)} is a {kind.__name__}, not a BatchNorm2d or FrozenBatchNorm2d")
    mean, var = (rec.tensor(node, name, optional=True) for name in ("running_mean", "running_var"))
    if mean is None or var is None:
        raise Unsupported(f"{rec.path(node)} has no running statistics")
    weight, bias = (rec.tensor(node, name, optional=True) for name in ("weight", "bias"))
    eps: Any = rec.attribute(node, "eps")
    stage.params[2:] = [weight, bias, mean, var]
    stage.eps = float(eps)
    if "drop" in module._modules:
        rec.identity(node, "drop", "dropout inside a norm")
    if "act" in module._modules:
        stage.act = act_of(rec, rec.child(node, "act"), family)
    return stage


def padding_of(rec: Recorder, node: int, *stages: Stage | None) -> str:
    """The one padding of all stages."""
    found = {s.padding for s in stages if s is not None and s.padding is not None}
    if len(found) > 1:
        raise Unsupported(f"{rec.path(node)}: symmetric and SAME padding in one block have no kernel")
    return found.pop() if found else "symmetric"


def layer_scale(rec: Recorder, node: int, family: Family) -> Tensor | None:
    child = rec.child(node, "layer_scale")
    kind = type(rec.modules[child])
    if kind is nn.Identity:
        return None
    if kind not in family.layer_scales:
        raise Unsupported(f"{rec.path(child)}: layer scale {kind.__name__} has no kernel")
    return rec.tensor(child, "gamma")


def sequence(rec: Recorder, node: int, name: str) -> dict[str, int]:
    """The children of a plain Sequential, in order."""
    child = rec.child(node, name)
    kind = type(rec.modules[child])
    if kind is not nn.Sequential:
        raise Unsupported(f"{rec.path(child)} is a {kind.__name__}, not a Sequential")
    return dict(rec.children(child))


def halving_pool(rec: Recorder, node: int) -> None:
    """Refuses all but an average pool of 2 x 2 pixels without padding."""
    kind = type(rec.modules[node])
    if kind is not nn.AvgPool2d:
        raise Unsupported(f"{rec.path(node)}: {kind.__name__} has no kernel, only an AvgPool2d")
    for name, allowed in (
        ("kernel_size", (2, (2, 2))), ("stride", (2, (2, 2))), ("padding", (0, (0, 0))), ("ceil_mode", (False,)),
        ("divisor_override", (None,)),
    ):  # fmt: skip
        value = rec.attribute(node, name)
        if value not in allowed:
            raise Unsupported(f"{rec.path(node, name)} = {value!r}: only a pool of 2 x 2 pixels has a kernel")


def doubling(rec: Recorder, node: int) -> None:
    """Refuses all but bilinear up-sampling by 2 with corners not aligned."""
    kind = type(rec.modules[node])
    if kind is not nn.Upsample:
        raise Unsupported(f"{rec.path(node)}: {kind.__name__} has no kernel, only an Upsample")
    for name, allowed in (
        ("size", (None,)), ("scale_factor", (2, (2, 2))), ("mode", ("bilinear",)), ("align_corners", (False, None)),
        ("recompute_scale_factor", (None, False)),
    ):  # fmt: skip
        value = rec.attribute(node, name)
        if value not in allowed:
            raise Unsupported(f"{rec.path(node, name)} = {value!r}: only bilinear up-sampling by 2 has a kernel")
