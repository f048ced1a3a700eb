"""The interface of a peer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

Run = Callable[[], Any]
CPU_DTYPES = ("float32", "bfloat16", "float16")
GPU_DTYPES = ("float16", "bfloat16", "float32")


def arguments_of(example: Any) -> tuple[torch.Tensor, ...]:
    """The inputs of a module whose example is one tensor or several."""
    return example if isinstance(example, tuple) else (example,)


class Unsupported(Exception):
    """This peer cannot run this model; the message says why."""


class Peer:
    """Something that runs a PyTorch module. A new one is a new file in this folder with a subclass that has a `name`.

    `device`: cpu or cuda. `dtypes`: what it computes in. `order`: place in the tables. `captured` (GPU): the call is
    captured into a CUDA graph, whose replays are timed by the device; otherwise calls are, by the clock of the host.
    `several_inputs`: it also takes a module of several tensors, `example` being a tuple then. `slow`: takes minutes to
    prepare a whole ledger (on a GPU: one model), so that `--ops` (on a GPU: `bench`) has it only where it is named.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    install: ClassVar[str] = ""
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    order: ClassVar[int] = 100
    captured: ClassVar[bool] = False
    several_inputs: ClassVar[bool] = False
    slow: ClassVar[bool] = False

    def available(self) -> str | None:
        """None if it can be used here, otherwise the reason why not."""
        missing = [module for module in self.requires if importlib.util.find_spec(module) is None]
        if not missing:
            return None
        return f"not installed: {', '.join(missing)} ({self.install or 'pip install ' + ' '.join(missing)})"

    def prepare(self, model: torch.nn.Module, example: Any, threads: int) -> Run:
        """A callable that runs `model` on `example` ([N, C, H, W], contiguous, on the peer's device, of the dtype to
        compute in) with `threads` threads.

        Conversion of weights, and of the input into the layout that the peer likes best, happens here and is not
        timed. The callable returns the output as a tensor or array shaped like the model's own. Raises Unsupported.
        """
        raise NotImplementedError

    def suits(self, model: torch.nn.Module) -> bool:
        """False for a variant that is nothing of its own for this model: then nobody misses it."""
        return True

    def refuses(self, dtype: str) -> str | None:
        """Why it cannot run in a dtype (`available` first), None if it can."""
        return None if dtype in self.dtypes else f"no {dtype}: computes in {', '.join(self.dtypes)}"


class CudaPeer(Peer):
    """A peer on an NVIDIA GPU that torch sees."""

    device = "cuda"
    dtypes: ClassVar[tuple[str, ...]] = GPU_DTYPES

    def available(self) -> str | None:
        import torch

        reason = super().available()
        return reason or (None if torch.cuda.is_available() else "torch sees no GPU")
