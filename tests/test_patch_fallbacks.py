"""Every condition under which the original forward runs: the same result, a reason, an error in strict mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mnv4_ops
from mnv4_ops import _native, patch
from mnv4_ops.reference import randomize_
from mnv4_ops.serve import StrictError

timm = pytest.importorskip("timm")
B = pytest.importorskip("timm.models._efficientnet_blocks")
pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")


@pytest.fixture(autouse=True)
def _on() -> Any:
    patch.enable()
    yield
    patch.disable()


def make(**options: Any) -> nn.Module:
    given: dict[str, Any] = {"dw_kernel_size_start": 3, "dw_kernel_size_mid": 3, "exp_ratio": 2.0} | options
    return randomize_(B.UniversalInvertedResidual(16, 16, **given)).eval()


X = torch.randn(2, 16, 7, 6, generator=torch.Generator().manual_seed(1))


def check(
    block: nn.Module, reason: str, x: Any = X, monkeypatch: Any = None, call: Callable[[Any], Any] | None = None
) -> None:
    """The original runs, for this reason, and strict mode refuses."""
    call = call or block
    report = mnv4_ops.explain(call, x) if isinstance(call, nn.Module) else explain_call(block, call, x)
    assert [row.served for row in report.rows] == [False], str(report)
    assert reason in report.rows[0].by, report.rows[0].by
    got = call(x)
    patch.disable()
    want = call(x)
    patch.enable()
    if isinstance(want, Tensor):
        assert torch.equal(got, want)
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    with pytest.raises(StrictError, match="would run its original forward"):
        call(x)
    monkeypatch.delenv("MNV4_OPS_STRICT")


def explain_call(block: nn.Module, call: Callable[[Any], Any], x: Any) -> Any:
    from mnv4_ops import serve

    with serve.observe() as report:
        call(x)
    return report.finish(block, "not reached")


def test_served_without_any_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make()
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    with torch.no_grad():
        got = block(X)
        patch.disable()
        torch.testing.assert_close(got, block(X), rtol=1e-4, atol=1e-5)


STRUCTURE: dict[str, tuple[dict[str, Any], str]] = {
    "dilation": ({"dilation": 2}, "dilation 2"),
    "groups": ({"group_size": 4}, "groups"),
    "squeeze and excitation": ({"se_layer": B.SqueezeExcite}, "squeeze-and-excitation"),
    "end depthwise": ({"dw_kernel_size_end": 3}, "end depthwise"),
    "kernel 7": ({"dw_kernel_size_mid": 7}, "mid_kernel"),
    "blur pool": ({"aa_layer": "blurpc", "stride": 2}, "anti-aliasing"),
    "average pool": ({"aa_layer": "avg", "stride": 2}, "anti-aliasing"),
    "hard swish": ({"act_layer": nn.Hardswish}, "Hardswish"),
    "tanh gelu": ({"act_layer": lambda inplace=False: nn.GELU(approximate="tanh")}, "approximate='tanh'"),
    "valid padding": ({"pad_type": "valid", "noskip": True}, "padding"),
    "group norm": ({"norm_layer": "groupnorm1"}, "not a BatchNorm2d"),
    "no statistics": (
        {"norm_layer": lambda c, **kw: timm.layers.BatchNormAct2d(c, track_running_stats=False, **kw)},
        "no running statistics",
    ),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_structure(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, reason = STRUCTURE[case]
    with torch.no_grad():
        check(make(**options), reason, monkeypatch=monkeypatch)


def training(block: nn.Module) -> nn.Module:
    return block.train()


def bn_training(block: Any) -> nn.Module:
    block.pw_exp.bn.train()
    return block


def drop_path_training(block: Any) -> nn.Module:
    block.drop_path = timm.layers.DropPath(0.0).train()
    return block


def forward_hook(block: Any) -> nn.Module:
    block.pw_exp.conv.register_forward_hook(lambda *a: None)
    return block


def pre_hook(block: Any) -> nn.Module:
    block.pw_exp.bn.act.register_forward_pre_hook(lambda *a: None)
    return block


def parametrized(block: Any) -> nn.Module:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    parametrize.register_parametrization(block.pw_exp.conv, "weight", Double())
    return block


def pruned(block: Any) -> nn.Module:
    import torch.nn.utils.prune as prune

    prune.l1_unstructured(block.pw_exp.conv, "weight", 0.5)
    return block


def own_forward(block: Any) -> nn.Module:
    conv = block.pw_proj.conv
    conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)
    return block


def other_conv(block: Any) -> nn.Module:
    class LoRA(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    block.pw_exp.conv.__class__ = LoRA
    return block


def subclass(block: Any) -> nn.Module:
    class Mine(B.UniversalInvertedResidual):
        pass

    block.__class__ = Mine
    return block


def half_weights(block: Any) -> nn.Module:
    block.pw_exp.conv.double()
    return block


STATE: dict[str, tuple[Callable[[Any], nn.Module], str]] = {
    "training": (training, "training mode"),
    "inner BatchNorm training": (bn_training, "pw_exp.bn.training"),
    "drop path training": (drop_path_training, "training mode"),
    "forward hook": (forward_hook, "hooks"),
    "forward pre-hook": (pre_hook, "hooks"),
    "parametrization": (parametrized, "Parametrized"),
    "pruning": (pruned, "parameter or buffer"),
    "own forward": (own_forward, "own forward"),
    "another class of convolution": (other_conv, "LoRA"),
    "subclass of the block": (subclass, "subclass"),
}


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("case", STATE)
def test_state(case: str, warm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    change, reason = STATE[case]
    block = make()
    with torch.no_grad():
        if warm:
            block(X)
        block = change(block)
        if case.endswith("training"):
            # statistics move: compare on copies
            report = mnv4_ops.explain(block, X)
            assert [row.served for row in report.rows] == [False]
            assert reason in report.rows[0].by
            monkeypatch.setenv("MNV4_OPS_STRICT", "1")
            with pytest.raises(StrictError, match="training"):
                block(X)
            return
        check(block, reason, monkeypatch=monkeypatch)


def test_mixed_dtypes_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    block = half_weights(make())
    with torch.no_grad():
        report_error = pytest.raises(RuntimeError)
        with report_error:
            block(X)  # what torch says
    block.pw_exp.conv.float()
    with torch.no_grad():
        assert mnv4_ops.explain(block, X).served


def test_grad_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make()
    check(block, "requires grad", monkeypatch=monkeypatch)
    out = block(X)
    out.sum().backward()
    assert block.pw_exp.conv.weight.grad is not None
    with torch.no_grad():
        assert mnv4_ops.explain(block, X).served
    block.requires_grad_(False)
    assert mnv4_ops.explain(block, X).served
    check(block, "the input requires grad", X.clone().requires_grad_(), monkeypatch)
    block.pw_exp.bn.weight.requires_grad_()
    check(block, "pw_exp.bn.weight" if False else "requires grad", monkeypatch=monkeypatch)


def test_input_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sub(Tensor):
        pass

    block = make()
    with torch.no_grad():
        check(block, "Sub, not a plain torch.Tensor", X.as_subclass(Sub), monkeypatch)
        double = copy.deepcopy(block).double()
        check(double, "the input is float64", X.double(), monkeypatch)
        bf16 = copy.deepcopy(block).bfloat16()
        check(bf16, "the input is bfloat16", X.bfloat16(), monkeypatch)
        negated = torch.view_as_complex(torch.randn(2, 16, 7, 6, 2)).conj().imag
        assert negated.is_neg()
        check(block, "lazily negated", negated, monkeypatch)
        meta = copy.deepcopy(block).to("meta")
        assert not mnv4_ops.explain(meta, X.to("meta")).served
        # torch's own errors are left alone
        for bad in (X[:, :15], X[0, 0], X.double()):
            with pytest.raises(RuntimeError):
                block(bad)
        assert block(X[:0]).shape == (0, 16, 7, 6)


def test_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make()

    def flops(x: Tensor) -> Tensor:
        with FlopCounterMode(display=False) as counter:
            out = block(x)
        assert counter.get_total_flops() > 0
        return out

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = block(x)
        assert out.dtype == torch.bfloat16 or out.dtype == torch.float32
        return out

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    def spied(x: Tensor) -> Tensor:
        with Spy():
            return block(x)

    with torch.no_grad():
        check(block, "dispatch mode", monkeypatch=monkeypatch, call=flops)
        check(block, "autocast", monkeypatch=monkeypatch, call=autocast)
        check(block, "function mode Spy", monkeypatch=monkeypatch, call=spied)
        check(block, "functorch", monkeypatch=monkeypatch, call=lambda x: torch.vmap(lambda v: block(v[None])[0])(x))
        handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
        try:
            check(block, "global module hooks", monkeypatch=monkeypatch)
        finally:
            handle.remove()
        with torch.device("cpu"):
            assert mnv4_ops.explain(block, X).served
        assert mnv4_ops.explain(block, X).served


def test_functional_call_uses_the_given_parameters() -> None:
    block = make()
    with torch.no_grad():
        block(X)
        params = {k: v * 2 for k, v in block.named_parameters()}
        got = torch.func.functional_call(block, params, (X,))
        after = block(X)
        patch.disable()
        torch.testing.assert_close(got, torch.func.functional_call(block, params, (X,)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after, block(X), rtol=1e-4, atol=1e-4)


def test_hooks_on_a_block_run_and_the_block_is_served() -> None:
    seen = []
    block = make()
    block.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    with torch.no_grad():
        assert mnv4_ops.explain(block, X).served
    assert seen == [X.shape]


def test_other_models_keep_their_exact_outputs() -> None:
    names = ["mobilenetv3_small_050", "lcnet_035", "efficientnet_b0", "tf_mobilenetv3_small_100"]
    for name in names:
        model = randomize_(timm.create_model(name, num_classes=4)).eval()
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            got = model(x)
            patch.disable()
            assert torch.equal(got, model(x)), name
            patch.enable()


def test_mobilenetv5_encoder_keeps_its_exact_output() -> None:
    v5 = pytest.importorskip("timm.models.mobilenetv5")
    arch = timm.models._efficientnet_builder.decode_arch_def(
        [
            ["er_r1_k3_s2_e4_c16"],
            ["uir_r1_a3_k5_s2_e6_c32", "uir_r1_a5_k0_s1_e4_c32"],
            ["uir_r1_a5_k5_s2_e6_c48", "mqa_r1_k3_h2_s1_v2_d16_c48", "uir_r1_a0_k0_s1_e2_c48"],
            ["uir_r1_a5_k5_s2_e6_c64"],
        ]
    )
    encoder = v5.MobileNetV5Encoder(arch, stem_size=16, msfa_output_resolution=4).eval()
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        got = encoder(x)
        patch.disable()
        assert torch.equal(got, encoder(x))


def test_a_model_with_hooks_inside_is_served_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = randomize_(timm.create_model("mobilenetv4_conv_small_050", num_classes=4)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        seen: list[Any] = []
        handle = model.blocks[2][1].pw_exp.register_forward_hook(lambda m, a, out: seen.append(out.shape))
        report = mnv4_ops.explain(model, x)
        assert len(seen) == 1
        assert [row.name for row in report.fallbacks if row.name.startswith("blocks")] == ["blocks.2.1"]
        assert "blocks.2.2" in [row.name for row in report.served]
        handle.remove()
        assert not mnv4_ops.explain(model, x).fallbacks
        assert torch.equal(model(x), want)


def test_a_subclass_with_its_own_head_keeps_it() -> None:
    from timm.models.mobilenetv3 import MobileNetV3

    class Mine(MobileNetV3):
        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return super().forward_head(x, pre_logits) + 100

    model: Any = randomize_(timm.create_model("mobilenetv4_conv_small_050", num_classes=4)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = model(x) + 100
        model.__class__ = Mine
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-4)
