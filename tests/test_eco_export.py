"""Exporters, tracing and scripting of enabled models give the original graph; packages run where nothing is enabled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import model_of_few_blocks
from torch import Tensor

import mnv4_ops
from mnv4_ops import _native

pytest.importorskip("timm")
pytestmark = [
    pytest.mark.skipif(_native.core is None, reason="no native library"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def served() -> tuple[Any, Tensor]:
    """An enabled model that has been called, and what the original gives."""
    m = model_of_few_blocks("mobilenetv4_conv_small_050", num_classes=6)
    with torch.no_grad():
        want = m(X)
        mnv4_ops.enable()
        m(X)
    return m, want


@pytest.mark.parametrize("strict", [True, False])
def test_export_is_the_original_graph(served: tuple[Any, Tensor], strict: bool, tmp_path: Path) -> None:
    m, want = served
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(m, (X,), strict=strict, dynamic_shapes=({0: batch},))
        assert "mnv4" not in str(exported.graph)
        torch.export.save(exported, tmp_path / "model.pt2")
        module = torch.export.load(tmp_path / "model.pt2").module()
        assert torch.equal(module(X), want)
        assert module(X[:1]).shape == (1, 6)


@pytest.mark.slow
def test_an_aot_inductor_package_runs_in_a_process_without_us(served: tuple[Any, Tensor], tmp_path: Path) -> None:
    m, want = served
    with torch.no_grad():
        m = m.blocks[0]  # less to compile
        want = m(torch.ones(1, 32, 16, 16))
        exported = torch.export.export(m, (torch.ones(1, 32, 16, 16),))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    torch.save(want, tmp_path / "want.pt")
    code = (
        "import sys, torch\n"
        f"got = torch._inductor.aoti_load_package({str(package)!r})(torch.ones(1, 32, 16, 16))\n"
        f"want = torch.load({str(tmp_path / 'want.pt')!r})\n"
        "assert torch.allclose(got, want, rtol=1e-4, atol=1e-5), (got - want).abs().max()\n"
        "assert 'mnv4_ops' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_is_the_original_graph(served: tuple[Any, Tensor], dynamo: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    m, want = served
    path = tmp_path / "model.onnx"
    torch.onnx.export(m, (X,), str(path), dynamo=dynamo, verbose=False)
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "pkg.onnxscript.torch_lib.common"}
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", ["trace", "script"])
def test_torchscript_is_the_original_graph(served: tuple[Any, Tensor], way: str, tmp_path: Path) -> None:
    m, want = served
    with torch.no_grad():
        made = torch.jit.trace(m, X) if way == "trace" else torch.jit.script(m)
        assert "mnv4::" not in str(made.inlined_graph)
        made.save(tmp_path / "model.pt")
        loaded = torch.jit.load(tmp_path / "model.pt")
        assert torch.equal(loaded(X), want)
        torch.testing.assert_close(torch.jit.freeze(loaded)(X), want, rtol=1e-4, atol=1e-4)
    # tracing leaves the enabled model as it was
    with torch.no_grad():
        assert not mnv4_ops.explain(m, X).fallbacks
