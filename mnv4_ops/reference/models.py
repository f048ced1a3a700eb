"""MobileNetV4 in plain PyTorch, generated from `definitions`; state-dict keys are those of timm's `mobilenetv4_*`."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..spec import VARIANTS, ConvSpec, HeadSpec, Spec, head_spec, model_specs
from . import functional as R
from .modules import Conv2d, ConvBNAct, MultiQueryAttention, build_block, make_act, unfolded

__all__ = ["MobileNetV4", "create_model", "list_models"]


class MobileNetV4(nn.Module):
    """A model of the ledger: [N, in_chans, H, W] -> logits [N, num_classes], or features [N, 1280] without classes.

    model: name as in `mnv4_ops.spec.VARIANTS` (timm's `mobilenetv4_` prefix may stay). padding: "symmetric" (timm) or
    "same" (TF). bn_eps: 1e-5 (timm) or 1e-3 (TF). act: None takes the model's own. device, dtype as in torch.
    ValueError for an unknown model, act or padding.
    """

    def __init__(
        self,
        model: str,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        padding: str = "symmetric",
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        act: str | None = None,
        drop_rate: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        rows = model_specs(model, in_chans=in_chans, classes=num_classes, act=act, padding=padding)
        specs = dict(rows)
        self.stem_spec = _conv_spec(specs["stem"])
        self.head_spec: HeadSpec = head_spec(model, num_classes, act)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        norm: dict[str, Any] = {"eps": bn_eps, "momentum": bn_momentum}

        stem = self.stem_spec
        self.conv_stem = Conv2d(stem.c_in, stem.c_out, stem.kernel, stem.stride, padding=stem.padding, **factory)
        self.bn1 = nn.BatchNorm2d(stem.c_out, **norm, **factory)
        self.act1 = make_act(stem.act)

        stages: dict[str, list[nn.Module]] = {}
        for name, spec in rows:
            if name[0].isdigit():
                stages.setdefault(name.partition(".")[0], []).append(build_block(spec, norm, **factory))
        self.blocks = nn.Sequential(*(nn.Sequential(*blocks) for blocks in stages.values()))

        hidden = _conv_spec(specs["conv_head"])
        self.num_features = hidden.c_in
        self.head_hidden_size = hidden.c_out
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_head = Conv2d(hidden.c_in, hidden.c_out, 1, **factory)
        self.norm_head = nn.BatchNorm2d(hidden.c_out, **norm, **factory)
        self.act2 = make_act(hidden.act)
        self.flatten = nn.Flatten(1)
        self.classifier = nn.Linear(hidden.c_out, num_classes, **factory) if num_classes else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights as timm draws them: normal by fan-out, Xavier in attention, uniform for the classifier."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
            elif isinstance(module, nn.Linear):
                bound = 1.0 / math.sqrt(module.out_features)
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, MultiQueryAttention):
                for conv in module.modules():
                    if isinstance(conv, nn.Conv2d):
                        nn.init.xavier_uniform_(conv.weight)

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier (none for 0) in place, on the device and in the dtype of the model."""
        weight = self.conv_head.weight
        self.num_classes = num_classes
        self.head_spec = HeadSpec(
            self.head_spec.c_in, self.head_spec.c_feat, self.head_spec.c_hidden, num_classes, self.head_spec.act
        )
        self.classifier = (
            nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)
            if num_classes
            else nn.Identity()
        )

    def stem_params(self) -> R.ConvBN:
        """Unfolded parameters that belong to `stem_spec`."""
        return unfolded(self.conv_stem, self.bn1)

    def head_params(self) -> R.HeadParams:
        """Unfolded parameters that belong to `head_spec`: blocks[4][0], conv_head and classifier."""
        feat = self.blocks.get_submodule("4.0")
        assert isinstance(feat, ConvBNAct)
        linear = self.classifier if isinstance(self.classifier, nn.Linear) else None
        classifier = R.ConvBN(linear.weight, bias=linear.bias) if linear is not None else None
        return R.HeadParams(feat.params(), unfolded(self.conv_head, self.norm_head), classifier)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> [N, num_features, ceil(H/32), ceil(W/32)]."""
        return self.blocks(self.act1(self.bn1(self.conv_stem(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features -> logits, or the pooled features of width `head_hidden_size` with pre_logits."""
        x = self.act2(self.norm_head(self.conv_head(self.global_pool(x))))
        x = F.dropout(self.flatten(x), p=self.drop_rate, training=self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _conv_spec(spec: Spec) -> ConvSpec:
    assert isinstance(spec, ConvSpec)
    return spec


def create_model(model: str, **options: Any) -> MobileNetV4:
    """`MobileNetV4(model, **options)` by name: `create_model("conv_small", num_classes=10)`."""
    return MobileNetV4(model, **options)


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(VARIANTS)
