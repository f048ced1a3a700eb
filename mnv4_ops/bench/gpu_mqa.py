"""Mobile MQA blocks on a GPU: one block, CUDA graph against CUDA graph, all variants in one process.

timm gives one key and one value head to `scaled_dot_product_attention`; torch versions that know no such case take the
unfused math backend for it. With keys and values expanded by a stride of zero its fused kernels serve; both forms, as
they are and compiled, are peers, and the best of them counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from mnv4_ops.bench import gpu_clock
from mnv4_ops.bench.gpu import PEER_SLACK, judge
from mnv4_ops.spec import MQASpec, ledger

PEERS = {
    "timm": "timm",
    "expanded": "timm, K/V expanded",
    "compile": "torch.compile",
    "compile_expanded": "torch.compile, K/V expanded",
}
OURS = "mnv4_ops"


def blocks(models: tuple[str, ...] = ("hybrid_medium", "hybrid_large")) -> dict[str, tuple[MQASpec, int, int]]:
    """Every distinct attention block of the hybrids at their own resolution: name -> (spec, rows, columns)."""
    found = {}
    for model in models:
        for entry in ledger(model):
            s = entry.spec
            if isinstance(s, MQASpec):
                name = f"{model} {entry.height}x{entry.width}x{s.c} kv{s.kv_stride} h{s.heads} d{s.key_dim}"
                found[name] = (s, entry.height, entry.width)
    return found


def timm_block(spec: MQASpec) -> Any:
    """timm's `MobileAttention` of a spec with random parameters, float32 on the CPU, eval mode."""
    from timm.models._efficientnet_blocks import MobileAttention

    from mnv4_ops.reference import randomize_

    block = MobileAttention(
        spec.c, spec.c, num_heads=spec.heads, key_dim=spec.key_dim, value_dim=spec.value_dim, use_multi_query=True,
        kv_stride=spec.kv_stride, dw_kernel_size=spec.kv_kernel, query_strides=spec.query_stride,
        noskip=not spec.residual, layer_scale_init_value=1e-5 if spec.layer_scale else None,
    )  # fmt: skip
    return randomize_(block).eval()


def has_attention(model: Any) -> bool:
    """Whether a timm model or block has multi-query attention."""
    from timm.layers.attention2d import MultiQueryAttention2d

    return any(type(module) is MultiQueryAttention2d for module in model.modules())


def expanded(model: Any) -> Any:
    """A copy of a timm model or block that gives keys and values to SDPA once per head, by a stride of zero."""
    import torch.nn.functional as F
    from timm.layers.attention2d import MultiQueryAttention2d

    class Expanded(MultiQueryAttention2d):
        def forward(self, x: Any, attn_mask: Any = None) -> Any:
            heads, (rows, columns) = self.num_heads, x.shape[2:]
            q = self._reshape_projected_query(self.query(x), heads, self.key_dim)
            k, v = self._reshape_input(self.key(x)), self._reshape_input(self.value(x))
            o = F.scaled_dot_product_attention(q, k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1))
            o = self._reshape_output(o, heads, rows // self.query_strides[0], columns // self.query_strides[1])
            return self.output(o)

    out = copy.deepcopy(model)
    for module in out.modules():
        if type(module) is MultiQueryAttention2d:
            module.__class__ = Expanded
    return out


def sdpa_backend(run: Callable[[], Any]) -> str:
    """Which implementation of SDPA a call takes, by the names that the profiler sees."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
        torch.cuda.synchronize()
    names = {event.key for event in seen.key_averages()}
    found = sorted(name.split("_scaled_dot_product_")[1] for name in names if "_scaled_dot_product_" in name)
    return ", ".join(found) or "none"


class Cell:
    """One block at one batch size: peers first, ours last; `timed` interleaves their graphs."""

    def __init__(self, block: Any, spec: MQASpec, batch: int, h: int, w: int, dtype: Any, device: Any) -> None:
        import torch

        # the convolutions of a channels_last block take no copies of their inputs
        self.block = copy.deepcopy(block).to(device, dtype).to(memory_format=torch.channels_last)
        self.x = torch.randn(batch, spec.c, h, w, device=device).to(dtype).to(memory_format=torch.channels_last)
        self.runs: dict[str, Callable[[], Any]] = {}
        self.facts: dict[str, Any] = {"batch": batch, "rows": h, "columns": w, "failed": {}, "sdpa": {}}
        sample = self.x[:8]
        self.truth = copy.deepcopy(self.block).double()(sample.double())
        self.plain = self.block(sample)

    def peers(self, names: tuple[str, ...] = tuple(PEERS)) -> None:
        import torch

        for name in names:
            model = expanded(self.block) if "expanded" in name else copy.deepcopy(self.block)
            if name.startswith("compile"):
                model = torch.compile(model, fullgraph=True, dynamic=False)
            else:
                self.facts["sdpa"][name] = sdpa_backend(lambda model=model: model(self.x))  # type: ignore[misc]
            self.add(name, lambda model=model: model(self.x), PEER_SLACK)  # type: ignore[misc]

    def add(self, name: str, run: Callable[[], Any], slack: float = 1.0) -> None:
        """Captures a variant; one that fails or is wrong is left out with the reason."""
        try:
            replay = gpu_clock.captured(run)
            facts = judge(replay()[:8].flatten(1), self.plain.flatten(1), self.truth.flatten(1), slack)
        except Exception as error:
            self.facts["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return
        if facts["ok"]:
            self.runs[name] = replay
        else:
            self.facts["failed"][name] = f"wrong: {facts['of_allowed']:.2f} of the allowed error"

    def timed(self, rounds: int = 10, seconds: float = 3.0) -> dict[str, Any]:
        """Microseconds (median) by name, and how often the best peer's time is ours."""
        stats = gpu_clock.interleave(self.runs, rounds=rounds, seconds=seconds)
        micros = {name: value.median_ms * 1e3 for name, value in stats.items()}
        others = {name: value for name, value in micros.items() if name != OURS}
        self.facts["us"] = micros
        if others and OURS in micros:
            best = min(others, key=others.__getitem__)
            self.facts |= {"best_peer": best, "speedup": others[best] / micros[OURS]}
        return self.facts
