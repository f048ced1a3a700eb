"""The interface of a peer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch


class Unsupported(Exception):
    """This peer cannot run this model; the message says why."""


class Peer:
    """Something that runs a PyTorch module. A new one: a file in this folder with a subclass, and a line in
    `peers.ALL`.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()

    def available(self) -> str | None:
        """None if it can be used here, otherwise the reason why not."""
        missing = [module for module in self.requires if importlib.util.find_spec(module) is None]
        return f"not installed: {', '.join(missing)} (pip install {' '.join(missing)})" if missing else None

    def prepare(self, model: torch.nn.Module, example: torch.Tensor, threads: int) -> Callable[[], Any]:
        """A callable that runs `model` on `example` (float32 [N, C, H, W], contiguous) with `threads` threads.

        Conversion of weights, and of the input into the layout that the peer likes best, happens here and is not
        timed. The callable returns the output as a tensor or array shaped like the model's own. Raises Unsupported.
        """
        raise NotImplementedError
