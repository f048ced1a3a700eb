"""timm's MobileNetV4 modules as fused parts. Nothing else in the package knows timm.

Source: `timm.models._efficientnet_blocks`, `timm.models.mobilenetv3`, `timm.layers` (1.0.12 to 1.0.31). Classes are
matched exactly: a subclass may compute something else.
"""

from __future__ import annotations

import timm.layers as L
from timm.layers.activations import GELU
from timm.models import _efficientnet_blocks as B
from timm.models import mobilenetv3 as M
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from . import blocks
from .layers import Family, Stage, act_of, conv, layer_scale, norm
from .models import trunk
from .record import Call, Part, Recipe, Recorder, Unsupported

FAMILY = Family(
    convs=(nn.Conv2d,),
    same_convs=(L.Conv2dSame,),
    norms=(nn.BatchNorm2d, L.BatchNormAct2d),
    frozen_norms=(FrozenBatchNorm2d, L.FrozenBatchNormAct2d),
    layer_scales=(L.LayerScale2d,),
    activations={nn.ReLU: "relu", nn.ReLU6: "relu6", nn.GELU: "gelu", GELU: "gelu", nn.Identity: "none"},
)
MQA_REASON = "Mobile MQA kernel not available yet"


def _conv_norm_act(rec: Recorder, node: int, name: str) -> Stage | None:
    child = rec.child(node, name)
    kind = type(rec.modules[child])
    if kind is nn.Identity:
        return None
    if kind is not L.ConvNormAct:
        raise Unsupported(f"{rec.path(child)} is a {kind.__name__}, not a ConvNormAct")
    if rec.has_child(child, "aa"):
        rec.identity(child, "aa", "anti-aliasing after a strided convolution")
    stage = conv(rec, rec.child(child, "conv"), FAMILY)
    return norm(rec, rec.child(child, "bn"), FAMILY, stage)


def _conv_norm(rec: Recorder, node: int, conv_name: str, norm_name: str) -> Stage:
    stage = conv(rec, rec.child(node, conv_name), FAMILY)
    return norm(rec, rec.child(node, norm_name), FAMILY, stage)


def _drop_path(rec: Recorder, node: int) -> None:
    child = rec.child(node, "drop_path")
    kind = type(rec.modules[child])
    if kind is L.DropPath:
        rec.evaluating(child)
    elif kind is not nn.Identity:
        raise Unsupported(f"{rec.path(child)}: {kind.__name__} has no kernel")


def uib(rec: Recorder, node: int) -> Part:
    rec.evaluating(node)
    rec.identity(node, "se", "squeeze-and-excitation")
    rec.identity(node, "dw_end", "an end depthwise")
    _drop_path(rec, node)
    start, mid = _conv_norm_act(rec, node, "dw_start"), _conv_norm_act(rec, node, "dw_mid")
    expand, project = _conv_norm_act(rec, node, "pw_exp"), _conv_norm_act(rec, node, "pw_proj")
    if expand is None or project is None:
        raise Unsupported(f"{rec.path(node, 'pw_exp')}: a block without expand or project has no kernel")
    gamma = layer_scale(rec, node, FAMILY)
    return blocks.uib(rec, node, start, expand, mid, project, gamma, bool(rec.attribute(node, "has_skip")))


def edge_residual(rec: Recorder, node: int) -> Part:
    rec.evaluating(node)
    rec.identity(node, "aa", "anti-aliasing after a strided convolution")
    rec.identity(node, "se", "squeeze-and-excitation")
    _drop_path(rec, node)
    expand, project = _conv_norm(rec, node, "conv_exp", "bn1"), _conv_norm(rec, node, "conv_pwl", "bn2")
    return blocks.fused_ib(rec, node, expand, project, bool(rec.attribute(node, "has_skip")))


def conv_bn_act(rec: Recorder, node: int) -> Part:
    rec.evaluating(node)
    rec.identity(node, "aa", "anti-aliasing after a strided convolution")
    if rec.attribute(node, "has_skip"):
        raise Unsupported(f"{rec.path(node) or 'block'}: a skip connection around one convolution has no kernel")
    return blocks.conv_bn_act(rec, node, _conv_norm(rec, node, "conv", "bn1"))


def mobile_attention(rec: Recorder, node: int) -> Part:
    raise Unsupported(MQA_REASON)


BLOCKS = {
    B.UniversalInvertedResidual: uib,
    B.EdgeResidual: edge_residual,
    B.ConvBnAct: conv_bn_act,
    B.MobileAttention: mobile_attention,
}


def _stem(rec: Recorder) -> Part:
    stage = _conv_norm(rec, 0, "conv_stem", "bn1")
    if rec.has_child(0, "act1"):
        act = act_of(rec, rec.child(0, "act1"), FAMILY)
        if stage.act != "none" and act != "none":
            raise Unsupported("two activations after the stem")
        stage.act = stage.act if act == "none" else act
    return blocks.conv_bn_act(rec, 0, stage, "stem")


def _pool(rec: Recorder) -> None:
    node = rec.child(0, "global_pool")
    if type(rec.modules[node]) is not L.SelectAdaptivePool2d:
        raise Unsupported(f"global_pool is a {type(rec.modules[node]).__name__}")
    kind = rec.attribute(node, "pool_type")
    if kind not in ("avg", "fast", "fastavg"):
        raise Unsupported(f"global_pool of type {kind!r} has no kernel")
    rec.identity(node, "flatten", "flattening in the pool")
    inner = rec.child(node, "pool")
    if type(rec.modules[inner]) is nn.AdaptiveAvgPool2d and rec.attribute(inner, "output_size") not in (1, (1, 1)):
        raise Unsupported("global_pool with more than one output pixel has no kernel")
    flatten = rec.child(0, "flatten")
    if type(rec.modules[flatten]) is not nn.Flatten or rec.attribute(flatten, "start_dim") != 1:
        raise Unsupported("a head that does not flatten has no kernel")


def _head(rec: Recorder, pre_logits: bool) -> Part:
    # dropout before the classifier acts in training only
    rec.evaluating(0)
    _pool(rec)
    hidden = _conv_norm(rec, 0, "conv_head", "norm_head")
    act = act_of(rec, rec.child(0, "act2"), FAMILY)
    if act != "none" and hidden.act != "none":
        raise Unsupported("act2: two activations after conv_head")
    hidden.act = hidden.act if act == "none" else act
    linear = None
    if not pre_logits:
        node = rec.child(0, "classifier")
        kind = type(rec.modules[node])
        if kind in (nn.Linear, L.Linear):
            weight, bias = rec.tensor(node, "weight"), rec.tensor(node, "bias", optional=True)
            assert weight is not None
            params = [weight, bias, None, None, None, None]
            linear = Stage(params, 0.0, weight.shape[1], weight.shape[0], 1, 1, 1, None)
        elif kind is not nn.Identity:
            raise Unsupported(f"classifier is a {kind.__name__}, not a Linear")
    return blocks.head(rec, 0, hidden, linear, hidden.c_in, "pre_logits" if pre_logits else "head")


def _trunk(rec: Recorder, recipe: Recipe, emit: dict[int, int] | None = None) -> None:
    if rec.attribute(0, "grad_checkpointing"):
        raise Unsupported("gradient checkpointing is on")
    stem_modules = ("conv_stem", "bn1", "act1") if "act1" in rec.modules[0]._modules else ("conv_stem", "bn1")
    trunk(rec, recipe, _stem, stem_modules, BLOCKS, emit)


def _not_overridden(rec: Recorder, *names: str) -> None:
    for name in names:
        rec.absent(0, name)
        if getattr(type(rec.modules[0]), name) is not getattr(M.MobileNetV3, name):
            raise Unsupported(f"{type(rec.modules[0]).__name__} has its own {name}")


def forward(rec: Recorder) -> Recipe:
    _not_overridden(rec, "forward_features", "forward_head")
    recipe = Recipe()
    rec.evaluating(0)
    _trunk(rec, recipe)
    mark = rec.mark()
    try:
        tail = _head(rec, pre_logits=False)
    except Unsupported as error:
        rec.rewind(mark)
        recipe.steps.append(Call(0, "forward_head", str(error)))
        return recipe
    last = recipe.steps[-1]
    merged = blocks.merge_feat(last, tail) if isinstance(last, Part) else None
    recipe.steps[len(recipe.steps) - (merged is not None) :] = [merged or tail]
    return recipe


def forward_features(rec: Recorder) -> Recipe:
    recipe = Recipe()
    _trunk(rec, recipe)
    return recipe


def forward_head(rec: Recorder) -> Recipe:
    return Recipe([_head(rec, pre_logits=False)])


def pre_logits(rec: Recorder) -> Recipe:
    return Recipe([_head(rec, pre_logits=True)])


def feature_pyramid(rec: Recorder) -> Recipe:
    """`MobileNetV3Features.forward`: the outputs of the stem and of stages, as a list."""
    if rec.attribute(0, "feature_hooks") is not None:
        raise Unsupported("features are taken with hooks inside the blocks")
    recipe = Recipe()
    _trunk(rec, recipe, rec.attribute(0, "_stage_out_idx"))
    return recipe
