"""Quantised, pruned, parametrised modules and adapters of peft: left alone with the reason, served afterwards."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import mnv4_ops
from mnv4_ops import _native
from mnv4_ops.reference import randomize_

timm = pytest.importorskip("timm")
pytestmark = [
    pytest.mark.skipif(_native.core is None, reason="no native library"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
U = nn.utils


@functools.cache
def built() -> Any:
    return randomize_(timm.create_model("mobilenetv4_conv_small_035", num_classes=4)).eval()


def model() -> Any:
    return copy.deepcopy(built())


def check(m: nn.Module, original: dict[str, str]) -> None:
    """`original`: names of the only modules that run their own forward, with a part of the reason."""
    with torch.no_grad():
        want = m(X)
        with mnv4_ops.enable():
            for _ in range(2):
                report = mnv4_ops.explain(m, X)
                torch.testing.assert_close(m(X), want, rtol=1e-3, atol=1e-3)
    found = {row.name: row.by for row in report.fallbacks}
    assert found.keys() == original.keys(), report
    for name, part in original.items():
        assert part in found[name]
    assert len(report.served) >= 17 - len(original)


CONV = "blocks.2.1"  # an IB


def conv(m: Any) -> Any:
    return m.get_submodule(CONV).pw_exp.conv


UNDONE: dict[str, tuple[Any, Any, str]] = {
    "weight_norm": (U.parametrizations.weight_norm, lambda c: U.parametrize.remove_parametrizations(c, "weight"),
                    "ParametrizedConv2d"),
    "spectral_norm": (U.parametrizations.spectral_norm, lambda c: U.parametrize.remove_parametrizations(c, "weight"),
                      "ParametrizedConv2d"),
    "older_weight_norm": (U.weight_norm, U.remove_weight_norm, "pw_exp.conv.weight"),
    "older_spectral_norm": (U.spectral_norm, U.remove_spectral_norm, "pw_exp.conv.weight"),
    "pruning": (lambda c: U.prune.l1_unstructured(c, "weight", 0.5), lambda c: U.prune.remove(c, "weight"),
                "pw_exp.conv.weight"),
}  # fmt: skip


@pytest.mark.parametrize("way", UNDONE)
def test_reparametrised_weights(way: str) -> None:
    wrap, unwrap, reason = UNDONE[way]
    m = model()
    wrap(conv(m))
    check(m, {CONV: reason})
    unwrap(conv(m))
    check(m, {})


def test_dynamic_quantisation_of_the_classifier() -> None:
    m = model()
    # torch quantises exact nn.Linear only, and timm's is a subclass
    m.classifier, trained = nn.Linear(1280, 4), m.classifier
    m.classifier.load_state_dict(trained.state_dict())
    m = torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, torch.qint8)
    assert "classifier is a torch.ao.nn.quantized.dynamic" in check_reason(m)


def check_reason(m: nn.Module) -> str:
    """The reason for the head, which alone is left."""
    with torch.no_grad():
        want = m(X)
        with mnv4_ops.enable():
            got, report = m(X), mnv4_ops.explain(m, X)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert all(row.name in ("", "(model)", "forward_head", "head", "classifier") for row in report.fallbacks), report
    assert sum(row.name.startswith("blocks.") for row in report.served) == 17
    return " ".join(row.by for row in report.fallbacks)


def test_quantisation_aware_training() -> None:
    m = model().train()
    m.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    m = torch.ao.quantization.prepare_qat(m).eval()
    with torch.no_grad():
        m.apply(torch.ao.quantization.disable_observer)
        want = m(X)
        with mnv4_ops.enable():
            assert torch.equal(m(X), want)
            report = mnv4_ops.explain(m, X)
    assert not report.served
    assert "torch.ao.nn.qat" in report.fallbacks[0].by


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="waits for pip install torchao")
    m = model()
    quantization.quantize_(m, getattr(quantization, config)())
    assert "not a plain tensor" in check_reason(m)


def test_peft() -> None:
    peft = pytest.importorskip("peft", reason="waits for pip install peft")
    config = peft.LoraConfig(target_modules=r"blocks\.2\.1\.pw_exp\.conv", r=2, init_lora_weights=False)
    m = peft.get_peft_model(model(), config).eval()
    check(m, {f"base_model.model.{CONV}": "peft.tuners.lora"})
    merged = m.merge_and_unload()
    check(merged, {})
    # in training, and back
    m = peft.get_peft_model(model(), config)
    mnv4_ops.enable()
    m.train()(X).sum().backward()
    grads = [name for name, p in m.named_parameters() if p.grad is not None]
    assert grads
    assert all("lora" in name for name in grads)
