"""What mnv4_ops is compared with, one file per peer: every `Peer` with a name in this folder is found by itself.

`PEERS` are those of the CPU in the order of the tables, `GPU_PEERS` those of an NVIDIA GPU, `OURS` is mnv4_ops on the
CPU.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence

from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.peers.base import Peer, Unsupported
from mnv4_ops.bench.peers.fused import Fused

__all__ = ["ALL", "GPU_PEERS", "OURS", "PEERS", "Peer", "Unsupported", "by_name", "named", "of_torch", "select"]


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


def named(text: str, known: Sequence[str], groups: Mapping[str, Sequence[str]], where: str = "") -> tuple[str, ...]:
    """The names in `--peers TEXT`: `none`, or some of `known` separated by commas, among them names of `groups`."""
    if text == "none":
        return ()
    names: list[str] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        names += groups.get(name, [name])
    for name in names:
        if name not in known:
            first, *others = groups
            have = ", ".join((first, "none", *others, *known))
            raise BenchError(f"--peers: no peer {name!r}{where}; known: {have}")
    return tuple(dict.fromkeys(names))


def of_torch(names: Iterable[str]) -> list[str]:
    """Those that `torch` stands for."""
    return [name for name in names if name.startswith("torch_")]


def select(text: str) -> list[Peer]:
    """Peers of the CPU, see `named`; `all` and `torch` stand for several."""
    known = [peer.name for peer in PEERS]
    return [by_name(name) for name in named(text, known, {"all": known, "torch": of_torch(known)})]
