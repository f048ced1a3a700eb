"""torch.compile, export, tracing and scripting of enabled models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import model_of_few_blocks
from torch import Tensor, nn

import mnv4_ops
from mnv4_ops import _native, patch

pytest.importorskip("timm")
pytestmark = [
    pytest.mark.skipif(_native.core is None, reason="no native library"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:Warning"),
]
X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _off() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    patch.disable()


class Graphs:
    """A compiler backend that runs the graphs as they are and keeps their ops."""

    def __init__(self) -> None:
        self.ops: list[list[str]] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.ops.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    def fused(self) -> int:
        return sum("mnv4" in op for op in self.ops[-1])


def model(name: str = "mobilenetv4_conv_small_050") -> Any:
    return model_of_few_blocks(name, num_classes=6)


def test_fullgraph_holds_one_op_per_model_or_block() -> None:
    m, graphs = model(), Graphs()
    blocks = sum(len(stage) for stage in m.blocks)
    with torch.no_grad():
        want = m(X)
        mnv4_ops.enable()
        # code that reads a parameter: the graph holds ops that take them
        own = m.classifier.bias
        compiled = torch.compile(lambda x: m(x) + 0.0 * own.sum(), backend=graphs, fullgraph=True)
        torch.testing.assert_close(compiled(X), want, rtol=1e-4, atol=1e-4)
        assert graphs.fused() == 1
        m.blocks[2][1].pw_exp.conv.weight.mul_(2)
        torch.testing.assert_close(compiled(X), m(X), rtol=1e-4, atol=1e-4)
        m.blocks[2][1].pw_exp.bn.train()
        compiled(X)
        # all blocks but one, and the head
        assert graphs.fused() == blocks


def test_grad_mode_compiles_the_original() -> None:
    m, graphs = model(), Graphs()
    mnv4_ops.enable()
    compiled = torch.compile(m, backend=graphs, fullgraph=True)
    compiled(X).sum().backward()
    assert graphs.fused() == 0
    assert m.conv_stem.weight.grad is not None


def test_hybrid_and_enable_model() -> None:
    m, other, graphs = model("mobilenetv4_hybrid_medium_075"), model(), Graphs()
    with torch.no_grad():
        want = m(X)
        mnv4_ops.enable(m)
        torch.testing.assert_close(torch.compile(m, backend=graphs)(X), want, rtol=1e-4, atol=1e-4)
        assert graphs.fused() > 0
        torch.compile(other, backend=graphs)(X)
        assert graphs.fused() == 0


@pytest.mark.slow
def test_inductor_and_dynamic_batch() -> None:
    m = nn.Sequential(*model().blocks[2][1:], copy.deepcopy(model().blocks[2][1]))
    c = m[0].pw_exp.conv.in_channels
    with torch.no_grad():
        mnv4_ops.enable()
        compiled = torch.compile(m, dynamic=True)
        for n in (2, 3, 5):
            x = torch.randn(n, c, 6, 7)
            torch.testing.assert_close(compiled(x), m(x), rtol=1e-4, atol=1e-4)


def test_changing_the_switch_resets_compiled_code() -> None:
    m, graphs = model(), Graphs()
    compiled = torch.compile(m, backend=graphs)
    with torch.no_grad():
        want = compiled(X)
        with pytest.warns(RuntimeWarning, match=r"torch.compiler.reset\(\)"):
            mnv4_ops.enable()
        compiled(X)
        assert graphs.fused() > 0
        with pytest.warns(RuntimeWarning, match=r"torch.compiler.reset\(\)"):
            mnv4_ops.disable()
        assert torch.equal(compiled(X), want)
        assert graphs.fused() == 0


def test_tracing_scripting_and_export_see_the_original() -> None:
    m = model()
    with torch.no_grad():
        want = m(X)
        mnv4_ops.enable()
        results: dict[str, Tensor] = {
            "trace": torch.jit.trace(m, X)(X),
            "fx": torch.fx.symbolic_trace(m)(X),
            "export": torch.export.export(m, (X,)).module()(X),
            "script": torch.jit.script(m)(X),
        }
        exported = str(torch.export.export(m, (X,)).graph)
    assert "mnv4" not in exported
    mnv4_ops.disable()
    for name, got in results.items():
        assert torch.equal(got, want), name
