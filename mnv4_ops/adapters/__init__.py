"""Which methods of which classes are patched, and the adapter functions that describe their modules.

The adapters import the library they know, so they are imported when that library is.
"""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """A method of a class. `plans` names functions of the adapter module: one per calling form."""

    module: str
    cls: str
    method: str
    adapter: str
    plans: tuple[str, ...]
    block: bool  # (Recorder, node) -> Part, or (Recorder) -> Recipe
    extra: str | None = None  # an argument after the input that has to be None


_TIMM_BLOCKS, _TIMM_MODELS = "timm.models._efficientnet_blocks", "timm.models.mobilenetv3"
_OUR_BLOCKS, _OUR_MODELS = "mnv4_ops.reference.modules", "mnv4_ops.reference.models"


def _block(module: str, cls: str, adapter: str, plan: str, extra: str | None = None) -> Target:
    return Target(module, cls, "forward", f"mnv4_ops.adapters.{adapter}", (plan,), True, extra)


def _model(module: str, cls: str, method: str, adapter: str, *plans: str) -> Target:
    return Target(module, cls, method, f"mnv4_ops.adapters.{adapter}", plans or (method,), False)


TARGETS = (
    _block(_TIMM_BLOCKS, "UniversalInvertedResidual", "timm", "uib"),
    _block(_TIMM_BLOCKS, "EdgeResidual", "timm", "edge_residual"),
    _block(_TIMM_BLOCKS, "ConvBnAct", "timm", "conv_bn_act"),
    _block(_TIMM_BLOCKS, "MobileAttention", "timm", "mobile_attention"),
    _block("timm.layers.attention2d", "MultiQueryAttention2d", "timm", "multi_query_attention", "attn_mask"),
    _model(_TIMM_MODELS, "MobileNetV3", "forward", "timm"),
    _model(_TIMM_MODELS, "MobileNetV3", "forward_features", "timm"),
    _model(_TIMM_MODELS, "MobileNetV3", "forward_head", "timm", "forward_head", "pre_logits"),
    _model(_TIMM_MODELS, "MobileNetV3Features", "forward", "timm", "feature_pyramid"),
    _block(_OUR_BLOCKS, "UIB", "reference", "uib"),
    _block(_OUR_BLOCKS, "FusedIB", "reference", "fused_ib"),
    _block(_OUR_BLOCKS, "ConvBNAct", "reference", "conv_bn_act"),
    _block(_OUR_BLOCKS, "MobileMQA", "reference", "mobile_mqa"),
    _model(_OUR_MODELS, "MobileNetV4", "forward", "reference"),
    _model(_OUR_MODELS, "MobileNetV4", "forward_features", "reference"),
    _model(_OUR_MODELS, "MobileNetV4", "forward_head", "reference", "forward_head", "pre_logits"),
)
