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
from .layers import Family, Stage, act_of, bare_norm, conv, halving_pool, layer_scale, norm
from .models import trunk
from .record import Part, Recipe, Recorder, Unsupported

FAMILY = Family(
    convs=(nn.Conv2d,),
    same_convs=(L.Conv2dSame,),
    norms=(nn.BatchNorm2d, L.BatchNormAct2d),
    frozen_norms=(FrozenBatchNorm2d, L.FrozenBatchNormAct2d),
    layer_scales=(L.LayerScale2d,),
    activations={nn.ReLU: "relu", nn.ReLU6: "relu6", nn.GELU: "gelu", GELU: "gelu", nn.Identity: "none"},
)


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


def _attention(rec: Recorder, node: int) -> blocks.Attention:
    def pool(rec: Recorder, node: int) -> str:
        halving_pool(rec, node)
        return "symmetric"

    kind = type(rec.modules[node])
    if kind is not L.MultiQueryAttention2d:
        raise Unsupported(f"{rec.path(node) or 'block'} is a {kind.__name__}: only MultiQueryAttention2d has a kernel")
    heads, key_dim = rec.attribute(node, "num_heads"), rec.attribute(node, "key_dim")
    if rec.attribute(node, "scale") != key_dim**-0.5:
        raise Unsupported(f"{rec.path(node, 'scale')}: only 1 / sqrt(key_dim) has a kernel")
    drop = rec.child(node, "attn_drop")
    if type(rec.modules[drop]) is not nn.Dropout:
        raise Unsupported(f"{rec.path(drop)} is a {type(rec.modules[drop]).__name__}, not a Dropout")
    rec.evaluating(drop)
    found = blocks.attention(rec, node, heads, FAMILY, pool)
    if found.key.c_out != key_dim:
        raise Unsupported(f"{rec.path(node, 'key')}: {found.key.c_out} channels, expected key_dim = {key_dim}")
    return found


def mobile_attention(rec: Recorder, node: int) -> Part:
    rec.evaluating(node)
    if rec.has_child(node, "conv_cpe_dw"):
        raise Unsupported(f"{rec.path(node, 'conv_cpe_dw')}: a conditional position encoding has no kernel")
    _drop_path(rec, node)
    norm = bare_norm(rec, rec.child(node, "norm"), FAMILY)
    attention = _attention(rec, rec.child(node, "attn"))
    gamma = layer_scale(rec, node, FAMILY)
    return blocks.mobile_mqa(rec, node, attention, norm, gamma, bool(rec.attribute(node, "has_skip")))


def multi_query_attention(rec: Recorder, node: int) -> Part:
    """The attention alone, where the block around it has no kernel or there is none."""
    return blocks.mobile_mqa(rec, node, _attention(rec, node), None, None, False)


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


def _hidden(rec: Recorder) -> Stage:
    _pool(rec)
    hidden = _conv_norm(rec, 0, "conv_head", "norm_head")
    act = act_of(rec, rec.child(0, "act2"), FAMILY)
    if act != "none" and hidden.act != "none":
        raise Unsupported("act2: two activations after conv_head")
    hidden.act = hidden.act if act == "none" else act
    return hidden


def _head(rec: Recorder, pre_logits: bool = False) -> Part:
    return blocks.head(rec, _hidden, (nn.Linear, L.Linear), pre_logits)


def _trunk(rec: Recorder, recipe: Recipe, emit: dict[int, int] | None = None) -> None:
    if rec.attribute(0, "grad_checkpointing"):
        raise Unsupported("gradient checkpointing is on")
    stem_modules = ("conv_stem", "bn1", "act1") if "act1" in rec.modules[0]._modules else ("conv_stem", "bn1")
    trunk(rec, recipe, _stem, stem_modules, BLOCKS, emit)


def forward(rec: Recorder) -> Recipe:
    blocks.not_overridden(rec, M.MobileNetV3, "forward_features", "forward_head")
    rec.evaluating(0)
    return blocks.with_head(rec, forward_features(rec), _head)


def forward_features(rec: Recorder) -> Recipe:
    recipe = Recipe()
    _trunk(rec, recipe)
    return recipe


def forward_head(rec: Recorder) -> Recipe:
    return Recipe([_head(rec)])


def pre_logits(rec: Recorder) -> Recipe:
    return Recipe([_head(rec, pre_logits=True)])


def feature_pyramid(rec: Recorder) -> Recipe:
    """`MobileNetV3Features.forward`: the outputs of the stem and of stages, as a list."""
    if rec.attribute(0, "feature_hooks") is not None:
        raise Unsupported("features are taken with hooks inside the blocks")
    recipe = Recipe()
    _trunk(rec, recipe, rec.attribute(0, "_stage_out_idx"))
    return recipe
