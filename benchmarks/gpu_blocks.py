"""GPU blocks: correctness of every kernel first, then measured tiles and the time of each block of the ledger.

python benchmarks/gpu_blocks.py [--check] [--tune [--near]] [--models conv_small,...]
    [--dtypes float16,bfloat16,float32,float32_tf32] [--batches 1,8,64,256] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from triton_cases import Case, run_case, small_cases, special_values

from mnv4_ops.spec import MODELS, ConvSpec, FusedIBSpec, HeadSpec, UIBSpec, head_spec, ledger


def describe(spec: Any) -> dict[str, Any] | None:
    """Keywords of `Block` or `Head`; None for what is no convolution block."""
    if isinstance(spec, UIBSpec):
        return {
            "c_in": spec.c_in, "c_mid": spec.c_mid, "c_out": spec.c_out, "padding": spec.padding,
            "residual": spec.residual, "start_kernel": spec.start_kernel, "start_stride": spec.start_stride,
            "expand": True, "expand_act": spec.act, "mid_kernel": spec.mid_kernel, "mid_stride": spec.mid_stride,
            "mid_act": spec.act if spec.mid_kernel else "none", "project": True,
        }  # fmt: skip
    if isinstance(spec, FusedIBSpec):
        return {
            "c_in": spec.c_in, "c_mid": spec.c_mid, "c_out": spec.c_out, "padding": spec.padding,
            "residual": spec.residual, "expand": True, "expand_kernel": spec.kernel, "expand_stride": spec.stride,
            "expand_act": spec.act, "project": True,
        }  # fmt: skip
    if isinstance(spec, ConvSpec) and not spec.depthwise:
        return {
            "c_in": spec.c_in, "c_mid": spec.c_out, "c_out": spec.c_out, "padding": spec.padding, "expand": True,
            "expand_kernel": spec.kernel, "expand_stride": spec.stride, "expand_act": spec.act,
        }  # fmt: skip
    if isinstance(spec, HeadSpec):
        return {
            "c_in": spec.c_in, "c_feat": spec.c_feat, "feat_act": spec.act if spec.c_feat else "none",
            "c_hidden": spec.c_hidden, "hidden_act": spec.act if spec.c_hidden else "none", "classes": spec.classes,
        }  # fmt: skip
    return None


def blocks(models: list[str]) -> dict[str, tuple[dict[str, Any], int, int, dict[str, int]]]:
    """{repr: (keywords, height, width, {model: how often})} for every distinct block; heads as one unit."""
    found: dict[str, tuple[dict[str, Any], int, int, dict[str, int]]] = {}

    def add(model: str, spec: Any, h: int, w: int) -> None:
        desc = describe(spec)
        if desc is not None:
            key = repr((desc, h, w))
            _, _, _, count = found.setdefault(key, (desc, h, w, {}))
            count[model] = count.get(model, 0) + 1

    for model in models:
        for entry in ledger(model):
            if entry.name == "4.0":
                add(model, head_spec(model), entry.height, entry.width)
            elif entry.name not in ("pool", "conv_head", "classifier"):
                add(model, entry.spec, entry.height, entry.width)
    return found


def check(models: list[str], dtypes: list[torch.dtype], batch: int = 2) -> int:
    """Small structures and every block of the ledger by the 2x rule; the number of failures."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    failed = 0
    worst = {}

    def report(name: str, dtype: torch.dtype, run: Any) -> None:
        nonlocal failed
        try:
            a, b = run()
            ok = a <= 1 and b <= 1
            text = f"max {a:.3f} rms {b:.3f}"
            worst[dtype] = max(worst.get(dtype, 0), a, b)
        except Exception as error:
            ok, text = False, f"{type(error).__name__}: {str(error)[:300]}"
        if not ok:
            failed += 1
            print(f"FAILED {name} {dtype}: {text}", flush=True)

    from mnv4_ops.triton_kernels.tuner import make, precompile

    ledger_sizes = [
        (desc, dtype, size)
        for desc, h, w, _ in blocks(models).values()
        for dtype in dtypes
        for size in (((batch, h, w), (3, 13, 11)) if dtype == torch.float16 else ((3, 13, 11),))
    ]
    small = [(d, *case) for case in small_cases() for d in {case[1], torch.bfloat16}]
    tasks = []
    for desc, dtype, size in ledger_sizes + [(desc, d, size) for d, _, _, desc, size, _, choice in small]:
        desc = {k: v for k, v in desc.items() if k not in ("gamma", "bn", "bias")}
        choice = make(desc, dtype, "cpu").choose(*size)
        tasks += [(desc, dtype, *size, choice, i, False) for i in range(len(choice["ops"]))]
    t0 = time.time()
    for message in precompile(tasks):
        print("compile:", message)
    print(f"{len(tasks)} kernels compiled in {time.time() - t0:.0f} s", flush=True)
    n = 0
    for d, name, _dtype, desc, size, layout, choice in small:
        case = Case(d, "cuda", **desc)
        block = case.build()
        block.choice = choice
        report(name, d, partial(run_case, case, *size, layout, block))
        n += 1
    special_values("cuda")
    for desc, dtype, size in ledger_sizes:
        case = Case(dtype, "cuda", **desc)
        report(f"{desc} {size}", dtype, partial(run_case, case, *size))
        n += 1
    print(f"checked {n} cases, {failed} failed, worst fractions { {str(k): round(v, 3) for k, v in worst.items()} }")
    host_time()
    return failed


def host_time() -> None:
    """Host microseconds of one eager call of a block of two kernels."""
    desc = next(d for d, h, _, _ in blocks(["conv_small"]).values() if d.get("mid_kernel"))
    case = Case(torch.float16, "cuda", **desc)
    block = case.build()
    x = torch.randn(1, desc["c_in"], 14, 14, device="cuda").half().to(memory_format=torch.channels_last)
    from triton_cases import output

    out = output(block, 1, 14, 14, torch.float16, "cuda")
    for _ in range(3):
        torch.cuda.synchronize()
        t0 = time.perf_counter()
        for _ in range(300):
            block.run(x, out)
        micros = (time.perf_counter() - t0) / 300 * 1e6
    print(f"host time of a call with {len(block.ops)} kernels: {micros:.1f} us", flush=True)


def totals(models: list[str], times: dict[str, dict[int, float]]) -> None:
    """Sums of block times per model."""
    for model in models:
        sums: dict[int, float] = {}
        for key, (_, _, _, count) in blocks(models).items():
            for batch, us in times.get(key, {}).items():
                sums[batch] = sums.get(batch, 0) + us * count.get(model, 0)
        print(model, {b: f"{us / 1000:.4f} ms" for b, us in sums.items()})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--near", action="store_true", help="with --tune: only what the tables hold for alike blocks")
    parser.add_argument("--models", default="conv_small,conv_medium,conv_large")
    parser.add_argument("--dtypes", default="float16")
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--out", default=".")
    args = parser.parse_args()
    models = list(MODELS) if args.models == "all" else args.models.split(",")
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    out = Path(args.out)
    t0 = time.time()
    if args.check:
        check(models, [torch.float16, torch.bfloat16, torch.float32])
        print(f"check took {time.time() - t0:.0f} s", flush=True)
    if args.tune:
        tune_models(models, args.dtypes.split(","), [int(b) for b in args.batches.split(",")], out, args.near)


def tune_models(models: list[str], dtypes: list[str], batches: list[int], out: Path, near: bool = False) -> None:
    """Tables written after each model, so that a cut-off run leaves what it has."""
    from mnv4_ops.triton_kernels import config, tune
    from mnv4_ops.triton_kernels.tuner import make

    from mnv4_ops import tuning

    name = torch.cuda.get_device_name()
    entries: dict[str, Any] = {}
    done: set[str] = set()
    t0 = time.time()
    with open(out / "tune.log", "w") as log:
        for label in dtypes:
            tf32 = label.endswith("_tf32")
            dtype = getattr(torch, label.removesuffix("_tf32"))
            for model in models:
                found = blocks([model])
                jobs = [(d, h, w) for key, (d, h, w, _) in found.items() if key + label not in done]
                done |= {key + label for key in found}
                part = tune(
                    jobs, dtype, batches, tf32=tf32, near=tuning.table(name) if near else None,
                    verbose=lambda s: print(s, file=log, flush=True), log=lambda s: print(s, flush=True),
                )  # fmt: skip
                for key, value in part.items():
                    entries.setdefault(key, {}).update(value)
                times = {}
                for key, (desc, h, w, _) in found.items():
                    row = entries[f"{label} {make(desc, dtype, 'cpu').key}"]
                    times[key] = {b: row[f"{b}x{h}x{w}"]["us"] for b in batches}
                print(f"{label} {time.time() - t0:.0f} s", end=" ")
                totals([model], times)
                meta = {"device": name, "torch": torch.__version__}
                table = {"format": 1, **meta, "entries": entries}
                (out / f"{config.table_name(name)}.json").write_text(json.dumps(table))


if __name__ == "__main__":
    main()
