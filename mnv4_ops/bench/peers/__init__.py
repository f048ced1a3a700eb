"""What mnv4_ops is compared with, one file per peer: every `Peer` with a name in this folder is found by itself.

`PEERS` are those of the CPU in the order of the tables, `GPU_PEERS` those of an NVIDIA GPU, `OURS` is mnv4_ops on the
CPU.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.peers.base import Peer, Unsupported
from mnv4_ops.bench.peers.fused import Fused

__all__ = ["ALL", "GPU_PEERS", "OURS", "PEERS", "Peer", "Unsupported", "by_name", "select"]


def _found() -> Iterator[Peer]:
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_") or module.name == "base":
            continue
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            # a class is found where it is written, not where it is imported
            own = isinstance(value, type) and value.__module__ == f"{__name__}.{module.name}"
            if own and issubclass(value, Peer) and hasattr(value, "name"):
                yield value()


OURS = Fused()
_ALL = sorted(_found(), key=lambda peer: (peer.order, peer.name))
PEERS: tuple[Peer, ...] = tuple(peer for peer in _ALL if peer.device == "cpu" and peer.name != OURS.name)
GPU_PEERS: tuple[Peer, ...] = tuple(peer for peer in _ALL if peer.device == "cuda")
ALL: tuple[Peer, ...] = (*PEERS, OURS)


def by_name(name: str) -> Peer:
    """The peer of the CPU or of a GPU with that name."""
    return next(peer for peer in (*ALL, *GPU_PEERS) if peer.name == name)


def select(text: str) -> list[Peer]:
    """Peers of the CPU for `none`, or names separated by commas, of which `all` and `torch` stand for several."""
    if text == "none":
        return []
    chosen: list[Peer] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        start = {"all": "", "torch": "torch_"}.get(name)
        found = [p for p in PEERS if (p.name == name if start is None else p.name.startswith(start))]
        if not found:
            raise BenchError(f"--peers: no peer {name!r}; known: all, none, torch, {', '.join(p.name for p in PEERS)}")
        chosen += [peer for peer in found if peer not in chosen]
    return chosen
