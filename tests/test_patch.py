"""enable, disable, handles, explain: what is patched when, and that nothing is left behind."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import tempfile
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mnv4_ops
from mnv4_ops import _native, patch, reference
from mnv4_ops.reference import randomize_

timm = pytest.importorskip("timm")
blocks = pytest.importorskip("timm.models._efficientnet_blocks")
mobilenetv3 = pytest.importorskip("timm.models.mobilenetv3")
pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")

CLASSES = [
    (blocks.UniversalInvertedResidual, "forward"),
    (blocks.EdgeResidual, "forward"),
    (blocks.ConvBnAct, "forward"),
    (blocks.MobileAttention, "forward"),
    (mobilenetv3.MobileNetV3, "forward"),
    (mobilenetv3.MobileNetV3, "forward_features"),
    (mobilenetv3.MobileNetV3, "forward_head"),
    (mobilenetv3.MobileNetV3Features, "forward"),
    (reference.UIB, "forward"),
    (reference.MobileNetV4, "forward"),
]


@pytest.fixture(autouse=True)
def _off() -> Any:
    yield
    patch.disable()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomize_(timm.create_model("mobilenetv4_conv_small_050", num_classes=11)).eval()


X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def served(model: nn.Module, x: Tensor = X) -> bool:
    with torch.no_grad():
        report = mnv4_ops.explain(model, x)
    assert bool(report.served) != bool(report.fallbacks) or report.served or report.rows
    return bool(report.served)


def snapshot(model: nn.Module) -> list[Any]:
    return [
        (name, type(m), sorted(m.__dict__), {k: id(v) for k, v in m.__dict__.items()})
        for name, m in model.named_modules()
    ]


def test_round_trip_is_bit_equal_and_leaves_no_trace(model: nn.Module) -> None:
    originals = [cls.__dict__[method] for cls, method in CLASSES]
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        want = model(X)
        mnv4_ops.enable()
        assert all(cls.__dict__[method] is not o for (cls, method), o in zip(CLASSES, originals, strict=True))
        fused = model(X)
        assert snapshot(model) == before
        mnv4_ops.disable()
        assert torch.equal(model(X), want)
    assert [cls.__dict__[method] for cls, method in CLASSES] == originals
    assert snapshot(model) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(fused, want, rtol=1e-4, atol=1e-4)


def test_enable_is_idempotent_and_disable_clears_everything(model: nn.Module) -> None:
    original = blocks.UniversalInvertedResidual.__dict__["forward"]
    mnv4_ops.enable()
    wrapper = blocks.UniversalInvertedResidual.__dict__["forward"]
    mnv4_ops.enable()
    assert blocks.UniversalInvertedResidual.__dict__["forward"] is wrapper
    with mnv4_ops.enable():
        mnv4_ops.disable()
        assert not served(model)
    assert not served(model)
    assert blocks.UniversalInvertedResidual.__dict__["forward"] is original


def test_handles_nest_and_restore(model: nn.Module) -> None:
    with mnv4_ops.enable():
        assert served(model)
        with mnv4_ops.enable():
            assert served(model)
        assert served(model)
        with mnv4_ops.enable(model):
            pass
        assert served(model)
    assert not served(model)
    mnv4_ops.enable()
    with mnv4_ops.enable():
        pass
    assert served(model)


def test_enable_model_serves_that_model_only(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    with mnv4_ops.enable(model):
        assert served(model)
        assert not served(other)
        assert not served(copy.deepcopy(model))
        with mnv4_ops.enable(other):
            assert served(other)
            assert served(model)
        assert not served(other)
    assert not served(model)
    with pytest.raises(TypeError, match=r"expected model to be an nn\.Module or None, got str"):
        mnv4_ops.enable("conv_small")  # type: ignore[arg-type]


def test_a_model_that_died_leaves_no_id_behind() -> None:
    model = timm.create_model("mobilenetv4_conv_small_035", num_classes=0)
    mnv4_ops.enable(model)
    assert patch._switch.ids
    del model
    import gc

    gc.collect()
    assert not patch._switch.ids


def test_handles_of_two_threads(model: nn.Module) -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with mnv4_ops.enable():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with mnv4_ops.enable():
        thread.start()
        assert inside.wait(30)
    assert served(model)
    leave.set()
    thread.join()
    assert not served(model)


def test_copies_and_pickles(model: nn.Module) -> None:
    with torch.no_grad(), mnv4_ops.enable():
        want = model(X)
        assert torch.equal(copy.deepcopy(model)(X), want)
        assert torch.equal(pickle.loads(pickle.dumps(model))(X), want)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(X), want)
        fresh = timm.create_model("mobilenetv4_conv_small_050", num_classes=11).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(X), want)
        forward = model.forward
        assert torch.equal(pickle.loads(pickle.dumps(forward))(X), want)


def test_somebody_who_patches_on_top_is_left_alone(model: nn.Module) -> None:
    cls = blocks.UniversalInvertedResidual
    original = cls.forward
    mnv4_ops.enable()
    ours = cls.forward
    cls.forward = lambda self, x: ours(self, x)
    theirs = cls.forward
    try:
        mnv4_ops.disable()
        assert cls.forward is theirs
        with torch.no_grad():
            got = model(X)
        cls.forward = original
        with torch.no_grad():
            assert torch.equal(model(X), got)
    finally:
        cls.forward = ours
        mnv4_ops.enable()
        mnv4_ops.disable()
    assert cls.forward is original


def run(code: str) -> str:
    # not in the checkout, whose bare source tree would be imported
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tempfile.gettempdir()
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_enable_before_timm_is_imported() -> None:
    code = """
import sys, torch, mnv4_ops
mnv4_ops.enable()
assert "timm" not in sys.modules
import timm
m = timm.create_model("mobilenetv4_conv_small_035").eval()
with torch.no_grad():
    r = mnv4_ops.explain(m, torch.randn(1, 3, 64, 64))
assert r.served and not r.fallbacks, str(r)
mnv4_ops.disable()
assert not any(name.startswith("timm") for name in mnv4_ops.imports._waiting)
assert not mnv4_ops.explain(m, torch.randn(1, 3, 64, 64)).served
print("fine")
"""
    assert "fine" in run(code)


def test_without_the_native_library() -> None:
    code = """
import os
os.environ["MNV4_OPS_SKIP_NATIVE"] = "1"
import torch, mnv4_ops
m = mnv4_ops.reference.create_model("conv_small_035").eval()
mnv4_ops.enable()
with torch.no_grad():
    r = mnv4_ops.explain(m, torch.randn(1, 3, 32, 32))
assert not r.served and "native library is not loaded" in str(r), str(r)
print("fine")
"""
    assert "fine" in run(code)


def test_explain_lists_every_block(model: nn.Module) -> None:
    mnv4_ops.enable()
    with torch.no_grad():
        report = mnv4_ops.explain(model, X)
    assert not report.fallbacks
    names = [row.name for row in report.served]
    assert names[0] == "stem"
    assert names[-1] == "head"
    assert "blocks.2.0" in names
    text = str(report)
    assert "ExtraDW" in text
    assert "mnv4::uib" in text
    mnv4_ops.disable()
    rows = mnv4_ops.explain(model, X).rows
    assert rows
    assert all(row.served is None and row.by == "mnv4_ops is not enabled" for row in rows)


def test_two_threads_at_once() -> None:
    models = [
        randomize_(timm.create_model("mobilenetv4_conv_small_035", num_classes=5), seed).eval() for seed in (1, 2)
    ]
    with torch.no_grad():
        want = [m(X) for m in models]
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def work(i: int) -> None:
        try:
            torch.set_num_threads(1)
            start.wait(30)
            with torch.inference_mode():
                for _ in range(10):
                    torch.testing.assert_close(models[i % 2](X), want[i % 2], rtol=1e-4, atol=1e-4)
        except BaseException as error:
            errors.append(error)

    threads = torch.get_num_threads()
    mnv4_ops.enable()
    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    torch.set_num_threads(threads)
    assert not errors, errors[0]


def test_thread_count_is_obeyed_and_does_not_change_results(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before, results = torch.get_num_threads(), []
    try:
        with torch.no_grad(), mnv4_ops.enable():
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(model(X))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)
