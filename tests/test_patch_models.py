"""Whole models: timm parity for every variant, features_only, no aten convolution left, the methods of the model."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import mnv4_ops
from mnv4_ops import _native, patch, reference
from mnv4_ops.reference import randomize_
from mnv4_ops.serve import StrictError

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")

CONV = [
    "mobilenetv4_conv_small_035",
    "mobilenetv4_conv_small_050",
    "mobilenetv4_conv_small",
    "mobilenetv4_conv_medium",
    "mobilenetv4_conv_large",
]
HYBRID = [
    "mobilenetv4_hybrid_medium_075",
    "mobilenetv4_hybrid_medium",
    "mobilenetv4_hybrid_large_075",
    "mobilenetv4_hybrid_large",
]
BLURRED = ["mobilenetv4_conv_aa_medium", "mobilenetv4_conv_blur_medium"]
SIZES = [(2, 96, 96), (1, 75, 101)]


@pytest.fixture(autouse=True)
def _off() -> Any:
    yield
    patch.disable()


@functools.lru_cache(maxsize=2)
def build(name: str, **options: Any) -> Any:
    return randomize_(timm.create_model(name, **options)).eval()


def assert_2x(got: Tensor, plain: Tensor, double: Tensor) -> None:
    """At most twice torch's own error, plus two units in the last place of the largest value."""
    assert got.shape == plain.shape
    assert got.dtype == plain.dtype
    limit = 2 * (plain - double).abs().max() + 2 * double.abs().max() * 2**-23
    assert (got - double).abs().max() <= limit


def compare(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        plain, double = model(x), copy.deepcopy(model).double()(x.double())
        with mnv4_ops.enable():
            got = model(x)
    if isinstance(plain, list):
        assert isinstance(got, list)
        assert len(got) == len(plain)
        for g, p, d in zip(got, plain, double, strict=True):
            assert_2x(g, p, d)
    else:
        assert_2x(got, plain, double)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CONV + HYBRID)
def test_parity_under_strict(name: str, size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    n, h, w = size
    compare(model, torch.randn(n, 3, h, w))


@pytest.mark.parametrize("name", BLURRED)
def test_parity_where_some_blocks_have_no_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(name), torch.randn(1, 3, 75, 64)
    compare(model, x)
    with torch.no_grad(), mnv4_ops.enable():
        report = mnv4_ops.explain(model, x)
        assert len(report.served) > len(report.fallbacks)
        assert all("anti-aliasing" in row.by for row in report.fallbacks)
        monkeypatch.setenv("MNV4_OPS_STRICT", "1")
        with pytest.raises(StrictError, match="anti-aliasing"):
            model(x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_parity_in_both_layouts(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(build("mobilenetv4_conv_medium")).to(memory_format=layout)
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    compare(model, torch.randn(2, 3, 64, 80).to(memory_format=layout))


def test_every_tier(tier: str) -> None:
    compare(build("mobilenetv4_conv_small_050"), torch.randn(1, 3, 65, 70))


@pytest.mark.parametrize(
    "options",
    [
        {"pad_type": "same"},
        {"act_layer": nn.ReLU6},
        {"act_layer": nn.GELU},
        {"in_chans": 5},
        {"drop_path_rate": 0.2, "drop_rate": 0.3},
        {"global_pool": "fast"},
        {"bn_eps": 1e-3},
    ],
    ids=lambda o: ",".join(o),
)
def test_options(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize_(timm.create_model("mobilenetv4_conv_small_050", **options)).eval()
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    compare(model, torch.randn(2, options.get("in_chans", 3), 65, 64))


def test_frozen_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.layers.freeze_batch_norm_2d(copy.deepcopy(build("mobilenetv4_conv_small_050"))).eval()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    compare(model, torch.randn(2, 3, 65, 64))


def test_head_without_classes_and_with_another_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 64, 64)
    for options in (
        {"num_classes": 0},
        {"num_classes": 3, "global_pool": "max"},
        {"num_classes": 0, "global_pool": ""},
    ):
        compare(randomize_(timm.create_model("mobilenetv4_conv_small_050", **options)).eval(), x)


def test_methods_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("mobilenetv4_conv_small"), torch.randn(2, 3, 64, 64)
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")

    def outputs() -> list[Tensor]:
        features = model.forward_features(x)
        last, intermediates = model.forward_intermediates(x)
        return [
            features,
            model.forward_head(features),
            model.forward_head(features, pre_logits=True),
            last,
            *intermediates,
        ]

    with torch.no_grad():
        want = outputs()
        with mnv4_ops.enable():
            got = outputs()
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", "mobilenetv4_hybrid_medium"])
@pytest.mark.parametrize("options", [{}, {"out_indices": (1, 3)}, {"output_stride": 16}], ids=str)
def test_features_only(name: str, options: dict[str, Any]) -> None:
    model = randomize_(timm.create_model(name, features_only=True, **options)).eval()
    x = torch.randn(1, 3, 96, 64)
    compare(model, x)
    with torch.no_grad(), mnv4_ops.enable():
        report = mnv4_ops.explain(model, x)
    assert "stem" in [row.name for row in report.served]


def aten_ops(model: nn.Module, x: Tensor) -> set[str]:
    with torch.inference_mode():
        model(x)
        with profile(activities=[ProfilerActivity.CPU]) as prof:
            model(x)
    return {event.key for event in prof.key_averages() if event.key.startswith(("aten::", "mkldnn"))}


@pytest.mark.no_poison
@pytest.mark.parametrize("name", CONV)
def test_no_aten_convolution_matmul_or_norm_is_left(name: str) -> None:
    model, x = build(name), torch.randn(1, 3, 64, 64)
    assert any("conv" in op for op in aten_ops(model, x))
    with mnv4_ops.enable():
        left = aten_ops(model, x)
    assert left <= {"aten::empty"}, left


def test_batch_of_zero_and_tiny_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mobilenetv4_conv_small")
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    with torch.no_grad(), mnv4_ops.enable():
        assert model(torch.randn(0, 3, 64, 64)).shape == (0, 1000)
    for size in ((1, 1), (1, 7), (33, 2)):
        compare(model, torch.randn(1, 3, *size))


@pytest.mark.parametrize("name", ["conv_small", "hybrid_medium"])
def test_reference_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({}, {"padding": "same", "bn_eps": 1e-3}):
        model = randomize_(reference.create_model(name, **options)).eval()
        monkeypatch.setenv("MNV4_OPS_STRICT", "1")
        compare(model, torch.randn(2, 3, 64, 71))
        monkeypatch.delenv("MNV4_OPS_STRICT")


def test_memory_beyond_the_packed_weights_is_small() -> None:
    core: Any = _native.core
    model = build("mobilenetv4_conv_large")
    with torch.inference_mode(), mnv4_ops.enable():
        model(torch.randn(1, 3, 384, 384))
    assert 0 < core.workspace_kept() <= core.WORKSPACE_LIMIT == 8 * 2**20
    packed = sum(p.native.packed_bytes for m in model.modules() for p in packed_of(m))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert packed <= 1.1 * weights


def packed_of(module: nn.Module) -> list[Any]:
    from mnv4_ops import cache

    side = cache._sides.get(id(module))
    return [] if side is None else list(side.packed.values())
