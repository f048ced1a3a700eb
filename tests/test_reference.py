"""The reference: modules against timm, functional against modules, the rest against plain arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.attention2d import MultiQueryAttention2d
from torch import Tensor, nn

from mnv4_ops.reference import create_model, functional, list_models, randomize_
from mnv4_ops.reference.modules import UIB, ConvBNAct, FusedIB, MobileMQA, build_block
from mnv4_ops.spec import VARIANTS, ConvSpec, FusedIBSpec, MQASpec, Spec, UIBSpec, ledger

TOLERANCE = 5e-6


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def timm_model(model: str, **options: Any) -> nn.Module:
    return timm.create_model(f"mobilenetv4_{model}", pretrained=False, **options).eval()


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("model", VARIANTS)
def test_timm_parity(model: str) -> None:
    ours, theirs = create_model(model).eval(), timm_model(model)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    side = 224 if model == "conv_small" else 96

    randomize_(theirs, seed=1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for size in ((side, side), (97, 65)):
        x = torch.randn(1, 3, *size)
        expected = theirs(x)
        assert expected.abs().max() > 0.1
        assert relative(ours(x), expected) <= TOLERANCE
        assert relative(ours(x.to(memory_format=torch.channels_last)), expected) <= TOLERANCE

    randomize_(ours, seed=2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert relative(ours(x), theirs(x)) <= TOLERANCE


@pytest.mark.parametrize("model", ["conv_small", "hybrid_medium_075"])
@pytest.mark.parametrize("options", [{"in_chans": 1}, {"num_classes": 10}, {"num_classes": 0}], ids=str)
def test_timm_parity_options(model: str, options: dict[str, int]) -> None:
    ours, theirs = create_model(model, **options).eval(), timm_model(model, **options)
    theirs.load_state_dict(randomize_(ours).state_dict(), strict=True)
    x = torch.randn(2, options.get("in_chans", 3), 65, 96)
    assert relative(ours(x), theirs(x)) <= TOLERANCE
    assert relative(ours.forward_features(x), theirs.forward_features(x)) <= TOLERANCE
    features = ours.forward_features(x)
    assert relative(ours.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True)) == 0


@pytest.mark.parametrize("model", ["conv_small", "hybrid_medium_075"])
@pytest.mark.parametrize("side", [64, 75])
def test_timm_parity_tf_padding_and_eps(model: str, side: int) -> None:
    ours = create_model(model, padding="same", bn_eps=1e-3, act="relu6").eval()
    theirs = timm_model(model, pad_type="same", bn_eps=1e-3, act_layer="relu6")
    theirs.load_state_dict(randomize_(ours).state_dict(), strict=True)
    x = torch.randn(1, 3, side, side)
    assert relative(ours(x), theirs(x)) <= TOLERANCE
    # the options are not idle
    assert relative(timm_model_with(model, ours)(x), theirs(x)) > 1e-3


def timm_model_with(model: str, source: nn.Module) -> nn.Module:
    plain = timm_model(model)
    plain.load_state_dict(source.state_dict())
    return plain


def test_train_mode_and_gradients_match_timm() -> None:
    ours, theirs = create_model("conv_small_035", num_classes=10), timm_model("conv_small_035", num_classes=10)
    theirs.load_state_dict(randomize_(ours).state_dict())
    x = torch.randn(4, 3, 64, 64)
    with torch.enable_grad():
        a, b = ours.train()(x), theirs.train()(x)
        a.square().sum().backward()
        b.square().sum().backward()
    assert relative(a, b) <= TOLERANCE
    assert relative(ours.conv_stem.weight.grad, theirs.conv_stem.weight.grad) <= 1e-4
    assert relative(ours.bn1.running_mean, theirs.bn1.running_mean) <= TOLERANCE


def test_model_interface() -> None:
    assert list_models() == list(VARIANTS)
    model = create_model("mobilenetv4_conv_small", dtype=torch.float64, device="meta")
    assert all(p.dtype == torch.float64 and p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(r.params for r in ledger("conv_small")) == 3_774_024
    assert (model.num_features, model.head_hidden_size, model.head_spec.classes) == (960, 1280, 1000)
    model.reset_classifier(7)
    assert model.get_classifier().weight.shape == (7, 1280)
    assert model.get_classifier().weight.dtype == torch.float64
    assert model.head_spec.classes == 7
    with pytest.raises(ValueError, match="model: expected one of conv_small"):
        create_model("conv_tiny")
    with pytest.raises(ValueError, match="padding in"):
        create_model("conv_small", padding="valid")
    with pytest.raises(ValueError, match="act in"):
        create_model("conv_small", act="silu")


@pytest.mark.parametrize("model", VARIANTS)
def test_ledger_matches_modules(model: str) -> None:
    net = create_model(model, device="meta")
    modules = {"classifier": net.classifier}
    modules |= {f"{i}.{j}": block for i, stage in enumerate(net.blocks) for j, block in enumerate(stage)}
    rows = {r.name: r for r in ledger(model)}
    assert set(rows) - set(modules) == {"stem", "pool", "conv_head"}
    for name, module in modules.items():
        assert sum(p.numel() for p in module.parameters()) == rows[name].params, name
        if name != "classifier":
            assert module.spec == rows[name].spec
    assert sum(p.numel() for p in net.parameters()) == sum(r.params for r in rows.values())


BLOCKS: list[Spec] = [
    *(
        UIBSpec(16, 48, 16 if stride == 1 else 24, start, mid, stride, act, padding, stride == 1, scale)
        for start in (0, 3, 5)
        for mid in (0, 3, 5)
        for stride in (1, 2)
        if stride == 1 or start or mid
        for act, padding, scale in (("relu", "symmetric", False), ("gelu", "same", True))
    ),
    UIBSpec(16, 48, 24, 3, 5, act="none"),
    FusedIBSpec(16, 64, 24, 3, 2),
    FusedIBSpec(16, 64, 24, 3, 2, "relu6", "same"),
    FusedIBSpec(16, 32, 16, 5, 1, residual=True),
    ConvSpec(3, 32, 3, 2),
    ConvSpec(3, 32, 3, 2, "gelu", "same"),
    ConvSpec(16, 32, 1, 1),
    ConvSpec(16, 16, 5, 2, padding="same", depthwise=True),
    *(
        MQASpec(32, 4, 16, 24, kv_stride, query_stride, layer_scale=scale, padding=padding)
        for kv_stride in (1, 2)
        for query_stride in (1, 2)
        for scale, padding in ((True, "symmetric"), (False, "same"))
    ),
    MQASpec(32, 2, 48, 48, kv_stride=2, kv_kernel=5, residual=False),
]


@pytest.mark.parametrize("spec", BLOCKS, ids=repr)
def test_functional_is_module(spec: Spec) -> None:
    block = randomize_(build_block(spec), seed=3).double().eval()
    even = isinstance(spec, MQASpec) and spec.query_stride > 1
    h, w = (14, 10) if even else (13, 10)
    x = torch.randn(2, spec.channels[0], h, w, dtype=torch.float64)
    expected = block(x)
    assert expected.shape == (2, spec.channels[1], *spec.out_hw(h, w))
    assert relative(functional.run(x, spec, block.params()), expected) <= 1e-13
    single = functional.run(x.float(), spec, functional.cast(block.params(), torch.float32))
    assert relative(single.double(), expected) <= 5e-6


def test_functional_whole_model() -> None:
    model = randomize_(create_model("hybrid_medium_075", num_classes=10)).double().eval()
    x = torch.randn(1, 3, 65, 96, dtype=torch.float64)
    y = functional.run(x, model.stem_spec, model.stem_params())
    for stage in model.blocks[:-1]:
        for block in stage:
            y = functional.run(y, block.spec, block.params())
    assert relative(functional.head(y, model.head_spec, model.head_params()), model(x)) <= 1e-12
    with pytest.raises(TypeError, match="run: expected spec of ConvSpec"):
        functional.run(x, "conv", None)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(12, 12), (13, 12), (7, 8), (1, 2)], ids=str)
def test_same_padding(kernel: int, stride: int, size: tuple[int, int]) -> None:
    # TF: the output has ceil(size / stride) pixels, the padding is what that needs, and the odd zero goes after
    pads: list[int] = []
    for n in reversed(size):
        need = max((math.ceil(n / stride) - 1) * stride + kernel - n, 0)
        pads += [need // 2, need - need // 2]
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    dense = torch.randn(6, 4, kernel, kernel, dtype=torch.float64)
    taps = torch.randn(4, 1, kernel, kernel, dtype=torch.float64)
    padded = F.pad(x, pads)
    out = functional.conv2d(x, dense, stride=stride, padding="same")
    assert out.shape[-2:] == (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    assert relative(out, F.conv2d(padded, dense, stride=stride)) <= 1e-14
    # one output at a time, from the definition
    dw = functional.depthwise(x, functional.ConvBN(taps), stride=stride, padding="same")
    for i in range(dw.shape[-2]):
        for j in range(dw.shape[-1]):
            window = padded[:, :, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
            assert torch.allclose(dw[:, :, i, j], (window * taps[:, 0]).sum((2, 3)), rtol=0, atol=1e-13)


def test_symmetric_and_same_differ_only_where_they_should() -> None:
    x, weight = torch.randn(1, 4, 12, 13), torch.randn(6, 4, 3, 3)
    same, symmetric = (functional.conv2d(x, weight, stride=2, padding=p) for p in ("same", "symmetric"))
    assert not torch.equal(same, symmetric)
    odd = x[:, :, :11]
    assert torch.equal(*(functional.conv2d(odd, weight, stride=2, padding=p) for p in ("same", "symmetric")))
    assert torch.equal(*(functional.conv2d(x, weight, padding=p) for p in ("same", "symmetric")))
    with pytest.raises(ValueError, match=r"expected padding in .*got 'valid'"):
        functional.conv2d(x, weight, padding="valid")
    with pytest.raises(ValueError, match=r"expected act in .*got 'silu'"):
        functional.activation(x, "silu")


@pytest.mark.parametrize("spec", [s for s in BLOCKS if isinstance(s, MQASpec) and s.padding == "symmetric"], ids=repr)
def test_attention_matches_timm(spec: MQASpec) -> None:
    block = randomize_(MobileMQA(spec), seed=4).double().eval()
    theirs = MultiQueryAttention2d(
        spec.c,
        num_heads=spec.heads,
        key_dim=spec.key_dim,
        value_dim=spec.value_dim,
        query_strides=spec.query_stride,
        kv_stride=spec.kv_stride,
        dw_kernel_size=spec.kv_kernel,
    )
    theirs = theirs.double().eval()
    theirs.load_state_dict(block.attn.state_dict(), strict=True)
    x = torch.randn(2, spec.c, 10, 14, dtype=torch.float64)
    assert relative(block.attn(x), theirs(x)) <= 1e-12


def test_attention_from_the_definition() -> None:
    heads, dk, dv, nk = 3, 4, 5, 6
    q, k, v = torch.randn(1, heads * dk, 2, 2), torch.randn(1, dk, 2, 3), torch.randn(1, dv, 2, 3)
    out = functional.attention(q, k, v, heads).reshape(heads, dv, 4)
    for head in range(heads):
        for pixel in range(4):
            query = q[0, head * dk : (head + 1) * dk].flatten(1)[:, pixel]
            scores = [float(query @ k[0].flatten(1)[:, key]) / math.sqrt(dk) for key in range(nk)]
            total = sum(math.exp(s) for s in scores)
            expected = sum(math.exp(s) / total * v[0].flatten(1)[:, key] for key, s in enumerate(scores))
            assert torch.allclose(out[head, :, pixel], expected, rtol=1e-5, atol=1e-6)


def test_query_pooling() -> None:
    x = torch.randn(2, 3, 5, 6)
    pooled = functional.query_pool(x, 2, "symmetric")
    assert pooled.shape == (2, 3, 2, 3)
    assert torch.allclose(pooled[:, :, 1, 2], x[:, :, 2:4, 4:6].mean((2, 3)))
    same = functional.query_pool(x, 2, "same")
    assert same.shape == (2, 3, 3, 3)
    # the last row has one row of pixels, and the zeros beside it do not count
    assert torch.allclose(same[:, :, 2, 1], x[:, :, 4, 2:4].mean(2))
    # bilinear without aligned corners: inner pixels are 3/4 of the near and 1/4 of the far neighbour, corners are kept
    up = functional.query_unpool(pooled, 2)
    assert up.shape == (2, 3, 4, 6)
    assert torch.equal(up[:, :, 0, 0], pooled[:, :, 0, 0])
    assert torch.allclose(up[:, :, 0, 1], 0.75 * pooled[:, :, 0, 0] + 0.25 * pooled[:, :, 0, 1], atol=1e-6)


@pytest.mark.parametrize("spec", [UIBSpec(8, 16, 8, 3, 3, residual=True), FusedIBSpec(8, 16, 8), MQASpec(8, 2, 4, 4)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_as_in_modules(spec: Spec, bad: float) -> None:
    block = randomize_(build_block(spec)).eval()
    x = torch.randn(1, 8, 12, 12)
    x[0, 3, 5, 6] = bad
    expected = block(x)
    actual = functional.run(x, spec, block.params())
    assert not expected.isfinite().all()
    assert torch.equal(actual.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert torch.allclose(actual[finite], expected[finite], rtol=1e-5, atol=1e-5)
    # a convolution spreads the fault only as far as its kernels reach, attention over all queries
    assert finite.any() == (not isinstance(spec, MQASpec))


@pytest.mark.parametrize("act", ["relu", "relu6", "gelu", "none"])
def test_activation_nan(act: str) -> None:
    x = torch.tensor([math.nan, math.inf, -3.0, 0.5, 9.0], dtype=torch.float64)
    y = functional.activation(x, act)
    expected = {
        "relu": max(0.0, -3.0),
        "relu6": 0.0,
        "gelu": -3 * 0.5 * (1 + math.erf(-3 / math.sqrt(2))),
        "none": -3.0,
    }
    assert y[0].isnan()
    assert y[1] == (6.0 if act == "relu6" else math.inf)
    assert y[2].item() == pytest.approx(expected[act], rel=1e-12, abs=1e-15)
    assert y[4].item() == pytest.approx(6.0 if act == "relu6" else 9.0, rel=1e-12)


@pytest.mark.parametrize("model", ["conv_small", "conv_large", "hybrid_medium"])
def test_randomize_keeps_activations_in_scale(model: str) -> None:
    net = randomize_(create_model(model)).eval()
    rms = []
    for stage in net.blocks:
        for block in stage:
            block.register_forward_hook(lambda _m, _i, out: rms.append(out.square().mean().sqrt().item()))
    logits = net(torch.randn(1, 3, 224, 224))
    assert min(rms) > 0.3
    assert max(rms) < 8
    assert 0.3 < logits.square().mean().sqrt() < 3
    for name, value in net.state_dict().items():
        if "running_var" in name or ("bn" in name and name.endswith("weight")):
            assert 0.5 <= value.min() <= value.max() <= 1.5, name
        elif "gamma" in name:
            assert 0.2 <= value.min() <= value.max() <= 1.0, name
        elif "running_mean" in name:
            assert 0.05 < value.std() < 0.2, name


def test_randomize_is_reproducible() -> None:
    first = randomize_(create_model("conv_small_035"), seed=5).state_dict()
    second = randomize_(create_model("conv_small_035"), seed=5).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = randomize_(create_model("conv_small_035"), seed=6).state_dict()
    assert not torch.equal(first["conv_stem.weight"], other["conv_stem.weight"])
    half = randomize_(create_model("conv_small_035").to(torch.bfloat16), seed=5).state_dict()
    assert half["conv_stem.weight"].dtype == torch.bfloat16
    assert torch.equal(half["conv_stem.weight"], first["conv_stem.weight"].to(torch.bfloat16))
    theirs = randomize_(timm_model("conv_small_035"), seed=5).state_dict()
    assert all(relative(first[k].float(), theirs[k].float()) < 1e-5 for k in first if first[k].any())


def test_build_block() -> None:
    assert isinstance(build_block(UIBSpec(8, 16, 8)), UIB)
    assert isinstance(build_block(FusedIBSpec(8, 16, 8)), FusedIB)
    assert isinstance(build_block(ConvSpec(8, 16)), ConvBNAct)
    assert build_block(ConvSpec(8, 16), {"eps": 1e-3}).bn1.eps == 1e-3
    with pytest.raises(TypeError, match="build_block: expected spec of ConvSpec"):
        build_block(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="affine=True and track_running_stats=True"):
        build_block(ConvSpec(8, 16), {"affine": False}).params()
