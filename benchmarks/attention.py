"""The paper's comparison of attention blocks (tables 2 and 3): what three of them add to the same base.

python benchmarks/attention.py [--device cpu] [--threads 1] [--batch 1] [--dtype float32] [--resolution 384]

The base is Conv-L; the three blocks come at the end of its last stage of blocks: multi-head attention (as many key and
value heads as query heads), multi-query attention, and multi-query attention with keys and values down-sampled by 2.
All variants are timed interleaved in one process, once as torch runs them (channels_last) and once with mnv4_ops, which
has no kernel for multi-head attention: that one runs its original forward between fused blocks. Random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import mnv4_ops
from mnv4_ops.bench import timing
from mnv4_ops.reference import randomize_
from mnv4_ops.spec import MQASpec, ledger

BLOCKS, HEADS, DIM = 3, 8, 64
# top-1, GMAC, M parameters, ms on the EdgeTPU of a Pixel 7, of a Pixel 8, on the GPU of a Galaxy S23 (table 2)
PAPER = {
    "base": (84.88, 6.0, 30.9, 4.31, 2.35, 13.15),
    "+3 MHSA": (85.27, 6.7, 36.0, 9.69, 2.76, 16.46),
    "+3 MQA": (85.24, 6.5, 34.7, 5.16, 2.60, 15.10),
}
# Hybrid-M with and without the down-sampling, ms on the CPU and on the GPU of a Galaxy S23 (table 3)
PAPER_DOWN_SAMPLING = ((15.8, 7.4), (12.8, 5.9))


def build(kind: str, seed: int = 0) -> Any:
    """Conv-L with three blocks of a kind after the last block of its last stage."""
    import timm
    from timm.models._efficientnet_blocks import MobileAttention

    torch.manual_seed(seed)
    model = timm.create_model("mobilenetv4_conv_large")
    stage = model.blocks[3]
    channels = stage[-1].pw_proj.conv.out_channels
    options: dict[str, Any] = {"num_heads": HEADS, "key_dim": DIM, "value_dim": DIM}
    for _ in range(0 if kind == "base" else BLOCKS):
        options["use_multi_query"] = kind != "+3 MHSA"
        options["kv_stride"] = 2 if kind.endswith("/2") else 1
        stage.append(MobileAttention(channels, channels, **options))
    return randomize_(model.eval(), seed)


def macs(kind: str, side: int) -> int:
    """Multiply-accumulates of one image."""
    total = sum(entry.macs for entry in ledger("conv_large", side))
    last = ledger("conv_large", side)[-4]
    h, w, c = last.height, last.width, HEADS * DIM
    if kind == "+3 MHSA":
        total += BLOCKS * (4 * h * w * c * c + 2 * (h * w) ** 2 * c)
    elif kind != "base":
        total += BLOCKS * MQASpec(c, HEADS, DIM, DIM, 2 if kind.endswith("/2") else 1, layer_scale=True).macs(h, w)
    return total


def variants(arguments: argparse.Namespace) -> tuple[dict[str, Callable[[], Any]], dict[str, int], Any]:
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    side = arguments.resolution
    x = torch.randn(arguments.batch, 3, side, side).to(device, dtype).to(memory_format=torch.channels_last)
    runs: dict[str, Callable[[], Any]] = {}
    params: dict[str, int] = {}
    enabled: list[nn.Module] = []

    def timed(model: Any) -> Callable[[], Any]:
        def run() -> Any:
            out = model(x)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return out

        return run

    for kind in (*PAPER, "+3 MQA, K/V /2"):
        plain = build(kind).to(device, dtype).to(memory_format=torch.channels_last)
        fused = build(kind).to(device, dtype)
        enabled.append(fused)
        params[kind] = sum(p.numel() for p in plain.parameters())
        runs[f"torch {kind}"], runs[f"mnv4_ops {kind}"] = timed(plain), timed(fused)
    for model in enabled:
        mnv4_ops.enable(model)
    for kind in params:
        want, got = runs[f"torch {kind}"]().float(), runs[f"mnv4_ops {kind}"]().float()
        error = float((want - got).abs().max() / want.abs().max())
        if not error < (1e-4 if dtype is torch.float32 else 3e-2):
            raise SystemExit(f"{kind}: the outputs differ, max|d|/max|ref| = {error:.1e}: no times")
    return runs, params, x


def saved(add: float, reference: float) -> str:
    return f"{100 * (add / reference - 1):+.1f} %"


def show(arguments: argparse.Namespace, ms: dict[str, float], params: dict[str, int]) -> None:
    where = f"{arguments.threads} threads" if arguments.device == "cpu" else torch.cuda.get_device_name()
    title = (
        f"Conv-L {arguments.resolution}, batch {arguments.batch}, {arguments.dtype}, {arguments.device} ({where}), "
        f"torch {torch.__version__}; added: against the base; last lines: change of what is added"
    )
    table = Table(title=title, title_justify="left")
    columns = ("variant", "GMAC", "M params", "torch ms", "added", "mnv4_ops ms", "added", "paper: top-1", "GMAC",
               "M params", "Pixel 7 TPU ms", "Pixel 8 TPU ms", "S23 GPU ms")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right")
    mine: dict[str, tuple[float, ...]] = {}
    for kind, count in params.items():
        torch_ms, our_ms = ms[f"torch {kind}"], ms[f"mnv4_ops {kind}"]
        mine[kind] = (macs(kind, arguments.resolution) / 1e9, count / 1e6, torch_ms, our_ms)
        gmac, million = mine[kind][:2]
        added = ["" if kind == "base" else f"{mine[kind][i] - mine['base'][i]:.3f}" for i in (2, 3)]
        paper = [f"{value:g}" for value in PAPER.get(kind, ())] or [""] * 6
        table.add_row(
            kind, f"{gmac:.2f}", f"{million:.1f}", f"{torch_ms:.3f}", added[0], f"{our_ms:.3f}", added[1], *paper
        )
    table.add_section()

    def change(kind: str, reference: str, paper: list[str]) -> None:
        cells = [
            saved(mine[kind][i] - mine["base"][i], mine[reference][i] - mine["base"][i]) for i in range(len(mine[kind]))
        ]
        table.add_row(f"{kind} for {reference[3:]}", *cells[:2], "", cells[2], "", cells[3], *paper)

    base, mhsa, mqa = (PAPER[kind] for kind in ("base", "+3 MHSA", "+3 MQA"))
    paper = [saved(mqa[i] - base[i], mhsa[i] - base[i]) for i in range(1, 6)]
    change("+3 MQA", "+3 MHSA", [f"{mqa[0] - mhsa[0]:+.2f} pt", *paper])
    change("+3 MQA, K/V /2", "+3 MQA", [""] * 6)
    Console(width=190).print(table)
    (cpu, gpu), (cpu_down, gpu_down) = PAPER_DOWN_SAMPLING
    print(
        "Paper, table 3, keys and values of Hybrid-M down-sampled, whole model on a Galaxy S23: "
        f"CPU {cpu} -> {cpu_down} ms ({saved(cpu_down, cpu)}), GPU {gpu} -> {gpu_down} ms ({saved(gpu_down, gpu)})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=384)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        runs, params, _ = variants(arguments)
        stats = timing.interleave(runs, repeats=arguments.repeats, seconds=arguments.seconds)
    show(arguments, {name: values.as_dict()["median_ms"] for name, values in stats.items()}, params)


if __name__ == "__main__":
    main()
