"""The package's own reference modules as fused parts."""

from __future__ import annotations

from torch import nn

from mnv4_ops.reference import models as M
from mnv4_ops.reference import modules as R

from . import blocks
from .layers import Family, Stage, act_of, bare_norm, conv, layer_scale, norm
from .models import trunk
from .record import Part, Recipe, Recorder, Unsupported

FAMILY = Family(
    convs=(R.Conv2d, nn.Conv2d),
    same_convs=(),
    norms=(nn.BatchNorm2d,),
    frozen_norms=(),
    layer_scales=(R.LayerScale,),
    activations={nn.ReLU: "relu", nn.ReLU6: "relu6", nn.GELU: "gelu", nn.Identity: "none"},
    is_same=lambda rec, node: bool(rec.attribute(node, "tf_same", False)),
)


def _conv_norm_act(rec: Recorder, node: int, conv_name: str, norm_name: str, act_name: str | None) -> Stage:
    stage = norm(rec, rec.child(node, norm_name), FAMILY, conv(rec, rec.child(node, conv_name), FAMILY))
    if act_name is not None:
        stage.act = act_of(rec, rec.child(node, act_name), FAMILY)
    return stage


def _stage(rec: Recorder, node: int, name: str) -> Stage | None:
    child = rec.child(node, name)
    kind = type(rec.modules[child])
    if kind is nn.Identity:
        return None
    if kind is not R.ConvNormAct:
        raise Unsupported(f"{rec.path(child)} is a {kind.__name__}, not a ConvNormAct")
    return _conv_norm_act(rec, child, "conv", "bn", "act")


def uib(rec: Recorder, node: int) -> Part:
    rec.evaluating(node)
    start, expand, mid, project = (_stage(rec, node, name) for name in ("dw_start", "pw_exp", "dw_mid", "pw_proj"))
    if expand is None or project is None:
        raise Unsupported(f"{rec.path(node, 'pw_exp')}: a block without expand or project has no kernel")
    gamma = layer_scale(rec, node, FAMILY)
    return blocks.uib(rec, node, start, expand, mid, project, gamma, rec.attribute(node, "spec").residual)


def fused_ib(rec: Recorder, node: int) -> Part:
    rec.evaluating(node)
    expand = _conv_norm_act(rec, node, "conv_exp", "bn1", "act1")
    project = _conv_norm_act(rec, node, "conv_pwl", "bn2", None)
    return blocks.fused_ib(rec, node, expand, project, rec.attribute(node, "spec").residual)


def conv_bn_act(rec: Recorder, node: int) -> Part:
    rec.evaluating(node)
    return blocks.conv_bn_act(rec, node, _conv_norm_act(rec, node, "conv", "bn1", "act"))


def mobile_mqa(rec: Recorder, node: int) -> Part:
    def pool(rec: Recorder, node: int) -> str:
        if type(rec.modules[node]) is not R.QueryPool or rec.attribute(node, "stride") != 2:
            raise Unsupported(f"{rec.path(node)}: only a QueryPool of stride 2 has a kernel")
        return str(rec.attribute(node, "padding"))

    rec.evaluating(node)
    spec = rec.attribute(node, "spec")
    norm = bare_norm(rec, rec.child(node, "norm"), FAMILY)
    attn = rec.child(node, "attn")
    if type(rec.modules[attn]) is not R.MultiQueryAttention:
        raise Unsupported(f"{rec.path(attn)} is a {type(rec.modules[attn]).__name__}, not a MultiQueryAttention")
    attention = blocks.attention(rec, attn, rec.attribute(attn, "spec").heads, FAMILY, pool)
    return blocks.mobile_mqa(rec, node, attention, norm, layer_scale(rec, node, FAMILY), spec.residual)


BLOCKS = {R.UIB: uib, R.FusedIB: fused_ib, R.ConvBNAct: conv_bn_act, R.MobileMQA: mobile_mqa}


def _stem(rec: Recorder) -> Part:
    return blocks.conv_bn_act(rec, 0, _conv_norm_act(rec, 0, "conv_stem", "bn1", "act1"), "stem")


def _hidden(rec: Recorder) -> Stage:
    pool = rec.child(0, "global_pool")
    if type(rec.modules[pool]) is not nn.AdaptiveAvgPool2d or rec.attribute(pool, "output_size") not in (1, (1, 1)):
        raise Unsupported("global_pool is not an average over all pixels")
    return _conv_norm_act(rec, 0, "conv_head", "norm_head", "act2")


def forward(rec: Recorder) -> Recipe:
    blocks.not_overridden(rec, M.MobileNetV4, "forward_features", "forward_head")
    rec.evaluating(0)
    return blocks.with_head(rec, forward_features(rec), _head)


def forward_features(rec: Recorder) -> Recipe:
    recipe = Recipe()
    trunk(rec, recipe, _stem, ("conv_stem", "bn1", "act1"), BLOCKS)
    return recipe


def _head(rec: Recorder, pre_logits: bool = False) -> Part:
    return blocks.head(rec, _hidden, (nn.Linear,), pre_logits)


def forward_head(rec: Recorder) -> Recipe:
    return Recipe([_head(rec)])


def pre_logits(rec: Recorder) -> Recipe:
    return Recipe([_head(rec, pre_logits=True)])
