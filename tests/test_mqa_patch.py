"""Attention blocks of timm and of the reference modules under `enable()`, and hybrid models as a whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rule import assert_2x
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import mnv4_ops
from mnv4_ops import _native, patch
from mnv4_ops.reference import randomize_
from mnv4_ops.reference.modules import build_block
from mnv4_ops.serve import StrictError
from mnv4_ops.spec import MQASpec

timm = pytest.importorskip("timm")
B = pytest.importorskip("timm.models._efficientnet_blocks")
A = pytest.importorskip("timm.layers.attention2d")
pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")
# classes: the largest error of three logits is a matter of luck (one input in ten fails the 2x rule at equal errors)
MANY = 301
FORBIDDEN = ("conv", "matmul", "::mm", "bmm", "addmm", "linear", "attention", "softmax")


def make(**options: Any) -> Any:
    given: dict[str, Any] = {"num_heads": 2, "key_dim": 16, "value_dim": 24, "use_multi_query": True, "kv_stride": 2}
    return randomize_(B.MobileAttention(32, 32, **(given | options))).eval()


X = torch.randn(2, 32, 8, 10, generator=torch.Generator().manual_seed(1))


def strict(module: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """By the 2x rule against the original, without a fallback."""
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    with torch.inference_mode():
        plain, double = module(x), copy.deepcopy(module).double()(x.double())
        with mnv4_ops.enable():
            got = module(x)
            assert not mnv4_ops.explain(module, x).fallbacks
    assert_2x(got, plain, double)
    return got


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_stride": 1},
        {"dw_kernel_size": 5},
        {"noskip": True},
        {"layer_scale_init_value": None},
        {"query_strides": 2},
        {"query_strides": (2, 2), "kv_stride": 1},
        {"pad_type": "same"},
        {"key_dim": 48, "value_dim": 48, "num_heads": 3},
        {"drop_path_rate": 0.1, "attn_drop": 0.1, "proj_drop": 0.1},
        {"norm_layer": nn.BatchNorm2d, "act_layer": nn.GELU},
    ],
    ids=str,
)
def test_variants_of_timm(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    out = strict(make(**options), X, monkeypatch)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("query_strides", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_the_attention_of_timm_alone(query_strides: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = A.MultiQueryAttention2d(
        32, num_heads=2, key_dim=16, value_dim=8, kv_stride=2, query_strides=query_strides, use_bias=bias
    )
    strict(randomize_(module).eval(), X, monkeypatch)


@pytest.mark.parametrize("spec", [MQASpec(32, 2, 16, 24, 2, layer_scale=True), MQASpec(32, 2, 16, 8, 1, 2),
                                  MQASpec(32, 2, 16, 8, 2, padding="same", residual=False)], ids=repr)  # fmt: skip
def test_reference_modules(spec: MQASpec, monkeypatch: pytest.MonkeyPatch) -> None:
    strict(randomize_(build_block(spec)).eval(), X, monkeypatch)


def test_changed_weights_and_statistics_are_noticed() -> None:
    block = make()
    with torch.no_grad(), mnv4_ops.enable():
        block(X)
        for change in (
            lambda: block.norm.bias.add_(0.5),
            lambda: block.norm.running_mean.mul_(1.5),
            lambda: block.attn.key.norm.weight.mul_(2),
            lambda: block.attn.query.proj.weight.mul_(3),
            lambda: block.layer_scale.gamma.mul_(0.5),
        ):
            before = block(X)
            change()
            after = block(X)
            assert not torch.equal(before, after)
            patch.disable()
            torch.testing.assert_close(after, block(X), rtol=1e-4, atol=1e-4)
            patch.enable()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda: make(use_cpe=True), "a conditional position encoding has no kernel"),
        (lambda: make(use_multi_query=False), "is a Attention2d: only MultiQueryAttention2d has a kernel"),
        (lambda: make(dilation=2), "dilation 2 has no kernel"),
        (lambda: _with(make(), "norm", nn.InstanceNorm2d(32)), "not a BatchNorm2d"),
        (lambda: _with(make(), "attn.output.drop", nn.Dropout(0.0).train()), "training mode"),
        (lambda: _with(make(), "attn.query.proj", nn.Conv2d(32, 32, 3, padding=1)), "only a 1x1 projection"),
        (lambda: _hooked(make()), "hooks"),
        (lambda: make().train(), "training mode"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_blocks_run_their_original(change: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = change()
    with torch.no_grad(), mnv4_ops.enable():
        rows = {row.name: row for row in mnv4_ops.explain(block, X).rows}
        assert rows["(model)"].served is False
        assert reason in rows["(model)"].by, rows["(model)"].by
        if not block.training:
            got = block(X)
            monkeypatch.setenv("MNV4_OPS_STRICT", "1")
            with pytest.raises(StrictError, match="would run its original forward"):
                block(X)
            patch.disable()
            torch.testing.assert_close(got, block(X), rtol=1e-4, atol=1e-4)


def _with(block: Any, name: str, module: nn.Module) -> Any:
    owner, _, last = name.rpartition(".")
    setattr(block.get_submodule(owner), last, module)
    return block


def _hooked(block: Any) -> Any:
    block.attn.key.proj.register_forward_hook(lambda *_: None)
    return block


def test_the_attention_inside_of_an_original_block_is_fused() -> None:
    with torch.no_grad(), mnv4_ops.enable():
        rows = {row.name: row for row in mnv4_ops.explain(make(use_cpe=True), X).rows}
    assert rows["attn"].served


def test_a_mask_and_another_attention_run_their_original(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, mask = make().attn, torch.randn(80, 20)
    v2 = randomize_(A.MultiQueryAttentionV2(32, num_heads=2)).eval()
    with torch.no_grad():
        want, other = attention(X, mask), v2(X)
        with mnv4_ops.enable():
            monkeypatch.setenv("MNV4_OPS_STRICT", "1")
            assert torch.equal(v2(X), other)
            attention(X, None)
            with pytest.raises(StrictError, match="attn_mask is given"):
                attention(X, mask)
            monkeypatch.delenv("MNV4_OPS_STRICT")
            assert torch.equal(attention(X, attn_mask=mask), want)


def test_sizes_that_queries_cannot_be_pooled_to_run_their_original() -> None:
    block = make(query_strides=2, noskip=True)
    odd = torch.randn(1, 32, 9, 7)
    with torch.no_grad():
        want = block(odd)
        with mnv4_ops.enable():
            torch.testing.assert_close(block(odd), want, rtol=1e-4, atol=1e-4)
            for x in (torch.randn(1, 32, 1, 6), torch.randn(1, 32, 9, 7)):
                with pytest.raises(RuntimeError, match=r"Output size|must match"):
                    (block if x.shape[2] == 1 else make(query_strides=2))(x)


def test_a_compiled_block_calls_the_op() -> None:
    block = make()
    with torch.inference_mode():
        want = block(X)
        with mnv4_ops.enable():
            seen: list[str] = []

            def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
                seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
                return graph.forward

            torch.testing.assert_close(torch.compile(block, backend=backend)(X), want, rtol=1e-4, atol=1e-4)
            torch.compiler.reset()
    assert seen == ["mnv4.module"], seen


@pytest.mark.parametrize(("name", "side"), [("mobilenetv4_hybrid_medium", 256), ("mobilenetv4_hybrid_large", 224)])
def test_hybrids_are_one_program(name: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize_(timm.create_model(name, num_classes=MANY)).eval()
    x = torch.randn(1, 3, side, side)
    strict(model, x, monkeypatch)
    with torch.inference_mode(), mnv4_ops.enable():
        report = mnv4_ops.explain(model, x)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            model(x)
    assert sum(row.by == "mnv4::mobile_mqa" for row in report.served) == 8
    names = {event.key for event in seen.key_averages()}
    assert not [n for n in names if n.startswith("aten::") and any(word in n for word in FORBIDDEN)], names


def test_a_pooled_block_in_a_model_is_called_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize_(timm.create_model("mobilenetv4_hybrid_medium_075", num_classes=MANY)).eval()
    model.blocks[3][8] = B.MobileAttention(
        192, 192, num_heads=4, key_dim=16, value_dim=16, use_multi_query=True, query_strides=2
    )
    randomize_(model.blocks[3][8].eval())
    strict(model, torch.randn(1, 3, 64, 64), monkeypatch)
    with torch.inference_mode():
        plain = model(torch.ones(1, 3, 128, 64))
        with mnv4_ops.enable():
            torch.testing.assert_close(model(torch.ones(1, 3, 128, 64)), plain, rtol=1e-3, atol=1e-3)
