"""The package's own reference modules as fused parts."""

from __future__ import annotations

from torch import nn

from mnv4_ops.reference import models as M
from mnv4_ops.reference import modules as R

from . import blocks
from .layers import Family, Stage, act_of, conv, layer_scale, norm
from .models import trunk
from .record import Call, Part, Recipe, Recorder, Unsupported

FAMILY = Family(
    convs=(R.Conv2d, nn.Conv2d),
    same_convs=(),
    norms=(nn.BatchNorm2d,),
    frozen_norms=(),
    layer_scales=(R.LayerScale,),
    activations={nn.ReLU: "relu", nn.ReLU6: "relu6", nn.GELU: "gelu", nn.Identity: "none"},
    is_same=lambda rec, node: bool(rec.attribute(node, "tf_same", False)),
)
MQA_REASON = "Mobile MQA kernel not available yet"


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
    raise Unsupported(MQA_REASON)


BLOCKS = {R.UIB: uib, R.FusedIB: fused_ib, R.ConvBNAct: conv_bn_act, R.MobileMQA: mobile_mqa}


def _stem(rec: Recorder) -> Part:
    return blocks.conv_bn_act(rec, 0, _conv_norm_act(rec, 0, "conv_stem", "bn1", "act1"), "stem")


def _head(rec: Recorder, pre_logits: bool) -> Part:
    # dropout before the classifier acts in training only
    rec.evaluating(0)
    pool, flatten = rec.child(0, "global_pool"), rec.child(0, "flatten")
    if type(rec.modules[pool]) is not nn.AdaptiveAvgPool2d or rec.attribute(pool, "output_size") not in (1, (1, 1)):
        raise Unsupported("global_pool is not an average over all pixels")
    if type(rec.modules[flatten]) is not nn.Flatten or rec.attribute(flatten, "start_dim") != 1:
        raise Unsupported("a head that does not flatten has no kernel")
    hidden = _conv_norm_act(rec, 0, "conv_head", "norm_head", "act2")
    linear = None
    if not pre_logits:
        node = rec.child(0, "classifier")
        kind = type(rec.modules[node])
        if kind is nn.Linear:
            weight, bias = rec.tensor(node, "weight"), rec.tensor(node, "bias", optional=True)
            assert weight is not None
            params = [weight, bias, None, None, None, None]
            linear = Stage(params, 0.0, weight.shape[1], weight.shape[0], 1, 1, 1, None)
        elif kind is not nn.Identity:
            raise Unsupported(f"classifier is a {kind.__name__}, not a Linear")
    return blocks.head(rec, 0, hidden, linear, hidden.c_in, "pre_logits" if pre_logits else "head")


def forward(rec: Recorder) -> Recipe:
    for name in ("forward_features", "forward_head"):
        rec.absent(0, name)
        if getattr(type(rec.modules[0]), name) is not getattr(M.MobileNetV4, name):
            raise Unsupported(f"{type(rec.modules[0]).__name__} has its own {name}")
    rec.evaluating(0)
    recipe = forward_features(rec)
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
    trunk(rec, recipe, _stem, ("conv_stem", "bn1", "act1"), BLOCKS)
    return recipe


def forward_head(rec: Recorder) -> Recipe:
    return Recipe([_head(rec, pre_logits=False)])


def pre_logits(rec: Recorder) -> Recipe:
    return Recipe([_head(rec, pre_logits=True)])
