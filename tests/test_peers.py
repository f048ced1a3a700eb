"""What mnv4_ops is compared with: found by its file, says why it cannot run, computes the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mnv4_ops import check
from mnv4_ops.bench import gate, gpu, peers
from mnv4_ops.bench.peers import ALL, GPU_PEERS, PEERS, Unsupported, by_name, select
from mnv4_ops.bench.peers.base import Peer
from mnv4_ops.spec import ConvSpec, HeadSpec, UIBSpec


def test_peers_are_chosen_by_name() -> None:
    assert select("none") == []
    assert select("all") == select("all, litert") == list(PEERS)
    assert {peer.name for peer in select("torch")} == {p.name for p in PEERS if p.name.startswith("torch_")}
    assert [peer.name for peer in select("xnnpack, openvino")] == ["xnnpack", "openvino"]
    assert len({peer.name for peer in ALL}) == len(ALL)


_PEER_SPECS = [
    ConvSpec(3, 8, 3, 2, "relu6"),
    UIBSpec(8, 24, 8, 5, 3, residual=True, layer_scale=True),
    UIBSpec(8, 24, 16, 0, 5, stride=2, act="gelu"),
    HeadSpec(16, 24, 32, 10),
]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "xnnpack", "torch_jit_cl", "ncnn", "litert"])
@pytest.mark.parametrize("spec", _PEER_SPECS, ids=lambda spec: spec.kind)
def test_a_peer_computes_the_same(name: str, spec: Any) -> None:
    (peer,) = select(name)
    if peer.available() is not None:
        pytest.skip(str(peer.available()))
    module = check.random_module(spec)
    x = torch.randn(2, spec.channels[0], 12, 10)
    with torch.inference_mode():
        reference = module(x)
        run = peer.prepare(module, x, 1)
        for _ in range(2):
            assert gate.compare(run(), reference).error < gate.TOLERANCE


def test_xnnpack_refuses_what_it_cannot_lower() -> None:
    (peer,) = select("xnnpack")
    if peer.available() is not None:
        pytest.skip(str(peer.available()))
    with pytest.raises(Unsupported, match="Softplus"):
        peer.prepare(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Softplus()), torch.randn(1, 3, 4, 4), 1)


def test_every_file_is_a_peer_or_a_helper() -> None:
    files = {file.stem for file in Path(peers.__file__).parent.glob("*.py")}
    helpers = {name for name in files if name.startswith("_")} | {"base"}
    assert {type(peer).__module__.rsplit(".", 1)[1] for peer in (*ALL, *GPU_PEERS)} == files - helpers


def test_a_new_file_is_a_new_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sundial.py").write_text(
        "from mnv4_ops.bench.peers.base import Peer\n"
        "class Sundial(Peer):\n    name = label = 'sundial'\n    requires = ('daylight',)\n    install = 'a garden'\n"
    )
    monkeypatch.setattr(peers, "__path__", [*peers.__path__, str(tmp_path)])
    try:
        (found,) = (peer for peer in peers._found() if peer.name == "sundial")
    finally:
        sys.modules.pop("mnv4_ops.bench.peers.sundial", None)
    assert found.available() == "not installed: daylight (a garden)"
    assert found.refuses("float32") is None
    assert found.refuses("float16") == "no float16: computes in float32"


def test_peers_say_what_they_are() -> None:
    names = [peer.name for peer in (*ALL, *GPU_PEERS)]
    assert len(set(names)) == len(names)
    assert {"torch_eager", "torch_eager_cl", "torch_compile", "torch_freeze_cl"} <= set(names)
    assert {"onnxruntime", "openvino", "xnnpack", "litert", "ncnn", "tensorrt_graph"} <= set(names)
    for peer in (*ALL, *GPU_PEERS):
        assert by_name(peer.name) is peer
        assert peer.label
        assert peer.dtypes
        reason = peer.available()
        assert reason is None or reason.strip()
    assert PEERS[0].name == "torch_eager"
    assert set(gpu.GRAPHS) | set(gpu.CALLS) == {p.name for p in GPU_PEERS} | {gpu.OURS, gpu.OURS_GRAPHS}


@pytest.mark.parametrize("name", ["torch_eager_cl", "torch_jit_cl", "openvino"])
def test_a_peer_in_bfloat16(name: str) -> None:
    peer = by_name(name)
    if peer.available() is not None:
        pytest.skip(str(peer.available()))
    module = check.random_module(UIBSpec(16, 32, 16, 3, 5, residual=True))
    x = torch.randn(1, 16, 9, 7)
    with torch.inference_mode():
        reference = module(x)
        run = peer.prepare(module.bfloat16(), x.bfloat16(), 1)
        assert gate.compare(run(), reference).error < 0.05
    assert by_name("xnnpack").refuses("bfloat16")


def test_gpu_peers_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that they do but for the device."""
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    module = check.random_module(UIBSpec(8, 16, 8, 3, 0, residual=True))
    x = torch.randn(2, 8, 5, 6)
    with torch.inference_mode():
        reference = module(x)
        for peer in GPU_PEERS:
            if peer.name == "tensorrt_graph":
                continue
            if peer.name == "compile_expanded_graph":
                with pytest.raises(Unsupported, match="no multi-query attention"):
                    peer.prepare(module, x, 1)
                continue
            assert gate.compare(peer.prepare(module, x, 1)(), reference).error < 1e-6
    graph, call = by_name("compile_graph"), by_name("compile")
    assert graph.prepare(module, x, 1) is call.prepare(module, x, 1)
    assert by_name("reduce_overhead").prepare(module, x, 1) is not call.prepare(module, x, 1)


def test_expanded_keys_and_values_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    model = pytest.importorskip("timm").create_model("mobilenetv4_hybrid_medium").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        run = by_name("compile_expanded_graph").prepare(model, x, 1)
        assert gate.compare(run(), model(x)).error < 1e-6


def test_native_depthwise_is_asked_for_during_the_call_alone() -> None:
    settings: Any = torch.backends.cudnn
    if not hasattr(settings, "depthwise_kernel"):
        pytest.skip("this torch does not let one choose the depthwise kernel")
    before, seen = settings.depthwise_kernel, []

    class Spy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(settings.depthwise_kernel)
            return x

    by_name("native_dw_graph").prepare(Spy(), torch.randn(1, 2, 3, 4), 1)()
    assert seen == ["native"]
    assert settings.depthwise_kernel == before


def test_tensorrt_without_it_names_it() -> None:
    peer: Peer = by_name("tensorrt_graph")
    reason = peer.available()
    assert reason is None or "tensorrt" in reason or "onnx" in reason or "GPU" in reason
