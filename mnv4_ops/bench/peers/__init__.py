"""What mnv4_ops is compared with. One file per peer; `ALL` is the order of the tables."""

from __future__ import annotations

from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.peers.base import Peer, Unsupported
from mnv4_ops.bench.peers.fused import Fused
from mnv4_ops.bench.peers.onnx_runtime import OnnxRuntime
from mnv4_ops.bench.peers.openvino import OpenVino
from mnv4_ops.bench.peers.torch_compile import Compile, CompileChannelsLast, FreezeChannelsLast
from mnv4_ops.bench.peers.torch_eager import Eager, EagerChannelsLast
from mnv4_ops.bench.peers.torch_jit import JitChannelsLast
from mnv4_ops.bench.peers.xnnpack import Xnnpack

__all__ = ["ALL", "OURS", "PEERS", "Peer", "Unsupported", "select"]

OURS = Fused()
PEERS: tuple[Peer, ...] = (
    Eager(),
    EagerChannelsLast(),
    Compile(),
    CompileChannelsLast(),
    JitChannelsLast(),
    FreezeChannelsLast(),
    OnnxRuntime(),
    OpenVino(),
    Xnnpack(),
)
ALL: tuple[Peer, ...] = (*PEERS, OURS)


def select(text: str) -> list[Peer]:
    """Peers for `all`, `none`, or a comma-separated list of names (`torch` stands for all of torch's)."""
    if text == "none":
        return []
    if text == "all":
        return list(PEERS)
    chosen: list[Peer] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        found = [peer for peer in PEERS if peer.name == name or (name == "torch" and peer.name.startswith("torch_"))]
        if not found:
            raise BenchError(f"--peers: no peer {name!r}; known: all, none, torch, {', '.join(p.name for p in PEERS)}")
        chosen += [peer for peer in found if peer not in chosen]
    return chosen
