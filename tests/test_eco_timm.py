"""timm's own ways with an enabled model, and libraries that build on timm: transformers, torchvision."""

from __future__ import annotations

import copy
import functools
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mnv4_ops
from mnv4_ops import _native
from mnv4_ops.reference import randomize_

timm = pytest.importorskip("timm")
B = pytest.importorskip("timm.models._efficientnet_blocks")
pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")
SMALL = "mobilenetv4_conv_small_035"
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
# a feature map of one pixel comes from 16 of the input
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@functools.cache
def built(**options: Any) -> Any:
    return randomize_(timm.create_model(SMALL, **({"num_classes": 4} | options))).eval()


def model(**options: Any) -> Any:
    return copy.deepcopy(built(**options))


def assert_same(call: Any, served: Any = None) -> None:
    """The call gives without and with enable() the same; `served` is the module that has to be served in it."""
    with torch.no_grad():
        want = call()
        with mnv4_ops.enable():
            got = call()
            if served is not None:
                with mnv4_ops.serve.observe() as report:
                    call()
                assert not report.finish(served, "").fallbacks
                assert report.served
    torch.testing.assert_close(got, want, **CLOSE)


def test_reset_classifier() -> None:
    m = model()
    for options, shape in (
        ({"num_classes": 7}, (2, 7)),
        ({"num_classes": 0}, (2, 1280)),
        ({"num_classes": 5, "global_pool": "fast"}, (2, 5)),
        ({"num_classes": 3, "global_pool": "avgmax"}, (2, 3)),
        ({"num_classes": 0, "global_pool": "max"}, (2, 1280)),
        ({"num_classes": 6, "global_pool": "avg"}, (2, 6)),
    ):
        m.reset_classifier(**options)
        assert_same(lambda: m(X))
        with torch.no_grad(), mnv4_ops.enable():
            # a plan that was made before the change is not used
            assert m(X).shape == shape
            report = mnv4_ops.explain(m, X)
        other = m.global_pool.pool_type not in ("avg", "fast")
        assert [row.by for row in report.fallbacks] == (
            [f"global_pool of type {m.global_pool.pool_type!r} has no kernel"] if other else []
        )
        # the last convolution may be in the head
        assert len(report.served) >= sum(len(stage) for stage in m.blocks)


@pytest.mark.parametrize("pool", ["avg", "fast", "max", "avgmax", ""])
def test_global_pools(pool: str) -> None:
    m = timm.create_model(SMALL, num_classes=0 if pool == "" else 4, global_pool=pool).eval()
    m.load_state_dict(model().state_dict(), strict=False)
    assert_same(lambda: m(X))
    assert_same(lambda: m.forward_head(m.forward_features(X), pre_logits=True))


@pytest.mark.parametrize(
    "options",
    [
        {"indices": 2},
        {"indices": [0, 3], "stop_early": True, "intermediates_only": True},
        {"intermediates_only": True, "norm": True},
        {"indices": 1, "extra_blocks": True},
    ],
    ids=",".join,
)
def test_forward_intermediates(options: dict[str, Any]) -> None:
    m = model()
    assert_same(lambda: m.forward_intermediates(X, **options), m)


def test_pruned_intermediate_layers() -> None:
    m = model()
    m.prune_intermediate_layers(2, prune_norm=True)
    assert_same(lambda: m.forward_intermediates(X, indices=2))


@pytest.mark.parametrize("cls", [None, "hook", "getter", "fx"])
def test_features_only(cls: str | None) -> None:
    """By each of timm's feature classes; fx holds layers and no blocks, so that it is the original."""
    m = model(features_only=True, **({} if cls is None else {"feature_cls": cls}))
    assert len(m(X)) == 5
    assert_same(lambda: m(X))
    with torch.no_grad(), mnv4_ops.enable():
        report = mnv4_ops.explain(m, X)
    assert bool(report.served) == (cls != "fx")


def test_torch_fx() -> None:
    """Tracing sees the original; blocks that are leaves of the tracer are served."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    m = model()
    leaves = [B.UniversalInvertedResidual, B.ConvBnAct]
    nodes = ["blocks.1.1", "blocks.3.5", "classifier"]
    with torch.no_grad():
        want = extraction.create_feature_extractor(m, ["blocks.1", "blocks.3", "classifier"])(X)
        mnv4_ops.enable()
        m(X)
        traced = extraction.create_feature_extractor(m, ["blocks.1", "blocks.3", "classifier"])
        got = traced(X)
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert torch.equal(torch.fx.symbolic_trace(m)(X), want["classifier"])
        served = extraction.create_feature_extractor(m, nodes, tracer_kwargs={"leaf_modules": leaves})
        report = mnv4_ops.explain(served, X)
        assert len(report.served) == sum(len(stage) for stage in m.blocks)
        for a, b in zip(served(X).values(), want.values(), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
        assert not mnv4_ops.explain(m, X).fallbacks


def test_reparameterize_and_freeze() -> None:
    m = model()
    for change in (
        timm.utils.reparameterize_model,
        lambda m: timm.utils.freeze(copy.deepcopy(m), include_bn_running_stats=True),
    ):
        other = change(m) or copy.deepcopy(m)
        assert_same(lambda other=other: other(X), other)


def test_gradient_checkpointing_in_evaluation() -> None:
    m = model()
    m.set_grad_checkpointing(True)
    assert_same(lambda: m(X))
    with torch.no_grad(), mnv4_ops.enable():
        report = mnv4_ops.explain(m, X)
    assert {row.by for row in report.fallbacks} == {"gradient checkpointing is on"}
    assert sum(row.name.startswith("blocks.") for row in report.served) == sum(len(s) for s in m.blocks)


def validate(m: nn.Module, loader: Any, amp: bool = False) -> tuple[float, float, float]:
    """The loop of timm's `validate.py` (which its wheel does not hold): loss, top-1, top-5."""
    losses, top1, top5 = (timm.utils.AverageMeter() for _ in range(3))
    criterion = nn.CrossEntropyLoss()
    m.eval()
    with torch.inference_mode():
        m(torch.randn(2, 3, 64, 64))  # its warm-up
        for images, target in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                output = m(images)
                loss = criterion(output, target)
            found1, found5 = timm.utils.accuracy(output.detach(), target, topk=(1, 5))
            losses.update(loss.item(), images.size(0))
            top1.update(found1.item(), images.size(0))
            top5.update(found5.item(), images.size(0))
    return losses.avg, top1.avg, top5.avg


def test_a_loop_like_validate(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for i in range(9):
        path = tmp_path / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        image.fromarray(np.random.default_rng(i).integers(0, 255, (70, 60, 3), dtype=np.uint8)).save(path)
    loader = timm.data.create_loader(
        timm.data.create_dataset("", root=str(tmp_path)),
        input_size=(3, 64, 64), batch_size=4, use_prefetcher=False, num_workers=0, device=torch.device("cpu"),
    )  # fmt: skip
    m = model(num_classes=6).to(memory_format=torch.channels_last)
    want = validate(m, loader)
    with mnv4_ops.enable():
        got, mixed = validate(m, loader), validate(m, loader, amp=True)
        with torch.no_grad():
            assert not mnv4_ops.explain(m, next(iter(loader))[0]).fallbacks
    assert got == pytest.approx(want, rel=1e-4)
    assert mixed[0] == pytest.approx(want[0], rel=0.05)


@pytest.mark.parametrize("way", ["plain", "compiled", "reparameterized"])
def test_a_loop_like_benchmark(way: str) -> None:
    """The loop of timm's `benchmark.py`: its options for the model, a warm-up, timed inference."""
    m = model(exportable=True).to(device="cpu", dtype=torch.float32, memory_format=torch.channels_last)
    with torch.no_grad():
        want = m(X)
    mnv4_ops.enable()
    if way == "compiled":
        torch.compiler.reset()
        m = torch.compile(m, backend="eager")
    elif way == "reparameterized":
        m = timm.utils.reparameterize_model(m)
    x = X.contiguous(memory_format=torch.channels_last)
    steps = []
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            start = time.perf_counter()
            got = m(x)
            steps.append(time.perf_counter() - start)
    assert all(step > 0 for step in steps)
    torch.testing.assert_close(got, want, **CLOSE)


def test_transformers_wrappers() -> None:
    transformers = pytest.importorskip("transformers", reason="waits for pip install transformers")
    config = transformers.TimmWrapperConfig(architecture=SMALL, num_labels=4)
    m = transformers.TimmWrapperForImageClassification(config).eval()
    randomize_(m.timm_model)
    with torch.no_grad():
        want = m(pixel_values=X, output_hidden_states=True)
        mnv4_ops.enable()
        got = m(pixel_values=X, output_hidden_states=True)
        report = mnv4_ops.explain(m, X)
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert not report.fallbacks
    assert len(report.served) == sum(len(stage) for stage in m.timm_model.blocks) + 1
    features = transformers.TimmWrapperModel(config).eval()
    config = transformers.TimmBackboneConfig(backbone=SMALL, use_pretrained_backbone=False, out_indices=(1, 2, 3))
    backbone = transformers.TimmBackbone(config).eval()
    assert_same(lambda: features(X).pooler_output, features)
    assert_same(lambda: list(backbone(X).feature_maps), backbone)


class Pyramid(nn.Module):
    """A backbone for torchvision's detectors, from timm's feature maps."""

    def __init__(self, out_channels: int) -> None:
        from torchvision.ops import FeaturePyramidNetwork

        super().__init__()
        self.body = timm.create_model(SMALL, features_only=True, out_indices=(2, 3, 4))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): f for i, f in enumerate(self.body(x))})


@pytest.mark.parametrize("kind", ["FasterRCNN", "RetinaNet"])
def test_torchvision_detection(kind: str) -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    backbone = Pyramid(16)
    randomize_(backbone.body)
    anchors = detection.anchor_utils.AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
    name = "rpn_anchor_generator" if kind == "FasterRCNN" else "anchor_generator"
    options: dict[str, Any] = {name: anchors, "min_size": 96, "max_size": 128}
    if kind == "FasterRCNN":
        from torchvision.ops import MultiScaleRoIAlign

        options["box_roi_pool"] = MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
        options |= {f"rpn_{when}_nms_top_n_{mode}": 20 for when in ("pre", "post") for mode in ("train", "test")}
    detector = getattr(detection, kind)(backbone, 4, **options).eval()
    head = detector.rpn.head if kind == "FasterRCNN" else detector.head
    seen: list[Any] = []
    head.register_forward_hook(lambda module, args, out: seen.append(out))
    images = [torch.rand(3, 80, 100), torch.rand(3, 96, 90)]
    with torch.no_grad():
        detector(images)
        mnv4_ops.enable()
        found = detector(images)
        report = mnv4_ops.explain(detector, images)
    assert not report.fallbacks
    assert len(report.served) == sum(len(stage) for stage in backbone.body.blocks) + 1
    # before boxes are chosen: near ties may fall the other way
    torch.testing.assert_close(seen[1], seen[0], **CLOSE)
    assert [sorted(f) for f in found] == [["boxes", "labels", "scores"]] * 2
    # training a detector is left as it is
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2
    losses = detector.train()(images, targets)
    sum(losses.values()).backward()
    assert backbone.body.conv_stem.weight.grad is not None
